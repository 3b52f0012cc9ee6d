# SPDX-License-Identifier: Apache-2.0
"""Texts as windows of tokens, each token to be predicted once, with as much before it as the stride leaves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cnllama.errors import InputError
from cnllama.eval.models import Item
from cnllama.textio import read_text_file

if TYPE_CHECKING:
    from cnllama.tokenizer import Tokenizer

CONVENTION = (
    "every token of the text is predicted once; a window begins with BOS where the model has one and holds up to ctx "
    "tokens, the first window predicts all of its tokens, each further one the next `stride` tokens; no end token is "
    "predicted, and without a BOS the first token is not; characters are Unicode code points of the text, line breaks "
    "and spaces included"
)
_RECORDS = (".jsonl", ".json")


@dataclass(frozen=True)
class Window(Item):
    """An item whose wanted rows are to predict `targets`, one for each row."""

    targets: Sequence[int]


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
    """Raises InputError unless 1 <= stride <= size."""
    if size < 2:
        raise InputError(f"--ctx is {size}, expected at least 2 tokens")
    if not 1 <= stride <= size:
        raise InputError(f"--stride is {stride}, expected 1 to the context, {size}")


def windows(tokenizer: Tokenizer, documents: Sequence[str], size: int, stride: int) -> list[Window]:
    """The windows of all documents, see CONVENTION. size: tokens a window may run. Raises InputError as check_window.

    Without a BOS the first token of a document has nothing before it and is not predicted.
    """
    check_window(size, stride)
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    result: list[Window] = []
    for document in documents:
        result += _document_windows(start, tokenizer.encode(document), size, stride)
    return result


def _document_windows(start: list[int], tokens: list[int], size: int, stride: int) -> Iterator[Window]:
    done = 1 - len(start)  # tokens before this one are predicted, or cannot be
    # A window runs `start` and the tokens but its last: that one is only predicted.
    reach = size + 1 - len(start)
    end = 0
    while done < len(tokens):
        end = min(len(tokens), reach if end == 0 else end + stride)
        begin = max(0, end - reach)
        ids = start + tokens[begin : end - 1]
        yield Window(ids, done - begin - 1 + len(start), tokens[done:end])
        done = end
