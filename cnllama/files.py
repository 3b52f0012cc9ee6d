# SPDX-License-Identifier: Apache-2.0
"""Everything that cnllama changes on a disk.

A file is under its name when it is whole, or not at all. Nothing else in cnllama/ and convert/ creates, writes, renames
or removes anything: a test reads both for such calls.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from cnllama.errors import CnllamaError, InputError, from_os_error
from cnllama.paths import exists, is_link, open_regular, read_some, real_path, status

try:
    import fcntl
except ImportError:  # a system without these locks: then what a killed process left is not cleaned up
    fcntl = None  # type: ignore[assignment]

_CHUNK = 1 << 22
_TRIES = 100
_LONGEST_STEM = 200  # bytes; file systems allow names of 255
# Temporary files carry this mark, a process id and a random number. Anchored: a file of the user's is never taken.
_MARK = re.compile(r"(?s)\..+\.cnllama-[0-9]+-[0-9a-f]{8}\.part")

# (name, status): with None a file is about to be written, with its status it is about to get its name.
Claim = Callable[[str, os.stat_result | None], None]
# Directories that keep a record of the files in them (ownership.py), by their real path.
_claims: dict[str, Claim] = {}


def _operation(kind: str, path: str | os.PathLike[str]) -> None:
    """Called before every change of a disk. kind: create, write, fsync, rename, unlink, mkdir, rmdir or mode.

    It does nothing. A test puts a function here that ends the process between any two changes.
    """


class Output:
    """A file written under a temporary name beside the final one and renamed when it is complete.

    As a context manager it removes the temporary file unless commit() was reached; a killed process leaves at most the
    temporary one, which the next run for the same name removes. A symbolic link is written through; a file that is
    replaced keeps its mode and, where the system allows it, its owner. Raises CnllamaError for a full disk and
    InputError for a place that cannot be written.

    temporary: where the file is until then, for a library that opens files by name. It must write this very file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._target = _destination(self.path)
        _tell(self._target, None)
        for leftover in temporaries(self._target, "part"):
            remove_leftover(leftover)
        self._fd, self.temporary = self._create()
        self._created = os.fstat(self._fd)
        self._committed = False
        if exists(self._target):  # until the end it is nobody's business
            _change_mode(self.temporary, 0o600)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._committed:
            self.discard()

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Writes all bytes at `offset`."""
        view = memoryview(data).cast("B")
        try:
            while view:
                _operation("write", self.temporary)
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise from_os_error(self.path, error) from None

    def commit(self) -> None:
        """Makes the file durable and gives it its final name."""
        try:
            if not has_name(self._created, self.temporary):
                raise CnllamaError(f"{self.path}: its temporary file {self.temporary.name} was removed or replaced")
            if not exists(self._target):
                _change_mode(self.temporary, stat.S_IMODE(self._created.st_mode))
            _operation("fsync", self.temporary)
            os.fsync(self._fd)
        except OSError as error:
            raise from_os_error(self.path, error) from None
        move(self.temporary, self._target)
        self._committed = True
        os.close(self._fd)

    def discard(self) -> None:
        """Removes the temporary file."""
        mine = has_name(self._created, self.temporary)  # while it is open nobody else has its inode
        os.close(self._fd)
        self._committed = True
        if mine:
            remove_file(self.temporary)

    def _create(self) -> tuple[int, Path]:
        """A locked temporary file: (descriptor, name)."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        for _ in range(_TRIES):
            temporary = temporary_name(self._target, "part")
            try:
                _operation("create", temporary)
                fd = os.open(temporary, flags, 0o666)
            except FileExistsError:
                continue
            except OSError as error:
                raise from_os_error(self.path, error) from None
            # Another process may have taken it for a leftover before it was locked: then it has no name any more.
            if try_lock(fd) is not False and has_name(os.fstat(fd), temporary):
                return fd, temporary
            os.close(fd)
        raise CnllamaError(f"{self.path}: every temporary file beside it was removed at once; try again")


def _destination(path: Path) -> Path:
    """Where a file that is to be called `path` goes, links followed. Raises InputError where none can."""
    target = real_path(path)
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return target
    except OSError as error:
        raise from_os_error(path, error) from None
    if stat.S_ISDIR(kind):
        raise InputError(f"{path}: this is a directory, expected the name of a file to write")
    if not stat.S_ISREG(kind):
        raise InputError(f"{path}: this is no regular file, which the result would replace; choose another name")
    if not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise InputError(f"{path}: this file is write-protected; choose another name, or change its permissions")
    return target


def check_place(path: Path) -> Path:
    """Where a file that is to be called `path` goes, links followed. Writes nothing.

    Raises InputError for a place where no file can be written.
    """
    target = _destination(path)
    try:
        os.stat(target.parent)
        with suppress(FileNotFoundError):
            os.lstat(target)  # its name may be too long
        if not os.access(target.parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise from_os_error(path, error) from None
    return target


def temporary_name(target: Path, kind: str) -> Path:
    """A new name beside `target` that carries our mark. kind: its ending."""
    return target.with_name(f".{_stem(target.name)}.cnllama-{os.getpid()}-{os.urandom(4).hex()}.{kind}")


def temporaries(target: Path, kind: str) -> list[Path]:
    """What is there under names that temporary_name gives for `target`."""
    ours = re.compile(re.escape(f".{_stem(target.name)}.cnllama-") + r"[0-9]+-[0-9a-f]{8}\." + kind)
    try:
        return [target.parent / name for name in os.listdir(target.parent) if ours.fullmatch(name)]
    except OSError:
        return []


def _stem(name: str) -> str:
    data = os.fsencode(name)
    return name if len(data) <= _LONGEST_STEM else hashlib.sha256(data).hexdigest()


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that only Output gives."""
    return _MARK.fullmatch(name) is not None


def remove_leftover(path: Path) -> bool:
    """Removes a temporary file whose process is gone; whether it did. path: of a name that is_temporary."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        status = os.fstat(fd)
        # The lock is held by a process that still writes. The name may have gone to another file since it was opened.
        if not stat.S_ISREG(status.st_mode) or try_lock(fd) is not True or not has_name(status, path):
            return False
        _operation("unlink", path)
        os.unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def has_name(status: os.stat_result, path: Path) -> bool:
    """Whether `path` is still the file of that status."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino)


def try_lock(fd: int, wait: bool = False) -> bool | None:
    """Locks a file or directory for this process: False where another has it, None where the system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def set_claim(directory: Path, claim: Claim | None) -> None:
    """`claim` is told of every file that goes into `directory` (a real path), and may refuse it; None ends that."""
    if claim is None:
        _claims.pop(str(directory), None)
    else:
        _claims[str(directory)] = claim


def _tell(target: Path, status: os.stat_result | None) -> None:
    claim = _claims.get(str(target.parent))
    if claim is not None:
        claim(target.name, status)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file. Raises CnllamaError for a full disk and InputError for a place that cannot be written."""
    with Output(path) as output:
        output.write(data, 0)
        output.commit()


def write_json(path: Path, value: object) -> None:
    """Writes readable JSON, as Hugging Face's files are."""
    write_file(path, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "backslashreplace"))


def copy_file(source: Path, target: Path, advance: Callable[[int], object] = lambda _: None) -> None:
    """Copies a file of any size; `advance` gets the bytes of every piece. Raises InputError for no regular file."""
    with open_regular(source) as file, Output(target) as output:
        offset = 0
        while data := read_some(file, source, _CHUNK):
            output.write(data, offset)
            offset += len(data)
            advance(len(data))
        output.commit()


def append(path: Path, data: bytes) -> None:
    """Adds bytes to the end of a file that grows, such as a log; makes it where it is not there."""
    try:
        _operation("write", path)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        write_file(path, data)
        return
    except OSError as error:
        raise from_os_error(path, error) from None
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as error:
        raise from_os_error(path, error) from None
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Makes a file that a library wrote durable."""
    try:
        _operation("fsync", path)
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise from_os_error(path, error) from None


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable, where the file system can."""
    with suppress(OSError):  # a directory that may not be read, or a file system that cannot sync one
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def move(source: Path, target: Path) -> None:
    """Gives a whole file its final name, or a directory one that is free. Both names are on one file system.

    A file that is replaced leaves its mode and owner to the new one.
    """
    try:
        status = os.lstat(source)
        if stat.S_ISREG(status.st_mode):
            _take_over(source, target)
            _tell(target, status)
        _operation("rename", target)
        os.replace(source, target)
    except OSError as error:
        raise from_os_error(target, error) from None
    sync_directory(target.parent)


def _take_over(path: Path, target: Path) -> None:
    """Owner and mode of the file that `path` is about to replace."""
    try:
        old, new = os.stat(target), os.stat(path)
    except FileNotFoundError:
        return
    for owner in ((old.st_uid, old.st_gid), (-1, old.st_gid)):
        if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
            with suppress(OSError):  # only root may give a file away
                _operation("mode", path)
                os.chown(path, *owner)
            new = os.stat(path)
    same = (new.st_uid, new.st_gid) == (old.st_uid, old.st_gid)
    _change_mode(path, stat.S_IMODE(old.st_mode) & (0o7777 if same else 0o777))


def _change_mode(path: Path, mode: int) -> None:
    with suppress(OSError):  # a file system without modes
        if stat.S_IMODE(os.stat(path).st_mode) != mode:
            _operation("mode", path)
            os.chmod(path, mode)


def remove_file(path: Path) -> None:
    """Removes a file, if it is there."""
    try:
        _operation("unlink", path)
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise from_os_error(path, error) from None


def make_directory(path: Path) -> list[Path]:
    """Makes a directory and those above it; returns the ones that were not there, the outermost first.

    Raises InputError where one cannot be.
    """
    missing = []
    level = path
    try:
        while (found := status(level)) is None or not stat.S_ISDIR(found.st_mode):
            # One look at it: another process may make it between two.
            if found is not None or is_link(level):
                raise InputError(f"{level}: this is a file, not a directory; choose another name")
            missing.append(level)
            level = level.parent
        for directory in reversed(missing):
            _operation("mkdir", directory)
            directory.mkdir(exist_ok=True)
    except OSError as error:
        raise from_os_error(path, error) from None
    return missing[::-1]


def remove_directory(path: Path) -> bool:
    """Removes a directory if it is empty; whether it did."""
    try:
        _operation("rmdir", path)
        os.rmdir(path)
    except OSError:
        return False
    return True
