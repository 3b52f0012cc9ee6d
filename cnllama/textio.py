# SPDX-License-Identifier: Apache-2.0
"""Text across the border of the process: standard streams, files and arguments in UTF-8 or GBK, and two languages."""

from __future__ import annotations

import codecs
import functools
import os
import sys
from pathlib import Path
from typing import TextIO

from cnllama.errors import InputError, from_os_error

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def configure_stdio() -> None:
    """Makes the standard streams able to carry any text.

    An encoding that the user chose and that has Chinese is kept, GBK as its superset GB18030; one that has none (ASCII
    of the C locale, Latin-1) becomes UTF-8. Nothing printed can raise UnicodeEncodeError afterwards. A stream that the
    caller closed becomes an empty one.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is None:
            continue
        errors = "surrogateescape" if stream is sys.stdin else "replace"
        reconfigure(encoding=_capable_encoding(stream), errors=errors)


def _capable_encoding(stream: TextIO) -> str:
    try:
        name = codecs.lookup(stream.encoding or "ascii").name
        "中".encode(name)
    except (LookupError, UnicodeEncodeError):
        return "utf-8"
    return "gb18030" if name in ("gbk", "gb2312", "cp936") else name


def decode_text(data: bytes, name: str) -> str:
    """Text of a prompt: UTF-8, with a byte-order mark or without, UTF-16 with one, else GBK (GB18030).

    Line ends become \\n. Raises InputError that names `name` and the position when it is none of them.
    """
    encoding = next((e for bom, e in _BOMS if data.startswith(bom)), None)
    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise InputError(f"{name}: byte {error.start} is not valid {encoding}: save it as UTF-8") from error
        try:
            text = data.decode("gb18030")
        except UnicodeDecodeError:
            raise InputError(
                f"{name}: byte {error.start} is neither valid UTF-8 nor the text GBK: save it as UTF-8"
            ) from error
    return text.replace("\r\n", "\n")


def read_text_file(path: str | os.PathLike[str]) -> str:
    """The text of a file without its last line end. Raises InputError as decode_text, or for an unreadable file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise from_os_error(path, error) from error
    return decode_text(data, os.fspath(path)).removesuffix("\n")


def decode_argument(text: str) -> str:
    """An argument of the command line as Unicode: bytes that Python could not decode are tried as UTF-8 and GBK."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return decode_text(os.fsencode(text), "the argument")
    return text


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
