# SPDX-License-Identifier: Apache-2.0
"""The two errors that end a command with one sentence instead of a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONGEST_VALUE = 600  # characters without a space; a name is at most 255 bytes, and a path seldom longer
_LONGEST_MESSAGE = 1500
_LOOKED_AT = 20_000  # of a text that may have millions


def printable(text: str) -> str:
    """`text` as one line that a terminal only shows: it may come from a stranger's file, or be its name.

    Escaped are control characters (line breaks and ESC among them), the separators of lines and paragraphs, what turns
    the direction of writing, what has no width or no meaning, and bytes of a name that are no text, as \\xNN. The space
    of Chinese text, U+3000, stays.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\u3000" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # what Python makes of an undecodable byte
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def bounded(text: str) -> str:
    """`text` short enough to be read, whatever it quotes: a long value, then a long list, is cut in its middle.

    A message begins with the file and ends with the mend: both ends stay.
    """
    if len(text) > _LONGEST_VALUE:
        text = " ".join(_cut(word, _LONGEST_VALUE) for word in _cut(text, _LOOKED_AT).split(" "))
    return _cut(text, _LONGEST_MESSAGE)


def _cut(text: str, most: int) -> str:
    """At most `most` characters, two thirds of them from the beginning."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[len(text) - end :]}"


def _sentence(text: str) -> str:
    return bounded(printable(_cut(text, _LOOKED_AT)))


class CnllamaError(Exception):
    """The work failed: a full disk, a machine that is too small, a file that changed while it was read.

    message: one sentence; it may quote files, so it is made printable and bounded. details: lines that the command line
    prints below it, a table for instance; so is each of them.
    """

    exit_code = 1

    def __init__(self, message: str = "", details: Iterable[str] = ()) -> None:
        super().__init__(_sentence(message))
        self.details = [_sentence(line) for line in details]
        if self.details:
            self.__notes__ = self.details  # Python 3.11 and later show them in a traceback


class InputError(CnllamaError):
    """The user's input is wrong. The message names the file, the value found, the value expected and the mend."""

    exit_code = 2


class FileChangedError(CnllamaError):
    """A file is no longer the one that was opened; nothing more can be read from it."""


_INPUT_ERRORS = {
    errno.ENOENT: "there is no such file or directory",
    errno.ENOTDIR: "a part of this path is a file, not a directory",
    errno.EISDIR: "this is a directory, expected a file",
    errno.EACCES: "no permission; change the file's or its directory's permissions",
    errno.EPERM: "no permission; change the file's or its directory's permissions",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "too many symbolic links",
}
_SPACE_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would pass the largest size allowed here (ulimit -f, or the file system's limit)",
}


def from_os_error(path: str | os.PathLike[str], error: OSError) -> CnllamaError:
    """One sentence for an operating-system error on `path`: InputError for a wrong path, CnllamaError otherwise."""
    code = error.errno or 0
    if code in _INPUT_ERRORS:
        return InputError(f"{os.fspath(path)}: {_INPUT_ERRORS[code]}")
    if code in _SPACE_ERRORS:
        return CnllamaError(f"{os.fspath(path)}: {_SPACE_ERRORS[code]}; free some space or choose another place")
    return CnllamaError(f"{os.fspath(path)}: {error.strerror or error}")


@contextmanager
def os_errors_explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an operating-system error of the block into from_os_error's, on `path` where it names no file itself."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error.filename or path, error) from error
