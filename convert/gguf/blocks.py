# SPDX-License-Identifier: Apache-2.0
"""Packed panels as rows of GGML blocks.

A 4-bit block of ours and one of GGML hold the same 32 columns with the same two columns in a byte, and both orders are
ascending: the conversion moves whole 32-bit words and never touches a value. Ours, by word: [line][row]; GGML's:
[row][line]. docs/format.md has the picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cnllama import _core
from cnllama.container import Bytes

from .container import GgmlType

PANEL_ROWS, BLOCK, SUPERBLOCK = 16, 32, 256
_LINE_BYTES = 64

FloatArray = npt.NDArray[np.float32]

# Scale, then min, then values as words of four bytes.
RECORDS: dict[GgmlType, np.dtype[Any]] = {
    GgmlType.Q4_0: np.dtype([("d", "<f2"), ("q", "<u4", (4,))]),
    GgmlType.Q4_1: np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "<u4", (4,))]),
    GgmlType.Q8_0: np.dtype([("d", "<f2"), ("q", "<u4", (8,))]),
}
# What stands nearest to a type when a matrix cannot be held exactly, and whether blocks of 32 are worth asking for.
_QUANTIZERS = {GgmlType.Q4_0: "q4-s32", GgmlType.Q4_1: "q4-a64", GgmlType.Q8_0: "q8-s64"}


class Span(NamedTuple):
    """Neighbouring superblocks of equal size in every panel of a matrix."""

    begin: int  # byte in the panel
    superblocks: int
    columns: int  # of each
    head: int  # bytes of scales and mins that begin each
    size: int  # bytes of each
    first: int  # column of the matrix

    @property
    def end(self) -> int:
        """Byte in the panel after the last superblock."""
        return self.begin + self.superblocks * self.size


def spans(scheme: str, cols: int) -> Iterator[Span]:
    """The spans of a panel: whole superblocks, then a shorter one if the padded columns leave a rest."""
    facts = _core.schemes()[scheme]
    padded = -(-cols // facts["group"]) * facts["group"]
    begin = 0
    for count, columns in ((padded // SUPERBLOCK, SUPERBLOCK), (1, padded % SUPERBLOCK)):
        if count and columns:
            scales = columns // facts["group"] * PANEL_ROWS * (4 if facts["asymmetric"] else 2)
            head = -(-scales // _LINE_BYTES) * _LINE_BYTES
            size = head + columns // BLOCK * _LINE_BYTES * int(facts["bits"])
            yield Span(begin, count, columns, head, size, padded // SUPERBLOCK * SUPERBLOCK if begin else 0)
            begin += count * size


def split(panels: Bytes, span: Span, scheme: str) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint32]]:
    """Views into packed panels [n, panel bytes]: (scales, lines).

    scales: [n, superblocks, 1 or 2 (mins), groups, 16 rows]; lines: words [n, superblocks, blocks, lines, 16 rows].
    """
    facts = _core.schemes()[scheme]
    kinds, groups = (2 if facts["asymmetric"] else 1), span.columns // facts["group"]
    body = panels[:, span.begin : span.end].reshape(len(panels), span.superblocks, span.size)
    scales = body[:, :, : kinds * groups * PANEL_ROWS * 2].view("<f2")
    lines = body[:, :, span.head :].view("<u4")
    lead = (len(panels), span.superblocks)
    return (
        scales.reshape(*lead, kinds, groups, PANEL_ROWS),
        lines.reshape(*lead, span.columns // BLOCK, int(facts["bits"]), PANEL_ROWS),
    )


def is_exact(scheme: str, target: GgmlType) -> bool:
    """Whether every value of a scheme is a value of the type: the float32 that both decode to is the same."""
    facts = _core.schemes()[scheme]
    if facts["bits"] == 8:
        return target in (GgmlType.Q8_0, GgmlType.F32)
    if facts["asymmetric"]:
        return target in (GgmlType.Q4_1, GgmlType.F32)
    return target in (GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q8_0, GgmlType.F32)


def to_blocks(panels: Bytes, scheme: str, cols: int, target: GgmlType) -> Bytes:
    """Packed panels [n, panel bytes] of a matrix with `cols` columns, a multiple of 32, as [16 n, row bytes] of blocks.

    The target is one that is_exact allows, F32 excepted. Raises OverflowError when a min would leave half precision.
    """
    facts = _core.schemes()[scheme]
    repeat = facts["group"] // BLOCK
    padded = -(-cols // facts["group"]) * repeat
    out = np.empty((len(panels), PANEL_ROWS, padded), RECORDS[target])
    for span in spans(scheme, cols):
        scales, lines = split(panels, span, scheme)
        blocks = span.superblocks * span.columns // BLOCK
        where = slice(span.first // BLOCK, span.first // BLOCK + blocks)
        part = out[:, :, where]
        low, *mins = (
            np.repeat(s.transpose(0, 3, 1, 2).reshape(len(panels), PANEL_ROWS, -1), repeat, axis=2)
            for s in np.moveaxis(scales, 2, 0)
        )
        part["d"] = low
        if target is GgmlType.Q4_1:
            part["m"] = mins[0] if mins else _times_minus_eight(low)
        words = lines.transpose(0, 4, 1, 2, 3).reshape(len(panels), PANEL_ROWS, blocks, -1)
        part["q"] = _words(words, int(facts["bits"]), target)
    return out[:, :, : cols // BLOCK].reshape(len(panels) * PANEL_ROWS, -1).view(np.uint8)


def _times_minus_eight(scales: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """Exact, for it is a power of two, unless it leaves the range."""
    with np.errstate(over="ignore"):
        result = scales * np.float16(-8)
    if not np.isfinite(result).all():
        raise OverflowError("eight times a scale is too large for half precision")
    return result


def _words(words: npt.NDArray[np.uint32], bits: int, target: GgmlType) -> npt.NDArray[np.uint32]:
    if bits == 8:
        return words ^ np.uint32(0x80808080)  # q - 128 in two's complement
    if target is not GgmlType.Q8_0:
        return words
    low = np.uint32(0x0F0F0F0F)
    nibbles = np.ascontiguousarray(np.concatenate([words & low, words >> 4 & low], axis=-1))
    return (nibbles.view(np.int8) - np.int8(8)).view(np.uint32)


def nearest(values: FloatArray, target: GgmlType) -> tuple[Bytes, float, float]:
    """float32 rows as the type's nearest values: (blocks [rows, row bytes], squared error, squares of the values).

    Rows are a multiple of 32 unless they are the last. Raises OverflowError for values beyond half precision.
    """
    rows, cols = values.shape
    if target is GgmlType.F32:
        return values.astype("<f4").view(np.uint8), 0.0, 0.0
    if target is GgmlType.F16:
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if not np.isfinite(half).all():
            raise OverflowError("a weight is too large for half precision")
        wide = values.astype(np.float64)
        return half.view(np.uint8), float(((wide - half) ** 2).sum()), float((wide**2).sum())
    scheme = _QUANTIZERS[target]
    twice = _core.schemes()[scheme]["group"] // BLOCK
    # Every block twice in a row: a group of 64 then is one block of 32, with a scale of its own.
    wide_rows = np.repeat(values.reshape(rows, -1, 1, BLOCK), twice, axis=2).reshape(rows, cols * twice)
    packed, squared_error, squares = _core.quantize(wide_rows, scheme)
    panels = packed.reshape(_core.padded_rows(rows) // PANEL_ROWS, -1)
    blocks = to_blocks(panels, scheme, cols * twice, target)[:rows]
    record = RECORDS[target].itemsize
    chosen = blocks.reshape(rows, -1, twice, record)[:, :, 0]
    return chosen.reshape(rows, -1), squared_error / twice, squares / twice
