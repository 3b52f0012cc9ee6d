# SPDX-License-Identifier: Apache-2.0
"""From a model to a letter: by the logits of the four letters, or out of generated text."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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

VARIANTS = ("both", "space", "colon", "piece")
_LARGEST = 1e300  # of a penalized logit: two of them still have a sum

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
    """letter: None when nothing could be read out of the response. drawn: nothing could, and it is one by chance."""

    prompt: Prompt
    letter: str | None
    logits: Sequence[float] = field(default=())
    response: str = ""
    drawn: bool = False

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
            "drawn": self.drawn,
            "answer": prompt.question.answer,
            "correct": self.correct,
            "response": self.response,
        }
        if self.logits:
            values["logits"] = dict(zip(LETTERS, self.logits, strict=True))
        return values


@dataclass(frozen=True)
class LetterTokens:
    """Ids of the four letters in the spellings of `variant`: at the start of a text, with SentencePiece's space, and
    right after a colon; or the pieces that are called so.
    """

    space: tuple[int, ...] = ()
    colon: tuple[int, ...] = ()
    piece: tuple[int, ...] = ()

    @property
    def variant(self) -> str:
        """Which of VARIANTS it is."""
        if self.piece:
            return "piece"
        return "both" if self.space and self.colon else "space" if self.space else "colon"


def letter_tokens(tokenizer: Tokenizer, variant: str = "both") -> LetterTokens:
    """The ids that the published scripts take. A spelling whose four ids are not different cannot tell the letters
    apart: "both" does without it. Raises InputError for an unknown variant and when no spelling is left.
    """
    if variant not in VARIANTS:
        raise InputError(f"the letters are {variant!r}, expected one of {', '.join(VARIANTS)}")
    spellings: dict[str, tuple[int, ...]] = {}
    if variant in ("both", "space"):
        spellings["space"] = tuple(tokenizer.encode(letter)[0] for letter in LETTERS)
    if variant in ("both", "colon"):
        spellings["colon"] = tuple(tokenizer.encode("：" + letter)[-1] for letter in LETTERS)
    if variant == "piece":
        ids = {tokenizer.piece(i): i for i in range(tokenizer.pieces)}
        spellings["piece"] = tuple(ids[letter] for letter in LETTERS if letter in ids)
    found = LetterTokens(**{name: ids for name, ids in spellings.items() if len(set(ids)) == len(LETTERS)})
    if not (found.space or found.colon or found.piece):
        raise InputError(
            f"the tokenizer has no four different tokens for A, B, C and D ({variant}): use other --letters, or "
            "--generate"
        )
    return found


def penalized(row: npt.NDArray[Any], tokens: Sequence[int], penalty: float) -> npt.NDArray[np.float64]:
    """[vocab_size] float64: the logits, those of `tokens` divided by the penalty where positive, else multiplied by it
    (Keskar et al. 2019, arXiv 1909.05858, as transformers does it).
    """
    values = np.array(row, np.float64)
    if penalty != 1.0 and len(tokens):
        at = np.unique(np.asarray(tokens, np.int64))
        chosen = values[at]
        with np.errstate(over="ignore"):
            punished = np.where(chosen > 0, chosen / penalty, chosen * penalty)
        values[at] = np.clip(punished, -_LARGEST, _LARGEST)
    return values


def letter_logits(
    row: npt.NDArray[Any], tokens: LetterTokens, prompt: Sequence[int] = (), penalty: float = 1.0
) -> list[float]:
    """The sum of a letter's logits over its spellings. row: [vocab_size]. penalty: of the tokens of `prompt`, see
    penalized. Raises CnllamaError for logits that are not finite.
    """
    values = penalized(row, prompt, penalty)
    sums = [sum(float(values[ids[i]]) for ids in (tokens.space, tokens.colon, tokens.piece) if ids) for i in range(4)]
    if not all(map(math.isfinite, sums)):
        raise CnllamaError("the logits of the letters are not finite: the weights are damaged or training diverged")
    return sums


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

    tokenizer: to name the most likely token of all, after the penalty, as the response.
    """
    items = [Item(prompt.ids, len(prompt.ids) - 1) for prompt in prompts]
    for rows in model.rows(items, progress):
        prompt = prompts[rows.item]
        values = letter_logits(rows.logits[-1], tokens, prompt.ids, penalty)
        response = ""
        if tokenizer is not None:
            top = int(penalized(rows.logits[-1], prompt.ids, penalty).argmax())
            response = tokenizer.piece(top) if tokenizer.has(top) else ""
        yield rows.item, Answer(prompt, LETTERS[int(np.argmax(values))], values, response)


def generate(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, progress: Progress | None = None
) -> Iterator[tuple[int, Answer]]:
    """(number of the prompt, answer): the letter in the text that follows the prompt. Question n gets seed + n."""
    size = llm.plan.sequences
    for at in range(0, len(prompts), size):
        batch = prompts[at : at + size]
        seeds = [params.with_changes(seed=seed_of(params, at + i)) for i in range(len(batch))]
        results = llm.generate([list(prompt.ids) for prompt in batch], seeds)
        for i, (prompt, result) in enumerate(zip(batch, results, strict=True)):
            yield at + i, answer_in(result.text, prompt)
            if progress:
                progress(len(prompt.ids))


def seed_of(params: SamplingParams, number: int) -> int:
    """The seed of question `number`."""
    return ((params.seed or 0) + number) % (1 << 64)


def answer_in(text: str, prompt: Prompt) -> Answer:
    """The answer that a generated text holds."""
    return Answer(prompt, extract_letter(text, prompt.question), response=text)


def drawn(answer: Answer, seed: int) -> Answer:
    """The same answer with a letter by chance where none could be read, which is what the published scripts do."""
    if answer.letter is not None:
        return answer
    return replace(answer, letter=random.Random(seed).choice(LETTERS), drawn=True)


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
    letters = {choice: letter for letter, choice in zip(LETTERS, question.choices, strict=True) if choice}
    match = re.search("|".join(map(re.escape, letters)), text) if letters else None
    return letters[match[0]] if match else None
