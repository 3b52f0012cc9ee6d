# SPDX-License-Identifier: Apache-2.0
"""Texts as windows of tokens, each token to be predicted once, with as much before it as the stride leaves."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cnllama.errors import InputError
from cnllama.eval.inputs import check_text_file
from cnllama.eval.models import Item
from cnllama.textio import read_text_file
from cnllama.tokenizer import split_utf8

if TYPE_CHECKING:
    from cnllama.tokenizer import Tokenizer

CONVENTION = (
    "every token of the text is predicted once; a window begins with BOS where the model has one and holds up to ctx "
    "tokens, the first window predicts all of its tokens, each further one the next `stride` tokens; no end token is "
    "predicted, and without a BOS the first token of a document, with what completes its last character, is not; "
    "characters are Unicode code points of what is predicted, line breaks and spaces included"
)
_RECORDS = (".jsonl", ".json")
_MAX_CONTEXT = 1 << 24


@dataclass(frozen=True)
class Window(Item):
    """An item whose wanted rows are to predict `targets`, one for each row. characters: of the text, that the targets
    complete; those of all windows of a document are the characters that its predicted tokens spell.
    """

    targets: Sequence[int]
    characters: int


@dataclass(frozen=True)
class Text:
    """Documents that are scored apart; a plain text file is one unless it is split."""

    path: Path
    documents: list[str]

    @property
    def characters(self) -> int:
        """Unicode code points."""
        return sum(map(len, self.documents))


def read_text(path: Path, split: bool = False, characters: int | None = None) -> tuple[Text, list[str]]:
    """(the text, sentences about records that were left out).

    .jsonl and .json files hold one document a record, {"text"} or a poem's fields; any other file is one document, or
    with `split` one for each block between blank lines. characters: only so many from the beginning. Raises InputError
    for a file that is not text or is empty.
    """
    problems: list[str] = []
    check_text_file(path, "a text, or records in .jsonl or .json")
    if path.suffix.lower() in _RECORDS:
        from cnllama.adapt.reading import ReadLog, read_documents

        log = ReadLog()
        documents = list(read_documents(path, log))
        problems = log.lines()
    else:
        whole = read_text_file(path)
        documents = re.split(r"\n[ \t\r]*\n\s*", whole) if split else [whole]
    if characters is not None:
        documents = list(_first(documents, characters))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"{path}: there is no text in it; give a file with some")
    return Text(path, documents), problems


def _first(documents: Sequence[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield document[:characters]
        characters -= len(document)
        if characters <= 0:
            return


def check_window(size: int, stride: int) -> None:
    """Raises InputError unless 1 <= stride <= size, and for a size that no model has."""
    if not 2 <= size <= _MAX_CONTEXT:
        raise InputError(f"--ctx is {size}, expected 2 to {_MAX_CONTEXT:,} tokens")
    if not 1 <= stride <= size:
        raise InputError(f"--stride is {stride}, expected 1 to the context, {size}")


def windows(tokenizer: Tokenizer, documents: Sequence[str], size: int, stride: int) -> list[Window]:
    """The windows of all documents, see CONVENTION. size: tokens a window may run. Raises InputError as check_window.

    Without a BOS the beginning of a document has nothing before it and is not predicted; its characters do not count.
    """
    check_window(size, stride)
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    result: list[Window] = []
    for document in documents:
        tokens = tokenizer.encode(document)
        given = (0, 0) if start else _given(tokenizer, document, tokens)
        result += _document_windows(start, _Spelling(tokenizer, document, tokens, *given), size, stride)
    return result


def _given(tokenizer: Tokenizer, document: str, tokens: Sequence[int]) -> tuple[int, int]:
    """(tokens that a document without BOS begins with and that nothing predicts, characters of the text they spell).

    The first token, and where that is a byte the rest of its character: half of one cannot be counted.
    """
    count, held = 1, b""
    for token in tokens:
        byte = tokenizer.surface(token).byte
        held = b"" if byte is None else split_utf8(held + bytes([byte]))[1]
        if not held:
            break
        count += 1
    text, stripped = tokenizer.decode(tokens[:count]), 0
    if tokenizer.removes_extra_spaces:
        stripped = len(document) - len(document.lstrip())
    if document.startswith(text, stripped):
        return count, stripped + len(text)
    # It stands for other characters than it decodes to: an unknown token, or the tokenizer normalizes.
    lengths = range(len(document) + 1)
    return count, bisect_right(lengths, count, key=lambda n: len(tokenizer.encode(document[:n]))) - 1


class _Spelling:
    """The tokens of a document, and how many of its characters a number of them spells.

    done: tokens at the beginning that are not predicted; first: characters that they spell.
    """

    def __init__(self, tokenizer: Tokenizer, document: str, tokens: list[int], done: int, first: int) -> None:
        self.tokens, self.done = tokens, done
        self._decoder, self._fed = tokenizer.stream(), 0
        self._least, self._most = first, len(document)
        self._shift = first - self._feed(done)
        self._spelled = first - self._shift

    def upto(self, count: int) -> int:
        """Characters of the document that are complete after `count` tokens, more than in the call before.

        All of them after the last token, whatever a tokenizer that normalizes makes of them.
        """
        self._spelled += self._feed(count)
        if count == len(self.tokens):
            return self._most
        return min(max(self._spelled + self._shift, self._least), self._most)

    def _feed(self, count: int) -> int:
        part = self.tokens[self._fed : count]
        self._fed = count
        return sum(len(self._decoder.feed(token)) for token in part)


def _document_windows(start: list[int], document: _Spelling, size: int, stride: int) -> Iterator[Window]:
    # A window runs `start` and the tokens but its last: that one is only predicted.
    reach = size + 1 - len(start)
    tokens, done, end = document.tokens, document.done, 0
    before = document.upto(done) if done < len(tokens) else 0
    while done < len(tokens):
        end = min(len(tokens), max(reach, done + 1) if end == 0 else end + stride)
        begin = max(0, end - reach)
        ids = start + tokens[begin : end - 1]
        after = document.upto(end)
        yield Window(ids, done - begin - 1 + len(start), tokens[done:end], after - before)
        done, before = end, after
