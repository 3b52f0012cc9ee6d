# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: single values of its metadata, and type and bytes of every tensor."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cnllama.errors import InputError

FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FILE_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 14: "q4_k_s", 15: "q4_k_m", 32: "bf16"}
MAX_STRING, MAX_COUNT = 1 << 26, 1 << 26


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
        kind = self.values.get("general.file_type")
        return FILE_TYPES.get(kind, f"type-{kind}") if isinstance(kind, int) else self.path.stem.lower()

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one decoding step reads."""
        unread = {"token_embd.weight"} if "output.weight" in self.tensors else set()
        return sum(size for name, size in self.tensors.items() if name not in unread)

    @property
    def kv_bytes(self) -> int:
        """Bytes of fp16 keys and values of one position. Raises InputError for what is no LLaMA."""
        try:
            heads = self.values["llama.attention.head_count"]
            size = self.values.get("llama.attention.key_length") or self.values["llama.embedding_length"] // heads
            kv_heads = self.values.get("llama.attention.head_count_kv", heads)
            return int(4 * self.values["llama.block_count"] * kv_heads * size)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise InputError(f"{self.path}: the GGUF describes no LLaMA ({error!r}); export it again") from error


def read_gguf(path: Path) -> GGUF:
    """Reads the header. Raises InputError for a file that is no GGUF or is cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path}: this is no GGUF file; make one with: cnllama export FILE.cnl --to gguf")
            _, tensors, pairs = struct.unpack("<IQQ", _take(file, 20))
            if max(tensors, pairs) > MAX_COUNT:
                raise ValueError("counts")
            values: dict[str, Any] = {}
            for _ in range(pairs):
                key = _string(file)
                value = _value(file, _scalar(file, 4))
                if value is not None:
                    values[key] = value
            table = [_tensor(file) for _ in range(tensors)]
            alignment = values.get("general.alignment", 32)
            begin = -(-file.tell() // alignment) * alignment
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the path of a GGUF file") from error
    except (ValueError, KeyError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the header of this GGUF file is damaged; get the file again") from error
    # A tensor ends where the next one begins: no table of types is needed.
    ends = sorted(offset for _, offset, _, _ in table)
    after = dict(zip(ends, [*ends[1:], size - begin], strict=True)) if ends else {}
    if any(end < offset for offset, end in after.items()):
        raise InputError(f"{path}: the file ends before its tensors do; get it again")
    sizes = {name: after[offset] - offset for name, offset, _, _ in table}
    return GGUF(path, size, values, sizes, {name: (kind, count) for name, _, kind, count in table})


def _take(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError("cut short")
    return data


def _scalar(file: BinaryIO, kind: int) -> Any:
    code = "<" + FORMATS[kind]
    return struct.unpack(code, _take(file, struct.calcsize(code)))[0]


def _string(file: BinaryIO) -> str:
    length = _scalar(file, 10)
    if length > MAX_STRING:
        raise ValueError("string")
    return _take(file, length).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _scalar(file, kind)
    inner, count = _scalar(file, 4), _scalar(file, 10)
    if count > MAX_COUNT or inner == ARRAY:
        raise ValueError("array")
    if inner == STRING:
        for _ in range(count):
            _string(file)
    else:
        _take(file, count * struct.calcsize("<" + FORMATS[inner]))
    return None


def _tensor(file: BinaryIO) -> tuple[str, int, int, int]:
    """(name, offset, number of the type, number of values)."""
    name = _string(file)
    dimensions = _scalar(file, 4)
    if dimensions > 8:
        raise ValueError("dimensions")
    count = math.prod(struct.unpack(f"<{dimensions}Q", _take(file, 8 * dimensions)))
    kind = _scalar(file, 4)
    return name, int(_scalar(file, 10)), int(kind), count
