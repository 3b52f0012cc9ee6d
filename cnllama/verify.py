# SPDX-License-Identifier: Apache-2.0
"""Re-checks everything that a .cnl says about itself, and compares two files by their fingerprints."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cnllama import _core
from cnllama.format import CnlFile, TensorEntry

# Statistics are stored with 4 significant digits: half a unit of the last one, twice over for two such numbers.
ROUNDING = 1e-3
_ROWS_VALUES = 1 << 23

FloatArray = npt.NDArray[np.float32]


@dataclass
class Statistics:
    """Count, sum, sum of squares and largest magnitude of the values added so far, summed in float64."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    absmax: float = 0.0

    def add(self, values: FloatArray) -> None:
        """Adds float32 values of any shape. Not-finite values make the statistics not finite."""
        if values.size == 0:
            return
        self.count += values.size
        self.total += float(values.sum(dtype=np.float64))
        self.squares += float(np.einsum("i,i->", (flat := values.reshape(-1)), flat, dtype=np.float64))
        self.absmax = float(np.maximum(self.absmax, np.maximum(values.max(), -values.min())))

    @property
    def mean(self) -> float:
        """Zero for no values."""
        return self.total / self.count if self.count else 0.0

    @property
    def rms(self) -> float:
        """The square root of the mean square, zero for no values."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def finite(self) -> bool:
        """Whether all values were finite (a float64 sum of float32 squares cannot overflow)."""
        return math.isfinite(self.absmax) and math.isfinite(self.total)


@dataclass(frozen=True)
class Check:
    """One line of a verification."""

    name: str
    passed: bool
    detail: str


def verify(
    file: CnlFile, parity: Callable[[CnlFile], str | None], progress: Callable[[int], object] = lambda values: None
) -> Iterator[Check]:
    """Yields every check of a file that opened, which means that its header is sound.

    parity: re-runs the tokenizer parity check, returns what differs or None. progress: called with a number of values.
    Raises FileChangedError when the file is overwritten meanwhile.
    """
    yield Check("header", True, "hash, sizes, offsets, config and settings fit")
    content = hashlib.sha256()
    for chunk in file.data_chunks():
        content.update(chunk.data)
    file.check_unchanged()
    expected = file.fingerprint["content_sha256"]
    same = content.hexdigest() == expected
    yield Check("content", same, expected if same else f"sha256 is {content.hexdigest()}, expected {expected}")
    wrong = []
    for tensor in file.tensors.values():
        if tensor.scheme != "raw":
            fault = check_tensor(tensor, file.fingerprint["tensors"][tensor.name], progress)
            file.check_unchanged()
            wrong += [f"{tensor.name}: {fault}"] if fault else []
            file.release(tensor.name)
    yield Check("tensors", not wrong, "; ".join(wrong[:3]) or f"{len(file.tensors) - 1} agree with the fingerprint")
    difference = parity(file)
    file.check_unchanged()
    yield Check("tokenizer", difference is None, difference or f"parity on {file.parity.get('texts')} texts")


def check_tensor(
    tensor: TensorEntry, recorded: Mapping[str, Any], progress: Callable[[int], object] = lambda values: None
) -> str | None:
    """What is wrong with a tensor's values, None when they fit the statistics of the unquantized weights.

    With the recorded relative error e, both |rms - rms'| and |mean - mean'| are at most e rms (triangle inequality and
    Cauchy-Schwarz): nothing is guessed.
    """
    statistics = Statistics()
    for values in dequantized(tensor):
        statistics.add(values)
        progress(values.size)
    if not statistics.finite:
        return "holds NaN or infinity"
    rms, mean = recorded["rms"], recorded["mean"]
    slack = (recorded.get("error", 0.0) + ROUNDING) * rms + 1e-30
    if abs(statistics.rms - rms) > slack:
        return f"rms is {statistics.rms:.4g}, expected {rms:.4g} within {slack:.2g}"
    if abs(statistics.mean - mean) > slack:
        return f"mean is {statistics.mean:.4g}, expected {mean:.4g} within {slack:.2g}"
    return None


def dequantized(tensor: TensorEntry) -> Iterator[FloatArray]:
    """The values of a tensor, some rows at a time."""
    if tensor.scheme == "f32":
        yield tensor.data.view(np.float32)[: tensor.rows]
        return
    step = max(32, _ROWS_VALUES // tensor.cols // 32 * 32)
    for row in range(0, tensor.rows, step):
        end = min(row + step, tensor.rows)
        yield _core.dequantize(tensor.data, tensor.scheme, tensor.rows, tensor.cols, row, end)


def statistics_differ(left: Mapping[str, float], right: Mapping[str, float]) -> Iterator[str]:
    """How two records of a tensor's values before quantization differ by more than their rounding."""
    scale = max(left["rms"], right["rms"])
    for key in ("rms", "mean", "absmax"):
        x, y = left[key], right[key]
        if abs(x - y) > ROUNDING * max(scale, abs(x), abs(y)):
            yield f"{key} is {x:.4g} and {y:.4g}"


def compare(a: CnlFile, b: CnlFile) -> list[str]:
    """Differences of two files' models by their fingerprints, empty when they hold the same model.

    Survives another container, sharding, library version and scheme: the statistics are those before quantization.
    """
    left, right = a.fingerprint["tensors"], b.fingerprint["tensors"]
    found = [f"{name}: only in {(a if name in left else b).path}" for name in sorted(left.keys() ^ right.keys())]
    for name in sorted(left.keys() & right.keys()):
        shapes = [(f.tensors[name].rows, f.tensors[name].cols) for f in (a, b)]
        if shapes[0] != shapes[1]:
            found.append(f"{name}: {shapes[0][0]} x {shapes[0][1]} and {shapes[1][0]} x {shapes[1][1]}")
            continue
        found += [f"{name}: {difference}" for difference in statistics_differ(left[name], right[name])]
    if a.tokenizer["sha256"] != b.tokenizer["sha256"] or a.tokenizer["added_tokens"] != b.tokenizer["added_tokens"]:
        found.append("tokenizer: the two files have different ones")
    return found
