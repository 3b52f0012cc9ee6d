# SPDX-License-Identifier: Apache-2.0
"""How well two tokenizers encode the same text: tokens per character, and how long its lines become."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnllama.adapt.plots import encoding_plot, format_table
from cnllama.adapt.reading import POEM_TEMPLATE, ReadLog, check_files, read_documents
from cnllama.convert.tokenizers import TokenizerFiles
from cnllama.errors import InputError
from cnllama.tokenizer import Tokenizer

# The sentence with which the paper shows what a Chinese vocabulary saves.
EXAMPLE = "人工智能是计算机科学、心理学、哲学等学科融合的交叉学科。"


@dataclass(frozen=True)
class Encoding:
    """One tokenizer on the lines of a file. lengths: tokens of each line, without BOS and EOS.

    byte_tokens: those that stand for a single byte of a character the vocabulary lacks. example: pieces of EXAMPLE.
    """

    name: str
    pieces: int
    characters: int
    lengths: tuple[int, ...]
    byte_tokens: int
    example: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all lines."""
        return sum(self.lengths)

    @property
    def tokens_per_character(self) -> float:
        """Less is better."""
        return self.tokens / self.characters

    def figures(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "tokenizer": self.name,
            "pieces": self.pieces,
            "tokens": self.tokens,
            "tokens_per_character": self.tokens_per_character,
            "characters_per_token": self.characters / self.tokens,
            "byte_tokens": self.byte_tokens,
            "mean_length": statistics.fmean(self.lengths),
            "median_length": statistics.median(self.lengths),
            "longest": max(self.lengths),
            "example_tokens": len(self.example),
            "example": list(self.example),
        }


def read_sample(path: Path, log: ReadLog, template: str = POEM_TEMPLATE, form: str | None = None) -> list[str]:
    """The lines of a text or JSON file that are not blank. Raises InputError when there are none."""
    check_files([path])
    documents = read_documents(path, log, template, form)
    lines = [line for document in documents for line in document.split("\n") if line.strip()]
    if not lines:
        reason = f"all {log.count:,} lines are bad, the first is {log.listed[0]}" if log.count else "it holds no text"
        raise InputError(f"{path}: {reason}")
    return lines


def measure(name: str, files: TokenizerFiles, lines: Sequence[str]) -> Encoding:
    """Encodes every line by itself, as the run time does."""
    tokenizer = Tokenizer(files.model, files.settings())
    lengths = []
    byte_tokens = 0
    for line in lines:
        ids = tokenizer.encode(line)
        lengths.append(len(ids))
        byte_tokens += sum(tokenizer.surface(i).byte is not None for i in ids)
    example = tuple(tokenizer.piece(i) for i in tokenizer.encode(EXAMPLE))
    characters = sum(map(len, lines))
    return Encoding(name, files.pieces, characters, tuple(lengths), byte_tokens, example)


def report_table(old: Encoding, new: Encoding) -> str:
    """The comparison for people: a table, then the example's tokens under both."""
    a, b = old.figures(), new.figures()
    rows: list[tuple[str, str, str, str]] = []
    for label, key, digits in (
        ("pieces", "pieces", 0),
        ("tokens", "tokens", 0),
        ("tokens per character", "tokens_per_character", 4),
        ("characters per token", "characters_per_token", 4),
        ("byte tokens", "byte_tokens", 0),
        ("tokens in a line, mean", "mean_length", 1),
        ("tokens in a line, median", "median_length", 1),
        ("tokens in a line, most", "longest", 0),
        ("tokens of the example", "example_tokens", 0),
    ):
        change = f"{b[key] / a[key] - 1:+.1%}" if a[key] else ""
        rows.append((label, f"{a[key]:,.{digits}f}", f"{b[key]:,.{digits}f}", change))
    head = f"{len(old.lengths):,} lines, {old.characters:,} characters"
    table = format_table((head, old.name, new.name, "change"), rows)
    example = [f"{e.name}: {len(e.example)} tokens: {' '.join(e.example)}" for e in (old, new)]
    return "\n".join([table, "", EXAMPLE, *example])


def plot_report(old: Encoding, new: Encoding, out: Path) -> None:
    """Writes the comparison as a PNG. Raises InputError when matplotlib is missing."""
    encodings = (old, new)
    encoding_plot(
        [e.name for e in encodings], [e.tokens_per_character for e in encodings], [e.lengths for e in encodings], out
    )
