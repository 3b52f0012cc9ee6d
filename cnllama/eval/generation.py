# SPDX-License-Identifier: Apache-2.0
"""Answers written as the published scripts let transformers write them.

Its order is penalty, temperature, top-k, top-p, draw: what top-p keeps is decided after the temperature, which at 0.2
keeps far fewer tokens than this program's own order does (SamplingParams). Only the tokenizer's end token ends a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cnllama._core import Sampler
from cnllama.eval.answers import Answer, answer_in, penalized, seed_of
from cnllama.eval.models import Progress, Sequences
from cnllama.eval.prompts import Prompt

if TYPE_CHECKING:
    from cnllama.llm import LLM
    from cnllama.sampling import SamplingParams

_LEAST = -1e30  # of a scaled logit: far below what float64 can tell from never


@dataclass
class _Text:
    """A prompt and what has been written behind it; `tokens` are both."""

    prompt: Prompt
    draw: _Draw
    tokens: list[int]
    written: list[int] = field(default_factory=list)
    ended: bool = False


class _Draw:
    """Chooses tokens for one text. params: of which top_k, top_p, temperature and the penalty count."""

    def __init__(self, params: SamplingParams, seed: int, banned: Sequence[int]) -> None:
        self._params, self._banned = params, list(banned)
        temperature = 1.0 if params.temperature else 0.0
        self._sampler = Sampler(
            temperature=temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p, seed=seed
        )

    def choose(self, row: npt.NDArray[np.float32], tokens: Sequence[int]) -> int:
        """The next token after `tokens`, whose logits `row` are: [vocab_size]."""
        values = penalized(row, tokens, self._params.repeat_penalty)
        values -= values.max()
        with np.errstate(over="ignore"):
            scaled = values / (self._params.temperature or 1.0)
        token, _, _ = self._sampler.sample(np.maximum(scaled, _LEAST).astype(np.float32), self._banned, 0)
        return int(token)


def write(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, progress: Progress | None = None
) -> Iterator[tuple[int, Answer]]:
    """(number of the prompt, answer) as answers.generate, as many at once as the LLM has sequences."""
    end, size = llm.tokenizer.eos_id, llm.plan.sequences
    banned = [i for i in range(llm.tokenizer.pieces, llm.vocab_size) if not llm.tokenizer.has(i)]
    limit = params.max_tokens or 0
    with Sequences(llm, size) as sequences:
        for at in range(0, len(prompts), size):
            texts = [
                _Text(prompt, _Draw(params, seed_of(params, at + i), banned), list(prompt.ids))
                for i, prompt in enumerate(prompts[at : at + size])
            ]
            rows: dict[int, Any] = {i: sequences.fill(i, text.tokens, limit) for i, text in enumerate(texts)}
            for _ in range(limit):
                for i, row in rows.items():
                    token = texts[i].draw.choose(row, texts[i].tokens)
                    texts[i].ended = token == end
                    if not texts[i].ended:
                        texts[i].tokens.append(token)
                        texts[i].written.append(token)
                open_texts = [i for i in rows if not texts[i].ended and len(texts[i].written) < limit]
                rows = sequences.step({i: texts[i].written[-1] for i in open_texts})
            for i, text in enumerate(texts):
                yield at + i, answer_in(llm.tokenizer.decode(text.written), text.prompt)
                if progress:
                    progress(len(text.prompt.ids))
