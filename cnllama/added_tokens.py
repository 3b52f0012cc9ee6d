# SPDX-License-Identifier: Apache-2.0
"""Added tokens: which places of a text they are, by the rules of Hugging Face's tokenizers (`added_vocabulary.rs`)."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
MAX_LENGTH = 1000  # characters of a token: how far the search looks ahead at every place of a text
MARKER = re.compile(r"<.*>|\[.*\]", re.DOTALL)  # how control tokens are named
# Unicode's White_Space: str.isspace without four control characters.
SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")
_WORD_CATEGORIES = ("L", "M", "Nd", "Nl", "Pc")
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before the rest is cut into pieces.

    special: only found where control tokens are wanted. lstrip, rstrip: it takes the white space before or after it.
    single_word: only where no letter or digit touches it. normalized: looked for after those without it. shown: whether
    it is part of a decoded text.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    shown: bool = False

    @classmethod
    def stored(cls, text: str, token: int, flags: Iterable[str] | None) -> AddedToken:
        """As a .cnl says it: names of FLAGS, None where the file says nothing, which means a control token that is
        shown unless it is named like one.
        """
        if flags is None:
            return cls(text, token, shown=not MARKER.fullmatch(text))
        said = dict.fromkeys(FLAGS, False) | dict.fromkeys(flags, True)
        return cls(text, token, **said, shown=not said["special"])


class Span(NamedTuple):
    """A piece of a text: begin .. end, and the token that it is, None for ordinary text."""

    begin: int
    end: int
    token: AddedToken | None


class AddedTokens:
    """The added tokens of a vocabulary, ready to be found: the leftmost one, of several the longest.

    A text of n characters takes O(n log(tokens)) steps, whatever the tokens are.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        known = list(tokens)
        groups = ([t for t in known if not t.normalized], [t for t in known if t.normalized])
        self._passes = [_Search({t.text: t for t in group}) for group in groups if group]

    def split(self, text: str, special: bool) -> list[Span]:
        """The whole text as spans, in order. special: whether control tokens count; else they are ordinary text, and
        so is a token that lies inside one's name.
        """
        spans = [Span(0, len(text), None)] if text else []
        for search in self._passes:
            spans = [part for span in spans for part in ([span] if span.token else search.split(text, span, special))]
        return spans


class _Search:
    """One set of tokens."""

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        self._tokens = tokens
        self._sorted = sorted(tokens)
        self._longest = max(map(len, tokens))
        firsts, seconds = ({text[i] for text in tokens if len(text) > i} for i in (0, 1))
        ahead = f"(?=[{_class(seconds)}])" if all(len(text) > 1 for text in tokens) else ""
        self._candidate = re.compile(f"[{_class(firsts)}]{ahead}")
        self._shorter = self._prefixes()

    def split(self, text: str, span: Span, special: bool) -> Iterator[Span]:
        """The parts of an ordinary span of `text`."""
        at = span.begin
        for found, token in self._matches(text, span):
            begin, end = found, found + len(token.text)
            if token.special and not special:
                continue
            if token.single_word and _touches_word(text, begin, end, span):
                continue
            if token.lstrip:
                while begin > at and text[begin - 1] in SPACES:
                    begin -= 1
                begin = max(begin, at)
            while token.rstrip and end < span.end and text[end] in SPACES:
                end += 1
            if at < begin:
                yield Span(at, begin, None)
            if begin < end:  # else the token before took it, as white space
                yield Span(begin, end, token)
            at = end
        if at < span.end:
            yield Span(at, span.end, None)

    def _matches(self, text: str, span: Span) -> Iterator[tuple[int, AddedToken]]:
        """(where it begins, the token): none overlaps another."""
        at = span.begin
        while (candidate := self._candidate.search(text, at, span.end)) is not None:
            begin = candidate.start()
            token = self._longest_at(text, begin, span.end)
            at = begin + (1 if token is None else len(token.text))
            if token is not None:
                yield begin, token

    def _longest_at(self, text: str, begin: int, end: int) -> AddedToken | None:
        ahead = text[begin : min(begin + self._longest, end)]
        # Whatever begins `ahead` is the last one sorted before it, or begins that one.
        index = bisect_right(self._sorted, ahead) - 1
        while index >= 0 and not ahead.startswith(self._sorted[index]):
            index = self._shorter[index]
        return self._tokens[self._sorted[index]] if index >= 0 else None

    def _prefixes(self) -> list[int]:
        """For every sorted token the index of the longest other one that begins it, -1 for none."""
        result: list[int] = []
        for i, text in enumerate(self._sorted):
            shorter = i - 1
            while shorter >= 0 and not text.startswith(self._sorted[shorter]):
                shorter = result[shorter]
            result.append(shorter)
        return result


def _class(characters: Iterable[str]) -> str:
    return "".join(map(re.escape, sorted(characters)))


def _touches_word(text: str, begin: int, end: int, span: Span) -> bool:
    return (begin > span.begin and is_word(text[begin - 1])) or (end < span.end and is_word(text[end]))


def is_word(character: str) -> bool:
    """Unicode's `\\w`, which a single_word token may not touch."""
    return unicodedata.category(character).startswith(_WORD_CATEGORIES) or character in _JOINERS
