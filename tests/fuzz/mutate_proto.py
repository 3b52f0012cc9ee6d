# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models damaged as the Protocol Buffers messages that they are.

ModelProto: 1 pieces {1 text, 2 score, 3 type}, 2 trainer_spec, 3 normalizer_spec, 4 self_test_data.
"""

from __future__ import annotations

import random
import struct

from fuzz import mutate_bytes, mutate_json

# (number, wire type, value): an int of wire type 0, bytes of the others.
Field = tuple[int, int, int | bytes]

_PIECE, _SPECS = 1, (2, 3)
_SIZES = {1: 8, 5: 4}
_TEXTS = (
    *(
        b"",
        b"<s>",
        b"</s>",
        b"<unk>",
        b"<0x41>",
        b"<0xZZ>",
        b"\xe2\x96\x81",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"a\nb",
        b"\x1b[2J",
    ),
    *(
        b"\x00",
        b"x" * 70_000,
        "纸".encode() * 3000,
        b"[PAD]",
        b"<|im_end|>",
        b"\xe7\xba",
        b" ",
        b"<0x41",
        b"<s>\n",
    ),
)
_INTEGERS = (0, 1, 2, 3, 4, 5, 6, 7, 64, 255, 330, (1 << 31) - 1, (1 << 32) - 1, (1 << 63), (1 << 64) - 1)
_FLOATS = (0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0x00000001, 0x80000000)


def parse(data: bytes) -> list[Field]:
    """The fields of a sound message."""
    fields: list[Field] = []
    at = 0
    while at < len(data):
        tag, at = _read(data, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _read(data, at)
        else:
            size, at = _read(data, at) if tag & 7 == 2 else (_SIZES[tag & 7], at)
            value, at = data[at : at + size], at + size
        fields.append((tag >> 3, tag & 7, value))
    return fields


def build(fields: list[Field]) -> bytes:
    """The message of the fields."""
    parts = []
    for number, wire, value in fields:
        parts.append(_varint(number << 3 | wire))
        if isinstance(value, int):
            parts.append(_varint(value))
        else:
            parts += [_varint(len(value))] * (wire == 2) + [value]
    return b"".join(parts)


def mutate(rng: random.Random, data: bytes) -> tuple[bytes, list[str]]:
    """(changed model, what was changed)."""
    if rng.random() < 0.2:
        changed, step = mutate_bytes.mutate(rng, data, range(0, len(data), 16))
        return changed, [step]
    fields = parse(data)
    steps = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        steps.append(rng.choices((_piece, _spec, _order, _foreign), (10, 5, 3, 1))[0](rng, fields))
    return build(fields), steps


def _pieces(fields: list[Field]) -> list[int]:
    return [i for i, (number, _, _) in enumerate(fields) if number == _PIECE]


def _piece(rng: random.Random, fields: list[Field]) -> str:
    """One piece gets another text, score or type."""
    places = _pieces(fields)
    if not places:
        return ""
    which = rng.choice([rng.choice(places), rng.choice(places[:4])])
    inner = parse(bytes(fields[which][2])) if isinstance(fields[which][2], bytes) else []
    kind = rng.randrange(4)
    if kind == 0:
        text = rng.choice(_TEXTS)
        inner = [(1, 2, text), *(field for field in inner if field[0] != 1)]
        step = f"is {mutate_json.short(text)}"
    elif kind == 1:
        number = rng.choice(_INTEGERS)
        inner = [*(field for field in inner if field[0] != 3), (3, 0, number)]
        step = f"has type {number}"
    elif kind == 2:
        bits = rng.choice(_FLOATS)
        inner = [*(field for field in inner if field[0] != 2), (2, 5, struct.pack("<I", bits))]
        step = f"has score {bits:#x}"
    else:
        inner = [field for field in inner if field[0] != rng.choice([1, 2, 3])]
        step = "lacks a field"
    fields[which] = (_PIECE, 2, build(inner))
    return f"piece {places.index(which)} {step}"


def _spec(rng: random.Random, fields: list[Field]) -> str:
    """One setting of the trainer or the normalizer changes: ids of control pieces, kind of model, prefix, ..."""
    which = rng.choice([i for i, (number, _, _) in enumerate(fields) if number in _SPECS] or [0])
    number, wire, value = fields[which]
    if not isinstance(value, bytes):
        return ""
    inner = [] if number == _PIECE else parse(value)
    setting = rng.choice([3, 4, 5, 24, 35, 40, 41, 42, 43, 45, 46, 47, 48, 49, rng.randrange(1, 60)])
    before = [field for field in inner if field[0] == setting]
    given: int | bytes = rng.choice([rng.choice(_INTEGERS), rng.choice(_TEXTS)])
    if before and isinstance(before[0][2], int):
        given = rng.choice(_INTEGERS)
    kind = 0 if isinstance(given, int) else 2
    fields[which] = (number, wire, build([*(field for field in inner if field[0] != setting), (setting, kind, given)]))
    return f"field {number}.{setting} := {mutate_json.short(given)}"


def _order(rng: random.Random, fields: list[Field]) -> str:
    """A field goes, comes twice, or changes its place."""
    if not fields:
        return ""
    places = _pieces(fields)
    which = rng.choice([*([rng.choice(places), rng.choice(places[:4])] if places else []), rng.randrange(len(fields))])
    kind = rng.randrange(4)
    if kind == 0:
        del fields[which : which + rng.choice([1, 1, 3, 300])]
        return f"field {which} removed"
    if kind == 1:
        fields.insert(which, fields[which])
        return f"field {which} twice"
    if kind == 2:
        fields.extend([fields[which]] * rng.choice([1, 2, 1000]))
        return f"field {which} again at the end"
    other = rng.randrange(len(fields))
    fields[which], fields[other] = fields[other], fields[which]
    return f"fields {which} and {other} swapped"


def _foreign(rng: random.Random, fields: list[Field]) -> str:
    number, wire = rng.choice([4, 5, 200, 536870911]), rng.choice([0, 1, 2, 5, 3, 6])
    given: int | bytes = rng.choice(_INTEGERS) if wire == 0 else rng.randbytes(_SIZES.get(wire, rng.choice([0, 3, 40])))
    fields.insert(rng.randrange(len(fields) + 1), (number, wire, given))
    return f"a field {number} of wire type {wire}"


def _read(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
