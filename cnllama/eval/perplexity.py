# SPDX-License-Identifier: Apache-2.0
"""Perplexity per token and per character, and the divergence of one model from another on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnllama.errors import CnllamaError, InputError
from cnllama.eval.models import Progress, Rows, Scorer
from cnllama.eval.numerics import DoubleArray, divergence, log_softmax, target_logprobs
from cnllama.eval.texts import Window

_ROWS = 32  # of float64 over the whole vocabulary at a time


@dataclass(frozen=True)
class Perplexity:
    """nll: negative log likelihood of all predicted tokens, nats. characters: of the text that these spell."""

    nll: float
    tokens: int
    characters: int

    def figures(self) -> dict[str, Any]:
        """For JSON: sums, perplexities and what they are made of."""
        return {
            "tokens": self.tokens,
            "characters": self.characters,
            "characters_per_token": self.characters / self.tokens,
            "nll": self.nll,
            "perplexity_per_token": _exp(self.nll / self.tokens),
            "perplexity_per_character": _exp(self.nll / self.characters),
            "bits_per_character": self.nll / self.characters / math.log(2),
        }


def _exp(value: float) -> float:
    """e to the value; the largest float instead of an overflow, which JSON could not say."""
    return math.exp(min(value, 709.0))


def perplexity(model: Scorer, parts: Sequence[Window], progress: Progress | None = None) -> Perplexity:
    """The perplexity of `parts`. Raises InputError when there is nothing to predict, CnllamaError for logits that are
    not finite.
    """
    nll, tokens = 0.0, 0
    for rows in model.rows(parts, progress):
        window = parts[rows.item]
        at = rows.position - window.begin
        nll -= float(target_logprobs(rows.logits, window.targets[at : at + len(rows.logits)]).sum())
        tokens += len(rows.logits)
    characters = predicted_characters(parts)
    _check(nll, min(tokens, characters))
    return Perplexity(nll, tokens, characters)


def predicted_characters(parts: Sequence[Window]) -> int:
    """Characters of the text that the windows' targets spell."""
    return sum(window.characters for window in parts)


def _check(nll: float, count: int) -> None:
    if not count:
        raise InputError("the text has nothing to predict: give a longer one")
    if not math.isfinite(nll):
        raise CnllamaError("the model's logits are not finite: its weights are damaged or its training diverged")


@dataclass(frozen=True)
class Comparison:
    """kl: KL(reference || model) of every predicted token, nats. agreed: tokens whose most likely one is the same.

    nll, reference_nll: negative log likelihood of all predicted tokens. characters: of the text that they spell.
    """

    kl: DoubleArray
    agreed: int
    nll: float
    reference_nll: float
    characters: int

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        count = len(self.kl)
        mean = float(self.kl.mean())
        return {
            "tokens": count,
            "kl_mean": mean,
            "kl_median": float(np.median(self.kl)),
            "kl_p99": float(np.quantile(self.kl, 0.99)),
            "kl_max": float(self.kl.max()),
            "kl_mean_standard_error": float(self.kl.std()) / math.sqrt(count),
            "top1_agreement": self.agreed / count,
            "characters": self.characters,
            "perplexity_per_token": _exp(self.nll / count),
            "perplexity_per_character": _exp(self.nll / self.characters),
            "reference_perplexity_per_token": _exp(self.reference_nll / count),
            "perplexity_ratio": _exp((self.nll - self.reference_nll) / count),
        }


def compare(model: Scorer, reference: Scorer, parts: Sequence[Window], progress: Progress | None = None) -> Comparison:
    """Both models on the same windows. Raises CnllamaError as `perplexity`; ValueError for two vocabularies."""
    if model.vocab_size != reference.vocab_size:
        raise ValueError(f"the vocabularies have {model.vocab_size} and {reference.vocab_size} tokens")
    kl: list[DoubleArray] = []
    agreed, nll, reference_nll = 0, 0.0, 0.0
    for ours, theirs in _side_by_side(model.rows(parts, progress), reference.rows(parts)):
        window = parts[ours.item]
        p, q = log_softmax(theirs.logits), log_softmax(ours.logits)
        kl.append(divergence(p, q))
        agreed += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        at = ours.position - window.begin
        index = np.arange(len(p)), np.asarray(window.targets[at : at + len(p)])
        nll -= float(q[index].sum())
        reference_nll -= float(p[index].sum())
    characters = predicted_characters(parts)
    _check(nll + reference_nll, min(len(kl), characters))
    every = np.maximum(np.concatenate(kl), 0.0)
    if not np.isfinite(every).all():
        raise CnllamaError("the divergence is infinite: a token that one model can choose is impossible in the other")
    return Comparison(every, agreed, nll, reference_nll, characters)


def _side_by_side(first: Iterator[Rows], second: Iterator[Rows]) -> Iterator[tuple[Rows, Rows]]:
    """Pieces of the same rows of two models that both take the items in order."""
    a = b = None
    while True:
        a, b = a or next(first, None), b or next(second, None)
        if a is None or b is None:
            if a is not b:
                raise ValueError("one model gave more rows than the other")
            return
        if a[:2] != b[:2]:
            raise ValueError(f"the rows are not in the same order: {a[:2]} and {b[:2]}")
        n = min(len(a.logits), len(b.logits), _ROWS)
        yield a._replace(logits=a.logits[:n]), b._replace(logits=b.logits[:n])
        a, b = _after(a, n), _after(b, n)


def _after(rows: Rows, n: int) -> Rows | None:
    return Rows(rows.item, rows.position + n, rows.logits[n:]) if n < len(rows.logits) else None
