# SPDX-License-Identifier: Apache-2.0
"""What goes out: standard streams that carry any text and survive their readers, and lines for people.

Nothing that comes from a file, a name or a model makes a terminal do anything: lines for people are made printable,
and what is written to a terminal has its control characters escaped.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
from typing import Any, TextIO

from cnllama.encodings import locale_encoding
from cnllama.errors import printable

# Controls, separators of lines and paragraphs, and what turns the direction of writing. Zero-width joiners stay: emoji
# are spelled with them.
_OBEYED = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_CONTROL = re.compile(f"[{_OBEYED}\r]")
_CONTROL_BUT_RETURN = re.compile(f"[{_OBEYED}]")


def configure_stdio() -> None:
    """Makes the standard streams able to carry any text, whatever becomes of those who read them.

    An encoding that the user chose and that has Chinese is kept, GBK as its superset GB18030, also where its locale is
    not installed; one that has none (ASCII of the C locale, Latin-1) becomes UTF-8. Nothing printed can raise
    UnicodeEncodeError afterwards. A stream that the caller closed becomes an empty one, and what nobody reads on stderr
    is lost without an error: an answer on stdout is worth more than the notice that was to stand beside it. Terminals
    get no control characters but line breaks and tabs; on stderr also carriage returns, which bars need.
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
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Shown(_Unread(sys.stderr.fileno()), sys.stderr.encoding, bars=True)
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty():
        sys.stdout = _Shown(sys.stdout.buffer, sys.stdout.encoding)


class _Unread(io.FileIO):
    """A stream of notices: what cannot be written is lost."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[super().write(left) or len(left) :]
        except OSError:
            pass
        return size


class _Shown(io.TextIOWrapper):
    """A text stream for people's eyes. bars: carriage returns may pass."""

    def __init__(self, buffer: Any, encoding: str, bars: bool = False) -> None:
        super().__init__(buffer, encoding, "replace", line_buffering=True, write_through=bars)
        self._pattern = _CONTROL_BUT_RETURN if bars else _CONTROL
        self._filter = buffer.isatty()

    def write(self, text: str) -> int:
        super().write(self._pattern.sub(_escape, text) if self._filter else text)
        return len(text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _capable_encoding(stream: TextIO) -> str:
    try:
        name = codecs.lookup(stream.encoding or "ascii").name
        "中".encode(name)
    except (LookupError, UnicodeEncodeError):
        name = "utf-8"
    if name == "utf-8" and not os.environ.get("PYTHONIOENCODING") and os.environ.get("PYTHONUTF8") != "1":
        return locale_encoding() or name  # Python takes UTF-8 where the locale is not installed
    return "gb18030" if name in ("gbk", "gb2312", "cp936") else name


def say(*lines: str) -> None:
    """Notices on stderr, each made printable."""
    for line in lines:
        print(printable(line), file=sys.stderr, flush=True)


def show(*lines: str) -> None:
    """Results for people on stdout, each line made printable."""
    for line in lines:
        print(printable(line), flush=True)


def to_json(value: object, indent: int | None = None) -> str:
    """JSON for stdout: text as it is, but what no terminal should obey and lone surrogates as escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return re.sub(f"[{_OBEYED}\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
