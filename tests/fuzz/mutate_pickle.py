# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save damaged as what they are: a zip archive, the opcodes of its pickle, their integers and names."""

from __future__ import annotations

import io
import pickletools
import random
import struct
import zipfile

from fuzz import mutate_bytes, mutate_json

_GLOBALS = (
    *(
        "os system",
        "builtins eval",
        "builtins getattr",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
    ),
    *(
        "torch._utils _rebuild_sparse_tensor",
        "torch._utils _rebuild_meta_tensor_no_storage",
        "torch._utils _rebuild_qtensor",
    ),
    *(
        "torch FloatStorage",
        "torch LongStorage",
        "torch BFloat16Storage",
        "torch.storage UntypedStorage",
        "torch float16",
    ),
    *(
        "collections OrderedDict",
        "collections Counter",
        "__builtin__ set",
        "_codecs encode",
        "torch Size",
        "torch device",
    ),
    *(
        "torch.nn.parameter Parameter",
        "torch._tensor _rebuild_from_type_v2",
        "torch Tensor",
        "x y",
        " ",
        "torch._utils x",
    ),
)
_OPCODES = (
    *(
        b")",
        b"]",
        b"}",
        b"(",
        b"0",
        b"1",
        b"2",
        b"N",
        b"R",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"u",
        b"s",
        b"e",
        b"a",
        b"b",
    ),
    *(
        b"Q",
        b".",
        b"\x88",
        b"\x89",
        b"\x81",
        b"\x93",
        b"\x94",
        b"h\x00",
        b"h\xff",
        b"j\xff\xff\xff\x7f",
        b"r\xff\xff\xff\x7f",
    ),
    *(
        b"\x80\x05",
        b"\x95" + b"\xff" * 8,
        b"K\x01",
        b"\x8a\xff" + b"\x7f" * 255,
        b"\x8b\xff\xff\xff\x7f",
        b"P1\n",
        b"c\n\n",
    ),
    *(
        b"\x8d" + struct.pack("<Q", 1 << 62),
        b"B\xff\xff\xff\x7f",
        b"X\xff\xff\xff\x7f",
        b"(" * 2000,
        b"]" * 50_000,
        b"}" * 500,
    ),
    *(b"G" + struct.pack(">d", float("nan")), b"i\n\n", b"o", b"\x82\x01", b"\x97", b"\xff"),
)
_INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    48,
    64,
    330,
    1 << 20,
    (1 << 31) - 1,
    -(1 << 31),
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    1 << 200,
)


def mutate(rng: random.Random, data: bytes) -> tuple[bytes, list[str]]:
    """(changed file, what was changed)."""
    if rng.random() < 0.12:
        changed, step = mutate_bytes.mutate(rng, data, [0, 4, len(data) - 22, len(data) - 6])
        return changed, [step]
    if not zipfile.is_zipfile(io.BytesIO(data)):  # as torch before 1.6 wrote it: pickles one after the other
        return opcodes(rng, data)
    entries = _entries(data)
    if rng.random() < 0.25:
        return archive(rng, entries)
    name = next(name for name in entries if name.endswith("data.pkl"))
    entries[name], steps = opcodes(rng, entries[name])
    return _zip(list(entries.items())), steps


def _entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def _zip(entries: list[tuple[str, bytes]], compressed: bool = False) -> bytes:
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", kind) as file:
        for name, content in entries:
            file.writestr(zipfile.ZipInfo(name), content, kind)
    return out.getvalue()


def archive(rng: random.Random, entries: dict[str, bytes]) -> tuple[bytes, list[str]]:
    """Another set of entries, or entries cut short."""
    items = list(entries.items())
    which = rng.randrange(len(items))
    name, content = items[which]
    kind = rng.randrange(7)
    if kind == 0:
        del items[which]
        return _zip(items), [f"zip: {name} removed"]
    if kind == 1:
        items[which] = (name, content[: rng.randrange(len(content) + 1)])
        return _zip(items), [f"zip: {name} cut"]
    if kind == 2:
        items.append(
            (rng.choice([name + "x", "../../x", "/x", "archive/data.pkl", "constants.pkl", "x" * 5000]), content)
        )
        return _zip(items), ["zip: another entry"]
    if kind == 3:
        items[which] = (name.replace("/", rng.choice(["//", "", "\\"]), 1), content)
        return _zip(items), [f"zip: {name} renamed"]
    if kind == 4:
        items[which] = (name, rng.choice(mutate_bytes.HEADS) * rng.choice([1, 100]))
        return _zip(items), [f"zip: {name} is other bytes"]
    if kind == 5:
        return _zip(items, compressed=True), ["zip: compressed"]
    data = bytearray(_zip(items))
    at = data.find(b"PK\x01\x02") + rng.randrange(46)  # the directory: sizes, offsets, flags
    data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF]))
    return bytes(data), [f"zip: its directory changed at {at}"]


def opcodes(rng: random.Random, data: bytes) -> tuple[bytes, list[str]]:
    """Opcodes of the pickle (or of the first ones of several) removed, doubled, put in, or given other arguments."""
    parts, rest = _split(data)
    steps = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        which = rng.randrange(len(parts))
        kind = rng.randrange(10)
        if kind == 0:
            del parts[which : which + rng.choice([1, 1, 4])]
            steps.append(f"opcode {which} removed")
        elif kind == 1:
            parts.insert(which, parts[rng.randrange(len(parts))])
            steps.append(f"another opcode at {which}")
        elif kind == 2:
            parts.insert(which, rng.choice(_OPCODES))
            steps.append(f"{parts[which][:10]!r} at {which}")
        else:
            where = [i for i, part in enumerate(parts) if part[:1] in b"KMJ\x8aXc\x8c"]
            if where:
                which = rng.choice(where)
                parts[which] = _argument(rng, parts[which])
                steps.append(f"opcode {which} is {mutate_json.short(parts[which][:40])}")
        if not parts:
            break
    return b"".join(parts) + rest, steps


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """(the opcodes of all pickles at the beginning, what follows them)."""
    parts: list[bytes] = []
    stream = io.BytesIO(data)
    try:
        while stream.tell() < len(data):
            begin = stream.tell()
            starts = [begin + position for _, _, position in pickletools.genops(data[begin:])]
            end = data.index(b".", starts[-1]) + 1
            parts += [data[a:b] for a, b in zip(starts, [*starts[1:], end], strict=True)]
            stream.seek(end)
    except ValueError:
        return parts, data[begin:]
    return parts, b""


def _argument(rng: random.Random, part: bytes) -> bytes:
    if part[:1] == b"c":
        module, name = rng.choice(_GLOBALS).split(" ")
        return f"c{module}\n{name}\n".encode()
    if part[:1] in b"X\x8c":
        text = rng.choice(
            [rng.choice(mutate_json.STRINGS), "cuda:0", "meta", "cpu", "0", "model.norm.weight", "storage"]
        )
        encoded = text.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", rng.choice([len(encoded), len(encoded), len(encoded) + 1])) + encoded
    number = rng.choice(_INTEGERS)
    size = (number.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + number.to_bytes(size, "little", signed=True)
