# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints out: safetensors files written a few rows at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnllama.container import DTYPE_BYTES
from cnllama.convert.checkpoint import FloatArray, SourceTensor
from cnllama.errors import InputError
from cnllama.files import Output

_CHUNK_BYTES = 1 << 24
_FLOAT16_OVERFLOW = 65520.0  # rounds to infinity


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written: read(begin, end) gives float32 rows, stored as `dtype` (F16, BF16 or F32).

    where: the files it comes from, for errors.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], FloatArray]
    release: Callable[[], None]
    where: str = ""

    @classmethod
    def copy_of(cls, source: SourceTensor) -> OutTensor:
        """The same values in the same type. Raises InputError for a type that holds no weights."""
        if source.dtype not in ("F16", "BF16", "F32"):
            raise InputError(f"{source.file}: tensor {source.name} has dtype {source.dtype}, expected F16, BF16 or F32")
        return cls(source.dtype, source.shape, source.read, source.release, str(source.file))

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def write_safetensors(
    path: Path, tensors: Mapping[str, OutTensor], advance: Callable[[int], object] = lambda _: None, finite: bool = True
) -> None:
    """Writes the tensors in the given order, under the final name only when complete.

    advance: called with the bytes of every piece written. finite: NaN and infinity are refused, and so are values that
    float16 cannot hold. Raises CnllamaError for a full disk, InputError for such values and for a place that cannot be
    written.
    """
    header = _header(tensors)
    with Output(path) as output:
        output.write(header, 0)
        offset = len(header)
        for name, tensor in tensors.items():
            for values in _chunks(tensor):
                if finite:
                    _check_values(tensor.where or str(path), name, values, tensor.dtype)
                data = encode(values, tensor.dtype)
                output.write(data, offset)
                offset += len(data)
                advance(len(data))
            tensor.release()
        output.commit()


def _header(tensors: Mapping[str, OutTensor]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        table[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: OutTensor) -> Iterator[FloatArray]:
    if not tensor.nbytes:  # it may claim any number of empty rows
        return
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, _CHUNK_BYTES // max(1, 4 * math.prod(tensor.shape[1:])))
    for begin in range(0, rows, step):
        yield tensor.read(begin, min(begin + step, rows))


def _check_values(where: str, name: str, values: FloatArray, dtype: str) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"{where}: tensor {name} holds NaN or infinity, expected finite numbers; get it again")
    largest = float(np.abs(values).max(initial=0.0))
    if dtype == "F16" and largest >= _FLOAT16_OVERFLOW:
        raise InputError(
            f"{where}: tensor {name} reaches {largest:g}, more than float16 holds; merge with --dtype bfloat16"
        )


def encode(values: FloatArray, dtype: str) -> bytes:
    """float32 values as the bytes of a safetensors type, rounded to the nearest, ties to even."""
    if dtype == "F32":
        return np.ascontiguousarray(values, np.float32).tobytes()
    if dtype == "F16":
        return bytes(values.astype(np.float16).data)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + (((bits >> 16) & 1) + 0x7FFF)
    return bytes((rounded >> 16).astype(np.uint16).data)
