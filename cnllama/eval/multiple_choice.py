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
from cnllama.eval.answers import Answer, LetterTokens, choose, generate, letter_tokens
from cnllama.eval.benchmarks import Benchmark
from cnllama.eval.models import EngineScorer
from cnllama.eval.prompts import Prompt, Prompter, choose_preset
from cnllama.eval.questions import read_subjects
from cnllama.eval.results import compare_choices, summarize
from cnllama.eval.text_scores import Bar, Opener, Reference, default_context, describe_model, progress_bar, tokenizer_of
from cnllama.plan import DEFAULT_CONTEXT
from cnllama.sampling import SamplingParams

if TYPE_CHECKING:
    from cnllama.format import CnlFile

# The sampling of the published scripts; their penalty looks back over the prompt too. They stop after 20 tokens also
# where the model is to think step by step, which leaves no room for a step.
SAMPLING = SamplingParams(temperature=0.2, top_k=40, top_p=0.9, repeat_penalty=1.1, repeat_last_n=-1, seed=1)
ANSWER_TOKENS, STEPS_TOKENS = 20, 512
_LANES = 4
_LISTED = 5


@dataclass(frozen=True)
class Settings:
    """What is asked and how. params: None to choose by the letters' logits, else to generate an answer with them.

    letters, penalty: see answers.letter_tokens and letter_logits. context: tokens that prompt and answer may take,
    None for the model's own length, at most 4096. sequences: answers that are generated at once.
    """

    split: str
    shots: int = 0
    cot: bool = False
    preset: str = "auto"
    letters: str = "both"
    penalty: float = 1.0
    params: SamplingParams | None = None
    context: int | None = None
    sequences: int = 1
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """answers: ours, in the order of the files."""

    result: dict[str, Any]
    answers: list[Answer]


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
    from cnllama.templates import get_template

    if settings.params is None and settings.cot:
        raise InputError("steps are to be written and no sampling is given: give Settings.params")
    if settings.params is not None and reference:
        raise InputError("a reference compares choices by logits: leave out Settings.params")
    tokenizer = tokenizer_of(file)
    letters = letter_tokens(tokenizer, settings.letters) if settings.params is None else None
    preset = choose_preset(settings.preset, file.template)
    subjects, absent = read_subjects(
        benchmark, data, settings.split, shots=settings.shots, cot=settings.cot, only=settings.only
    )
    prompter = Prompter(preset, benchmark, tokenizer, get_template(file.template), settings.cot)
    limit = default_context(file, settings.context) - _answer_room(settings)
    prompts = [prompter.prompt(subject, question, limit) for subject in subjects for question in subject.questions]
    for note in _notes(benchmark, settings, prompts, absent, letters.variant if letters else ""):
        say(note)

    started = time.monotonic()
    answers, described = _ask(file.path, benchmark.name, prompts, letters, settings, open_llm=open_llm, bar=bar)
    result = {
        "model": described,
        "benchmark": benchmark.name,
        "split": settings.split,
        "preset": preset,
        "shots": settings.shots,
        "cot": settings.cot,
        **_method(settings, letters.variant if letters else ""),
        "seconds": time.monotonic() - started,
        **summarize(benchmark, answers),
        "questions_with_fewer_shots": sum(prompt.shots < settings.shots for prompt in prompts),
        "missing_subjects": absent,
    }
    if reference and letters:
        scorer, facts = reference()
        facts.pop("tensors", None)
        with bar("reference", _size(prompts)) as progress:
            theirs = _in_order(choose(scorer, prompts, letters, penalty=settings.penalty, progress=progress), prompts)
        result["reference"] = facts | compare_choices(answers, theirs)
    return Run(result, answers)


def _ask(
    path: Path,
    name: str,
    prompts: Sequence[Prompt],
    letters: LetterTokens | None,
    settings: Settings,
    *,
    open_llm: Opener,
    bar: Bar,
) -> tuple[list[Answer], dict[str, Any]]:
    """Our answers in the order of the prompts, and what describes the model; name: of the bar."""
    needed = max(len(prompt.ids) for prompt in prompts) + _answer_room(settings)
    # Questions behind the same examples run one after the other; others together take the memory of one long one.
    lanes = 1 if settings.shots else max(1, min(_LANES, DEFAULT_CONTEXT // needed))
    lanes = settings.sequences if settings.params else lanes
    with open_llm(path, needed, lanes) as llm, bar(name, _size(prompts)) as progress:
        if letters is None:
            assert settings.params is not None
            answers = _in_order(generate(llm, prompts, settings.params, progress), prompts)
        else:
            with EngineScorer(llm, lanes) as model:
                found = choose(
                    model, prompts, letters, penalty=settings.penalty, tokenizer=llm.tokenizer, progress=progress
                )
                answers = _in_order(found, prompts)
        return answers, describe_model(llm)


def _answer_room(settings: Settings) -> int:
    return (settings.params.max_tokens or 1) - 1 if settings.params else 0


def _size(prompts: Sequence[Prompt]) -> int:
    return sum(len(prompt.ids) for prompt in prompts)


def _in_order(numbered: Iterator[tuple[int, Answer]], prompts: Sequence[Prompt]) -> list[Answer]:
    found = dict(numbered)
    return [found[i] for i in range(len(prompts))]


def _method(settings: Settings, variant: str) -> dict[str, Any]:
    if settings.params is None:
        return {"method": "logits", "letters": variant, "repeat_penalty": settings.penalty}
    names = ("temperature", "top_k", "top_p", "repeat_penalty", "repeat_last_n", "seed", "max_tokens")
    return {"method": "generate", "sampling": {name: getattr(settings.params, name) for name in names}}


def _notes(
    benchmark: Benchmark, settings: Settings, prompts: Sequence[Prompt], absent: Sequence[str], variant: str
) -> list[str]:
    notes = []
    if absent:
        names = ", ".join(absent[:_LISTED]) + (" ..." if len(absent) > _LISTED else "")
        notes.append(f"{len(absent)} of the {len(benchmark.subjects)} subjects have no file: {names}")
    if variant and variant != settings.letters:
        notes.append(f"the tokenizer tells the letters apart in one spelling only: choosing by '{variant}'")
    fewer = Counter(prompt.subject.key for prompt in prompts if prompt.shots < settings.shots)
    for key, number in fewer.items():
        least = min(prompt.shots for prompt in prompts if prompt.subject.key == key)
        notes.append(
            f"{key}: {number} prompts did not fit with {settings.shots} examples and have fewer, at least {least}"
        )
    return notes
