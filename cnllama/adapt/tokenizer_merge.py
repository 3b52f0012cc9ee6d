# SPDX-License-Identifier: Apache-2.0
"""Appends the pieces of one SentencePiece model to another, and writes Hugging Face tokenizer directories.

A model file is a Protocol Buffers message whose first field repeats, once for each piece. New pieces are put in behind
the last one, and every other byte stays as it is.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnllama.convert.tokenizers import (
    ADDED,
    CONFIG,
    MAX_TOKENIZER,
    MODEL,
    SPECIAL,
    TokenizerFiles,
    read_tokenizer,
)
from cnllama.errors import InputError
from cnllama.files import Output, make_directory, remove_directory, write_file, write_json
from cnllama.ownership import OwnedDirectory
from cnllama.paths import exists, is_dir, read_bytes, same_file

PAD = "[PAD]"
_PIECES = 1
_NORMAL, _USER_DEFINED = 1, 4
_DELIMITED, _FIXED = 2, {1: 8, 5: 4}


@dataclass(frozen=True)
class Merged:
    """A merged model and what became of the pieces. present: pieces of the new model that the base had already."""

    model: bytes
    base: int
    added: int
    present: int
    user_defined: int
    pad: bool

    @property
    def pieces(self) -> int:
        """Pieces in all."""
        return self.base + self.added + self.user_defined + self.pad

    @property
    def sha256(self) -> str:
        """Of the model's bytes."""
        return hashlib.sha256(self.model).hexdigest()


def open_model(path: Path) -> TokenizerFiles:
    """A tokenizer.model file, or the one in a tokenizer or checkpoint directory. Raises InputError when it is none."""
    if is_dir(path):
        files = read_tokenizer(path, None)
        if files is None:
            raise InputError(f"{path}: there is no {MODEL} in this directory, expected a SentencePiece model")
    else:
        files = TokenizerFiles(path, read_bytes(path, MAX_TOKENIZER))
    files.processor.get_piece_size()
    return files


def merge_tokenizers(
    base: TokenizerFiles, new: TokenizerFiles, *, user_defined: Sequence[str] = (), pad: bool = False
) -> Merged:
    """The base model with the new model's ordinary pieces, then `user_defined` ones, then `[PAD]`, all with score 0.

    Pieces keep their order and the base keeps its ids; nothing occurs twice. Raises InputError when the base has tokens
    beside its model, whose ids the new pieces would take, and when a user-defined piece or the pad exists already.
    """
    beside = {text: i for text, i in base.added.items() if i >= base.pieces}
    if beside:
        text, i = next(iter(beside.items()))
        raise InputError(
            f"{base.file.parent}: has {len(beside)} added tokens beside the model, such as {text!r:.40} with id {i}, "
            "whose ids the new pieces would take; give the tokenizer.model file alone, and --pad for the Alpaca token"
        )
    old, end = _read_pieces(base)
    have = {piece for piece, _ in old}
    ordinary = [(piece, kind) for piece, kind in _read_pieces(new)[0] if kind in (_NORMAL, _USER_DEFINED)]
    appended = [(piece, kind) for piece, kind in dict.fromkeys(ordinary) if piece not in have]
    have.update(piece for piece, _ in appended)
    for piece in [*user_defined, *([PAD] if pad else [])]:
        if piece in have or not piece:
            raise InputError(
                f"the piece {piece!r:.40} {'is in the merged model already' if piece else 'is empty'}; drop it"
            )
        have.add(piece)
    following = [*appended, *((piece, _USER_DEFINED) for piece in user_defined), *([(PAD, _NORMAL)] if pad else [])]
    model = base.model[:end] + b"".join(_piece_message(*entry) for entry in following) + base.model[end:]
    processor = TokenizerFiles(base.file, model).processor
    if processor.id_to_piece(list(range(processor.get_piece_size()))) != [piece for piece, _ in [*old, *following]]:
        raise InputError(f"{base.file}: SentencePiece does not read the merged model back; get the file again")
    return Merged(model, len(old), len(appended), len(ordinary) - len(appended), len(user_defined), pad)


def _piece_message(piece: str, kind: int) -> bytes:
    """Field 1 of the model: {1: the text, 2: score 0.0, 3: the kind unless it is the ordinary one}."""
    text = piece.encode("utf-8")
    body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", 0.0)
    body += b"" if kind == _NORMAL else b"\x18" + _varint(kind)
    return b"\x0a" + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _read_pieces(files: TokenizerFiles) -> tuple[list[tuple[str, int]], int]:
    """[(text, kind)] of every piece by id, and where in the model's bytes the last one ends. Raises InputError."""
    pieces: list[tuple[str, int]] = []
    end = 0
    try:
        for number, value, after in _fields(files.model):
            if number == _PIECES and isinstance(value, bytes):
                fields = {n: v for n, v, _ in _fields(value)}
                pieces.append((bytes(fields[1]).decode("utf-8"), int(fields.get(3, _NORMAL))))
                end = after
    except (IndexError, KeyError, TypeError, ValueError):
        pieces = []
    if len(pieces) != files.pieces:
        raise InputError(f"{files.file}: this is no SentencePiece model; get the file again")
    return pieces, end


def _fields(message: bytes) -> Iterator[tuple[int, Any, int]]:
    """(field number, value, where it ends) of a Protocol Buffers message; fixed-size values come as bytes."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _read_varint(message, at)
        else:
            size, at = _read_varint(message, at) if tag & 7 == _DELIMITED else (_FIXED[tag & 7], at)
            value, at = message[at : at + size], at + size
        yield tag >> 3, value, at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


@contextmanager
def tokenizer_output(out: Path, inputs: Sequence[Path] = ()) -> Iterator[Callable[[bytes], None]]:
    """Where a model goes, checked before the work that makes it; gives the function that writes it.

    It becomes the file `out` when that name ends in .model, else a Hugging Face tokenizer directory. Raises InputError
    when `out` is one of `inputs`, and for a directory with files of another tokenizer.
    """
    target = out if out.suffix == ".model" else out / MODEL
    for path in inputs:
        if same_file(path / MODEL if is_dir(path) else path, target):
            raise InputError(f"{target}: this is one of the inputs and would be overwritten; choose another name")
    if target is not out:
        with _tokenizer_directory(out) as write:
            yield write
        return
    made = make_directory(out.parent)
    try:
        with Output(out) as output:

            def write_model(model: bytes) -> None:
                output.write(model, 0)
                output.commit()

            yield write_model
    except BaseException:
        for directory in reversed(made):
            remove_directory(directory)
        raise


@contextmanager
def _tokenizer_directory(out: Path) -> Iterator[Callable[[bytes], None]]:
    if exists(out) and not is_dir(out):
        raise InputError(f"{out}: this is a file, expected the name of a directory or one that ends in .model")
    with OwnedDirectory(out, "tokenizer", names=(CONFIG, SPECIAL, MODEL)):
        for name in ("tokenizer.json", ADDED):
            if exists(out / name):
                raise InputError(f"{out / name}: belongs to another tokenizer; choose an empty directory or remove it")
        yield lambda model: write_tokenizer_files(out, model)


def write_tokenizer_files(directory: Path, model: bytes) -> None:
    """tokenizer_config.json, special_tokens_map.json and, last, tokenizer.model.

    Merged pieces all tie at score 0, which the merge ranks of transformers 5 cannot express: it splits some lines
    otherwise than SentencePiece, the original and this project do.
    """
    config, special = tokenizer_settings(TokenizerFiles(directory / MODEL, model))
    write_json(directory / CONFIG, config)
    write_json(directory / SPECIAL, special)
    write_file(directory / MODEL, model)


def tokenizer_settings(files: TokenizerFiles) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of tokenizer_config.json and special_tokens_map.json for a model with LLaMA's habits."""
    processor = files.processor
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    special = {name: str(processor.id_to_piece(i)) for name, i in ids.items() if i >= 0}
    if processor.pad_id() >= 0 or processor.id_to_piece(processor.piece_to_id(PAD)) == PAD:
        special["pad_token"] = PAD if processor.pad_id() < 0 else str(processor.id_to_piece(processor.pad_id()))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": "bos_token" in special,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        **special,
    }
    return config, special
