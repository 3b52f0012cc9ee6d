# SPDX-License-Identifier: Apache-2.0
"""Log probabilities of a reference model in a file: computed once, compared with many packed files.

A safetensors file with two tensors, whose rows are the predicted tokens in the order of the windows: `logprobs`, F16
[rows, vocab_size], natural logs of the whole distribution, and `target_logprobs`, F32 [rows], that of the token that
comes next. The second makes perplexities those of the model to 1e-6 nats; in the first the others share what is left of
one, which keeps half precision from moving a mean divergence by 1e-5 (tests/test_eval_stored.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from cnllama.container import SafetensorsFile, parse_json
from cnllama.eval.models import FloatArray, Item, Progress, Rows, Scorer
from cnllama.eval.numerics import log_softmax
from cnllama.eval.texts import Window
from cnllama.files import Output
from cnllama.space import check_space

_FORMAT, _VERSION = "cnllama-reference", "2"
_NAME, _TARGETS = "logprobs", "target_logprobs"
_LEAST = float(np.finfo(np.float16).min)
_ROWS = 64
_ALIGNMENT = 64
_AGAIN = "make it again with: cnllama eval kl --save-reference"

Statistics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Origin:
    """What a reference was made from.

    source: names, for people. content: changes with the contents of its files. tensors: {name: {"rms", "mean",
    "absmax"}} of the merged weights, as in a .cnl's fingerprint.
    """

    source: str
    content: str = ""
    tensors: Statistics = field(default_factory=dict)


def stored_bytes(parts: Sequence[Window], vocab_size: int) -> int:
    """Size of the file's data for these windows."""
    return (2 * vocab_size + 4) * _count(parts)


def windows_digest(parts: Sequence[Window]) -> str:
    """Of everything that the rows depend on besides the model."""
    digest = hashlib.sha256()
    for window in parts:
        numbers = [len(window.ids), window.begin, *window.ids, *window.targets]
        digest.update(np.asarray(numbers, "<i8").tobytes())
    return digest.hexdigest()


def _count(parts: Sequence[Window]) -> int:
    return sum(len(window.targets) for window in parts)


class SavingScorer:
    """A model whose log probabilities are also written to a file, which appears when the block ends without an error.

    All windows must be read, in one call of `rows`. Raises CnllamaError when the disk cannot hold the file.
    """

    def __init__(self, model: Scorer, path: Path, parts: Sequence[Window], origin: Origin) -> None:
        self.vocab_size = model.vocab_size
        self._model, self._parts = model, parts
        self._first = [0, *np.cumsum([len(window.targets) for window in parts]).tolist()]
        rows = self._first[-1]
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "windows_sha256": windows_digest(parts),
            "source": origin.source,
            "content": origin.content,
            "tensors": json.dumps(origin.tensors),
        }
        size = stored_bytes(parts, self.vocab_size)
        table = {
            "__metadata__": metadata,
            _TARGETS: {"dtype": "F32", "shape": [rows], "data_offsets": [0, 4 * rows]},
            _NAME: {"dtype": "F16", "shape": [rows, self.vocab_size], "data_offsets": [4 * rows, size]},
        }
        header = json.dumps(table, ensure_ascii=False).encode("utf-8", "replace")
        header += b" " * (-(8 + len(header)) % _ALIGNMENT)
        self._begin = 8 + len(header)
        check_space(path, self._begin + size)
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
        matrix = self._begin + 4 * self._first[-1]
        for rows in self._model.rows(items, progress):
            inside = rows.position - items[rows.item].begin
            targets = np.asarray(self._parts[rows.item].targets, np.int64)[inside:]
            row = self._first[rows.item] + inside
            for at in range(0, len(rows.logits), _ROWS):
                values = log_softmax(rows.logits[at : at + _ROWS])
                exact = values[np.arange(len(values)), targets[at : at + len(values)]].astype("<f4")
                self._output.write(exact.tobytes(), self._begin + 4 * (row + at))
                data = np.maximum(values, _LEAST).astype("<f2")
                self._output.write(data.tobytes(), matrix + 2 * self.vocab_size * (row + at))
            yield rows


class StoredScorer:
    """The model of such a file. content: what it must have been made from, where that is known.

    Raises InputError for another format, other windows, another vocabulary and another origin.
    """

    def __init__(self, path: Path, parts: Sequence[Window], vocab_size: int, content: str = "") -> None:
        file = SafetensorsFile(path)
        self._file, self.vocab_size = file, vocab_size
        if file.metadata.get("format") != _FORMAT or _NAME not in file.entries:
            file.refuse("this holds no reference log probabilities", "make them with: cnllama eval kl --save-reference")
        if file.metadata.get("version") != _VERSION or _TARGETS not in file.entries:
            version = file.metadata.get("version", "")
            file.refuse(f"its version is {version!r:.20} and this cnllama reads {_VERSION!r}", _AGAIN)
        self._check_shapes(_count(parts), vocab_size)
        if file.metadata.get("windows_sha256") != windows_digest(parts):
            file.refuse(
                f"its {file.entries[_NAME].shape[0]:,} rows were made for another text, tokenizer, --ctx or --stride",
                f"use the same ones, or make it again ({_count(parts):,} rows are wanted)",
            )
        if content and file.metadata.get("content") != content:
            file.refuse("it was made from other files than those named now", "choose another place, or remove it")
        self.origin = Origin(file.metadata.get("source", ""), file.metadata.get("content", ""), self._statistics())
        self._targets = [np.asarray(window.targets, np.int64) for window in parts]
        self._exact = file.view(_TARGETS).view("<f4")
        self._values = file.view(_NAME).view("<f2").reshape(file.entries[_NAME].shape)

    def rows(self, items: Sequence[Item], progress: Progress | None = None) -> Iterator[Rows]:
        """The rows of the windows that the file was opened for, as log probabilities."""
        row = 0
        for number, item in enumerate(items):
            for position in range(item.begin, len(item.ids), _ROWS):
                n = min(_ROWS, len(item.ids) - position)
                values, exact = self._values[row : row + n], self._exact[row : row + n]
                if not (np.isfinite(values).all() and np.isfinite(exact).all() and (exact <= 0).all()):
                    self._file.check_unchanged()
                    self._file.refuse(f"row {row:,} and the {n - 1} after it hold what is no log probability", _AGAIN)
                inside = position - item.begin
                found = _with_exact(values, self._targets[number][inside : inside + n], exact)
                self._file.check_unchanged()
                yield Rows(number, position, found)
                row += n
            if progress:
                progress(len(item.ids))

    def _check_shapes(self, rows: int, vocab_size: int) -> None:
        matrix, targets = self._file.entries[_NAME], self._file.entries[_TARGETS]
        if matrix.dtype != "F16" or len(matrix.shape) != 2 or matrix.shape[1] != vocab_size:
            self._file.refuse(
                f"the log probabilities are {matrix.dtype} {list(matrix.shape)} and the model has {vocab_size} tokens",
                "make them again from the checkpoint that was packed",
            )
        if targets.dtype != "F32" or targets.shape != matrix.shape[:1]:
            self._file.refuse(f"{_TARGETS} is {targets.dtype} {list(targets.shape)}, expected F32 [{rows}]", _AGAIN)
        if matrix.shape[0] != rows:
            self._file.refuse(
                f"its {matrix.shape[0]:,} rows were made for another text, tokenizer, --ctx or --stride",
                f"use the same ones, or make it again ({rows:,} rows are wanted)",
            )

    def _statistics(self) -> Statistics:
        what = f"{self._file.path}: the table of its tensors"
        found = parse_json(self._file.metadata.get("tensors", "{}"), what)
        keys = ("rms", "mean", "absmax")
        good = isinstance(found, dict) and all(
            isinstance(values, dict) and all(_is_number(values.get(key)) for key in keys) for values in found.values()
        )
        if not good:
            self._file.refuse("the table of its tensors holds no statistics", _AGAIN)
        return dict(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _with_exact(
    values: npt.NDArray[np.float16], targets: npt.NDArray[np.int64], exact: npt.NDArray[np.float32]
) -> FloatArray:
    """The rows as log probabilities that sum to one, the targets' being `exact`."""
    at = np.arange(len(values)), targets
    rows = values.astype(np.float64)
    rows[at] = -np.inf
    with np.errstate(divide="ignore"):
        left = np.log(-np.expm1(exact.astype(np.float64)))
        others = np.log(np.exp(rows).sum(axis=1))
    shift = left - others
    rows += np.where(np.isfinite(shift), shift, 0.0)[:, None]  # nothing is left beside a target that is certain
    rows[at] = exact
    return rows.astype(np.float32)
