# SPDX-License-Identifier: Apache-2.0
"""Lines that are typed or pasted on a terminal, in UTF-8 or GBK, under any locale.

Readline is no way to read them: what its locale cannot decode it takes for keys, and the end of the line for the rest
of a character, so that turns are lost or run together; under the C locale that is all Chinese. What some Pythons have
under its name does not know pasted texts either.
"""

from __future__ import annotations

import codecs
import os
import re
import shutil
import sys
import termios
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cnllama.errors import printable

_ESCAPE = 0x1B
_SEQUENCE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|[ -NP-Z\\-~])", re.DOTALL)
_UNFINISHED = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|O)?\Z")
_PASTE_ON, _PASTE_OFF = b"\x1b[?2004h", b"\x1b[?2004l"
_PASTE_BEGIN, _PASTE_END = b"\x1b[200~", b"\x1b[201~"
_JOINED = "\u200d\ufe0f"  # stand with the character before them, as combining marks do


class LineReader:
    """Reads lines with editing of its own: the terminal's deletes bytes, not characters, and takes no line over 4 KiB.

    The usual keys move and delete, up and down bring earlier lines back. What is pasted is text, its line breaks too.
    """

    def __init__(self) -> None:
        self._input = sys.stdin.fileno()
        self._output = next((s.fileno() for s in (sys.stdout, sys.stderr) if s.isatty()), self._input)
        self._encoding = sys.stdin.encoding
        self._clever = os.environ.get("TERM", "dumb") != "dumb"  # it can move the cursor
        self._typed = b""  # what came after the line before
        self._history: list[str] = []
        self._keys = self._make_keys()

    def read(self, prompt: str) -> bytes | None:
        """The next line, which has line breaks only where they were pasted; None at the end."""
        self._prompt, self._before, self._after = prompt, "", ""
        self._decoder = codecs.getincrementaldecoder(self._encoding)("surrogateescape")
        self._cursor = self._walk(prompt, (0, 0))
        self._lines = [*self._history, ""]
        self._at = len(self._history)
        self._pasting = self._done = self._ended = False
        with self._raw():
            self._show(prompt)
            while not (self._done or self._ended):
                self._take()
                if not (self._done or self._ended):
                    more = os.read(self._input, 4096)
                    self._ended = not more  # the terminal has gone
                    self._typed += more
            self._put(self._decoder.decode(b"", True))
            self._replace(self._before + self._after, "")
            self._show("\n")
        line = self._before
        if line.strip() and self._history[-1:] != [line]:
            self._history.append(line)
        return None if self._ended and not line else line.encode(self._encoding, "surrogateescape")

    def _take(self) -> None:
        """Takes what was typed, up to the end of the line; what is no whole key yet stays."""
        while self._typed and not (self._done or self._ended):
            byte = self._typed[0]
            if byte == _ESCAPE:
                if _UNFINISHED.match(self._typed):
                    return
                found = _SEQUENCE.match(self._typed)
                key, self._typed = (found[0], self._typed[found.end() :]) if found else (b"", self._typed[1:])
                if key in (_PASTE_BEGIN, _PASTE_END):
                    self._pasting = key == _PASTE_BEGIN
                    continue
            elif byte >= 0x20 and byte != 0x7F:
                end = next((i for i, b in enumerate(self._typed) if b < 0x20 or b == 0x7F), len(self._typed))
                self._put(self._decoder.decode(self._typed[:end]))
                self._typed = self._typed[end:]
                continue
            else:
                key, self._typed = self._typed[:1], self._typed[1:]
            self._put(self._decoder.decode(b"", True))
            self._decoder.reset()
            if self._pasting:
                self._put("\n" if key in b"\r\n" else key.decode() if len(key) == 1 else "")
            elif key in self._keys:
                self._keys[key]()

    # ---- keys

    def _make_keys(self) -> dict[bytes, Callable[[], None]]:
        keys = {
            (b"\r", b"\n"): self._finish,
            (b"\x04",): self._delete_or_end,
            (b"\x7f", b"\x08"): lambda: self._cut(len(self._before) - _last(self._before)),
            (b"\x15",): lambda: self._cut(0),
            (b"\x17",): lambda: self._cut(self._before.rstrip().rfind(" ") + 1),
            (b"\x0b",): lambda: self._replace(self._before, ""),
            (b"\t",): lambda: self._put("\t"),
            (b"\x10", b"\x1b[A", b"\x1bOA"): lambda: self._recall(-1),
            (b"\x0e", b"\x1b[B", b"\x1bOB"): lambda: self._recall(1),
            (b"\x1b[3~",): lambda: self._replace(self._before, self._after[_first(self._after) :]),
        }
        if self._clever:
            keys |= {
                (b"\x02", b"\x1b[D", b"\x1bOD"): lambda: self._move(len(self._before) - _last(self._before)),
                (b"\x06", b"\x1b[C", b"\x1bOC"): lambda: self._move(len(self._before) + _first(self._after)),
                (b"\x01", b"\x1b[H", b"\x1bOH", b"\x1b[1~"): lambda: self._move(0),
                (b"\x05", b"\x1b[F", b"\x1bOF", b"\x1b[4~"): lambda: self._move(len(self._before + self._after)),
            }
        return {key: action for names, action in keys.items() for key in names}

    def _finish(self) -> None:
        self._done = True

    def _delete_or_end(self) -> None:
        if self._before or self._after:
            self._replace(self._before, self._after[_first(self._after) :])
        else:
            self._ended = True

    def _cut(self, kept: int) -> None:
        self._replace(self._before[:kept], self._after)

    def _move(self, place: int) -> None:
        text = self._before + self._after
        self._replace(text[:place], text[place:])

    def _recall(self, step: int) -> None:
        if 0 <= self._at + step < len(self._lines):
            self._lines[self._at] = self._before + self._after
            self._at += step
            self._replace(self._lines[self._at], "")

    def _put(self, text: str) -> None:
        if not text:
            return
        self._before += text
        if self._after:
            self._redraw()
        else:
            self._show(_shown(text))
            self._cursor = self._walk(_shown(text), self._cursor)

    def _replace(self, before: str, after: str) -> None:
        if (before, after) != (self._before, self._after):
            self._before, self._after = before, after
            self._redraw()

    # ---- the screen

    def _redraw(self) -> None:
        if not self._clever:
            self._show("\n" + self._prompt + _shown(self._before + self._after))
            return
        up = f"\x1b[{self._cursor[0]}A" if self._cursor[0] else ""
        text = f"\r{up}\x1b[J{self._prompt}{_shown(self._before + self._after)}"
        self._cursor = row, column = self._walk(self._prompt + _shown(self._before), (0, 0))
        if self._after:
            last = self._walk(_shown(self._after), self._cursor)[0]
            text += (f"\x1b[{last - row}A" if last > row else "") + "\r" + (f"\x1b[{column}C" if column else "")
        self._show(text)

    def _walk(self, text: str, cursor: tuple[int, int]) -> tuple[int, int]:
        """(row, column) of the cursor, below the prompt's row, after `text` is shown at another place."""
        columns = shutil.get_terminal_size().columns
        row, column = cursor
        for character in text:
            if character == "\n":
                row, column = row + 1, 0
                continue
            width = _width(character)
            if column + width > columns:
                row, column = row + 1, 0
            column += width
        return row, column

    def _show(self, text: str) -> None:
        data = text.replace("\n", "\r\n").encode(self._encoding, "replace")
        while data:
            data = data[os.write(self._output, data) :]

    @contextmanager
    def _raw(self) -> Iterator[None]:
        """The terminal hands every key over at once and shows none; Ctrl-C and Ctrl-Z stay what they are."""
        before = termios.tcgetattr(self._input)
        mode = termios.tcgetattr(self._input)
        mode[3] &= ~(termios.ICANON | termios.ECHO)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        try:
            termios.tcsetattr(self._input, termios.TCSADRAIN, mode)
            if self._clever:
                os.write(self._output, _PASTE_ON)
            yield
        finally:
            if self._clever:
                os.write(self._output, _PASTE_OFF)
            termios.tcsetattr(self._input, termios.TCSADRAIN, before)


def _shown(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _last(text: str) -> int:
    """How many code points the last character of `text` has: a letter, and marks on it."""
    at = len(text) - 1
    while at > 0 and (unicodedata.combining(text[at]) or text[at] in _JOINED):
        at -= 1
    return len(text) - max(at, 0)


def _first(text: str) -> int:
    """The same for the first character."""
    at = min(1, len(text))
    while at < len(text) and (unicodedata.combining(text[at]) or text[at] in _JOINED):
        at += 1
    return at


def _width(character: str) -> int:
    """Columns of a character on a terminal."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
