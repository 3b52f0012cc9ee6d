# SPDX-License-Identifier: Apache-2.0
"""The safetensors container: parsed with suspicion, mapped, never copied. format.py builds the .cnl on it."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from cnllama.errors import InputError
from cnllama.files import Output
from cnllama.mapped import WatchedFile
from cnllama.paths import read_bytes
from cnllama.signatures import HEAD, what_it_is
from cnllama.space import check_space

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
_MAX_DIGITS = 400  # of an integer; the largest float has 309
_MAX_DEPTH = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

Bytes = npt.NDArray[np.uint8]
_Writer = TypeVar("_Writer", bound="TensorWriter")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} occurs twice")
    return result


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits:.80} is larger than any number")
    return value


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _check_characters(text: str, value: object, names: bool) -> None:
    """Raises ValueError for half a surrogate pair, which can be written as an escape and is no character."""
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape" if names else "strict")


def parse_json(text: str | bytes, what: str, names: bool = False) -> Any:
    """Strict JSON in UTF-8: no key twice, no number beyond the floats, no half characters, no nesting without end.

    names: texts may be names of files, in which Python spells bytes that are no text as half characters. Raises
    InputError, which `what` begins.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer, parse_float=_real
        )
        if _is_deep(value):
            raise RecursionError
        _check_characters(text, value, names)
        return value
    except RecursionError:
        raise InputError(f"{what} is nested too deeply to be valid; the file is damaged") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 (byte {error.start}); save it as UTF-8, or get it again") from None
    except UnicodeEncodeError:
        raise InputError(f"{what} holds half a surrogate pair, which is no character; get it again") from None
    except ValueError as error:
        raise InputError(f"{what} is not valid JSON ({error}); the file is damaged, get it again") from None


def read_json(path: Path, names: bool = False) -> dict[str, Any]:
    """The object in a small JSON file. Raises InputError when it is no regular file, too long, or no object.

    names: as for parse_json; files that we write ourselves hold some.
    """
    data = read_bytes(path, MAX_HEADER_BYTES)
    contents = what_it_is(data[:HEAD], text=True)
    if contents is not None:
        raise InputError(f"{path}: {contents}")
    value = parse_json(data.removeprefix(b"\xef\xbb\xbf"), f"{path}: the file", names)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def is_count(value: object, low: int = 0, high: int = 1 << 62) -> bool:
    """Whether `value` is an integer (no bool) within low .. high."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object) -> bool:
    """Whether `value` is a finite number of JSON (no bool)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; begin and end count from the start of the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A validated, mapped safetensors file.

    Raises InputError when a length, offset, shape or dtype is not what the format allows: the data area must be covered
    by the tensors without holes or overlaps, exactly to the end of the file.
    """

    def __init__(self, path: str | os.PathLike[str], max_header: int = MAX_HEADER_BYTES) -> None:
        self.path = Path(path)
        self._file = WatchedFile(path)
        self._map, self.bytes = self._file.map()
        self._keeps_pages = False
        self.size = self._file.size
        self.header = self._read_header(max_header)
        self.data_begin = 8 + len(self.header)
        table = parse_json(self.header, f"{self.path}: the header")
        if not isinstance(table, dict):
            self.refuse("the header is no JSON object", "this is no safetensors file")
        self.metadata = self._check_metadata(table.pop("__metadata__", {}))
        self.entries = {name: self._check_entry(name, info) for name, info in table.items()}
        self._check_cover()

    def check_unchanged(self, same: Callable[[], bool] | None = None) -> None:
        """Raises FileChangedError when the file was written to since it was opened; see WatchedFile."""
        self._file.check_unchanged(same)

    def view(self, name: str) -> Bytes:
        """The bytes of a tensor: a read-only uint8 view of the map. What they say is certain after check_unchanged."""
        entry = self.entries[name]
        return self.bytes[entry.begin : entry.end]

    @property
    def address(self) -> int:
        """Where `bytes` begins in this process."""
        return int(self.bytes.ctypes.data)

    def keep_pages(self) -> None:
        """Makes `release` do nothing from now on: pages of the map may no longer be the file's, and would be lost."""
        self._keeps_pages = True

    def release(self, begin: int, end: int) -> None:
        """Drops the pages that hold bytes begin .. end of the file from memory; reading them again brings them back."""
        begin -= begin % mmap.PAGESIZE
        if hasattr(self._map, "madvise") and end > begin and not self._keeps_pages:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def advise_huge_pages(self) -> None:
        """Asks for large pages, which save page-table walks when all weights are read for every token."""
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel built without them
                return

    def refuse(self, found: str, mend: str) -> NoReturn:
        """Raises InputError naming this file."""
        raise InputError(f"{self.path}: {found}; {mend}")

    def _read_header(self, max_header: int) -> bytes:
        start = self.bytes[:8].tobytes()
        if self.size < 10:
            self.refuse(f"the file has {self.size} bytes, too few for any safetensors file", "make it again")
        length = int.from_bytes(start, "little")
        if not 2 <= length <= max_header or self.bytes[8] != ord("{"):
            contents = what_it_is(self.bytes[:HEAD].tobytes())
            if contents is not None:
                self.refuse(f"this is {contents.what}, expected a safetensors file", contents.mend)
            self.refuse(f"it begins with {start!r}, which starts no safetensors header", "expected a safetensors file")
        if 8 + length > self.size:
            self.refuse(
                f"the header is {length:,} bytes long but the file ends after {self.size:,}",
                "it was cut off, get it again",
            )
        header = self.bytes[8 : 8 + length].tobytes()
        self.check_unchanged()
        return header

    def _check_metadata(self, value: object) -> dict[str, str]:
        if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
            return value
        self.refuse("__metadata__ in the header is no map of strings", "the file is damaged")

    def _check_entry(self, name: str, info: object) -> Entry:
        damaged = "the file is damaged, get it again"
        if not name.isprintable():
            self.refuse(f"a tensor is called {name!r:.80}", damaged)
        if not isinstance(info, dict):
            self.refuse(f"the header's entry of {name!r} is no object", damaged)
        dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            self.refuse(f"tensor {name!r} has dtype {dtype!r:.40}, expected one of {', '.join(DTYPE_BYTES)}", damaged)
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(is_count(extent) for extent in shape):
            self.refuse(f"tensor {name!r} has shape {shape!r:.80}, expected a short list of sizes", damaged)
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(offset) for offset in offsets):
            self.refuse(f"tensor {name!r} has data_offsets {offsets!r:.80}, expected two positions", damaged)
        begin, end = offsets
        room = self.size - self.data_begin
        if begin > end or end > room:
            self.refuse(
                f"tensor {name!r} claims bytes {begin:,} to {end:,} of a data area of {room:,}",
                "the file was cut off or is damaged, get it again",
            )
        expected = math.prod(shape) * DTYPE_BYTES[dtype]
        if end - begin != expected:
            self.refuse(f"tensor {name!r} has {end - begin:,} bytes but its shape asks for {expected:,}", damaged)
        return Entry(dtype, tuple(shape), self.data_begin + begin, self.data_begin + end)

    def _check_cover(self) -> None:
        position = self.data_begin
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != position:
                found = "overlaps another" if entry.begin < position else "has a hole before it"
                self.refuse(f"tensor {name!r} {found} at byte {entry.begin:,}", "the file is damaged, get it again")
            position = entry.end
        if position != self.size:
            self.refuse(
                f"the tensors end at byte {position:,} but the file has {self.size:,}",
                "the file is damaged, get it again",
            )


class TensorWriter:
    """The tensors of a file, streamed to a temporary name that becomes the final one when all are there.

    sizes: name -> bytes, in file order. data_begin: where the first tensor begins, after the header. alignment: bytes;
    zeros after a tensor bring the next one, or the end of the file, to a multiple of it. Tensors are written in order,
    each in pieces of any size. An exception leaves no file. Raises CnllamaError for a full disk and InputError for a
    place that cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], sizes: Mapping[str, int], data_begin: int, alignment: int = 1
    ) -> None:
        self.path = Path(path)
        self._alignment = alignment
        self.size = data_begin + sum(round_up(size, alignment) for size in sizes.values())
        check_space(self.path, self.size)
        self._order = iter(sizes.items())
        self._name, self._left = "", 0
        self._position = data_begin
        self._output = Output(self.path)

    def __enter__(self: _Writer) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._output.__exit__(kind, error, traceback)

    def write(self, name: str, chunk: Bytes | bytes) -> None:
        """Appends bytes to tensor `name`. Raises ValueError for a wrong order or too many bytes, CnllamaError when the
        disk is full.
        """
        if self._left == 0:
            self._name, self._left = next(self._order, ("", 0))
        if name != self._name:
            raise ValueError(f"{name} was written where {self._name or 'nothing'} was due")
        data = np.ascontiguousarray(chunk).data.cast("B") if isinstance(chunk, np.ndarray) else memoryview(chunk)
        if len(data) > self._left:
            raise ValueError(f"{name} has {len(data) - self._left} bytes too many")
        self._append(data)
        self._left -= len(data)
        if self._left == 0:
            self._append(memoryview(bytes(round_up(self._position, self._alignment) - self._position)))

    def _append(self, data: memoryview) -> None:
        self._output.write(data, self._position)
        self._position += len(data)

    def _check_complete(self) -> None:
        if self._position != self.size:
            raise ValueError(f"the file ends at byte {self._position} instead of {self.size}: a tensor is missing")


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
