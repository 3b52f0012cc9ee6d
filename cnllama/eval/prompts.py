# SPDX-License-Identifier: Apache-2.0
"""The prompts of the published evaluations, to the letter.

base: the plain text that the base models got. alpaca and alpaca-2: what the scripts of the two generations gave their
chat models, which is not the template that these models chat with. template: the file's own chat template, examples as
turns, for models that the scripts do not know.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnllama.errors import InputError
from cnllama.eval.benchmarks import Benchmark
from cnllama.eval.questions import LETTERS, Question, Subject
from cnllama.templates import Message, Template, encode_chat

if TYPE_CHECKING:
    from cnllama.tokenizer import Tokenizer

PRESETS = ("auto", "base", "alpaca", "alpaca-2", "template")

_HEADER = "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n"
_ACKNOWLEDGED = "好的，我会结合{subject}相关知识回答"
_ANSWER = "\n答案："
_ALPACA_ANSWER = "\n答案是什么？ "
_STEPS = "让我们一步一步思考，\n"
_SOLVED_STEPS = "\n所以答案是{answer}。"
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)
_ALPACA2 = "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{instruction} [/INST]"
_ALPACA2_SHOT = "[INST] {question}\n答案：[/INST]{answer}\n"


@dataclass(frozen=True)
class Prompt:
    """ids: with BOS where the model has one; packed, for there may be 20 million. text: what they spell. shots: the
    examples that are in it.
    """

    subject: Subject
    question: Question
    text: str
    ids: Sequence[int]
    shots: int


def choose_preset(name: str, template: str) -> str:
    """The preset for a file whose template has this name, when `name` is "auto". Raises InputError."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    if name != "auto":
        return name
    return {"raw": "base", "alpaca": "alpaca", "alpaca-2": "alpaca-2"}.get(template, "template")


def question_text(question: Question) -> str:
    """The question and its four choices."""
    choices = zip(LETTERS, question.choices, strict=True)
    return question.text + "".join(f"\n{letter}. {choice}" for letter, choice in choices)


class Prompter:
    """Makes the prompts of one preset."""

    def __init__(
        self, preset: str, benchmark: Benchmark, tokenizer: Tokenizer, template: Template, cot: bool = False
    ) -> None:
        self.preset = preset
        self.cot = cot
        self._benchmark = benchmark
        self._tokenizer = tokenizer
        self._template = template

    def prompt(self, subject: Subject, question: Question, limit: int) -> Prompt:
        """The prompt with as many of the subject's examples, from the first on, as fit into `limit` tokens.

        Raises InputError when it does not fit without any.
        """
        for shots in range(len(subject.shots), -1, -1):
            text, ids = self._make(subject, question, subject.shots[:shots])
            if len(ids) <= limit:
                return Prompt(subject, question, text, array("i", ids), shots)
        raise InputError(
            f"question {question.id} of {subject.key} takes {len(ids)} tokens without examples and there is room for "
            f"{limit}: raise the context (--ctx)"
        )

    def _make(self, subject: Subject, question: Question, shots: Sequence[Question]) -> tuple[str, list[int]]:
        if self.preset == "template":
            ids = encode_chat(self._template, self._tokenizer, self._messages(subject, question, shots))
            return self._tokenizer.decode(ids), ids
        make = {"base": self._base, "alpaca": self._alpaca, "alpaca-2": self._alpaca2}[self.preset]
        text = make(subject, question, shots)
        return text, self._tokenizer.encode(text, bos=self._tokenizer.add_bos)

    def _base(self, subject: Subject, question: Question, shots: Sequence[Question]) -> str:
        opening = _ANSWER + (_STEPS + "1." if self.cot else "")
        return self._examples(subject, shots) + question_text(question) + opening

    def _alpaca(self, subject: Subject, question: Question, shots: Sequence[Question]) -> str:
        instruction = self._examples(subject, shots) + question_text(question)
        return _ALPACA.format(instruction=instruction + self._asked(_ALPACA_ANSWER))

    def _alpaca2(self, subject: Subject, question: Question, shots: Sequence[Question]) -> str:
        text = ""
        if shots:
            header = _HEADER.format(subject=subject.name)
            text = _ALPACA2.format(system=self._benchmark.system, instruction=header)
            text += _ACKNOWLEDGED.format(subject=subject.name)
        for shot in shots:
            text += _ALPACA2_SHOT.format(question=question_text(shot), answer=shot.answer)
        instruction = question_text(question) + self._asked(_ANSWER)
        return text + _ALPACA2.format(system=self._benchmark.system, instruction=instruction)

    def _messages(self, subject: Subject, question: Question, shots: Sequence[Question]) -> list[Message]:
        turns: list[tuple[str, str]] = []
        if shots:
            header = _HEADER.format(subject=subject.name).rstrip("\n")
            turns = [("user", header), ("assistant", _ACKNOWLEDGED.format(subject=subject.name))]
        for shot in shots:
            turns += [("user", question_text(shot) + _ANSWER), ("assistant", str(shot.answer))]
        turns.append(("user", question_text(question) + self._asked(_ANSWER)))
        return [{"role": role, "content": content} for role, content in turns]

    def _asked(self, plain: str) -> str:
        """The end of a chat model's question."""
        return "\n答案是什么？" + _STEPS + "1." if self.cot else plain

    def _examples(self, subject: Subject, shots: Sequence[Question]) -> str:
        text = _HEADER.format(subject=subject.name) if shots else ""
        for shot in shots:
            solution = f"{shot.answer}"
            if self.cot:
                solution = _STEPS + shot.explanation + _SOLVED_STEPS.format(answer=shot.answer)
            text += question_text(shot) + _ANSWER + solution + "\n\n"
        return text
