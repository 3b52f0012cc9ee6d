# SPDX-License-Identifier: Apache-2.0
"""Text that comes into the process, in UTF-8 or GBK, and messages in two languages; stdio.py has what goes out."""

from __future__ import annotations

import functools
import os
import stat
import warnings
from typing import BinaryIO

from cnllama.encodings import UndecodableError, decode, locale_encoding
from cnllama.errors import InputError, from_os_error
from cnllama.paths import check_name

MOST_TEXT = 1 << 26  # bytes of a text that is read whole
_PART = 1 << 20


def decode_text(data: bytes, name: str) -> str:
    """Text of a prompt: UTF-8, what a byte-order mark says, or GBK (GB18030) where that is likely.

    Line ends become \\n. Raises InputError that names `name`, the position and the mend for damaged text and for other
    encodings; warns where a short text may be in either of two.
    """
    try:
        found = decode(data, locale_encoding())
    except UndecodableError as error:
        raise InputError(f"{name}: {error}") from None
    if found.doubt:
        warnings.warn(
            tr(
                f"{name}: read as {found.encoding.upper()}, which is not certain ({found.text:.20}): save it as UTF-8",
                f"{name}：按 {found.encoding.upper()} 读取，但不能确定（{found.text:.20}）：请存为 UTF-8",
            )
            if found.encoding != "utf-8"
            else tr(
                f"{name}: read as UTF-8, but it may be {found.doubt}: save it as UTF-8",
                f"{name}：按 UTF-8 读取，但也可能是 {found.doubt}：请存为 UTF-8",
            ),
            stacklevel=2,
        )
    return found.text.replace("\r\n", "\n")


def read_text_file(path: str | os.PathLike[str], most: int = MOST_TEXT) -> str:
    """The text of a file, or of a pipe that something writes into, without its last line end. most: bytes it may have.

    Raises InputError as decode_text, or for an unreadable file, one without an end and a pipe without a writer.
    """
    check_name(path)
    name = os.fspath(path)
    try:
        # Without O_NONBLOCK, to open a pipe would wait for its writer; what a shell's <(...) names has one.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            os.set_blocking(file.fileno(), True)
            data = read_limited(file, name, most)
            if not data and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                raise InputError(
                    tr(
                        f"{name}: nothing writes into this pipe: start that first, or give a file",
                        f"{name}：没有程序向这个管道写入：请先启动它，或给一个文件",
                    )
                )
    except OSError as error:
        raise from_os_error(path, error) from error
    return decode_text(data, name).removesuffix("\n")


def read_limited(file: BinaryIO, name: str, most: int = MOST_TEXT) -> bytes:
    """All of a stream. Raises InputError when it has more than `most` bytes."""
    parts: list[bytes] = []
    while sum(map(len, parts)) <= most and (part := file.read(_PART)):
        parts.append(part)
    data = b"".join(parts)
    if len(data) > most:
        raise InputError(
            tr(
                f"{name}: more than {most >> 20} MiB, which no context holds: give a shorter text",
                f"{name}：超过 {most >> 20} MiB，任何上下文都放不下：请缩短",
            )
        )
    return data


def decode_argument(text: str) -> str:
    """A text of the command line as Unicode, out of the bytes that the shell passed; names of files stay as they are.

    Raises InputError as decode_text.
    """
    if text.isascii() and "\0" not in text:
        return text
    name = tr("the argument", "参数")
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError as error:  # from another program; a shell passes bytes
        found = text[error.start]
        raise InputError(
            tr(f"{name}: {found!r} is no character of a text: leave it out", f"{name}：{found!r} 不是字符：请去掉")
        ) from None
    return decode_text(data, name)


@functools.cache
def chinese_messages() -> bool:
    """Whether messages are in Chinese: the locale of messages is."""
    for variable in ("LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(variable)
        if value:
            return value.lower().startswith("zh")
    return False


def tr(english: str, chinese: str) -> str:
    """The message in the user's language."""
    return chinese if chinese_messages() else english


def count_chinese(text: str) -> int:
    """Chinese characters (CJK ideographs) in the text."""
    return sum(
        0x4E00 <= c <= 0x9FFF or 0x3400 <= c <= 0x4DBF or 0x20000 <= c <= 0x3FFFF or 0xF900 <= c <= 0xFAFF
        for c in map(ord, text)
    )
