# SPDX-License-Identifier: Apache-2.0
"""Every vocabulary size of a conversion, before any weight is read: which file is wrong, and in which order it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import NoReturn

from cnllama.config import EMBEDDING, LM_HEAD
from cnllama.errors import InputError
from cnllama.paths import exists

from .adapters import Adapter
from .checkpoint import Checkpoint
from .tokenizers import TokenizerFiles, first_difference, read_tokenizer, with_additions
from .tying import RowsError, on_embeddings, rows_after

_MAX_REORDERED = 5
_SMALLEST_PADDING, _LARGEST_PADDING = 8, 512


@dataclass(frozen=True)
class Vocabulary:
    """What the checks decided: the tokenizer that goes into the file, the rows, and what the user should know.

    rows: of the matrices after all adapters, padding included; `tokenizer.size` of them have a token.
    """

    tokenizer: TokenizerFiles
    rows: int
    table: list[str]
    warnings: list[str] = field(default_factory=list)


class _MismatchError(Exception):
    """The sizes do not fit in this order; carries the sentence."""


def check_vocabulary(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], tied: bool, override: Path | None = None
) -> Vocabulary:
    """Follows the vocabulary through base and adapters.

    tied: whether the base has one tensor for embed_tokens and lm_head. override: the directory given with --tokenizer.

    Raises InputError with one sentence, that names the wrong file, and the table of all sizes.
    """
    table = size_table(checkpoint, adapters, override)
    try:
        steps = _follow(checkpoint, adapters, tied)
        rows = steps[-1]
        tokenizer, left_out = _tokenizer_after(checkpoint, adapters, override, steps)
    except (_MismatchError, RowsError) as error:
        better = _better_order(checkpoint, adapters, tied, override)
        hint = f"; the right order is {' '.join(f'--lora {a.directory}' for a in better)}" if better else ""
        raise InputError(f"{error}{hint}", table) from None
    warnings = [
        *tokenizer.notices,
        *(
            f"{tokenizer.file.parent}: the special token {text!r} has no id and the model no row for it: ignored"
            for text in left_out
        ),
    ]
    if tokenizer.size < rows:
        warnings.append(
            f"{checkpoint.directory}: the model has {rows} rows and {tokenizer.file.parent} {tokenizer.size} tokens; "
            f"the last {rows - tokenizer.size} rows are padding to a multiple of {padding(rows)} and left out"
        )
    return Vocabulary(tokenizer, rows, table, warnings)


def _follow(checkpoint: Checkpoint, adapters: Sequence[Adapter], tied: bool) -> list[int]:
    """Rows of the base and after each adapter."""
    base = {name: checkpoint.tensors[name].shape[0] for name in (EMBEDDING, LM_HEAD) if name in checkpoint.tensors}
    rows = [base[EMBEDDING]]
    if not tied and base[LM_HEAD] != rows[0]:
        raise _MismatchError(_odd_one(checkpoint, base))
    for adapter in adapters:
        found = on_embeddings(adapter, tied)
        rows.append(rows_after(adapter, found, rows[-1]))
        tied = found.tied
    return rows


def _tokenizer_after(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], override: Path | None, steps: Sequence[int]
) -> tuple[TokenizerFiles, list[str]]:
    """The tokenizer for the rows of the last of `steps`, which are _follow's."""
    base = read_tokenizer(checkpoint.directory, None)
    if override is not None:
        chosen = read_tokenizer(override, None)
        if chosen is None:
            raise InputError(f"{override}: there is no tokenizer.model, expected a directory with one")
        directories = [checkpoint.directory, *(adapter.directory for adapter in adapters)]
        return _fit(with_additions(chosen, directories), steps[-1], checkpoint)
    tokenizer = base
    for adapter, current in zip(adapters, steps[1:], strict=True):
        after = read_tokenizer(adapter.directory, tokenizer)
        if after is None:
            continue
        if tokenizer is not None and after.model != tokenizer.model:
            _check_extends(tokenizer, after)
        if tokenizer is None or after.file != tokenizer.file or after.size != tokenizer.size:
            _fit(after, current, checkpoint)
        tokenizer = after
    if tokenizer is None:
        _refuse_without_model(checkpoint, adapters)
    return _fit(tokenizer, steps[-1], checkpoint)


def _check_extends(before: TokenizerFiles, after: TokenizerFiles) -> None:
    difference = first_difference(before, after)
    if difference is not None:
        raise _MismatchError(
            f"{after.file}: piece {difference} is {after.processor.id_to_piece(difference)!r} but "
            f"{before.processor.id_to_piece(difference)!r} in {before.file}: this is the tokenizer of another model; "
            "give the right one with --tokenizer DIR"
        )


def _fit(tokenizer: TokenizerFiles, rows: int, checkpoint: Checkpoint) -> tuple[TokenizerFiles, list[str]]:
    placed, left_out = tokenizer.place(rows)
    added = f" ({placed.pieces} pieces and {placed.size - placed.pieces} added)" if placed.size > placed.pieces else ""
    if placed.size > rows:
        raise _MismatchError(
            f"{tokenizer.file}: the tokenizer has {placed.size} tokens{added} but the model has {rows} rows: the new "
            "rows are missing; give the adapter that carries them with --lora, or the model's own tokenizer"
        )
    if placed.size < rows and rows - placed.size >= padding(rows):
        raise _MismatchError(
            f"{tokenizer.file}: the tokenizer has {placed.size} tokens{added} but the model has {rows} rows: it is the "
            "tokenizer of another model; give the right one with --tokenizer DIR"
        )
    return placed, left_out


def padding(rows: int) -> int:
    """The largest multiple that this number of rows can have been padded to, 1 for none: fewer rows are its padding.

    Resizing (pad_to_multiple_of) and training programs pad to powers of two, from 8 on for the tensor cores.
    """
    multiple = math.gcd(rows, _LARGEST_PADDING)
    return multiple if multiple >= _SMALLEST_PADDING else 1


def _refuse_without_model(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> NoReturn:
    for directory in [*(a.directory for a in reversed(adapters)), checkpoint.directory]:
        if exists(directory / "tokenizer.json"):
            raise InputError(
                f"{directory}: there is only a tokenizer.json; expected the SentencePiece file tokenizer.model, give "
                "its directory with --tokenizer DIR"
            )
    raise InputError(f"{checkpoint.directory}: there is no tokenizer.model; give its directory with --tokenizer DIR")


def _odd_one(checkpoint: Checkpoint, base: Mapping[str, int]) -> str:
    """Which of embed_tokens and lm_head disagrees with what else is known."""
    embed, head = base[EMBEDDING], base[LM_HEAD]
    tokenizer = read_tokenizer(checkpoint.directory, None)
    votes = [checkpoint.config.get("vocab_size"), tokenizer.size if tokenizer else None]
    wrong, right, expected = LM_HEAD, EMBEDDING, embed
    if votes.count(head) > votes.count(embed):
        wrong, right, expected = EMBEDDING, LM_HEAD, head
    return (
        f"{checkpoint.tensors[wrong].file}: {wrong} has {base[wrong]} rows, expected the {expected} of {right}; the "
        "checkpoint was merged or resized wrongly, make it again"
    )


def _better_order(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], tied: bool, override: Path | None
) -> Sequence[Adapter]:
    """The one order of the same adapters that fits, if there is exactly one."""
    if not 2 <= len(adapters) <= _MAX_REORDERED:
        return ()
    fitting = []
    for order in permutations(adapters):
        try:
            _tokenizer_after(checkpoint, order, override, _follow(checkpoint, order, tied))
        except (_MismatchError, InputError):
            continue
        fitting.append(order)
    return fitting[0] if len(fitting) == 1 else ()


def size_table(checkpoint: Checkpoint, adapters: Sequence[Adapter], override: Path | None = None) -> list[str]:
    """Every vocabulary size that any file states, as lines for people."""
    sizes = _sizes(checkpoint, adapters, override)
    width = max(len(what) for _, what, _ in sizes)
    lines = ["vocabulary sizes found:"]
    last = ""
    for directory, what, size in sizes:
        if directory != last:
            lines.append(f"  {directory}")
            last = directory
        lines.append(f"    {what:<{width}}  {size}")
    return lines


def _sizes(checkpoint: Checkpoint, adapters: Sequence[Adapter], override: Path | None) -> list[tuple[str, str, object]]:
    """(directory, what, size) of every vocabulary size that any file states."""
    found: list[tuple[str, str, object]] = []
    claimed = checkpoint.config.get("vocab_size")
    found.append((str(checkpoint.directory), "config.json vocab_size", "none" if claimed is None else claimed))
    tokenizer = read_tokenizer(checkpoint.directory, None)
    found.append((str(checkpoint.directory), "tokenizer", tokenizer.size if tokenizer else "none"))
    for name in (EMBEDDING, LM_HEAD):
        tensor = checkpoint.tensors.get(name)
        found.append((str(checkpoint.directory), name, tensor.shape[0] if tensor else "tied"))
    for adapter in adapters:
        tokenizer = read_tokenizer(adapter.directory, tokenizer)
        own = exists(adapter.directory / "tokenizer.model")
        found.append((str(adapter.directory), "tokenizer", tokenizer.size if own and tokenizer else "none"))
        found += [(str(adapter.directory), what, rows) for what, rows in dict.fromkeys(adapter.stated_rows())]
    if override is not None:
        given = read_tokenizer(override, None)
        found.append((str(override), "tokenizer", given.size if given else "none"))
    return found
