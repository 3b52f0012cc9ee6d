# SPDX-License-Identifier: Apache-2.0
"""From a model to a letter: by the logits of the four letters, or out of generated text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cnllama.errors import CnllamaError, InputError
from cnllama.eval.models import Item, Progress, Scorer
from cnllama.eval.prompts import Prompt
from cnllama.eval.questions import LETTERS, Question

if TYPE_CHECKING:
    from cnllama.llm import LLM
    from cnllama.sampling import SamplingParams
    from cnllama.tokenizer import Tokenizer

VARIANTS = ("both", "space", "colon")

# What the published scripts look for in an answer, in this order; the last match of the first, the first of the others.
_STEPS_PATTERN = r"所以答案是(.+?)。"
_PATTERNS = (
    r"([ABCD])是正确的",
    r"选项([ABCD])正确",
    r"答案为([ABCD])",
    r"答案是([ABCD])",
    r"答案([ABCD])",
    r"选择([ABCD])",
    r"答案：([ABCD])",
    r"选择答案([ABCD])",
)


@dataclass(frozen=True)
class Answer:
    """letter: None when nothing could be read out of the response."""

    prompt: Prompt
    letter: str | None
    logits: Sequence[float] = field(default=())
    response: str = ""

    @property
    def correct(self) -> bool | None:
        """None where the right answer is not known."""
        expected = self.prompt.question.answer
        return None if expected is None else self.letter == expected

    def record(self) -> dict[str, Any]:
        """For the log: the prompt as the model got it, and what came of it."""
        prompt = self.prompt
        values: dict[str, Any] = {
            "subject": prompt.subject.key,
            "id": prompt.question.id,
            "shots": prompt.shots,
            "prompt": prompt.text,
            "prompt_tokens": len(prompt.ids),
            "letter": self.letter,
            "answer": prompt.question.answer,
            "correct": self.correct,
            "response": self.response,
        }
        if self.logits:
            values["logits"] = dict(zip(LETTERS, self.logits, strict=True))
        return values


@dataclass(frozen=True)
class LetterTokens:
    """Ids of the four letters: at the start of a text, with SentencePiece's space, and right after a colon."""

    space: tuple[int, ...] = ()
    colon: tuple[int, ...] = ()

    @property
    def variant(self) -> str:
        """Which of VARIANTS it is."""
        return "both" if self.space and self.colon else "space" if self.space else "colon"


def letter_tokens(tokenizer: Tokenizer, variant: str = "both") -> LetterTokens:
    """The ids that the published scripts take. A spelling whose four ids are not different cannot tell the letters
    apart: "both" does without it. Raises InputError for an unknown variant and when no spelling is left.
    """
    if variant not in VARIANTS:
        raise InputError(f"the letters are {variant!r}, expected one of {', '.join(VARIANTS)}")
    space = tuple(tokenizer.encode(letter)[0] for letter in LETTERS) if variant != "colon" else ()
    colon = tuple(tokenizer.encode("：" + letter)[-1] for letter in LETTERS) if variant != "space" else ()
    found = LetterTokens(*(ids if len(set(ids)) == len(LETTERS) else () for ids in (space, colon)))
    if not found.space and not found.colon:
        raise InputError("the tokenizer spells A, B, C and D with the same token: use --generate")
    return found


def letter_logits(
    row: npt.NDArray[np.float32], tokens: LetterTokens, prompt: Sequence[int] = (), penalty: float = 1.0
) -> list[float]:
    """The sum of a letter's logits over its spellings. row: [vocab_size].

    penalty: tokens that occur in `prompt` have a positive logit divided and a negative one multiplied by it, which is
    the repetition penalty of the published scripts' sampling settings.
    """
    sums = np.zeros(len(LETTERS), np.float32)
    seen = set(prompt) if penalty != 1.0 else set()
    for ids in (tokens.space, tokens.colon):
        if ids:
            values = row[list(ids)].astype(np.float32)
            if penalty != 1.0:
                punished = np.where(values > 0, values / np.float32(penalty), values * np.float32(penalty))
                values = np.where([i in seen for i in ids], punished, values).astype(np.float32)
            sums += values
    if not np.isfinite(sums).all():
        raise CnllamaError("the logits of the letters are not finite: the weights are damaged or training diverged")
    return [float(value) for value in sums]


def choose(
    model: Scorer,
    prompts: Sequence[Prompt],
    tokens: LetterTokens,
    *,
    penalty: float = 1.0,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Answer]]:
    """(number of the prompt, answer) as they come: the letter with the largest sum of logits, the first of equals.

    tokenizer: to name the most likely token of all as the response.
    """
    items = [Item(prompt.ids, len(prompt.ids) - 1) for prompt in prompts]
    for rows in model.rows(items, progress):
        prompt = prompts[rows.item]
        values = letter_logits(rows.logits[-1], tokens, prompt.ids, penalty)
        top = int(rows.logits[-1].argmax())
        response = tokenizer.piece(top) if tokenizer is not None and tokenizer.has(top) else ""
        yield rows.item, Answer(prompt, LETTERS[int(np.argmax(values))], values, response)


def generate(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, progress: Progress | None = None
) -> Iterator[tuple[int, Answer]]:
    """(number of the prompt, answer): the letter in the text that follows the prompt. Question n gets seed + n."""
    size = llm.plan.sequences
    for at in range(0, len(prompts), size):
        batch = prompts[at : at + size]
        seeds = [params.with_changes(seed=(params.seed or 0) + at + i) for i in range(len(batch))]
        results = llm.generate([list(prompt.ids) for prompt in batch], seeds)
        for i, (prompt, result) in enumerate(zip(batch, results, strict=True)):
            yield at + i, Answer(prompt, extract_letter(result.text, prompt.question), response=result.text)
            if progress:
                progress(len(prompt.ids))


def extract_letter(text: str, question: Question) -> str | None:
    """The letter that the published scripts find in a generated text; None where they would draw one at random."""
    found = re.findall(_STEPS_PATTERN, text)
    if found and found[-1] in LETTERS:
        return str(found[-1])
    for pattern in _PATTERNS:
        match = re.search(pattern, text)
        if match:
            return match[1]
    match = re.search("[ABCD]", text)
    if match:
        return match[0]
    # Where two choices are the same text the later letter counts, as in the scripts' table.
    letters = {choice: letter for letter, choice in zip(LETTERS, question.choices, strict=True) if choice.strip()}
    match = re.search("|".join(map(re.escape, letters)), text) if letters else None
    return letters[match[0]] if match else None
