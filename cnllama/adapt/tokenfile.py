# SPDX-License-Identifier: Apache-2.0
"""The tokens of a data file on disk: made once, named by a hash of all that decides them, then mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnllama.adapt.reading import ReadLog, check_files
from cnllama.container import read_json
from cnllama.contents import file_sha256
from cnllama.convert.tokenizers import read_tokenizer
from cnllama.errors import InputError, printable
from cnllama.files import Output, make_directory, write_json
from cnllama.tokenizer import Tokenizer

_VERSION = 1
_FLUSH_TOKENS = 1 << 20

Ids = npt.NDArray[np.unsignedinteger[Any]]
Positions = npt.NDArray[np.int64]
Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer directory opened for training: `size` is one more than the largest id, `pad_id` that of `[PAD]` or 0.

    sha256: of the model and of the settings that decide ids.
    """

    tokenizer: Tokenizer
    sha256: str
    size: int
    pad_id: int

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """Of the token files: uint16 while it can hold every id."""
        return np.uint16 if self.size <= 1 << 16 else np.uint32


def open_vocabulary(directory: Path, rows: int | None = None) -> Vocabulary:
    """Reads tokenizer.model and the JSON files beside it as the converter does.

    rows: of the model's embeddings; special tokens without an id get one while there are rows (all of them by default).
    Raises InputError when there is no tokenizer, and when it has more ids than `rows`.
    """
    files = read_tokenizer(directory, None)
    if files is None:
        raise InputError(f"{directory}: there is no tokenizer.model, expected a tokenizer directory")
    files, _ = files.place(rows if rows is not None else 1 << 31)
    if rows is not None and files.size > rows:
        raise InputError(
            f"{directory}: the tokenizer has {files.size:,} ids but the model {rows:,} rows; "
            "grow the model first with cnllama adapt resize"
        )
    settings = files.settings()
    digest = hashlib.sha256(files.model + json.dumps(settings, sort_keys=True).encode()).hexdigest()
    tokenizer = Tokenizer(files.model, settings, str(directory))
    pad = next((i for i in (tokenizer.special_id(name) for name in ("[PAD]", "<pad>")) if i is not None), 0)
    return Vocabulary(tokenizer, digest, files.size, pad)


@dataclass
class FileReport:
    """What tokenizing a file gave.

    entries: documents or samples. masked: samples left out because no answer was left inside the length. truncated:
    samples cut at the length. bad, bad_lines: see ReadLog.
    """

    file: str
    entries: int = 0
    tokens: int = 0
    characters: int = 0
    masked: int = 0
    truncated: int = 0
    bad: int = 0
    bad_lines: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Sentences for the user: one on the file, then one for each kind of loss."""
        out = [f"{self.file}: {self.entries:,} entries, {self.tokens:,} tokens, {self.characters:,} characters"]
        if self.truncated:
            out.append(f"{self.file}: {self.truncated:,} samples were cut at the maximum length")
        if self.masked:
            out.append(f"{self.file}: {self.masked:,} samples were skipped: their prompts leave no room for an answer")
        return out + ReadLog(self.bad, self.bad_lines).lines()


@dataclass(frozen=True)
class Entry:
    """One document or sample on its way to the file. mask: 1 where a token is in the loss, None for all of them."""

    ids: list[int]
    characters: int
    mask: list[int] | None = None


Produce = Callable[[ReadLog, FileReport], Iterator[Entry]]


class TokenFile:
    """A mapped token file: tokens [n], and where each entry ends, int64 [entries]; mask uint8 [n] for samples."""

    def __init__(self, stem: Path) -> None:
        info = read_json(stem.with_name(stem.name + ".json"), names=True)
        self.stem = stem
        self.report = FileReport(**info["report"])
        self.ends: Positions = self._map("ends", np.dtype(np.int64), self.report.entries)
        self.tokens: Ids = self._map("tokens", np.dtype(info["dtype"]), self.report.tokens)
        self.mask: Mask | None = self._map("mask", np.dtype(np.uint8), self.report.tokens) if info["masked"] else None

    @property
    def starts(self) -> Positions:
        """Where each entry begins, int64 [entries]."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])

    def _map(self, kind: str, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        path = self.stem.with_name(f"{self.stem.name}.{kind}")
        if path.stat().st_size != count * dtype.itemsize:
            raise ValueError(f"{path} has the wrong size")
        return np.memmap(path, dtype, "r", shape=(count,))


def token_file(
    path: Path,
    cache: Path,
    vocabulary: Vocabulary,
    options: Mapping[str, Any],
    produce: Produce,
    *,
    progress: bool = False,
) -> TokenFile:
    """The tokens of data file `path`, from the cache directory or made now.

    options: all that decides the result besides the tokenizer and the file's contents. produce: gives the entries; its
    ReadLog and FileReport collect what is left out. Raises InputError when nothing is left, CnllamaError for a full
    disk.
    """
    check_files([path])
    key = json.dumps([_VERSION, vocabulary.sha256, file_sha256(path), dict(options)], sort_keys=True)
    stem = cache / f"{path.stem[:40]}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    try:
        return TokenFile(stem)
    except (OSError, InputError, KeyError, TypeError, ValueError):
        pass  # not there, or a damaged leftover: it is made again
    make_directory(cache)
    _write(stem, path, vocabulary.dtype, produce, progress)
    return TokenFile(stem)


class _Column:
    """One array of a token file: appended to in memory, written in large pieces."""

    def __init__(self, stem: Path, kind: str, dtype: type[np.generic]) -> None:
        self._output, self._dtype = Output(stem.with_name(f"{stem.name}.{kind}")), dtype
        self._offset = 0
        self._values: list[int] = []

    def extend(self, values: list[int]) -> None:
        self._values += values
        if len(self._values) >= _FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        data = np.array(self._values, self._dtype).tobytes()
        self._output.write(data, self._offset)
        self._offset += len(data)
        self._values = []

    def commit(self) -> None:
        self._flush()
        self._output.commit()

    def discard(self) -> None:
        self._output.discard()


def _write(stem: Path, path: Path, dtype: type[np.generic], produce: Produce, progress: bool) -> None:
    """Writes the columns, then the JSON, whose presence says that the others are complete."""
    from tqdm import tqdm

    log, report = ReadLog(), FileReport(str(path))
    columns: dict[str, _Column] = {}
    bar = tqdm(
        total=path.stat().st_size,
        unit="B",
        unit_scale=True,
        desc=f"tokenize {printable(path.name)}",
        disable=not progress,
    )
    try:
        for entry in produce(log, report):
            if not columns:
                kinds = {"tokens": dtype, "ends": np.int64} | ({} if entry.mask is None else {"mask": np.uint8})
                columns.update((kind, _Column(stem, kind, kind_dtype)) for kind, kind_dtype in kinds.items())
            report.entries += 1
            report.tokens += len(entry.ids)
            report.characters += entry.characters
            columns["tokens"].extend(entry.ids)
            columns["ends"].extend([report.tokens])
            if entry.mask is not None:
                columns["mask"].extend(entry.mask)
            bar.update(log.bytes_read - bar.n)
        report.bad, report.bad_lines = log.count, log.listed
        if not columns:
            raise InputError(_nothing_left(path, report))
        masked = "mask" in columns
        for kind in list(columns):
            columns[kind].commit()
            del columns[kind]
    finally:
        bar.close()
        for column in columns.values():
            column.discard()
    info = {"dtype": np.dtype(dtype).name, "masked": masked, "report": asdict(report)}
    write_json(stem.with_name(stem.name + ".json"), info)


def _nothing_left(path: Path, report: FileReport) -> str:
    if report.masked:
        return f"{path}: none of {report.masked:,} samples leaves room for an answer; raise the maximum length"
    if report.bad:
        return f"{path}: all {report.bad:,} lines are bad, the first is {report.bad_lines[0]}"
    return f"{path}: the file holds no text; expected documents or records to train on"
