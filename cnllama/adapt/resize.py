# SPDX-License-Identifier: Apache-2.0
"""Grows embed_tokens and lm_head of a Hugging Face checkpoint to a merged tokenizer, a few rows in memory at a time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnllama.adapt.hf_checkpoint import OutTensor, write_safetensors
from cnllama.adapt.kept import result_directory
from cnllama.adapt.plots import format_table
from cnllama.adapt.tokenizer_merge import write_tokenizer_files
from cnllama.arguments import add_output_option
from cnllama.config import EMBEDDING, LM_HEAD
from cnllama.convert.checkpoint import (
    Checkpoint,
    FloatArray,
    SourceTensor,
    canonical_name,
    open_checkpoint,
    open_weights,
)
from cnllama.convert.tokenizers import MAX_TOKENIZER, MODEL, TokenizerFiles, first_difference, read_tokenizer
from cnllama.errors import InputError, printable
from cnllama.files import copy_file, write_json
from cnllama.paths import exists, is_dir, read_bytes
from cnllama.stdio import say, show
from cnllama.tokenizer import SPACE, Tokenizer

INITS = ("mean", "normal", "zeros")
_ROWS = 1024
_TOKENIZER_FILES = (
    MODEL, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
    "chat_template.jinja",
)  # fmt: skip
_KEPT = ("generation_config.json", "LICENSE", "LICENSE.txt")


@dataclass(frozen=True)
class Growth:
    """What happened to one matrix: rows before and after, and the mean Euclidean norm of the kept and the new rows."""

    name: str
    old_rows: int
    new_rows: int
    old_norm: float
    new_norm: float


@dataclass(frozen=True)
class Resized:
    """The result of a resize: the checkpoint's directory, its rows, each matrix, and warnings for the user."""

    directory: Path
    rows: int
    growth: list[Growth]
    warnings: list[str] = field(default_factory=list)


def resize(
    base: Path,
    tokenizer: Path,
    out: Path,
    *,
    init: str = "mean",
    multiple: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Resized:
    """Writes the checkpoint `base` with rows for every id of `tokenizer` to the directory `out`, with its tokenizer.

    init: "mean" gives a new row the mean of the rows that its text had under the old tokenizer (the mean of all rows
    where it had none, and for padding), "normal" draws from the old rows' mean and deviation by column.
    multiple: rows are padded to a multiple of it. Old rows and all other tensors keep their values and types; .bin
    becomes safetensors. What a killed run left in `out` is begun anew, and a finished result of the same inputs is left
    as it is (growth is empty then). Raises InputError when the tokenizer does not extend the base's, and where `out`
    holds anything else.
    """
    if init not in INITS:
        raise InputError(f"there is no initialization {init!r}: choose one of {', '.join(INITS)}")
    if multiple < 1:
        raise InputError(f"rows are to be a multiple of {multiple}, expected a positive number")
    checkpoint = open_checkpoint(base)
    if EMBEDDING not in checkpoint.tensors:
        raise InputError(f"{base}: there is no tensor {EMBEDDING}; this is no LLaMA checkpoint, or a part is missing")
    rows = checkpoint.tensors[EMBEDDING].shape[0]
    old, new = _tokenizers(base, tokenizer, rows)
    grown = -(-max(new.size, rows) // multiple) * multiple
    if new.size <= old.size and grown == rows:
        raise InputError(
            f"{tokenizer}: has {new.size:,} ids and {base} has rows for them all; there is nothing to grow"
        )
    matrices = [name for name in (EMBEDDING, LM_HEAD) if name in checkpoint.tensors]
    warnings = []
    if checkpoint.config.get("vocab_size") != rows:
        warnings.append(
            f"{printable(str(base / 'config.json'))}: says vocab_size {checkpoint.config.get('vocab_size')!r:.40}, has "
            f"{rows:,} rows"
        )
    parts = old_tokens(old, new, grown)
    grown_by_name = {
        name: _GrownMatrix(_matrix(checkpoint, name, rows), old.size, parts, init, seed) for name in matrices
    }
    inputs = {"base": [base], "tokenizer": [tokenizer]}
    options = {"init": init, "pad_to_multiple": multiple, "seed": seed}
    files = list(dict.fromkeys(tensor.file for tensor in checkpoint.tensors.values()))
    needed = sum(path.stat().st_size for path in files) + sum(m.tensor.nbytes for m in grown_by_name.values())
    with result_directory(
        out, "adapt resize", inputs=inputs, options=options, last="config.json", needed=needed
    ) as own:
        if own is None:
            return Resized(out, grown, [], warnings)
        _write_weights(files, out, grown_by_name, needed if progress else None)
        _write_small_files(checkpoint, tokenizer, new, out, grown)
    return Resized(out, grown, [matrix.growth(name) for name, matrix in grown_by_name.items()], warnings)


def _tokenizers(base: Path, tokenizer: Path, rows: int) -> tuple[TokenizerFiles, TokenizerFiles]:
    """The old and the new tokenizer, the second extending the first. Raises InputError."""
    old = read_tokenizer(base, None)
    if old is None:
        raise InputError(f"{base}: there is no {MODEL}, expected the SentencePiece tokenizer of the checkpoint")
    old, _ = old.place(rows)
    if old.size > rows:
        raise InputError(
            f"{base}: the tokenizer has {old.size:,} ids but embed_tokens {rows:,} rows; get the right one"
        )
    new = read_tokenizer(tokenizer, None) if is_dir(tokenizer) else _model_file(tokenizer)
    if new is None:
        raise InputError(f"{tokenizer}: there is no {MODEL}, expected a directory made by cnllama tokenizer merge")
    new, _ = new.place(1 << 31)
    difference = first_difference(old, new)
    if difference is not None:
        raise InputError(
            f"{tokenizer}: id {difference} is {new.processor.id_to_piece(difference)!r:.40} and "
            f"{old.processor.id_to_piece(difference)!r:.40} in {old.file}; it does not extend the old tokenizer, "
            "merge it with cnllama tokenizer merge"
        )
    if new.size < old.size:
        raise InputError(
            f"{tokenizer}: has {new.size:,} ids, fewer than the {old.size:,} of {base}; merge it with those"
        )
    for text, i in old.added.items():
        if i >= old.pieces and _text_of(new, i) != text:
            raise InputError(
                f"{tokenizer}: id {i} is {_text_of(new, i)!r:.40}, but this is the id of the base's added token "
                f"{text!r:.40}; give the base without added tokens"
            )
    return old, new


def _model_file(path: Path) -> TokenizerFiles:
    return TokenizerFiles(path, read_bytes(path, MAX_TOKENIZER))


def _text_of(files: TokenizerFiles, i: int) -> str | None:
    if i < files.pieces:
        return str(files.processor.id_to_piece(i))
    return next((text for text, number in files.added.items() if number == i), None)


def _matrix(checkpoint: Checkpoint, name: str, rows: int) -> SourceTensor:
    tensor = checkpoint.tensors[name]
    if len(tensor.shape) != 2 or tensor.shape[0] != rows:
        raise InputError(
            f"{tensor.file}: {name} has shape {list(tensor.shape)} and embed_tokens {rows:,} rows; the two differ, "
            "get the checkpoint again"
        )
    return tensor


def old_tokens(old: TokenizerFiles, new: TokenizerFiles, rows: int) -> list[list[int]]:
    """For every id from old.size to rows - 1, the ids that its text has under the old tokenizer, empty for none."""
    plain = Tokenizer(old.model, {"add_dummy_prefix": False})
    prefixed = Tokenizer(old.model, {"add_dummy_prefix": True})
    added = {i: text for text, i in new.added.items()}
    parts: list[list[int]] = []
    for i in range(old.size, rows):
        text = added.get(i, "")
        if i < new.pieces:
            p = new.processor
            marker = p.is_control(i) or p.is_byte(i) or p.is_unknown(i) or p.is_unused(i)
            text = "" if marker else str(p.id_to_piece(i))
        # A leading space is the old tokenizer's own when it strips the one of the text.
        if text.startswith(SPACE):
            parts.append(prefixed.encode(text[1:].replace(SPACE, " ")))
        else:
            parts.append(plain.encode(text.replace(SPACE, " ")))
    return parts


class _GrownMatrix:
    """A matrix with its new rows, read like the old one."""

    def __init__(self, source: SourceTensor, kept: int, parts: list[list[int]], init: str, seed: int) -> None:
        self.source, self.kept, self.parts, self.init, self.seed = source, kept, parts, init, seed
        self.columns = source.shape[1]
        self.mean, self.std, self.old_norm = self._statistics()
        self._norms = 0.0

    @property
    def tensor(self) -> OutTensor:
        return OutTensor(self.source.dtype, (self.kept + len(self.parts), self.columns), self.read, self.source.release)

    def growth(self, name: str) -> Growth:
        new_norm = self._norms / len(self.parts)
        return Growth(name, self.source.shape[0], self.kept + len(self.parts), self.old_norm, new_norm)

    def read(self, begin: int, end: int) -> FloatArray:
        """float32 rows begin .. end; every row is to be read once, for the norms."""
        if end <= self.kept:
            return self.source.read(begin, end)
        values = np.empty((end - begin, self.columns), np.float32)
        split = max(begin, self.kept)
        if begin < self.kept:
            values[: self.kept - begin] = self.source.read(begin, self.kept)
        for i in range(split, end):
            row = values[i - begin]
            row[:] = self._new_row(i)
            self._norms += float(np.linalg.norm(row))
        return values

    def _new_row(self, i: int) -> FloatArray | float:
        ids = self.parts[i - self.kept]
        if self.init == "zeros":
            return 0.0
        if self.init == "normal":
            noise = np.random.Generator(np.random.PCG64([self.seed, i])).standard_normal(self.columns, np.float32)
            return self.mean + self.std * noise
        if not ids:
            return self.mean
        return np.mean([self.source.read(j, j + 1)[0] for j in ids], axis=0, dtype=np.float32)

    def _statistics(self) -> tuple[FloatArray, FloatArray, float]:
        """Mean and deviation by column, and the mean norm, of the kept rows."""
        total, squares = np.zeros(self.columns), np.zeros(self.columns)
        norms = 0.0
        for begin in range(0, self.kept, _ROWS):
            values = self.source.read(begin, min(begin + _ROWS, self.kept)).astype(np.float64)
            if not np.isfinite(values).all():
                raise InputError(f"{self.source.file}: {self.source.name} holds NaN or infinity; get the file again")
            total += values.sum(0)
            squares += (values**2).sum(0)
            norms += float(np.linalg.norm(values, axis=1).sum())
        self.source.release()
        mean = total / self.kept
        deviation = np.sqrt(np.maximum(squares / self.kept - mean**2, 0))
        return mean.astype(np.float32), deviation.astype(np.float32), norms / self.kept


def _write_weights(files: list[Path], out: Path, grown: Mapping[str, _GrownMatrix], total_bytes: int | None) -> None:
    """Every file of the base: copied when it holds no grown matrix, else written anew. total_bytes: None for no bar."""
    from tqdm import tqdm

    weight_map: dict[str, str] = {}
    total = 0
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="resize", disable=total_bytes is None) as bar:
        for number, path in enumerate(files, 1):
            tensors = _tensors_of(path, grown)
            name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
            if path.suffix == ".safetensors" and not any(canonical_name(key) in grown for key in tensors):
                copy_file(path, out / name, bar.update)
            else:
                write_safetensors(out / name, tensors, bar.update)
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)


def _tensors_of(path: Path, grown: Mapping[str, _GrownMatrix]) -> dict[str, OutTensor]:
    """The tensors of a file under their stored names, grown ones in place of the old; without derived tables."""
    found = {}
    for name, source in open_weights(path).items():
        if not name.endswith("rotary_emb.inv_freq"):
            matrix = grown.get(canonical_name(name))
            found[name] = OutTensor.copy_of(source) if matrix is None else matrix.tensor
    return found


def _write_small_files(checkpoint: Checkpoint, tokenizer: Path, new: TokenizerFiles, out: Path, rows: int) -> None:
    """The tokenizer, what else belongs to a checkpoint, and last the config, without which none of it can be loaded."""
    if is_dir(tokenizer):
        for name in _TOKENIZER_FILES:
            if exists(tokenizer / name):
                copy_file(tokenizer / name, out / name)
    else:
        write_tokenizer_files(out, new.model)
    for name in _KEPT:
        if exists(checkpoint.directory / name):
            copy_file(checkpoint.directory / name, out / name)
    write_json(out / "config.json", {**checkpoint.config, "vocab_size": rows})


def add_resize_arguments(parser: argparse.ArgumentParser) -> None:
    """BASE TOKENIZER -o DIR [--init mean|normal|zeros] [--pad-to-multiple N] [--seed S]."""
    parser.add_argument("base", type=Path, metavar="BASE", help="directory of a Hugging Face LLaMA")
    parser.add_argument(
        "tokenizer", type=Path, metavar="TOKENIZER", help="merged tokenizer: a directory or .model file"
    )
    add_output_option(parser, "DIR", "directory to write")
    parser.add_argument(
        "--init", choices=INITS, default="mean", help="new rows (default: mean of the old tokens' rows)"
    )
    parser.add_argument(
        "--pad-to-multiple", type=int, default=1, metavar="N", help="pad the rows to a multiple of N (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of --init normal (default 0)")


def run_resize(args: argparse.Namespace) -> int:
    """Runs `cnllama adapt resize` and prints the norms of old and new rows."""
    done = resize(
        args.base,
        args.tokenizer,
        args.output,
        init=args.init,
        multiple=args.pad_to_multiple,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    for warning in done.warnings:
        say(f"cnllama: warning: {warning}")
    rows: list[Any] = [(g.name, g.old_rows, g.new_rows, g.old_norm, g.new_norm) for g in done.growth]
    if rows:
        columns = ("matrix", "rows before", "rows after", "norm of old rows", "norm of new rows")
        show(*format_table(columns, rows).split("\n"))
    show(f"{done.directory}: {done.rows:,} rows")
    return 0
