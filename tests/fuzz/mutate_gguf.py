# SPDX-License-Identifier: Apache-2.0
"""GGUF files damaged as what they are: typed metadata, a table of tensors, and the counts before both."""

from __future__ import annotations

import copy
import random
import struct
from dataclasses import dataclass
from typing import Any

from fuzz import mutate_bytes, mutate_json

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_BIG = (
    0,
    1,
    2,
    3,
    31,
    32,
    33,
    64,
    255,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 61,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
)
_KEYS = (
    *(
        "general.alignment",
        "general.file_type",
        "llama.block_count",
        "llama.attention.head_count",
        "llama.embedding_length",
    ),
    *("llama.attention.head_count_kv", "llama.attention.key_length", "general.architecture", "split.count"),
)


@dataclass
class Parts:
    """A file, taken apart. values: [key, type, bytes]. tensors: [name, extents, type, offset]. counts: what it says."""

    values: list[list[Any]]
    tensors: list[list[Any]]
    data: bytes
    version: int = 3
    counts: tuple[int, int] | None = None


def parse(data: bytes) -> Parts:
    """A sound file's parts."""
    version, tensors, pairs = struct.unpack_from("<IQQ", data, 4)
    at = 24
    values: list[list[Any]] = []
    for _ in range(pairs):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        end = _value_end(data, at + 4, kind)
        values.append([key, kind, data[at + 4 : end]])
        at = end
    table: list[list[Any]] = []
    for _ in range(tensors):
        name, at = _string(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        extents = list(struct.unpack_from(f"<{dimensions}Q", data, at + 4))
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dimensions)
        table.append([name, extents, kind, offset])
        at += 16 + 8 * dimensions
    return Parts(values, table, data[-(-at // 32) * 32 :], version)


def build(parts: Parts) -> bytes:
    """The file of the parts."""
    tensors, pairs = parts.counts or (len(parts.tensors), len(parts.values))
    out = [b"GGUF", struct.pack("<IQQ", parts.version & 0xFFFFFFFF, tensors, pairs)]
    for key, kind, data in parts.values:
        out += [_pack(key), struct.pack("<I", kind), data]
    for name, extents, kind, offset in parts.tensors:
        out += [
            _pack(name),
            struct.pack(f"<I{len(extents)}Q", len(extents), *extents),
            struct.pack("<IQ", kind, offset),
        ]
    header = b"".join(out)
    return header + bytes(-len(header) % 32) + parts.data


def mutate(rng: random.Random, data: bytes) -> tuple[bytes, list[str]]:
    """(changed file, what was changed)."""
    if rng.random() < 0.2:
        changed, step = mutate_bytes.mutate(rng, data, [*range(0, 24), *range(24, 400)])
        return changed, [step]
    parts = parse(data)
    steps = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        steps.append(rng.choices((_value, _key, _tensor, _count, _more), (10, 3, 8, 3, 3))[0](rng, parts))
    return build(parts), [step for step in steps if step]


def any_value(rng: random.Random) -> tuple[int, bytes]:
    """A value of any type: (its number, its bytes)."""
    kind = rng.choice([*_SCALARS, 4, 5, 6, 6, 12, _STRING, _STRING, _ARRAY, _ARRAY, 13, 255, (1 << 32) - 1])
    if kind == 6:
        return kind, rng.choice([struct.pack("<f", f) for f in (float("nan"), float("inf"), -1.0, 0.0, 1e30, 0.5)])
    if kind == 12:
        return kind, rng.choice([struct.pack("<d", f) for f in (float("nan"), float("inf"), -1.0, 0.0, 1e300, 0.5)])
    if kind in _SCALARS:
        size = struct.calcsize(_SCALARS[kind])
        return kind, (rng.choice(_BIG) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if kind == _STRING:
        return kind, _pack(rng.choice(mutate_json.STRINGS).encode("utf-8", "surrogatepass"))
    if kind == _ARRAY:
        inner, count = rng.choice([0, 4, 8, 9, 12, 255]), rng.choice([0, 1, 3, 1 << 26, 1 << 62])
        return kind, struct.pack("<IQ", inner, count) + bytes(rng.choice([0, 1, 40, 1000]))
    return kind, bytes(rng.choice([0, 8]))


def _value(rng: random.Random, parts: Parts) -> str:
    if not parts.values:
        return ""
    chosen = [entry for entry in parts.values if entry[0].decode("utf-8", "replace") in _KEYS]
    entry = rng.choice(chosen if chosen and rng.random() < 0.7 else parts.values)
    entry[1:] = any_value(rng)
    return f"{entry[0][:40]!r} is of type {entry[1]}: {entry[2][:16]!r}"


def _key(rng: random.Random, parts: Parts) -> str:
    if not parts.values:
        return ""
    which = rng.randrange(len(parts.values))
    kind = rng.randrange(4)
    if kind == 0:
        return f"{parts.values.pop(which)[0][:40]!r} removed"
    if kind == 1:
        parts.values.append(copy.deepcopy(parts.values[which]))
        return f"{parts.values[which][0][:40]!r} twice"
    text = rng.choice([*mutate_json.STRINGS, *_KEYS])
    parts.values[which][0] = text.encode("utf-8", "surrogatepass")
    return f"key {which} is {mutate_json.short(text)}"


def _tensor(rng: random.Random, parts: Parts) -> str:
    if not parts.tensors:
        return ""
    tensor = rng.choice(parts.tensors)
    kind = rng.randrange(6)
    if kind == 0:
        tensor[0] = rng.choice(
            [rng.choice(mutate_json.STRINGS).encode("utf-8", "surrogatepass"), b"\xff", parts.tensors[0][0]]
        )
    elif kind == 1:
        tensor[1] = rng.choice(
            [[], [0], [1 << 63] * 4, [rng.choice(_BIG)], [*tensor[1], 1], [1] * 9, [0, 1 << 62], [2] * 70]
        )
    elif kind == 2:
        tensor[2] = rng.choice(_BIG) & 0xFFFFFFFF
    elif kind == 3:
        tensor[3] = rng.choice([*_BIG, tensor[3] + 1, max(0, tensor[3] - 1), parts.tensors[0][3]])
    elif kind == 4:
        parts.tensors.remove(tensor)
        return f"tensor {tensor[0][:40]!r} removed"
    else:
        parts.tensors.append(copy.deepcopy(tensor))
    return f"tensor {tensor[0][:20]!r}: {mutate_json.short(tensor[1])} type {tensor[2]} at {tensor[3]}"


def _count(rng: random.Random, parts: Parts) -> str:
    tensors, pairs = len(parts.tensors), len(parts.values)
    parts.counts = rng.choice(
        [(tensors + 1, pairs), (tensors, pairs + 1), (tensors, max(0, pairs - 1)), (rng.choice(_BIG), pairs)]
    )
    if rng.random() < 0.3:
        parts.counts = (tensors, rng.choice(_BIG))
    if rng.random() < 0.2:
        parts.version = rng.choice([0, 1, 2, 4, 0x03000000, 1 << 31])
    return f"version {parts.version}, counts {parts.counts}"


def _more(rng: random.Random, parts: Parts) -> str:
    kind, data = any_value(rng)
    name = rng.choice([*_KEYS, rng.choice(mutate_json.STRINGS)])
    place = rng.choice([0, len(parts.values)])
    parts.values.insert(place, [name.encode("utf-8", "surrogatepass"), kind, data])
    return f"{mutate_json.short(name)} added, of type {kind}: {data[:16]!r}"


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + size], at + 8 + size


def _pack(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value_end(data: bytes, at: int, kind: int) -> int:
    if kind == _STRING:
        return _string(data, at)[1]
    if kind != _ARRAY:
        return at + struct.calcsize(_SCALARS[kind])
    inner, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if inner != _STRING:
        return int(at + count * struct.calcsize(_SCALARS[inner]))
    for _ in range(count):
        at = _string(data, at)[1]
    return at
