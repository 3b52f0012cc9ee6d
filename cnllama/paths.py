# SPDX-License-Identifier: Apache-2.0
"""What stands at a path that somebody gave: asked the same way on every Python, answered or refused in one sentence,
and read without waiting for what never comes.

Path.exists and its like take some errors for "no", raise others, and which ones depends on the version of Python.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

from cnllama.errors import InputError, from_os_error

PathLike = str | os.PathLike[str]

_CHUNK = 1 << 22


def check_name(path: PathLike) -> None:
    """Raises InputError for a text that can be no file's name: with a NUL in it, or with what has no encoding."""
    text = os.fspath(path)
    if "\0" in text:
        raise InputError(f"{text}: there is a NUL in this name, which no file's name has; give another")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise InputError(
            f"{text}: {found!r} in this name cannot be written in {error.encoding}, the encoding of file names here; "
            "give another name, or choose a locale with UTF-8"
        ) from None


def status(path: PathLike) -> os.stat_result | None:
    """What stands there, links followed; None for nothing, and for a link to nothing.

    Raises InputError where that cannot be told: a name that is none or is too long, links in a circle, no permission.
    """
    check_name(path)
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise from_os_error(path, error) from None


def exists(path: PathLike) -> bool:
    """Whether anything stands there. Raises as `status`."""
    return status(path) is not None


def is_dir(path: PathLike) -> bool:
    """Whether it is a directory. Raises as `status`."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: PathLike) -> bool:
    """Whether it is a regular file. Raises as `status`."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_link(path: PathLike) -> bool:
    """Whether it is a symbolic link, to whatever. Raises InputError for a name that can be none."""
    check_name(path)
    return os.path.islink(path)


def is_own_dir(path: PathLike) -> bool:
    """Whether it is a directory itself, no link to one; False where that cannot be told."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def same_file(one: PathLike, other: PathLike) -> bool:
    """Whether both are there and one file or directory. Raises as `status`."""
    first, second = status(one), status(other)
    return first is not None and second is not None and os.path.samestat(first, second)


def real_path(path: PathLike) -> Path:
    """The absolute path without links; of what is not there, as far as it is. Raises InputError for no name."""
    check_name(path)
    return Path(os.path.realpath(path))


def names_in(directory: PathLike) -> list[str]:
    """Names of all that is in a directory, sorted. Raises InputError where that cannot be told."""
    check_name(directory)
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        raise from_os_error(directory, error) from None


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file to read. Raises InputError for a pipe, a device, a directory: what could hang or never end."""
    check_name(path)
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISREG(kind):  # asked before, because opening some devices has effects, and after, of what was opened
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
            kind = os.fstat(fd).st_mode
            if stat.S_ISREG(kind):
                return os.fdopen(fd, "rb")
            os.close(fd)
    except OSError as error:
        raise from_os_error(path, error) from None
    found = "this is a directory, expected a file" if stat.S_ISDIR(kind) else "this is no regular file"
    raise InputError(f"{path}: {found}")


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of a small file. Raises InputError when it is no regular file, and for more than `limit` bytes."""
    parts: list[bytes] = []
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        while size <= limit and (data := read_some(file, path, _CHUNK)):  # the size of some files of the system is 0
            parts.append(data)
            size = max(size, sum(map(len, parts)))
    if size > limit:
        raise InputError(f"{path}: {size:,} bytes is too long for such a file, expected at most {limit:,}")
    return b"".join(parts)


def read_some(file: IO[bytes], path: Path, count: int) -> bytes:
    """The next `count` bytes of an open file, fewer at its end. Raises CnllamaError."""
    try:
        return file.read(count)
    except OSError as error:
        raise from_os_error(path, error) from None
