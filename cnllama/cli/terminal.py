# SPDX-License-Identifier: Apache-2.0
"""Turns that a user types, pastes or pipes in: whatever the locale, and of several lines where they are meant so."""

from __future__ import annotations

import sys
from collections.abc import Callable

from cnllama.cli.line_reader import LineReader
from cnllama.errors import CnllamaError, from_os_error
from cnllama.textio import decode_text, tr

_PROMPT, _MORE = "> ", ". "
_QUOTES = '"""'
_LONGEST = 1 << 26  # bytes of a line


class Turns:
    """What the user says, turn by turn.

    On a terminal a text that is pasted is one turn; so are lines that end in a backslash with the one that follows, and
    what stands between two \"\"\". In a pipe a line is a turn.
    """

    def __init__(self) -> None:
        self._typed = sys.stdin.isatty()
        self._line: Callable[[str], bytes | None] = LineReader().read if self._typed else _piped

    def next(self) -> str | None:
        """The next turn, None at the end.

        Raises InputError for bytes that are no text, and CnllamaError where nothing can follow.
        """
        turn = self._text(_PROMPT)
        if turn is None or not self._typed:
            return turn
        if turn.lstrip().startswith(_QUOTES):
            return self._quoted(turn.lstrip().removeprefix(_QUOTES))
        while turn.endswith("\\"):
            turn = turn[:-1] + "\n" + (self._text(_MORE) or "")
        return turn

    def _quoted(self, text: str) -> str:
        while not text.rstrip().endswith(_QUOTES):
            line = self._text(_MORE)
            if line is None:
                return text
            text += "\n" + line
        return text.rstrip().removesuffix(_QUOTES).strip("\n")

    def _text(self, prompt: str) -> str | None:
        line = self._line(prompt)
        return None if line is None else decode_text(line, tr("standard input", "标准输入"))


def _piped(_: str) -> bytes | None:
    name = tr("standard input", "标准输入")
    try:
        line: bytes = sys.stdin.buffer.readline(_LONGEST + 1)
    except OSError as error:
        raise CnllamaError(str(from_os_error(name, error))) from error
    if len(line) > _LONGEST:
        raise CnllamaError(tr(f"{name}: a line has no end", f"{name}：有一行没有结尾"))
    return line.removesuffix(b"\n").removesuffix(b"\r") if line else None
