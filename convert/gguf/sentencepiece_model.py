# SPDX-License-Identifier: Apache-2.0
"""What a SentencePiece model file says, read without the protobuf library, which users need not have."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from cnllama.errors import InputError

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
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + length > len(data):
            raise ValueError("it is cut off")
        yield key >> 3, data[at : at + length]
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
