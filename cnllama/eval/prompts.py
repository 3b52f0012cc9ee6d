# SPDX-License-Identifier: Apache-2.0
"""The prompts of the published evaluations, to the letter; procedures.py says which is whose.

alpaca and alpaca-2 are what the scripts of the two generations gave their chat models, which is not the template that
these models chat with. template: the file's own chat template, examples as turns, for models that the scripts do not
know.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnllama.errors import InputError
from cnllama.eval.benchmarks import Benchmark
from cnllama.eval.procedures import procedure_of
from cnllama.eval.questions import LETTERS, Question, Subject
from cnllama.templates import Message, Template, encode_chat

if TYPE_CHECKING:
    from cnllama.tokenizer import Tokenizer

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
_CMMLU_HEADER = "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n"
_CMMLU_QUESTION = "题目：{question}\n答案是："


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
        self.procedure = procedure_of(preset, benchmark)
        self.cot = cot
        self._benchmark = benchmark
        self._tokenizer = tokenizer
        self._template = template

    def prompt(self, subject: Subject, question: Question, limit: int | None) -> Prompt:
        """The prompt with all of the subject's examples, or with as many as fit into `limit` tokens.

        Raises InputError when it does not fit without any.
        """
        count = 0
        for text, shots in self._texts(subject, question, limit):
            ids = self._ids(text) if isinstance(text, str) else encode_chat(self._template, self._tokenizer, text)
            if limit is None or len(ids) <= limit:
                shown = text if isinstance(text, str) else self._tokenizer.decode(ids)
                return Prompt(subject, question, shown, array("i", ids), shots)
            count = len(ids)
        raise InputError(
            f"question {question.id} of {subject.key} takes {count} tokens without examples and there is room for "
            f"{limit}: raise the context (--ctx)"
        )

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, bos=self._tokenizer.add_bos)

    def _texts(
        self, subject: Subject, question: Question, limit: int | None
    ) -> Iterator[tuple[str | list[Message], int]]:
        """(prompt, examples in it), the longest first: examples are dropped as the procedure says, or from the end."""
        if limit is not None and self.procedure.shortens == "longest":
            yield self._cmmlu_fitted(subject, question, limit)
            return
        name = self.procedure.subject_name(subject)
        makers: dict[str, Callable[[str, Question, Sequence[Question]], str | list[Message]]] = {
            "base": self._base,
            "alpaca": self._alpaca,
            "alpaca-2": self._alpaca2,
            "official": self._official,
            "template": self._messages,
        }
        for count in range(len(subject.shots), -1, -1):
            yield makers[self.preset](name, question, subject.shots[:count]), count

    def _base(self, name: str, question: Question, shots: Sequence[Question]) -> str:
        header = _HEADER.format(subject=name) if shots else ""
        return header + self._examples(shots) + question_text(question) + self._opening()

    def _official(self, name: str, question: Question, shots: Sequence[Question]) -> str:
        """The header stands before a question without examples too."""
        if self._benchmark.name == "cmmlu":
            examples = "".join(map(_cmmlu_example, shots))
            return _CMMLU_HEADER.format(subject=name) + examples + _cmmlu_question(question)
        return _HEADER.format(subject=name) + self._examples(shots) + question_text(question) + self._opening()

    def _cmmlu_fitted(self, subject: Subject, question: Question, limit: int) -> tuple[str, int]:
        """CMMLU's rule: the longest examples go until the rest fits by the sum of what its parts take, each with a BOS;
        the header goes too where it does not fit beside the question.
        """
        header = _CMMLU_HEADER.format(subject=self.procedure.subject_name(subject))
        end = _cmmlu_question(question)
        room = limit - len(self._ids(header)) - len(self._ids(end))
        if room < 0:
            return end, 0
        examples = [(text, len(self._ids(text))) for text in map(_cmmlu_example, subject.shots)]
        while examples and sum(size for _, size in examples) >= room:
            longest = max(size for _, size in examples)
            examples = [(text, size) for text, size in examples if size != longest]
        return header + "".join(text for text, _ in examples) + end, len(examples)

    def _alpaca(self, name: str, question: Question, shots: Sequence[Question]) -> str:
        instruction = (_HEADER.format(subject=name) if shots else "") + self._examples(shots) + question_text(question)
        return _ALPACA.format(instruction=instruction + self._asked(_ALPACA_ANSWER))

    def _alpaca2(self, name: str, question: Question, shots: Sequence[Question]) -> str:
        text = ""
        if shots:
            header = _HEADER.format(subject=name)
            text = _ALPACA2.format(system=self._benchmark.system, instruction=header)
            text += _ACKNOWLEDGED.format(subject=name)
        for shot in shots:
            text += _ALPACA2_SHOT.format(question=question_text(shot), answer=shot.answer)
        instruction = question_text(question) + self._asked(_ANSWER)
        return text + _ALPACA2.format(system=self._benchmark.system, instruction=instruction)

    def _messages(self, name: str, question: Question, shots: Sequence[Question]) -> list[Message]:
        turns: list[tuple[str, str]] = []
        if shots:
            header = _HEADER.format(subject=name).rstrip("\n")
            turns = [("user", header), ("assistant", _ACKNOWLEDGED.format(subject=name))]
        for shot in shots:
            turns += [("user", question_text(shot) + _ANSWER), ("assistant", str(shot.answer))]
        turns.append(("user", question_text(question) + self._asked(_ANSWER)))
        return [{"role": role, "content": content} for role, content in turns]

    def _opening(self) -> str:
        """The end of a question that the model is to continue."""
        return _ANSWER + (_STEPS + "1." if self.cot else "")

    def _asked(self, plain: str) -> str:
        """The end of a chat model's question."""
        return "\n答案是什么？" + _STEPS + "1." if self.cot else plain

    def _examples(self, shots: Sequence[Question]) -> str:
        text = ""
        for shot in shots:
            solution = f"{shot.answer}"
            if self.cot:
                solution = _STEPS + shot.explanation + _SOLVED_STEPS.format(answer=shot.answer)
            text += question_text(shot) + _ANSWER + solution + "\n\n"
        return text


def _cmmlu_question(question: Question) -> str:
    return _CMMLU_QUESTION.format(question=question_text(question))


def _cmmlu_example(shot: Question) -> str:
    return _cmmlu_question(shot) + f"{shot.answer}\n\n"
