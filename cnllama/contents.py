# SPDX-License-Identifier: Apache-2.0
"""What files hold, as SHA-256: by that a kept result is known to be the one that is asked for.

Hashes are remembered in $XDG_CACHE_HOME/cnllama (~/.cache/cnllama) for as long as device, inode, size and both times of
a file stay the same. Nothing depends on that file: without it, or when it is damaged, files are read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cnllama import files
from cnllama.container import parse_json
from cnllama.errors import CnllamaError, InputError, from_os_error
from cnllama.paths import is_dir, is_file, open_regular, read_bytes

_CHUNK = 1 << 22
_FILE = "hashes"  # its own hash, then rows of JSON
_ENTRIES = 4096  # the newest are kept
_MAX_CACHE = 1 << 21
# A file may change again within the same tick of its file system's clock: one so young is not remembered.
_YOUNG_NS = 2_000_000_000
_MAX_FILES = 100_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Reading these takes no longer than looking them up.
_SMALL = 1 << 22
# Weights may have any name, which their index gives; optimizers and the like end in .bin, too.
_MODEL_FILES = re.compile(
    r"(config|generation_config|adapter_config|chat_template)\.json|chat_template\.jinja"
    r"|tokenizer\.(model|json)|(tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|.+\.safetensors|(?!training_args|optimizer|scheduler).+\.bin|.+\.(safetensors|bin)\.index\.json",
    re.DOTALL,
)

Advance = Callable[[int], object]
Key = tuple[int, int, int, int, int]


def file_sha256(path: Path, advance: Advance = lambda _: None) -> str:
    """The hash of a file's bytes, hexadecimal; read a piece at a time, or remembered. Raises InputError.

    advance: called with the bytes of every piece, of the whole file at once when it is remembered.
    """
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        key = _key(before)
        known = _cache.get(key) if before.st_size > _SMALL else None
        if known is not None:
            advance(before.st_size)
            return known
        digest = hashlib.sha256()
        started = time.time_ns()
        try:
            while data := file.read(_CHUNK):
                digest.update(data)
                advance(len(data))
        except OSError as error:
            raise from_os_error(path, error) from None
        settled = started - max(before.st_mtime_ns, before.st_ctime_ns) > _YOUNG_NS
        # Should it change while it is read, its key does, too.
        if settled and before.st_size > _SMALL:
            _cache.put(key, digest.hexdigest())
    return digest.hexdigest()


def contents(path: Path, advance: Advance = lambda _: None) -> dict[str, str]:
    """Relative name -> hash of a file ("" is its name), or of the files in a directory that decide anything.

    Of a checkpoint, adapter or tokenizer these are the model's own files, so that logs and pictures beside them are
    nobody's business; of another directory all regular files, at any depth. Raises InputError.
    """
    if not is_dir(path):
        return {"": file_sha256(path, advance)}
    return {name: file_sha256(path / name, advance) for name in deciding_files(path)}


def deciding_files(directory: Path) -> list[str]:
    """Names of a model's own files in a directory, of all files in and under it where it holds no model."""
    try:
        own = sorted(name for name in os.listdir(directory) if _MODEL_FILES.fullmatch(name))
    except OSError as error:
        raise from_os_error(directory, error) from None
    if own:
        return own
    found: list[str] = []
    for folder, inner, names in os.walk(directory):
        inner.sort()
        for name in names:
            path = Path(folder, name)
            if is_file(path) and not files.is_temporary(name):
                found.append(path.relative_to(directory).as_posix())
        if len(found) > _MAX_FILES:
            raise InputError(f"{directory}: holds more than {_MAX_FILES:,} files, expected the data of one run")
    return sorted(found)


def content_key(paths: Iterable[Path]) -> str:
    """One hash of the contents of files and directories, in this order; their own names do not count."""
    return hashlib.sha256(json.dumps([contents(path) for path in paths]).encode("utf-8")).hexdigest()


def _key(status: os.stat_result) -> Key:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def cache_directory() -> Path | None:
    """$XDG_CACHE_HOME/cnllama, by the XDG rules: a relative path counts as none. None where there is no home either."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "cnllama"
    with suppress(RuntimeError, InputError):
        home = Path.home()
        return home / ".cache" / "cnllama" if is_dir(home) else None
    return None


class _Cache:
    """The remembered hashes of this user. A reader takes the file as it is; a writer adds to what is there now.

    Two writers at the same time may forget an entry of each other, and never anything else: the file is replaced whole.
    """

    def get(self, key: Key) -> str | None:
        return dict(self._read()).get(key)

    def put(self, key: Key, digest: str) -> None:
        directory = cache_directory()
        if directory is None:
            return
        entries = [(k, d) for k, d in self._read() if k[:2] != key[:2]][1 - _ENTRIES :]
        rows = json.dumps([[*k, d] for k, d in [*entries, (key, digest)]]).encode()
        with suppress(CnllamaError):  # a place that cannot be written: then it is read again next time
            files.make_directory(directory)
            files.write_file(directory / _FILE, hashlib.sha256(rows).hexdigest().encode() + b"\n" + rows)

    def _read(self) -> list[tuple[Key, str]]:
        directory = cache_directory()
        if directory is None:
            return []
        try:
            own, _, data = read_bytes(directory / _FILE, _MAX_CACHE).partition(b"\n")
            rows = parse_json(data, _FILE) if own.decode("ascii") == hashlib.sha256(data).hexdigest() else None
        except (CnllamaError, ValueError):
            return []
        return [((r[0], r[1], r[2], r[3], r[4]), r[5]) for r in rows if _is_row(r)] if isinstance(rows, list) else []


def _is_row(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 6 or not isinstance(row[5], str):
        return False
    return all(type(value) is int for value in row[:5]) and _SHA256.fullmatch(row[5]) is not None


_cache = _Cache()
