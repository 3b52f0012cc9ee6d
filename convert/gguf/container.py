# SPDX-License-Identifier: Apache-2.0
"""The GGUF container, version 3: typed metadata, a table of tensors, then their data, written in one pass."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from cnllama.container import TensorWriter, round_up

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
_ARRAY = 9


class GgmlType(IntEnum):
    """Tensor types by their number in the file. A row is a sequence of blocks; see _BLOCKS for their sizes."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8

    @property
    def block(self) -> int:
        """Values in one block; the columns of a matrix are a multiple of it."""
        return _BLOCKS[self][0]

    def row_bytes(self, cols: int) -> int:
        """Bytes of one row of `cols` values."""
        values, size = _BLOCKS[self]
        return cols // values * size


_BLOCKS = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
}


@dataclass(frozen=True)
class Value:
    """One metadata value: the number of its type and its bytes."""

    kind: int
    data: bytes


def uint32(value: int) -> Value:
    """An unsigned 32-bit integer."""
    return Value(4, struct.pack("<I", value))


def float32(value: float) -> Value:
    """A 32-bit float."""
    return Value(6, struct.pack("<f", value))


def boolean(value: bool) -> Value:
    """True or false."""
    return Value(7, bytes([value]))


def text(value: str) -> Value:
    """A string, stored in UTF-8."""
    return Value(8, _string(value))


def texts(values: Sequence[str]) -> Value:
    """An array of strings."""
    return _array(8, len(values), b"".join(map(_string, values)))


def float32s(values: Iterable[float]) -> Value:
    """An array of 32-bit floats."""
    data = np.fromiter(values, "<f4")
    return _array(6, data.size, data.tobytes())


def int32s(values: Iterable[int]) -> Value:
    """An array of signed 32-bit integers."""
    data = np.fromiter(values, "<i4")
    return _array(5, data.size, data.tobytes())


def _array(kind: int, count: int, data: bytes) -> Value:
    return Value(_ARRAY, struct.pack("<IQ", kind, count) + data)


def _string(value: str) -> bytes:
    # Names of files may hold bytes that are no UTF-8; strings in the file must be.
    data = value.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


@dataclass(frozen=True)
class TensorInfo:
    """One row of the table. shape: [rows, cols], or [n] of a vector; the file stores it in the opposite order."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of the data, without what aligns the next tensor."""
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


class GgufWriter(TensorWriter):
    """Streams a GGUF file to a temporary name and renames it when it is complete; see TensorWriter."""

    def __init__(
        self, path: str | os.PathLike[str], metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]
    ) -> None:
        header = _header(metadata, tensors)
        super().__init__(path, {tensor.name: tensor.bytes for tensor in tensors}, len(header), ALIGNMENT)
        try:
            self._output.write(header, 0)
        except BaseException:
            self._output.discard()
            raise

    def finish(self) -> None:
        """Syncs and renames."""
        self._check_complete()
        self._output.commit()


def _header(metadata: Mapping[str, Value], tensors: Sequence[TensorInfo]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), struct.pack("<I", value.kind), value.data]
    offset = 0
    for tensor in tensors:
        extents = tensor.shape[::-1]
        parts += [_string(tensor.name), struct.pack(f"<I{len(extents)}Q", len(extents), *extents)]
        parts.append(struct.pack("<IQ", tensor.type, offset))
        offset += round_up(tensor.bytes, ALIGNMENT)
    header = b"".join(parts)
    return header + bytes(round_up(len(header), ALIGNMENT) - len(header))
