# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: single values of its metadata, and type and bytes of every tensor."""

from __future__ import annotations

import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cnllama.container import is_count, round_up
from cnllama.errors import InputError, from_os_error
from cnllama.paths import check_name

FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FILE_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 14: "q4_k_s", 15: "q4_k_m", 32: "bf16"}
VERSIONS = (2, 3)
# More than any file of use has; what stays under them is read within seconds.
MAX_PAIRS, MAX_TENSORS, MAX_STRINGS = 1 << 16, 1 << 16, 1 << 20
MAX_STRING, MAX_NAME = 1 << 26, 1 << 16
MAX_DIMENSIONS, MAX_EXTENT, MAX_ALIGNMENT = 8, 1 << 40, 1 << 20
_ALIGNMENT = "general.alignment"


class _DamagedError(Exception):
    """What is wrong with a header, for the sentence."""


@dataclass(frozen=True)
class GGUF:
    """values: metadata that are single values; arrays are left out. tensors: name -> bytes.

    kinds: name -> (number of its GGML type, number of its values).
    """

    path: Path
    size: int
    values: dict[str, Any]
    tensors: dict[str, int]
    kinds: dict[str, tuple[int, int]]

    @property
    def type_name(self) -> str:
        """What kind of quantization the file says it holds."""
        kind: Any = self.values.get("general.file_type")
        return FILE_TYPES.get(int(kind), f"type-{kind}") if is_count(kind) else self.path.stem.lower()

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one decoding step reads."""
        unread = {"token_embd.weight"} if "output.weight" in self.tensors else set()
        return sum(size for name, size in self.tensors.items() if name not in unread)

    @property
    def kv_bytes(self) -> int:
        """Bytes of fp16 keys and values of one position. Raises InputError for what is no LLaMA."""
        heads = self._number("llama.attention.head_count")
        size = self._number("llama.attention.key_length", self._number("llama.embedding_length") // heads)
        kv_heads = self._number("llama.attention.head_count_kv", heads)
        return 4 * self._number("llama.block_count") * kv_heads * size

    def _number(self, key: str, default: int | None = None) -> int:
        """A size that the metadata must hold; the default where they lack it."""
        value: Any = self.values.get(key, default)
        if not is_count(value, 1, 1 << 20):
            found = f"{key} is {value!r:.40}" if value is not None else f"there is no {key}"
            raise InputError(f"{self.path}: the GGUF describes no LLaMA ({found}); export it again")
        return int(value)


def read_gguf(path: Path) -> GGUF:
    """Reads the header. Raises InputError for a file that is no GGUF, is damaged or is cut short."""
    check_name(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # a pipe would wait for its writer
            raise InputError(f"{path}: this is no regular file; give the path of a GGUF file")
        with path.open("rb") as file:
            reader = _Reader(file, status.st_size)
            if reader.take(min(4, status.st_size)) != b"GGUF":
                raise InputError(f"{path}: this is no GGUF file; make one with: cnllama export FILE.cnl --to gguf")
            values, table = reader.header()
            begin = _round_up(file.tell(), values)
    except OSError as error:
        raise from_os_error(path, error) from error
    except _DamagedError as error:
        raise InputError(f"{path}: the header of this GGUF file is damaged ({error}); get the file again") from error
    # A tensor ends where the next one begins: no table of types is needed.
    ends = sorted(offset for offset, _, _ in table.values())
    if len(set(ends)) < len(ends):
        raise InputError(f"{path}: two tensors begin at the same byte; get the file again")
    after = dict(zip(ends, [*ends[1:], status.st_size - begin], strict=True)) if ends else {}
    if any(end < offset for offset, end in after.items()):
        raise InputError(f"{path}: the file ends before its tensors do; get it again")
    sizes = {name: after[offset] - offset for name, (offset, _, _) in table.items()}
    kinds = {name: (kind, count) for name, (_, kind, count) in table.items()}
    return GGUF(path, status.st_size, values, sizes, kinds)


def _round_up(position: int, values: dict[str, Any]) -> int:
    alignment = values.get(_ALIGNMENT, 32)
    if not is_count(alignment, 1, MAX_ALIGNMENT) or alignment & (alignment - 1):
        raise _DamagedError(f"{_ALIGNMENT} is {alignment!r:.40}, expected a power of two up to {MAX_ALIGNMENT:,}")
    return round_up(position, alignment)


class _Reader:
    """Reads the parts of a header one after the other, none beyond the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def header(self) -> tuple[dict[str, Any], dict[str, tuple[int, int, int]]]:
        """(single values by key, {name of a tensor: (offset, number of the type, number of values)})."""
        version, tensors, pairs = struct.unpack("<IQQ", self.take(20))
        if version not in VERSIONS:
            raise _DamagedError(f"its version is {version}, expected one of {', '.join(map(str, VERSIONS))}")
        if pairs > MAX_PAIRS or tensors > MAX_TENSORS:
            raise _DamagedError(f"it counts {pairs:,} values and {tensors:,} tensors")
        values: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._new_name(values)
            values[key] = self._value(self._scalar(4))
        table: dict[str, tuple[int, int, int]] = {}
        for _ in range(tensors):
            name = self._new_name(table)
            table[name] = self._tensor(name)
        return {key: value for key, value in values.items() if value is not None}, table

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self._use(count)
        data = self._file.read(count)
        if len(data) != count:
            raise _DamagedError("it is cut short")
        return data

    def _use(self, count: int) -> None:
        if count > self._left:
            raise _DamagedError("it is cut short")
        self._left -= count

    def _scalar(self, kind: int) -> Any:
        if kind not in FORMATS:
            raise _DamagedError(f"a value has type {kind}")
        code = "<" + FORMATS[kind]
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def _string(self, most: int = MAX_STRING) -> str:
        length = self._scalar(10)
        if length > most:
            raise _DamagedError(f"a text of {length:,} bytes")
        return self.take(length).decode("utf-8", "replace")

    def _new_name(self, known: dict[str, Any]) -> str:
        name = self._string(MAX_NAME)
        if name in known:
            raise _DamagedError(f"{name!r:.60} occurs twice")
        return name

    def _value(self, kind: int) -> Any:
        """A single value, None for an array."""
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(kind)
        inner, count = self._scalar(4), self._scalar(10)
        if inner == ARRAY:
            raise _DamagedError("an array of arrays")
        if inner != STRING and inner not in FORMATS:
            raise _DamagedError(f"an array of type {inner}")
        size = count * (8 if inner == STRING else struct.calcsize("<" + FORMATS[inner]))
        if size > self._left or (inner == STRING and count > MAX_STRINGS):
            raise _DamagedError(f"an array of {count:,} values")
        if inner != STRING:
            self._use(size)
            self._file.seek(size, os.SEEK_CUR)
            return None
        for _ in range(count):
            length = self._scalar(10)
            self._use(length)
            self._file.seek(length, os.SEEK_CUR)
        return None

    def _tensor(self, name: str) -> tuple[int, int, int]:
        """(offset, number of the type, number of values)."""
        dimensions = self._scalar(4)
        if dimensions > MAX_DIMENSIONS:
            raise _DamagedError(f"{name!r:.60} has {dimensions:,} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))
        count = math.prod(shape)
        if max(shape, default=0) > MAX_EXTENT or count > 1 << 62:
            raise _DamagedError(f"{name!r:.60} has shape {list(shape)}")
        kind = self._scalar(4)
        return int(self._scalar(10)), int(kind), count
