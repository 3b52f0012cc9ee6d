# SPDX-License-Identifier: Apache-2.0
"""A terminal small enough to read: what a line reader's output looks like on it."""

from __future__ import annotations

import re
import unicodedata

_TOKEN = re.compile(r"\x1b\[([0-9?]*)([A-Za-z])|.", re.DOTALL)


class Screen:
    """Rows of text on a terminal of `columns`, which wraps as terminals do: when a character comes that has no room."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        for token in _TOKEN.finditer(text):
            if token[2]:
                self._control(token[2], token[1])
            elif token[0] == "\r":
                self.column = 0
            elif token[0] == "\n":
                self._down()
            else:
                self._put(token[0])

    def text(self) -> list[str]:
        return ["".join(row).rstrip(" ") for row in self.rows]

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    def _put(self, character: str) -> None:
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if unicodedata.combining(character):
            width = 0
        if self.column + width > self.columns:
            self.column = 0
            self._down()
        row = self.rows[self.row]
        row += [" "] * (self.column + width - len(row))
        if width == 0:
            row[self.column - 1] += character
            return
        row[self.column : self.column + width] = [character, *[""] * (width - 1)]
        self.column += width

    def _control(self, letter: str, number: str) -> None:
        if letter == "A":
            self.row -= int(number or 1)
            assert self.row >= 0
        elif letter == "C":
            self.column += int(number or 1)
            assert self.column <= self.columns
        elif letter == "J":
            del self.rows[self.row + 1 :]
            del self.rows[self.row][self.column :]
        else:
            assert (letter, number) in (("h", "?2004"), ("l", "?2004")), (letter, number)
