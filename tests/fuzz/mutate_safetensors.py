# SPDX-License-Identifier: Apache-2.0
"""safetensors files damaged with their format in mind: the header alone, or header and data together."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Sequence
from typing import Any

from fuzz import mutate_bytes, mutate_json

DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}
_HEADER_KEYS = {
    "__metadata__": [{}, {"format": "pt"}, {"a": "b"}],
    "x": [{"dtype": "F32", "shape": [], "data_offsets": [0, 4]}],
}
_WORDS = (0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7BFF, 0xFBFF, 0x0001, 0x7D01, 0x7F80, 0xFF80, 0x7FC0)


def parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data area) of a sound file."""
    begin = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:begin]), data[begin:]


def build(header: Any, body: bytes) -> bytes:
    """A file of any header tree, padded to eight bytes."""
    text = mutate_json.dump(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def mutate(rng: random.Random, data: bytes, names: Sequence[str] = ()) -> tuple[bytes, list[str]]:
    """(changed file, what was changed). names: of tensors that the product knows."""
    kind = rng.random()
    header, body = parse(data)
    if kind < 0.35:
        tree, steps = mutate_json.mutate(rng, header, _HEADER_KEYS)
        return build(tree, body), steps
    if kind < 0.8:
        return together(rng, header, body, names)
    changed, step = mutate_bytes.mutate(rng, data, [0, 4, 8, len(data) - len(body)])
    return changed, [step]


def together(rng: random.Random, header: dict[str, Any], body: bytes, names: Sequence[str]) -> tuple[bytes, list[str]]:
    """A file that is sound as safetensors and holds other tensors."""
    tensors = [
        [name, info["dtype"], list(info["shape"]), body[info["data_offsets"][0] : info["data_offsets"][1]]]
        for name, info in header.items()
        if name != "__metadata__"
    ]
    steps = [rng.choice(_CHANGES)(rng, tensors, names) for _ in range(rng.choice([1, 1, 1, 2, 3])) if tensors]
    table: dict[str, Any] = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    end = 0
    for name, dtype, shape, part in tensors:
        while name in table:
            name += mutate_json.TWIN  # noqa: PLW2901
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(part)]}
        end += len(part)
    if tensors and rng.random() < 0.12:
        steps.append(shift(rng, table))
    return build(table, b"".join(part for *_, part in tensors)), steps


def shift(rng: random.Random, table: dict[str, Any]) -> str:
    """One tensor lies elsewhere with its size unchanged: over another one, or beyond the end."""
    name = rng.choice([name for name in table if name != "__metadata__"])
    begin, end = table[name]["data_offsets"]
    step = rng.choice([64, -64, 1, -1, end - begin, begin - end, -begin, _begin_of(rng, table) - begin])
    table[name]["data_offsets"] = [begin + step, end + step]
    return f"{name[:60]} lies {step} bytes off"


def _begin_of(rng: random.Random, table: dict[str, Any]) -> int:
    return int(rng.choice([info["data_offsets"][0] for name, info in table.items() if name != "__metadata__"]))


def _rename(rng: random.Random, tensors: list[list[Any]], names: Sequence[str]) -> str:
    tensor = rng.choice(tensors)
    before, pool = (
        tensor[0],
        [rng.choice(mutate_json.STRINGS), *names, f"{tensor[0]}\n", f"model.{tensor[0]}", tensor[0][:-1]],
    )
    tensor[0] = rng.choice([*pool, before.replace(".0.", ".9."), before.replace("weight", "bias"), before + ".x"])
    return f"{before} renamed {mutate_json.short(tensor[0])}"


def _retype(rng: random.Random, tensors: list[list[Any]], names: Sequence[str]) -> str:
    tensor = rng.choice(tensors)
    tensor[1] = rng.choice(list(DTYPES))
    _fit(tensor)
    return f"{tensor[0]} is {tensor[1]}"


def _reshape(rng: random.Random, tensors: list[list[Any]], names: Sequence[str]) -> str:
    tensor = rng.choice(tensors)
    shape = tensor[2]
    first, rest = (shape or [1])[0], shape[1:]
    counts = (first + 1, max(0, first - 1), 64 * first, 0)
    odd: list[list[int]] = [[], [0], [1] * 8, [1] * 9, [0, 1 << 61], [1 << 61, 0], [math.prod(shape)], shape[:1], rest]
    tensor[2] = rng.choice([*odd, shape[::-1], [*shape, 1], [1, *shape], [*rest, first], *([n, *rest] for n in counts)])
    _fit(tensor)
    return f"{tensor[0]} has shape {tensor[2]}"


def _revalue(rng: random.Random, tensors: list[list[Any]], names: Sequence[str]) -> str:
    tensor = rng.choice(tensors)
    part = tensor[3]
    at = rng.randrange(max(1, len(part) // 2)) * 2
    count = rng.choice([1, 16, len(part)])
    word = rng.choice(_WORDS)
    data = struct.pack("<H", word) * count
    tensor[3] = (
        (part[:at] + data + part[at + len(data) :])[: len(part)] if count < len(part) else (data * 2)[: len(part)]
    )
    return f"{tensor[0]} holds {word:#06x} {count} times"


def _remove(rng: random.Random, tensors: list[list[Any]], names: Sequence[str]) -> str:
    if rng.random() < 0.05:
        tensors.clear()
        return "no tensors"
    return f"{tensors.pop(rng.randrange(len(tensors)))[0]} removed"


def _add(rng: random.Random, tensors: list[list[Any]], names: Sequence[str]) -> str:
    tensor = copy.deepcopy(rng.choice(tensors))
    tensor[0] = rng.choice([*names, *mutate_json.STRINGS, tensor[0]])
    tensors.insert(rng.randrange(len(tensors) + 1), tensor)
    return f"another tensor {mutate_json.short(tensor[0])}"


def _swap(rng: random.Random, tensors: list[list[Any]], names: Sequence[str]) -> str:
    one, other = rng.choice(tensors), rng.choice(tensors)
    one[0], other[0] = other[0], one[0]
    return f"{one[0]} and {other[0]} swapped"


_CHANGES = (_rename, _rename, _retype, _reshape, _reshape, _revalue, _remove, _add, _swap)


def _fit(tensor: list[Any]) -> None:
    """Cuts or fills the data to what type and shape ask for, as far as that is a sensible size."""
    size = math.prod(tensor[2]) * DTYPES[tensor[1]]
    if size < 1 << 22:
        tensor[3] = (tensor[3] + bytes(max(0, size - len(tensor[3]))))[:size]
