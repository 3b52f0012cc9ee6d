# SPDX-License-Identifier: Apache-2.0
"""Packed panels as rows of GGML blocks.

A 4-bit block of ours and one of GGML hold the same 32 columns with the same two columns in a byte, and both orders are
ascending: the conversion moves whole 32-bit words and never touches a value. Ours, by word: [line][row]; GGML's:
[row][line]. docs/format.md has the picture. Other numbers of bits are taken out of their planes and put into the
smallest type that has room for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cnllama import _core
from cnllama.container import Bytes

from .container import GgmlType

PANEL_ROWS, BLOCK, SUPERBLOCK = 16, 32, 256
_LINE_BYTES = 64

FloatArray = npt.NDArray[np.float32]

# Scale, then min, then the highest of five bits, then values as words of four bytes.
_SCALE, _MIN, _HIGH, _NIBBLES = ("d", "<f2"), ("m", "<f2"), ("high", "<u4"), ("q", "<u4", (4,))
RECORDS: dict[GgmlType, np.dtype[Any]] = {
    GgmlType.Q4_0: np.dtype([_SCALE, _NIBBLES]),
    GgmlType.Q4_1: np.dtype([_SCALE, _MIN, _NIBBLES]),
    GgmlType.Q5_0: np.dtype([_SCALE, _HIGH, _NIBBLES]),
    GgmlType.Q5_1: np.dtype([_SCALE, _MIN, _HIGH, _NIBBLES]),
    GgmlType.Q8_0: np.dtype([_SCALE, ("q", "<u4", (8,))]),
}
# Bits of a value, and whether there is a min.
_KINDS = {
    GgmlType.Q4_0: (4, False),
    GgmlType.Q4_1: (4, True),
    GgmlType.Q5_0: (5, False),
    GgmlType.Q5_1: (5, True),
    GgmlType.Q8_0: (8, False),
}
# What stands nearest to a type when a matrix cannot be held exactly, and whether blocks of 32 are worth asking for.
_QUANTIZERS = {GgmlType.Q4_0: "q4-s32", GgmlType.Q4_1: "q4-a64", GgmlType.Q8_0: "q8-s32"}
# Bits of the planes of a block.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
_EVERY_BYTE = 0x01010101


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
    if target not in _KINDS:
        return target is GgmlType.F32
    facts = _core.schemes()[scheme]
    bits, with_min = _KINDS[target]
    return bool(facts["bits"] <= bits and (with_min or not facts["asymmetric"]))


def own_type(scheme: str) -> GgmlType:
    """The smallest type that holds every value of a scheme."""
    return next(target for target in _KINDS if is_exact(scheme, target) and _KINDS[target][1] == is_asymmetric(scheme))


def is_asymmetric(scheme: str) -> bool:
    """Whether the groups of a scheme have a min."""
    return bool(_core.schemes()[scheme]["asymmetric"])


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
        if _KINDS[target][1]:
            part["m"] = mins[0] if mins else _mins(low, _zero(facts))
        words = lines.transpose(0, 4, 1, 2, 3).reshape(len(panels), PANEL_ROWS, blocks, -1)
        _put_values(part, words, facts, target)
    return out[:, :, : cols // BLOCK].reshape(len(panels) * PANEL_ROWS, -1).view(np.uint8)


def _zero(facts: Mapping[str, Any]) -> int:
    """The stored integer that stands for 0."""
    return 0 if facts["asymmetric"] else 1 << (int(facts["bits"]) - 1)


def _mins(scales: npt.NDArray[np.float16], zero: int) -> npt.NDArray[np.float16]:
    """Of symmetric values: exact, for zero is a power of two, unless they leave the range."""
    with np.errstate(over="ignore"):
        result = scales * np.float16(-zero)
    if not np.isfinite(result).all():
        raise OverflowError(f"{zero} times a scale is too large for half precision")
    return result


def _put_values(
    part: npt.NDArray[Any], words: npt.NDArray[np.uint32], facts: Mapping[str, Any], target: GgmlType
) -> None:
    """Fills in q (and high) of records [...] from the lines of their blocks, words [..., lines]."""
    bits, target_bits = int(facts["bits"]), _KINDS[target][0]
    if bits == target_bits and bits in (4, 8):
        part["q"] = words if bits == 4 else words ^ np.uint32(_EVERY_BYTE * 0x80)  # two's complement
        return
    values = _values(words, bits)
    if target_bits == 8:
        part["q"] = (values.view(np.uint8) - np.uint8(_zero(facts))).view(np.uint32)
        return
    if not _KINDS[target][1]:
        values += np.uint32(_EVERY_BYTE * ((1 << target_bits - 1) - _zero(facts)))
    nibbles = values & np.uint32(_EVERY_BYTE * 15)
    part["q"] = nibbles[..., :4] | nibbles[..., 4:] << np.uint32(4)
    if target_bits == 5:
        high = np.packbits(values.view(np.uint8) >> np.uint8(4), axis=-1, bitorder="little")
        part["high"] = high.view(np.uint32)[..., 0]


def _values(words: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint32]:
    """Lines of blocks [..., lines] as values, four neighbouring columns in the bytes of a word: [..., 8]."""
    result = np.zeros((*words.shape[:-1], 8), np.uint32)
    below = 0
    for plane in _PLANES[bits]:
        mask = np.uint32(_EVERY_BYTE * ((1 << plane) - 1))
        for first in range(0, 8, plane):
            part = words[..., below : below + plane] >> np.uint32(first) & mask
            result[..., first : first + plane] |= part << np.uint32(below)
        below += plane
    return result


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
