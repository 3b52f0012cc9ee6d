# SPDX-License-Identifier: Apache-2.0
"""What a `tokenizer.json` says that a SentencePiece model and its small JSON files say too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnllama.container import is_count, read_json
from cnllama.errors import InputError
from cnllama.paths import exists

NAME = "tokenizer.json"
_MEND = "get the file again"


@dataclass(frozen=True)
class TokenizerJson:
    """The parts that count here; None where the file does not say.

    pieces: id -> text of the model's vocabulary. added: entries of `added_tokens` as they are. The rest is as
    transformers means it.
    """

    file: Path
    pieces: Mapping[int, str] | None
    added: tuple[Any, ...]
    add_prefix_space: bool | None
    legacy: bool | None
    add_bos: bool | None
    add_eos: bool | None


def read_tokenizer_json(directory: Path) -> TokenizerJson | None:
    """The directory's file, None where there is none. Raises InputError for a file that is not one."""
    path = directory / NAME
    if not exists(path):
        return None
    values = read_json(path)
    added = values.get("added_tokens", [])
    if not isinstance(added, list):
        raise InputError(f"{path}: added_tokens is a JSON {type(added).__name__}, expected a list; {_MEND}")
    prefix, legacy = _prefix(values.get("normalizer"), values.get("pre_tokenizer"))
    bos, eos = _ends(values.get("post_processor"))
    return TokenizerJson(path, _pieces(path, values.get("model")), tuple(added), prefix, legacy, bos, eos)


def first_other_piece(found: Mapping[int, str], pieces: list[str], added: Mapping[int, str]) -> int | None:
    """The first id that is not the same text in a tokenizer.json as in a SentencePiece model, None when all are.

    found: the file's vocabulary, id -> text. pieces: the model's, by id. added: the added tokens, id -> text, which may
    stand in the vocabulary too.
    """
    for i, piece in enumerate(pieces):
        if found.get(i) != piece:
            return i
    return min((i for i, text in found.items() if i >= len(pieces) and added.get(i) != text), default=None)


def _pieces(path: Path, model: object) -> dict[int, str] | None:
    """A BPE's vocabulary maps text to id, a Unigram's is a list of [text, score]."""
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if vocabulary is None:
        return None
    if isinstance(vocabulary, dict):
        pairs = [(i, text) for text, i in vocabulary.items()]
    elif isinstance(vocabulary, list):
        pairs = [(i, entry[0] if isinstance(entry, list) and entry else entry) for i, entry in enumerate(vocabulary)]
    else:
        raise InputError(f"{path}: its vocabulary is a JSON {type(vocabulary).__name__}, expected an object; {_MEND}")
    for i, text in pairs:
        if not isinstance(text, str) or not is_count(i, 0, 1 << 31):
            raise InputError(f"{path}: its vocabulary gives {text!r:.40} the id {i!r:.40}, expected a number; {_MEND}")
    return dict(pairs)


def _parts(value: object, key: str) -> list[dict[str, Any]]:
    """A normalizer, pre_tokenizer or post_processor as the list of those it is a sequence of."""
    if not isinstance(value, dict):
        return []
    inner = value.get(key)
    return [part for entry in inner for part in _parts(entry, key)] if isinstance(inner, list) else [value]


def _prefix(normalizer: object, pre_tokenizer: object) -> tuple[bool | None, bool | None]:
    """(add_prefix_space, legacy): transformers writes the space as a Prepend of every text, or as a Metaspace."""
    for part in _parts(pre_tokenizer, "pretokenizers"):
        if part.get("type") == "Metaspace":
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            return {"always": (True, True), "first": (True, False), "never": (False, None)}.get(
                str(scheme), (None, None)
            )
    parts = _parts(normalizer, "normalizers")
    if any(part.get("type") == "Prepend" for part in parts):
        return True, True
    replaces = any(part.get("type") == "Replace" and part.get("content") == "\u2581" for part in parts)
    return (False, None) if replaces else (None, None)


def _ends(post_processor: object) -> tuple[bool | None, bool | None]:
    """Whether a token is put before and after a single text."""
    for part in _parts(post_processor, "processors"):
        single = part.get("single")
        if part.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            special = [isinstance(entry, dict) and "SpecialToken" in entry for entry in single]
            return special[0], special[-1]
    return None, None
