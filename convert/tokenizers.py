# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint: tokenizer.model and the tokens that the small JSON files add to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cnllama.container import is_count, read_json
from cnllama.errors import InputError
from cnllama.files import read_bytes
from cnllama.signatures import HEAD, what_it_is

MODEL, ADDED, CONFIG, SPECIAL = (
    "tokenizer.model", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"
)  # fmt: skip
MAX_TOKENIZER = 1 << 28  # bytes of a model
# The order in which transformers gives ids to special tokens that the vocabulary lacks.
_SPECIAL_KEYS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
    "additional_special_tokens",
)  # fmt: skip


def load_sentencepiece(model: bytes, where: str) -> Any:
    """The library's processor of a serialized model. `where` begins the InputError for bytes that are none."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:  # the library raises RuntimeError, and others for bytes that are no message at all
        contents = what_it_is(model[:HEAD])
        if contents is not None:
            raise InputError(f"{where}: this is no SentencePiece model but {contents.what}; {contents.mend}") from None
        raise InputError(
            f"{where}: this is no SentencePiece model ({' '.join(str(error).split()):.80}); get the file again"
        ) from None


@dataclass(frozen=True)
class TokenizerFiles:
    """A SentencePiece model and the tokens added to it.

    added: text -> id, ids from the files. unplaced: special tokens that are named without an id anywhere; transformers
    would append them, so they count if the model has rows for them.
    """

    file: Path
    model: bytes
    added: Mapping[str, int] = field(default_factory=dict)
    unplaced: tuple[str, ...] = ()
    add_bos: bool = True
    add_prefix_space: bool | None = None
    legacy: bool | None = None

    @cached_property
    def processor(self) -> Any:
        """The SentencePiece processor of the model as it is."""
        return load_sentencepiece(self.model, str(self.file))

    @property
    def pieces(self) -> int:
        """Pieces of the SentencePiece model."""
        return int(self.processor.get_piece_size())

    @property
    def size(self) -> int:
        """Ids the tokenizer may give: one more than the largest."""
        return max([self.pieces, *(i + 1 for i in self.added.values())])

    def place(self, rows: int) -> tuple[TokenizerFiles, list[str]]:
        """Gives the unplaced special tokens the next ids while the model has rows; (the result, the ones left out)."""
        added, left = dict(self.added), []
        following = self.size
        for text in self.unplaced:
            if following < rows:
                added[text] = following
                following += 1
            else:
                left.append(text)
        return replace(self, added=added, unplaced=()), left

    def settings(self) -> dict[str, Any]:
        """The `tokenizer` metadata of a .cnl."""
        prefix = self.add_prefix_space
        if prefix is None:
            prefix = self.processor.encode("a", out_type=str)[0].startswith("\u2581")
        result: dict[str, Any] = {
            "type": "sentencepiece",
            "add_bos": self.add_bos,
            "add_dummy_prefix": prefix,
            "added_tokens": {text: i for text, i in self.added.items() if i >= self.pieces},
            "pieces": self.pieces,
            "sha256": hashlib.sha256(self.model).hexdigest(),
        }
        return result if self.legacy is None else result | {"legacy": self.legacy}


def read_tokenizer(directory: Path, before: TokenizerFiles | None) -> TokenizerFiles | None:
    """The tokenizer after `directory`: its own tokenizer.model, or the one before it with this directory's additions.

    None when there is none yet. Raises InputError for damaged files and for additions that contradict the pieces.
    """
    own = _read_model(directory / MODEL)
    if own is not None:
        before = TokenizerFiles(directory / MODEL, own)
    if before is None:
        return None
    config = _read_optional(directory / CONFIG)
    added = dict(before.added) | _added_tokens(directory, config)
    for text, i in added.items():
        if i < before.pieces and before.processor.id_to_piece(i) != text:
            raise InputError(
                f"{directory}: gives the token {text!r:.40} the id {i}, which is "
                f"{before.processor.id_to_piece(i)!r:.40} in {before.file}; these files belong to different tokenizers"
            )
    special = _special_tokens(_read_optional(directory / SPECIAL) | config)
    known = {*added, *before.unplaced}
    fresh = [t for t in special if t and t not in known and before.processor.id_to_piece(_id_of(before, t)) != t]
    prefix, bos = config.get("add_prefix_space"), config.get("add_bos_token")
    legacy = config.get("legacy")
    return replace(
        before,
        added=added,
        unplaced=(*(text for text in before.unplaced if text not in added), *dict.fromkeys(fresh)),
        add_bos=bos if isinstance(bos, bool) else before.add_bos,
        add_prefix_space=prefix if isinstance(prefix, bool) else before.add_prefix_space,
        legacy=legacy if isinstance(legacy, bool) else before.legacy,
    )


def first_difference(a: TokenizerFiles, b: TokenizerFiles) -> int | None:
    """The first id below both sizes whose pieces differ: None when one vocabulary extends the other."""
    ids = list(range(min(a.pieces, b.pieces)))
    pairs = zip(a.processor.id_to_piece(ids), b.processor.id_to_piece(ids), strict=True)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), None)


def _id_of(files: TokenizerFiles, text: str) -> int:
    return int(files.processor.piece_to_id(text))


def _read_model(path: Path) -> bytes | None:
    return read_bytes(path, MAX_TOKENIZER) if path.exists() else None


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Text -> id of every file that may add tokens; they must agree."""
    found: dict[str, int] = {}
    sources: list[tuple[str, Any]] = [(ADDED, list(_read_optional(directory / ADDED).items()))]
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        sources.append((CONFIG, [(_content(v), int(i)) for i, v in decoder.items() if i.isdecimal()]))
    listed = _read_optional(directory / "tokenizer.json").get("added_tokens")
    if isinstance(listed, list):
        sources.append(("tokenizer.json", [(_content(v), v.get("id")) for v in listed if isinstance(v, dict)]))
    for file, entries in sources:
        for text, i in entries:
            if not isinstance(text, str) or not text or not is_count(i, 0, 1 << 31):
                raise InputError(f"{directory / file}: added token {text!r:.40} has id {i!r:.40}; get the file again")
            if found.setdefault(text, i) != i:
                raise InputError(
                    f"{directory / file}: gives the token {text!r:.40} the id {i}, another file {found[text]}; "
                    "get all tokenizer files of one model"
                )
    return found


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def _special_tokens(values: Mapping[str, Any]) -> list[str]:
    tokens: list[str] = []
    for key in _SPECIAL_KEYS:
        value = values.get(key)
        for item in value if isinstance(value, list) else [value]:
            text = _content(item)
            if isinstance(text, str):
                tokens.append(text)
    return tokens
