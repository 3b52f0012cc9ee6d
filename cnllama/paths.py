# SPDX-License-Identifier: Apache-2.0
"""What stands at a path that somebody gave: asked the same way on every Python, answered or refused in one sentence.

Path.exists and its like take some errors for "no", raise others, and which ones depends on the version of Python.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cnllama.errors import InputError, from_os_error

PathLike = str | os.PathLike[str]


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
