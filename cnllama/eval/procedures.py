# SPDX-License-Identifier: Apache-2.0
"""The published procedures: what each preset takes from which publication, and where a run differs from it.

base, alpaca, alpaca-2: the scripts of Chinese-LLaMA-Alpaca (scripts/ceval) and Chinese-LLaMA-Alpaca-2 (scripts/ceval,
scripts/cmmlu), without and with their prompt. official: the benchmark's own authors, C-Eval's README with its evaluator
of LLaMA, and src/mp_utils.py with src/hf_causal_model.py of CMMLU. template: nobody's but ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cnllama.errors import InputError
from cnllama.sampling import SamplingParams

if TYPE_CHECKING:
    from cnllama.eval.benchmarks import Benchmark
    from cnllama.eval.questions import Subject

PRESETS = ("auto", "base", "alpaca", "alpaca-2", "official", "template")
# The free generation of the scripts, whose penalty looks back over the prompt too.
SAMPLING = SamplingParams(temperature=0.2, top_k=40, top_p=0.9, repeat_penalty=1.1, repeat_last_n=-1, seed=1)
ANSWER_TOKENS, STEPS_TOKENS = 20, 512


@dataclass(frozen=True)
class Procedure:
    """How a preset asks, reads the answer and counts.

    source: the publication, "" for a way of our own. by_key: prompts name a subject by its file (accountant), not in
    Chinese. as_pandas: choices are printed as pandas reads them (columns.py). letters, penalty: of letter_tokens and
    letter_logits in answers.py. shortens: examples of a prompt that does not fit go "never" (the scripts run prompts of
    any length), from the "last" on, or the "longest" first. context: tokens of a prompt where the publication says so.
    steps_tokens: written with --cot. generates: whether free generation is part of it. draws: a letter that cannot be
    read is drawn at random. mean_of: what accuracy is averaged over, "questions" or "subjects". one_group: a subject
    counts for its first group only.
    """

    source: str
    by_key: bool
    as_pandas: bool = True
    letters: str = "both"
    penalty: float = 1.0
    shortens: str = "never"
    context: int | None = None
    steps_tokens: int = ANSWER_TOKENS
    generates: bool = True
    draws: bool = True
    mean_of: str = "questions"
    one_group: bool = True

    def subject_name(self, subject: Subject) -> str:
        """What the prompts call the subject."""
        return subject.key if self.by_key else subject.name


_FIRST, _SECOND = "Chinese-LLaMA-Alpaca", "Chinese-LLaMA-Alpaca-2"
_SCRIPTS = Procedure("", by_key=True, penalty=1.1)
_OFFICIAL = Procedure("", by_key=False, generates=False, mean_of="subjects", one_group=False)
_OWN = Procedure(
    "", by_key=False, as_pandas=False, shortens="last", steps_tokens=STEPS_TOKENS, draws=False, one_group=False
)
_PROCEDURES = {
    ("base", "ceval"): replace(_SCRIPTS, source=f"scripts/ceval of {_FIRST} and {_SECOND}, --with_prompt False"),
    ("base", "cmmlu"): replace(_SCRIPTS, source=f"scripts/cmmlu of {_SECOND}, --with_prompt False"),
    ("alpaca", "ceval"): replace(_SCRIPTS, source=f"scripts/ceval of {_FIRST}, --with_prompt True"),
    ("alpaca", "cmmlu"): _SCRIPTS,  # there is no such script: the prompts of the other benchmark's
    ("alpaca-2", "ceval"): replace(_SCRIPTS, source=f"scripts/ceval of {_SECOND}, --with_prompt True"),
    ("alpaca-2", "cmmlu"): replace(_SCRIPTS, source=f"scripts/cmmlu of {_SECOND}, --with_prompt True"),
    ("official", "ceval"): replace(
        _OFFICIAL, source="README of C-Eval, letters as its evaluators/llama.py", letters="space", shortens="last"
    ),
    ("official", "cmmlu"): replace(
        _OFFICIAL, source="mp_utils.py and hf_causal_model.py of CMMLU", letters="piece", shortens="longest",
        context=2048,
    ),
    ("template", "ceval"): _OWN,
    ("template", "cmmlu"): _OWN,
}  # fmt: skip


def choose_preset(name: str, template: str) -> str:
    """The preset for a file whose template has this name, when `name` is "auto". Raises InputError."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    if name != "auto":
        return name
    return {"raw": "base", "alpaca": "alpaca", "alpaca-2": "alpaca-2"}.get(template, "template")


def procedure_of(preset: str, benchmark: Benchmark) -> Procedure:
    """What the preset does on a benchmark. preset: one of PRESETS but "auto"."""
    return _PROCEDURES[preset, benchmark.name]


@dataclass(frozen=True)
class Choices:
    """What a run really did: letters and penalty, or params where it generated. model: its numbers, in words.

    shortened: prompts that lost examples. left_out: keys of subjects.
    """

    split: str
    letters: str
    penalty: float
    params: SamplingParams | None
    cot: bool
    model: str
    shortened: int
    left_out: Sequence[str]


def differences(procedure: Procedure, done: Choices) -> list[str]:
    """Where a run differs from the publication, one clause each; what is no publication's is said in one."""
    if not procedure.source:
        return ["no publication has these prompts for this benchmark"]
    found = [f"the model is {done.model} where the published ones are float16"]
    if done.params is None:
        if done.letters != procedure.letters:
            found.append(f"letters '{done.letters}' instead of '{procedure.letters}'")
        if done.penalty != procedure.penalty:
            found.append(f"repetition penalty {done.penalty:g} instead of {procedure.penalty:g}")
    else:
        found.append("random numbers are this program's own")
        expected = SAMPLING.with_changes(max_tokens=procedure.steps_tokens if done.cot else ANSWER_TOKENS)
        for name in ("temperature", "top_k", "top_p", "repeat_penalty", "repeat_last_n", "max_tokens"):
            value, usual = getattr(done.params, name), getattr(expected, name)
            if value != usual:
                found.append(f"{name} {value:g} instead of {usual:g}")
    if done.split == "dev":
        found.append("the questions are the dev split, of which nothing is published")
    if done.shortened and procedure.shortens == "never":
        found.append(f"{done.shortened} prompts had to be shortened, which the scripts never do")
    if done.left_out:
        found.append(f"{len(done.left_out)} subjects are left out")
    return found
