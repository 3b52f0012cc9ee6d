# SPDX-License-Identifier: Apache-2.0
"""Files damaged as bytes: cut, flipped, spliced, repeated, with numbers that break programs at places that count."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

from fuzz.case import SPECIAL, Special

_BOUNDARIES = (
    *(0, 1, 2, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    *(1 << 32, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 64, (1 << 64) - 1),
)
# What other kinds of file begin with.
HEADS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    *(
        b"<!DOCTYPE html>\n<html>",
        b"GGUF\x03\x00\x00\x00",
        b"PK\x03\x04",
        b"\x80\x02}q\x00.",
        b"\x80\x05",
        b"{",
        b"[",
        b"{}",
    ),
    *(b"\x1f\x8b\x08", b"\x7fELF", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x00" * 64, b"\xff" * 64, b"\n", b" "),
    *(b"\x89PNG\r\n", b"ggml", b"lmgg", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"Entry not found"),
)


def mutate(rng: random.Random, data: bytes, offsets: Sequence[int] = ()) -> tuple[bytes, str]:
    """(changed bytes, what was changed). offsets: where the format keeps lengths, counts and the like."""
    if not data:
        return rng.choice(HEADS), "other bytes"
    change = rng.choices(
        (_cut, _flip, _insert, _delete, _splice, _repeat, _number, _fill, _head, _text), (4, 8, 4, 4, 4, 3, 8, 3, 2, 2)
    )[0]
    return change(rng, data, offsets)


def special(rng: random.Random) -> Special:
    """No regular file. A pipe costs the whole time limit where it is opened, so it is rare."""
    return Special(rng.choices(SPECIAL, [1 if kind in ("fifo", "zero device") else 20 for kind in SPECIAL])[0])


def _place(rng: random.Random, data: bytes, offsets: Sequence[int]) -> int:
    known = [offset for offset in offsets if offset < len(data)]
    if known and rng.random() < 0.7:
        return rng.choice(known)
    return rng.randrange(len(data)) if rng.random() < 0.6 else rng.randrange(min(len(data), 256))


def _cut(rng: random.Random, data: bytes, offsets: Sequence[int]) -> tuple[bytes, str]:
    at = rng.choice([int(len(data) * rng.random() ** 3), len(data) - 1, len(data) - rng.randrange(min(64, len(data)))])
    return data[:at], f"cut at {at}"


def _flip(rng: random.Random, data: bytes, offsets: Sequence[int]) -> tuple[bytes, str]:
    changed = bytearray(data)
    count = rng.choice([1, 1, 1, 2, 8, 64])
    first = _place(rng, data, offsets)
    changed[first] ^= 1 << rng.randrange(8)
    for _ in range(count - 1):
        changed[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(changed), f"{count} bytes changed, one at {first}"


def _insert(rng: random.Random, data: bytes, offsets: Sequence[int]) -> tuple[bytes, str]:
    at, size = _place(rng, data, offsets), rng.choice([1, 2, 8, 64, 4096])
    return data[:at] + rng.randbytes(size) + data[at:], f"{size} bytes put in at {at}"


def _delete(rng: random.Random, data: bytes, offsets: Sequence[int]) -> tuple[bytes, str]:
    at, size = _place(rng, data, offsets), rng.choice([1, 2, 8, 64, 4096])
    return data[:at] + data[at + size :], f"{size} bytes removed at {at}"


def _splice(rng: random.Random, data: bytes, offsets: Sequence[int]) -> tuple[bytes, str]:
    source, at, size = rng.randrange(len(data)), _place(rng, data, offsets), rng.choice([1, 4, 8, 64, 1024])
    part = data[source : source + size]
    return data[:at] + part + data[at + len(part) :], f"{size} bytes of {source} at {at}"


def _repeat(rng: random.Random, data: bytes, offsets: Sequence[int]) -> tuple[bytes, str]:
    at, size, times = _place(rng, data, offsets), rng.choice([1, 8, 64]), rng.choice([2, 10, 1000])
    return data[:at] + data[at : at + size] * times + data[at + size :], f"{size} bytes at {at} {times} times"


def _number(rng: random.Random, data: bytes, offsets: Sequence[int]) -> tuple[bytes, str]:
    at, number = _place(rng, data, offsets), rng.choice(_BOUNDARIES)
    form = rng.choice(["<Q", "<Q", "<I", "<H", "<B", ">I"])
    size = struct.calcsize(form)
    packed = struct.pack(form, number & ((1 << 8 * size) - 1))
    return data[:at] + packed + data[at + size :], f"the number {number} at {at} ({form})"


def _fill(rng: random.Random, data: bytes, offsets: Sequence[int]) -> tuple[bytes, str]:
    at, size, byte = _place(rng, data, offsets), rng.choice([1, 8, 64, 1024]), rng.choice([0, 255, 0x7F, 0x20, 0x0A])
    return data[:at] + bytes([byte]) * size + data[at + size :], f"{size} bytes {byte} at {at}"


def _head(rng: random.Random, data: bytes, offsets: Sequence[int]) -> tuple[bytes, str]:
    head = rng.choice(HEADS)
    return head + data[rng.choice([0, len(head), len(data)]) :], f"begins with {head[:12]!r}"


def _text(rng: random.Random, data: bytes, offsets: Sequence[int]) -> tuple[bytes, str]:
    """As other programs would save it, where it is text."""
    encoding = rng.choice(["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030", "utf-7"])
    return data.decode("utf-8", "replace").encode(encoding, "replace"), f"as {encoding}"
