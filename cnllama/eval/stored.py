# SPDX-License-Identifier: Apache-2.0
"""Log probabilities of a reference model in a file: computed once, compared with many packed files.

A safetensors file with one tensor, `logprobs`, F16 [rows, vocab_size]: natural logs of the whole distribution after
every predicted token, in the order of the windows. Half precision costs under 1e-6 of divergence: the rows are made to
sum to one again when they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from cnllama.container import Output, SafetensorsFile, check_space
from cnllama.eval.models import Item, Progress, Rows, Scorer
from cnllama.eval.numerics import log_softmax
from cnllama.eval.texts import Window

_FORMAT, _VERSION, _NAME = "cnllama-reference", "1", "logprobs"
_ROWS = 64
_ALIGNMENT = 64


def stored_bytes(parts: Sequence[Window], vocab_size: int) -> int:
    """Size of the file's data for these windows."""
    return 2 * vocab_size * sum(len(window.targets) for window in parts)


def windows_digest(parts: Sequence[Window]) -> str:
    """Of everything that the rows depend on besides the model."""
    digest = hashlib.sha256()
    for window in parts:
        numbers = [len(window.ids), window.begin, *window.ids, *window.targets]
        digest.update(np.asarray(numbers, "<i8").tobytes())
    return digest.hexdigest()


class SavingScorer:
    """A model whose log probabilities are also written to a file, which appears when the block ends without an error.

    All windows must be read, in one call of `rows`. Raises CnllamaError when the disk cannot hold the file.
    """

    def __init__(self, model: Scorer, path: Path, parts: Sequence[Window], source: str) -> None:
        self.vocab_size = model.vocab_size
        self._model = model
        counts = [len(window.targets) for window in parts]
        self._first = [0, *np.cumsum(counts).tolist()]
        shape = [self._first[-1], self.vocab_size]
        metadata = {"format": _FORMAT, "version": _VERSION, "windows_sha256": windows_digest(parts), "source": source}
        entry = {"dtype": "F16", "shape": shape, "data_offsets": [0, stored_bytes(parts, self.vocab_size)]}
        header = json.dumps({"__metadata__": metadata, _NAME: entry}, ensure_ascii=False).encode("utf-8", "replace")
        header += b" " * (-(8 + len(header)) % _ALIGNMENT)
        self._begin = 8 + len(header)
        check_space(path, self._begin + stored_bytes(parts, self.vocab_size))
        self._output = Output(path)
        self._output.write(len(header).to_bytes(8, "little") + header, 0)

    def __enter__(self) -> SavingScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._output.commit()
        self._output.__exit__(kind, error, traceback)

    def rows(self, items: Sequence[Item], progress: Progress | None = None) -> Iterator[Rows]:
        """What the model gives."""
        for rows in self._model.rows(items, progress):
            row = self._first[rows.item] + rows.position - items[rows.item].begin
            for at in range(0, len(rows.logits), _ROWS):
                data = log_softmax(rows.logits[at : at + _ROWS]).astype("<f2")
                self._output.write(data.tobytes(), self._begin + 2 * self.vocab_size * (row + at))
            yield rows


class StoredScorer:
    """The model of such a file. Raises InputError for another format, other windows or another vocabulary."""

    def __init__(self, path: Path, parts: Sequence[Window], vocab_size: int) -> None:
        file = SafetensorsFile(path)
        entry = file.entries.get(_NAME)
        if file.metadata.get("format") != _FORMAT or file.metadata.get("version") != _VERSION or entry is None:
            file.refuse("this holds no reference log probabilities", "make them with: cnllama eval kl --save-reference")
        rows = sum(len(window.targets) for window in parts)
        if entry.dtype != "F16" or len(entry.shape) != 2 or entry.shape[1] != vocab_size:
            file.refuse(
                f"the log probabilities are {entry.dtype} {list(entry.shape)} and the model has {vocab_size} tokens",
                "make them again from the checkpoint that was packed",
            )
        if entry.shape[0] != rows or file.metadata.get("windows_sha256") != windows_digest(parts):
            file.refuse(
                f"its {entry.shape[0]:,} rows were made for another text, tokenizer, --ctx or --stride",
                f"use the same ones, or make it again ({rows:,} rows are wanted)",
            )
        self.vocab_size = vocab_size
        self.source = file.metadata.get("source", "")
        self._file, self._entry = file, entry
        self._values = file.view(_NAME).view("<f2").reshape(entry.shape)

    def rows(self, items: Sequence[Item], progress: Progress | None = None) -> Iterator[Rows]:
        """The rows of the windows that the file was opened for, as logits."""
        row = 0
        for number, item in enumerate(items):
            for position in range(item.begin, len(item.ids), _ROWS):
                n = min(_ROWS, len(item.ids) - position)
                values = self._values[row : row + n].astype(np.float32)
                self._file.check_unchanged()
                yield Rows(number, position, values)
                row += n
            if progress:
                progress(len(item.ids))
