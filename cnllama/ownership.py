# SPDX-License-Identifier: Apache-2.0
"""Directories that cnllama fills: a record in them names every file that we wrote, so that only those are ever removed.

The record is `.cnllama.json`. A file is entered, with its size and time of change, before it has its name: a process
that is killed at any moment leaves nothing that cannot be cleaned up. What is not in the record, or was changed since,
is foreign: it is never removed and never overwritten.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from cnllama import files
from cnllama.container import read_json
from cnllama.errors import CnllamaError, InputError, from_os_error
from cnllama.paths import is_own_dir, read_bytes, real_path

RECORD = ".cnllama.json"
_FORMAT, _VERSION = "cnllama-directory", 1
_GROWS = "log"  # in place of identities: a log in JSON lines, known by what it holds
_MAX_LOG = 1 << 30
_LISTED = 3

Identity = tuple[int, int]  # bytes, time of change in nanoseconds
_Owned = TypeVar("_Owned", bound="OwnedDirectory")


class OwnedDirectory:
    """A directory and its record, for one process at a time. As a context manager it makes, locks and records.

    path: made if it is not there, and removed again when the block ends without having put anything into it. made_by:
    the command, for people. names: files that will be written; a foreign one of them is refused at once. alone:
    anything foreign is. wait: for another process that works there. scratch: matches the relative names of the files in
    SCRATCH, which libraries write there.

    Whatever files.py puts into the directory itself is entered; an exception leaves no SCRATCH. Raises InputError for
    what is foreign, and for a place that cannot be written; CnllamaError where another process works there.
    """

    SCRATCH = ".cnllama-scratch"

    def __init__(
        self,
        path: Path,
        made_by: str,
        *,
        names: Iterable[str] = (),
        alone: bool = False,
        wait: bool = False,
        scratch: re.Pattern[str] | None = None,
    ) -> None:
        self.path = path
        self._real = real_path(path)
        self._made_by, self._wanted, self._alone, self._wait = made_by, list(names), alone, wait
        self._scratch = scratch
        self._files: dict[str, list[Identity] | str] = {}
        self._directories: list[str] = []
        self.key: dict[str, Any] | None = None
        self._lock = -1
        self._made: list[Path] = []
        self._fresh = False

    def __enter__(self: _Owned) -> _Owned:
        self._made = files.make_directory(self.path)
        try:
            self._take_lock()
            self._load()
            self.refuse_foreign(self._wanted)
            if self._alone:
                self.refuse_strangers()
            self._sweep()
            if not os.path.lexists(self._real / RECORD):
                self._fresh = True
                self._save()  # a place that cannot be written is found out before the work
            files.set_claim(self._real, self._claim)
        except BaseException:
            self._close(failed=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(CnllamaError):  # what somebody else put there stays
                self.remove(self.SCRATCH)
        files.set_claim(self._real, None)
        self._close(failed=kind is not None)

    def is_ours(self, name: str) -> bool:
        """Whether the file of this relative name is there as we wrote it."""
        known = self._files.get(name)
        found = self._identity(name)
        if known is None or found is None:
            return False
        return _is_log(self._real / name) if isinstance(known, str) else found in known

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Raises InputError for the first of these names that is there and is not ours."""
        for name in names:
            if os.path.lexists(self._real / name) and not self.is_ours(name) and name not in self._directories:
                raise InputError(_foreign(self.path / name))

    def strangers(self, within: str = "") -> list[str]:
        """Relative names of all that is not ours: in the directory, or in one of those in it."""
        return list(self._strangers(within))

    def refuse_strangers(self, within: str = "") -> None:
        """Raises InputError naming what is foreign."""
        found = self.strangers(within)
        if found:
            raise InputError(_foreign(*(self.path / name for name in found)))

    def read(self) -> OwnedDirectory:
        """Takes the record as it is now, without a lock, for a process that only looks."""
        self._load()
        return self

    def damaged(self) -> list[str]:
        """Names of recorded files, not of logs, that are gone or have another size than when they were written."""
        sizes = {n: {size for size, _ in known} for n, known in self._files.items() if not isinstance(known, str)}
        found = {name: self._identity(name) for name in sizes}
        return [name for name, identity in found.items() if identity is None or identity[0] not in sizes[name]]

    def size(self) -> int:
        """Bytes of the files in the record, as far as they are there."""
        return sum(identity[0] for identity in map(self._identity, self._files) if identity is not None)

    def names(self) -> list[str]:
        """Relative names of the files in the record, in the order in which they were written."""
        return list(self._files)

    def directories(self) -> list[str]:
        """Relative names of the directories in the record."""
        return list(self._directories)

    def set_key(self, key: Mapping[str, Any]) -> None:
        """Keeps with the record what decides the result."""
        self.key = dict(key)
        self._save()

    def let_grow(self, name: str) -> None:
        """From now on the file is appended to: a log of JSON lines."""
        self._files[name] = _GROWS
        self._save()

    def settle(self, name: str) -> None:
        """A file that grew is finished, or a program of ours wrote it: it is entered as it is now."""
        self._files.pop(name, None)
        found = self._identity(name)
        if found is not None:
            self._files[name] = [found]
        self._save()

    def snapshot(self) -> dict[str, Identity | None]:
        """Relative name -> identity of all that is there, None for what is no regular file: before a program runs."""
        found: dict[str, Identity | None] = {}
        for path in self._real.rglob("*"):
            name = path.relative_to(self._real).as_posix()
            found[name] = None if is_own_dir(path) else self._identity(name)
        return found

    def adopt(self, before: Mapping[str, Identity | None]) -> None:
        """Enters what a program has made or changed since snapshot()."""
        for name, identity in sorted(self.snapshot().items()):
            if name == RECORD or files.is_temporary(name.rpartition("/")[2]):
                continue
            if identity is not None and before.get(name) != identity:
                self._files.pop(name, None)
                self._files[name] = [identity]
            elif name not in before and is_own_dir(self._real / name):
                self._directories = list(dict.fromkeys([*self._directories, name]))
        self._save()

    def make_scratch(self) -> Path:
        """An empty directory for a library that writes by itself. What a killed process left in it is removed."""
        self.remove(self.SCRATCH)
        return self._make(self.SCRATCH)

    def publish(self, source: Path, name: str) -> None:
        """Gives a directory in the scratch its name in this one, in one step, with all files durable and entered."""
        if os.path.lexists(self._real / name):
            raise InputError(_foreign(self.path / name))
        for path in sorted(source.rglob("*")):
            relative = f"{name}/{path.relative_to(source).as_posix()}"
            if is_own_dir(path):
                self._directories.append(relative)
            else:
                files.sync_file(path)
                self._files[relative] = [_identity_of(path.stat())]
        self._directories = list(dict.fromkeys([*self._directories, name]))
        self._files.pop(name, None)  # what had the name before, and is gone
        self._save()
        files.sync_directory(source)
        files.move(source, self._real / name)

    def publish_files(self, source: Path, last: str, leave: Iterable[str] = ()) -> None:
        """Gives the files of a directory in the scratch their names in this one, `last` after all others.

        leave: files that stay in the scratch.
        """
        names = {path.name for path in source.iterdir()} - set(leave)
        for name in sorted(names, key=lambda name: (name == last, name)):
            files.sync_file(source / name)
            files.move(source / name, self._real / name)

    def remove(self, name: str) -> None:
        """Removes a file, or a directory with all in it. Raises InputError, before anything, for what is foreign."""
        if name in self._directories:
            self.refuse_strangers(name)
            self._remove_tree(name)
        elif name in self._files:
            self.refuse_foreign([name])
            self._remove_file(name)
        else:
            return
        self._save()

    def clear(self) -> None:
        """Removes everything, what was written last first. Raises InputError, before anything, for what is foreign."""
        self.refuse_strangers()
        for name in reversed([name for name in self._files if "/" not in name]):
            self._remove_file(name)
        for name in [name for name in self._directories if "/" not in name]:
            self._remove_tree(name)
        self.key = None
        self._save()

    def delete(self) -> None:
        """Removes everything that is ours, and at the end of the block the directory."""
        self.clear()
        self._fresh, self._made = True, self._made or [self._real]

    def _strangers(self, within: str) -> Iterator[str]:
        try:
            entries = sorted(os.scandir(self._real / within), key=lambda entry: entry.name)
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_os_error(self.path / within, error) from None
        for entry in entries:
            name = f"{within}/{entry.name}" if within else entry.name
            if name == RECORD or files.is_temporary(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False) and (name in self._directories or self._in_scratch(name)):
                yield from self._strangers(name)
            elif not self.is_ours(name) and not self._in_scratch(name):
                yield name

    def _in_scratch(self, name: str) -> bool:
        """Whether a library wrote this, going by where it is and what it is called."""
        begin = self.SCRATCH + "/"
        if self._scratch is None or self.SCRATCH not in self._directories or not name.startswith(begin):
            return False
        return self._scratch.fullmatch(name.removeprefix(begin)) is not None

    def _identity(self, name: str) -> Identity | None:
        """Of a regular file; None for anything else, and where a part of the way is a link."""
        parts = name.split("/")
        try:
            for end in range(1, len(parts)):
                if not stat.S_ISDIR(os.lstat(self._real.joinpath(*parts[:end])).st_mode):
                    return None
            status = os.lstat(self._real / name)
        except OSError:
            return None
        return _identity_of(status) if stat.S_ISREG(status.st_mode) else None

    def _claim(self, name: str, status: os.stat_result | None) -> None:
        """Enters a file that is about to get its name; the one that it replaces stays ours until then."""
        if name == RECORD:
            return
        self.refuse_foreign([name])
        if status is None:
            return
        before = self._identity(name)
        self._directories = [n for n in self._directories if n != name]
        grows = self._files.pop(name, None) == _GROWS
        self._files[name] = _GROWS if grows else [*([before] if before else []), _identity_of(status)]
        self._save()

    def _make(self, name: str) -> Path:
        if name not in self._directories:
            if os.path.lexists(self._real / name):
                raise InputError(_foreign(self.path / name))
            self._directories.append(name)
            self._save()
        files.make_directory(self._real / name)
        return self._real / name

    def _remove_file(self, name: str) -> None:
        if self._identity(name) is not None:
            files.remove_file(self._real / name)
        self._files.pop(name, None)

    def _remove_tree(self, name: str) -> None:
        """A directory of which nothing is foreign: files, then directories, the innermost first."""
        top = self._real / name
        inside = sorted(top.rglob("*"), key=lambda path: len(path.parts)) if is_own_dir(top) else []
        last_first = [self._real / n for n in reversed(self._files) if n.startswith(name + "/")]
        for path in dict.fromkeys([*last_first, *inside]):
            if is_own_dir(path):
                continue
            files.remove_file(path)
        for path in (*(p for p in reversed(inside) if is_own_dir(p)), top):
            if os.path.lexists(path) and not files.remove_directory(path):
                raise CnllamaError(f"{path}: this directory cannot be removed; is something being written there?")
        self._files = {n: known for n, known in self._files.items() if not n.startswith(name + "/")}
        self._directories = [n for n in self._directories if n != name and not n.startswith(name + "/")]

    def _sweep(self) -> None:
        """Removes temporary files that a killed process left."""
        for name in os.listdir(self._real):
            if files.is_temporary(name):
                files.remove_leftover(self._real / name)

    def _take_lock(self) -> None:
        try:
            self._lock = os.open(self._real, os.O_RDONLY)
        except OSError as error:
            raise from_os_error(self.path, error) from None
        if files.try_lock(self._lock, self._wait) is False or not files.has_name(os.fstat(self._lock), self._real):
            raise CnllamaError(f"{self.path}: another cnllama works in this directory; wait for it, or choose another")

    def _close(self, failed: bool) -> None:
        if not self._files and not self._directories and (failed or self.key is None):
            if self._fresh:
                files.remove_file(self._real / RECORD)
            for directory in reversed(self._made):
                if not files.remove_directory(directory):
                    break
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _load(self) -> None:
        path = self._real / RECORD
        if not os.path.lexists(path):
            return
        record = read_json(path, names=True)
        known, directories, key = record.get("files"), record.get("directories"), record.get("key")
        if (record.get("format"), record.get("version")) != (_FORMAT, _VERSION) or not _is_record(known, directories):
            raise InputError(f"{path}: this is no record of a cnllama directory; move it away, or choose another")
        for name, value in dict(known or {}).items():
            self._files[name] = value if value == _GROWS else [(size, changed) for size, changed in value]
        self._directories = list(directories or [])
        self.key = key if isinstance(key, dict) else None
        self._made_by = str(record.get("made_by"))

    def _save(self) -> None:
        record: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "made_by": self._made_by}
        if self.key is not None:
            record["key"] = self.key
        record |= {"files": self._files, "directories": self._directories}
        # A name may have bytes that are no UTF-8; JSON can spell them.
        files.write_file(self._real / RECORD, json.dumps(record).encode("ascii") + b"\n")


def _is_record(known: Any, directories: Any) -> bool:
    """Whether the values of a record, which may be a stranger's, are of the right kinds and stay in the directory."""

    def inside(name: object) -> bool:
        return isinstance(name, str) and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))

    def identities(value: object) -> bool:
        pairs = value if isinstance(value, list) else [None]
        numbers = (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in pairs)
        return value == _GROWS or all(numbers)

    if not isinstance(known, dict) or not isinstance(directories, list):
        return False
    return all(map(inside, [*known, *directories])) and all(map(identities, known.values()))


def _identity_of(status: os.stat_result) -> Identity:
    return status.st_size, status.st_mtime_ns


def _is_log(path: Path) -> bool:
    """Whether every whole line is a JSON object, as in the logs that we write; the last one may be torn."""
    try:
        *lines, _ = read_bytes(path, _MAX_LOG).split(b"\n")
        return all(isinstance(json.loads(line), dict) for line in lines)
    except (CnllamaError, ValueError, RecursionError):
        return False


def _foreign(*paths: Path) -> str:
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    listed = ", ".join(str(path) for path in paths[:_LISTED])
    return (
        f"{listed}{more}: cnllama did not write this, or it was changed since; it is neither removed nor overwritten: "
        "move it away, or choose another --output"
    )
