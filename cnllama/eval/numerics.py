# SPDX-License-Identifier: Apache-2.0
"""Log probabilities and statistics, summed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]


def log_totals(logits: FloatArray) -> DoubleArray:
    """log(sum(exp(logits))) of every row of [n, vocab]."""
    peaks = logits.max(axis=1, keepdims=True)
    # The exponentials in float32 cost a relative error under 1e-7 each, and half the time of float64.
    values = logits - peaks
    totals = np.exp(values, out=values).sum(axis=1, dtype=np.float64)
    result: DoubleArray = peaks[:, 0].astype(np.float64) + np.log(totals)
    return result


def target_logprobs(logits: FloatArray, targets: Sequence[int]) -> DoubleArray:
    """Natural log of softmax(logits)[row, targets[row]], for logits [n, vocab]."""
    chosen = logits[np.arange(len(logits)), np.asarray(targets, np.int64)]
    return np.asarray(chosen, np.float64) - log_totals(logits)


def log_softmax(logits: npt.NDArray[Any]) -> DoubleArray:
    """Natural log of softmax over the rows of [n, vocab], in float64. Of log probabilities it is themselves, summing to
    one again.
    """
    values = np.asarray(logits, np.float64)
    values = values - values.max(axis=1, keepdims=True)
    result: DoubleArray = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    return result


def divergence(reference: DoubleArray, other: DoubleArray) -> DoubleArray:
    """KL(reference || other) in nats of every row, from log probabilities [n, vocab]; what cannot be adds 0."""
    probabilities = np.exp(reference)
    ratios = np.subtract(reference, other, out=np.zeros_like(reference), where=probabilities > 0)
    return np.asarray((probabilities * ratios).sum(axis=1))


def sign_test(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: how likely pairs that differ are split as unevenly by chance."""
    n = only_first + only_second
    term = tail = 1  # binomial coefficients from 0 on
    for i in range(min(only_first, only_second)):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << n))
