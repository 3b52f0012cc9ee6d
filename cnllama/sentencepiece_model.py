# SPDX-License-Identifier: Apache-2.0
"""A SentencePiece model file read and changed without the protobuf library, which users need not have."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from cnllama.errors import InputError
from cnllama.signatures import HEAD, what_it_is

UNIGRAM, BPE = 1, 2


class PieceType(IntEnum):
    """The file's numbers, which are GGUF's too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class SentencePieceModel:
    """Pieces with scores and types, and the settings that decide how text is cut. Defaults are the format's."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[PieceType] = field(default_factory=list)
    model_type: int = UNIGRAM
    space_is_suffix: bool = False
    normalizes: bool = False
    add_dummy_prefix: bool = True
    remove_extra_spaces: bool = True


def parse(data: bytes, where: str) -> SentencePieceModel:
    """Reads a serialized ModelProto. Raises InputError for bytes that are none; `where` begins its message."""
    try:
        return _model(data)
    except (ValueError, IndexError, struct.error) as error:
        raise InputError(f"{where}: the tokenizer is no SentencePiece model ({error}); convert again") from None


def open_model(data: bytes, where: str) -> Any:
    """The library's processor of a serialized model, every piece of which is text and one of which is the unknown one.

    The library itself takes models without, and fails at the first text. Raises InputError for bytes that are no such
    model; `where` begins its message and is its subject.
    """
    import sentencepiece

    try:
        if not data:
            raise ValueError("it is empty")
        processor: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        if not 0 <= processor.unk_id() < processor.get_piece_size():
            raise ValueError("it has no piece for unknown text")
        processor.id_to_piece(list(range(processor.get_piece_size())))
    except Exception as error:  # the library raises RuntimeError, and others for bytes that are no message at all
        contents = what_it_is(data[:HEAD])
        if contents is not None:
            raise InputError(f"{where} is no SentencePiece model but {contents.what}; {contents.mend}") from None
        reason = "a piece is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        reason = " ".join(reason.split())  # the library quotes the damaged bytes, line breaks and all
        raise InputError(f"{where} is no SentencePiece model ({reason:.80}); get the file again") from None
    return processor


def with_dummy_prefix(data: bytes, flag: bool) -> bytes:
    """The model with another normalizer_spec.add_dummy_prefix, whether a space is put before a text."""
    # A repeated field of a serialized message is merged into the first: this sets the one value and leaves the rest.
    return data + bytes([0x1A, 2, 0x18, flag])


def as_control(data: bytes, ids: Collection[int]) -> bytes:
    """The model with these pieces as control pieces, which no text is cut into. Raises ValueError for bytes that are
    no model.
    """
    parts: list[bytes] = []
    piece = 0
    for number, value, begin, end in _placed_fields(data):
        if number == 1:
            if piece in ids:
                # The last of several types counts, as for every single field.
                message = _message(value) + bytes([0x18, PieceType.CONTROL])
                parts.append(b"\x0a" + _to_varint(len(message)) + message)
                piece += 1
                continue
            piece += 1
        parts.append(data[begin:end])
    return b"".join(parts)


def _model(data: bytes) -> SentencePieceModel:
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == 1:
            piece, score, kind = "", 0.0, PieceType.NORMAL
            for part, content in _fields(_message(value)):
                if part == 1:
                    piece = _message(content).decode("utf-8")
                elif part == 2:
                    (score,) = struct.unpack("<f", _message(content))
                elif part == 3:
                    kind = PieceType(_integer(content))
            model.pieces.append(piece)
            model.scores.append(score)
            model.types.append(kind)
        elif number == 2:
            for part, content in _fields(_message(value)):
                if part == 3:
                    model.model_type = _integer(content)
                elif part == 24:
                    model.space_is_suffix = bool(_integer(content))
        elif number == 3:
            for part, content in _fields(_message(value)):
                if part == 2:
                    model.normalizes = bool(_message(content))
                elif part == 3:
                    model.add_dummy_prefix = bool(_integer(content))
                elif part == 4:
                    model.remove_extra_spaces = bool(_integer(content))
    return model


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: numbers as integers, everything else, floats too, as its bytes."""
    for number, value, _, _ in _placed_fields(data):
        yield number, value


def _placed_fields(data: bytes) -> Iterator[tuple[int, int | bytes, int, int]]:
    """The same and where the field lies in the message, begin and end."""
    at = 0
    while at < len(data):
        begin = at
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value, begin, at
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + length > len(data):
            raise ValueError("it is cut off")
        yield key >> 3, data[at : at + length], begin, at + length
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number without end")


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
