# SPDX-License-Identifier: Apache-2.0
"""What every quantizer is: it takes a merged model and gives the tensors of the file, piece by piece in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from cnllama import _core
from cnllama.errors import CnllamaError, InputError
from cnllama.verify import Statistics

from ..merge import MergedTensor

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

CHUNK_VALUES = 1 << 23  # float32 values merged and quantized at a time: 32 MiB


class CalibrationError(CnllamaError):
    """A calibration that cannot go on, of a model that could still be rounded."""


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor as the file has them.

    data: whole panels of a matrix, the float32 bytes of a vector. statistics: of the tensor up to these rows, as it was
    before it was quantized. values: how many. squared_error: of these rows, unweighted.
    """

    name: str
    data: ByteArray | bytes
    statistics: Statistics
    values: int
    squared_error: float = 0.0


@dataclass(frozen=True)
class Work:
    """A merged model and the scheme of each of its tensors: name -> (scheme, rows, cols), "f32" for vectors.

    threads 0: the default of this machine. say: takes a line about a tensor that was calibrated.
    """

    tensors: Mapping[str, MergedTensor]
    table: Mapping[str, tuple[str, int, int]]
    config: Mapping[str, Any]
    threads: int = 0
    say: Callable[[str], object] = lambda line: None


class Quantizer(Protocol):
    """A way to choose the integers, scales and mins of a scheme."""

    name: str

    def pieces(self, work: Work) -> Iterator[Piece]:
        """Every tensor of `work` in its order, the rows of each ascending. Raises InputError for bad weights."""


class Rtn:
    """Round to nearest: the scale (and min) of every group that leaves the least squared error of the weights."""

    name = "rtn"

    def pieces(self, work: Work) -> Iterator[Piece]:
        """See Quantizer; a few rows at a time."""
        for name in work.tensors:
            yield from rounded(work, name)


def rounded(work: Work, name: str) -> Iterator[Piece]:
    """A tensor by Rtn; a vector as it is."""
    tensor, scheme, statistics = work.tensors[name], work.table[name][0], Statistics()
    for values in chunks(tensor, statistics):
        if scheme == "f32":
            yield Piece(name, values.tobytes(), statistics, values.size)
        else:
            data, error = quantize(tensor, values, scheme, work.threads)
            yield Piece(name, data, statistics, values.size, error)
    tensor.release()


def chunks(tensor: MergedTensor, statistics: Statistics, size: int | None = None) -> Iterator[FloatArray]:
    """float32 rows of a tensor in order, in multiples of the 32 of a panel pair, added to `statistics`.

    size: values at a time, CHUNK_VALUES by default. Raises InputError for NaN and infinity.
    """
    rows = tensor.shape[0]
    step = rows if len(tensor.shape) == 1 else max(32, (size or CHUNK_VALUES) // tensor.shape[1] // 32 * 32)
    for begin in range(0, rows, step):
        values = tensor.read(begin, min(begin + step, rows))
        statistics.add(values)
        if not statistics.finite:
            _refuse_values(tensor, values, begin)
        yield values


def quantize(
    tensor: MergedTensor, values: FloatArray, scheme: str, threads: int, importance: FloatArray | None = None
) -> tuple[ByteArray, float]:
    """(packed rows, squared error) of rounding to nearest. importance: float32 [cols], weighs the squared errors."""
    weights = {} if importance is None else {"importance": importance}
    try:
        packed, error, _ = _core.quantize(np.ascontiguousarray(values), scheme, threads, **weights)
    except ValueError as problem:
        raise cannot_quantize(tensor, problem) from None
    return packed, error


def cannot_quantize(tensor: MergedTensor, problem: ValueError) -> InputError:
    """The error for weights that the native quantizer refused."""
    return InputError(f"{tensor.files()}: tensor {tensor.name} cannot be quantized ({problem})")


def _refuse_values(tensor: MergedTensor, values: FloatArray, begin: int) -> NoReturn:
    where = np.argwhere(~np.isfinite(values))[0]
    value = values[tuple(where)]
    place = f"row {begin + int(where[0])}" + (f", column {int(where[1])}" if values.ndim == 2 else "")
    raise InputError(
        f"{tensor.files()}: tensor {tensor.name} is {value} at {place}, expected finite numbers; the checkpoint "
        "is damaged or its training diverged, get it again"
    )
