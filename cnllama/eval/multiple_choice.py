# SPDX-License-Identifier: Apache-2.0
"""C-Eval and CMMLU from the files to the counted result."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnllama.errors import InputError
from cnllama.eval.answers import Answer, LetterTokens, choose, drawn, generate, letter_tokens, seed_of
from cnllama.eval.benchmarks import Benchmark
from cnllama.eval.generation import write
from cnllama.eval.models import EngineScorer
from cnllama.eval.procedures import (
    ANSWER_TOKENS,
    SAMPLING,
    Choices,
    Procedure,
    choose_preset,
    differences,
    procedure_of,
)
from cnllama.eval.prompts import Prompt, Prompter
from cnllama.eval.questions import read_subjects
from cnllama.eval.results import compare_choices, summarize
from cnllama.eval.text_scores import Bar, Opener, Reference, default_context, describe_model, progress_bar, tokenizer_of
from cnllama.plan import DEFAULT_CONTEXT
from cnllama.sampling import SamplingParams

if TYPE_CHECKING:
    from cnllama.format import CnlFile

_LANES = 4
_LISTED = 5


@dataclass(frozen=True)
class Settings:
    """What is asked and how.

    letters, penalty: see answers.letter_tokens and letter_logits; None as the preset's procedure has them. generate:
    the letter is read out of an answer that is written with `temperature`, `seed` and `max_tokens`; cot: step by step,
    too. context: tokens that prompt and answer may take, None as the procedure has it. sequences: answers that are
    written at once. only: keys of subjects, all when empty.
    """

    split: str
    shots: int = 0
    cot: bool = False
    preset: str = "auto"
    letters: str | None = None
    penalty: float | None = None
    generate: bool = False
    temperature: float | None = None
    seed: int = 1
    max_tokens: int | None = None
    context: int | None = None
    sequences: int = 1
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """answers: ours, in the order of the files."""

    result: dict[str, Any]
    answers: list[Answer]


@dataclass(frozen=True)
class _Work:
    """What is asked of the model. letters: None where it writes, with `params`. absent: subjects without a file."""

    benchmark: Benchmark
    settings: Settings
    preset: str
    procedure: Procedure
    letters: LetterTokens | None
    penalty: float
    params: SamplingParams | None
    prompts: list[Prompt]
    absent: list[str]

    @property
    def fewer(self) -> list[Prompt]:
        """Prompts that lost examples."""
        return [prompt for prompt in self.prompts if prompt.shots < self.settings.shots]


def evaluate(
    benchmark: Benchmark,
    file: CnlFile,
    data: Path,
    settings: Settings,
    open_llm: Opener,
    *,
    reference: Reference | None = None,
    bar: Bar = progress_bar,
    say: Callable[[str], object] = lambda sentence: None,
) -> Run:
    """Asks every question. open_llm: (path, context, sequences) -> LLM. reference: opens a model to compare with and
    describes it. bar: (name, tokens) -> what counts them. say: gets sentences for the user. Raises InputError for wrong
    data and settings, and for a question that does not fit.
    """
    if (settings.generate or settings.cot) and reference:
        raise InputError("a reference compares choices by logits: leave out Settings.generate and cot")
    work = _prepare(benchmark, file, data, settings)
    for note in _notes(work):
        say(note)
    started = time.monotonic()
    answers, described = _ask(file.path, work, open_llm=open_llm, bar=bar)
    result = {
        "model": described,
        "benchmark": benchmark.name,
        "split": settings.split,
        "preset": work.preset,
        "procedure": _procedure(work, described),
        "shots": settings.shots,
        "cot": settings.cot,
        **_method(work),
        "seconds": time.monotonic() - started,
        **summarize(benchmark, answers, work.procedure.one_group),
        "questions_with_fewer_shots": len(work.fewer),
        "missing_subjects": work.absent,
    }
    if reference and work.letters:
        scorer, facts = reference()
        facts.pop("tensors", None)
        with bar("reference", _size(work.prompts)) as progress:
            found = choose(scorer, work.prompts, work.letters, penalty=work.penalty, progress=progress)
            theirs = _in_order(found, work.prompts)
        result["reference"] = facts | compare_choices(answers, theirs)
    return Run(result, answers)


def _prepare(benchmark: Benchmark, file: CnlFile, data: Path, settings: Settings) -> _Work:
    from cnllama.templates import get_template

    preset = choose_preset(settings.preset, file.template)
    procedure = procedure_of(preset, benchmark)
    params = _sampling(procedure, settings, preset)
    tokenizer = tokenizer_of(file)
    letters = letter_tokens(tokenizer, settings.letters or procedure.letters) if params is None else None
    subjects, absent = read_subjects(
        benchmark,
        data,
        settings.split,
        shots=settings.shots,
        cot=settings.cot,
        only=settings.only,
        as_pandas=procedure.as_pandas,
    )
    prompter = Prompter(preset, benchmark, tokenizer, get_template(file.template), settings.cot)
    limit = _limit(file, procedure, settings, params)
    prompts = [prompter.prompt(subject, question, limit) for subject in subjects for question in subject.questions]
    penalty = procedure.penalty if settings.penalty is None else settings.penalty
    return _Work(benchmark, settings, preset, procedure, letters, penalty, params, prompts, absent)


def _sampling(procedure: Procedure, settings: Settings, preset: str) -> SamplingParams | None:
    if not (settings.generate or settings.cot):
        return None
    if not procedure.generates:
        raise InputError(
            f"--preset {preset} reads the letters' logits, which is all that is published: leave out --generate and "
            "--cot, or take another preset"
        )
    tokens = settings.max_tokens
    if tokens is None:
        tokens = procedure.steps_tokens if settings.cot else ANSWER_TOKENS
    if tokens < 1:
        raise InputError(f"--max-tokens is {tokens}, expected 1 or more")
    params = SAMPLING.with_changes(seed=settings.seed, max_tokens=tokens)
    return params if settings.temperature is None else params.with_changes(temperature=settings.temperature)


def _limit(file: CnlFile, procedure: Procedure, settings: Settings, params: SamplingParams | None) -> int | None:
    """Tokens that a prompt may take, None for any number."""
    if settings.context is None and procedure.shortens == "never":
        return None
    if settings.context is None and procedure.context is not None:
        return procedure.context
    return default_context(file, settings.context) - _answer_room(params)


def _ask(path: Path, work: _Work, *, open_llm: Opener, bar: Bar) -> tuple[list[Answer], dict[str, Any]]:
    """Our answers in the order of the prompts, and what describes the model."""
    prompts, params = work.prompts, work.params
    needed = max(len(prompt.ids) for prompt in prompts) + _answer_room(params)
    # Questions behind the same examples run one after the other; others together take the memory of one long one.
    lanes = 1 if work.settings.shots else max(1, min(_LANES, DEFAULT_CONTEXT // needed))
    lanes = work.settings.sequences if params else lanes
    with open_llm(path, needed, lanes) as llm, bar(work.benchmark.name, _size(prompts)) as progress:
        if work.letters is not None:
            options: dict[str, Any] = {"penalty": work.penalty, "tokenizer": llm.tokenizer, "progress": progress}
            with EngineScorer(llm, lanes) as model:
                answers = _in_order(choose(model, prompts, work.letters, **options), prompts)
        else:
            assert params is not None
            answers = _written(llm, work, params, progress)
        return answers, describe_model(llm)


def _written(llm: Any, work: _Work, params: SamplingParams, progress: Any) -> list[Answer]:
    """The scripts' way, steps in transformers' order and a letter by chance where there is none, or our own."""
    if not work.procedure.draws:
        return _in_order(generate(llm, work.prompts, params, progress), work.prompts)
    answers = _in_order(write(llm, work.prompts, params, progress), work.prompts)
    return [drawn(answer, seed_of(params, number)) for number, answer in enumerate(answers)]


def _answer_room(params: SamplingParams | None) -> int:
    return (params.max_tokens or 1) - 1 if params else 0


def _size(prompts: Sequence[Prompt]) -> int:
    return sum(len(prompt.ids) for prompt in prompts)


def _in_order(numbered: Iterator[tuple[int, Answer]], prompts: Sequence[Prompt]) -> list[Answer]:
    found = dict(numbered)
    return [found[i] for i in range(len(prompts))]


def _method(work: _Work) -> dict[str, Any]:
    if work.letters is not None:
        return {"method": "logits", "letters": work.letters.variant, "repeat_penalty": work.penalty}
    names = ("temperature", "top_k", "top_p", "repeat_penalty", "repeat_last_n", "seed", "max_tokens")
    return {"method": "generate", "sampling": {name: getattr(work.params, name) for name in names}}


def _procedure(work: _Work, model: dict[str, Any]) -> dict[str, Any]:
    """What the figures may be compared with, and what is not as published."""
    procedure, asked = work.procedure, {prompt.subject.key for prompt in work.prompts}
    done = Choices(
        split=work.settings.split,
        letters=work.letters.variant if work.letters else "",
        penalty=work.penalty,
        params=work.params,
        cot=work.settings.cot,
        model=f"{model['scheme']} with 8-bit activations and an {model['kv_type']} cache",
        shortened=len(work.fewer),
        left_out=[key for key in work.benchmark.subjects if key not in asked],
    )
    return {
        "source": procedure.source or None,
        "subject_names": "file" if procedure.by_key else "Chinese",
        "mean_of": procedure.mean_of,
        "differences": differences(procedure, done),
    }


def _notes(work: _Work) -> list[str]:
    notes, absent, asked = [], work.absent, work.settings.letters or work.procedure.letters
    if absent:
        names = ", ".join(absent[:_LISTED]) + (" ..." if len(absent) > _LISTED else "")
        notes.append(f"{len(absent)} of the {len(work.benchmark.subjects)} subjects have no file: {names}")
    if work.letters and work.letters.variant != asked:
        variant = work.letters.variant
        notes.append(f"the tokenizer tells the letters apart in one spelling only: choosing by '{variant}'")
    for key, number in Counter(prompt.subject.key for prompt in work.fewer).items():
        least = min(prompt.shots for prompt in work.fewer if prompt.subject.key == key)
        notes.append(
            f"{key}: {number} prompts did not fit with {work.settings.shots} examples and have fewer, at least {least}"
        )
    return notes
