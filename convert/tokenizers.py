# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint: tokenizer.model and what the small JSON files say about it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from cnllama.container import read_json
from cnllama.errors import InputError
from cnllama.paths import exists, read_bytes
from cnllama.sentencepiece_model import open_model
from cnllama.templates import CONTROL_NAMES

from .added_tokens import ADDED, CONFIG, SPECIAL, Added, added_tokens, flags_to_store, role_names, special_tokens
from .tokenizer_json import TokenizerJson, first_other_piece, read_tokenizer_json

__all__ = ["ADDED", "CONFIG", "MODEL", "SPECIAL", "TokenizerFiles", "first_difference", "read_tokenizer"]

MODEL = "tokenizer.model"
MAX_TOKENIZER = 1 << 28  # bytes of a model
# Where transformers looks for a chat template besides tokenizer_config.json.
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")


@lru_cache(maxsize=4)
def load_sentencepiece(model: bytes, where: str) -> Any:
    """The library's processor of a serialized model. `where` begins the InputError for bytes that are none."""
    return open_model(model, f"{where}: this")


@dataclass(frozen=True)
class TokenizerFiles:
    """A SentencePiece model and what the JSON files beside it, or after it, add.

    added: text -> id, ids from the files. flags: text -> names of added_tokens.FLAGS, None where no file tells. names:
    role (`bos_token` ...) -> text, None where the files say that no token has it. unplaced: special tokens that are
    named without an id anywhere; transformers would append them, so they count if the model has rows for them.
    add_prefix_space, legacy: None where no file tells. chat_template: the file that has one. notices: what the user
    should know.
    """

    file: Path
    model: bytes
    added: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, frozenset[str] | None] = field(default_factory=dict)
    names: Mapping[str, str | None] = field(default_factory=dict)
    unplaced: tuple[str, ...] = ()
    add_bos: bool = True
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    chat_template: Path | None = None
    notices: tuple[str, ...] = ()

    @property
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

    def id_of(self, text: str) -> int | None:
        """The id of an added token or a piece, None for a text that is none."""
        if text in self.added:
            return self.added[text]
        i = int(self.processor.piece_to_id(text))
        return i if self.processor.id_to_piece(i) == text else None

    def text_of(self, token: int) -> str | None:
        """The text of an added token or a piece, None for an id without one."""
        if 0 <= token < self.pieces:
            return str(self.processor.id_to_piece(token))
        return next((text for text, i in self.added.items() if i == token), None)

    def role_id(self, role: str) -> int | None:
        """The id of the token with a role, `bos_token` ...: what the JSON files name, else the model's own."""
        name = self.names.get(role)
        named = self.id_of(name) if name else None
        if named is not None:
            return named
        own = int(getattr(self.processor, role.replace("_token", "_id"))())
        return own if own >= 0 else None

    def settings(self, ends: Collection[int] = ()) -> dict[str, Any]:
        """The `tokenizer` metadata of a .cnl. ends: ids that end an answer, which are control tokens."""
        prefix = self.add_prefix_space
        if prefix is None:
            prefix = self.processor.encode("a", out_type=str)[0].startswith("\u2581")
        flags = {text: self.stored_flags(text, i in ends) for text, i in self.added.items()}
        stored = {text: flags[text] for text, i in self.added.items() if self._is_stored(i, flags[text])}
        result: dict[str, Any] = {
            "type": "sentencepiece",
            "add_bos": self.add_bos and not self._lacks("bos_token"),
            "add_dummy_prefix": prefix,
            "legacy": bool(self.legacy),
            "added_tokens": {text: self.added[text] for text in stored},
            "token_flags": {text: list(flags) for text, flags in stored.items()},
            "pieces": self.pieces,
            "sha256": hashlib.sha256(self.model).hexdigest(),
        }
        for role in ("bos_token", "eos_token"):
            own, found = int(getattr(self.processor, role.replace("_token", "_id"))()), self.role_id(role)
            if found is not None and found != own:
                result[f"{role}_id"] = found
        return result

    def _lacks(self, role: str) -> bool:
        """Whether the files say that no token has the role."""
        return role in self.names and self.names[role] is None

    def stored_flags(self, text: str, control: bool = False) -> tuple[str, ...]:
        """The `token_flags` of a .cnl for an added token. control: what a user types must not become it."""
        i = self.added[text]
        control = control or text in CONTROL_NAMES or text in self.names.values()
        return flags_to_store(text, self.flags.get(text), control or (i < self.pieces and self._is_control(i)))

    def _is_stored(self, i: int, flags: Collection[str]) -> bool:
        """Pieces that are added tokens too are only stored where that changes something."""
        if i >= self.pieces:
            return True
        plain = set(flags) - {"normalized"} == {"special"} and self._is_control(i)
        return not plain and not self.processor.is_byte(i)

    def _is_control(self, i: int) -> bool:
        return bool(self.processor.is_control(i) or self.processor.is_unknown(i))


def read_tokenizer(directory: Path, before: TokenizerFiles | None) -> TokenizerFiles | None:
    """The tokenizer after `directory`: its own tokenizer.model, or the one before it with this directory's additions.

    None when there is none yet. Of two names for one id the later directory's wins, with a notice. Raises InputError
    for damaged files and for additions that contradict the pieces.
    """
    own = _read_model(directory / MODEL)
    if own is not None:
        before = TokenizerFiles(directory / MODEL, own)
    if before is None:
        return None
    config, special = _read_optional(directory / CONFIG), _read_optional(directory / SPECIAL)
    whole = read_tokenizer_json(directory)
    tokens, notices = added_tokens(directory, _read_optional(directory / ADDED), config, whole)
    _check_pieces(before, tokens)
    added, flags = dict(before.added), dict(before.flags)
    notices += _displace(added, tokens)
    for text, token in tokens.items():
        added[text], flags[text] = token.id, token.flags
    named = special_tokens(special, config, directory)
    for text, said in named.items():
        found = flags.get(text)
        flags[text] = said if found is None else found | {"special"}
    names, differing = role_names(special, config, directory)
    notices += differing
    result = replace(before, added=added, flags=flags, names={**before.names, **names})
    fresh = [text for text in named if result.id_of(text) is None and text not in before.unplaced]
    result = replace(
        result,
        unplaced=(*(text for text in before.unplaced if text not in added), *fresh),
        chat_template=_chat_template(directory, config) or before.chat_template,
    )
    if whole is not None and whole.pieces is not None:
        notices += _compare_pieces(result, whole, own is not None)
    return _with_habits(result, config, whole, directory / CONFIG, notices)


def with_additions(chosen: TokenizerFiles, directories: Sequence[Path]) -> TokenizerFiles:
    """A tokenizer given instead of the ones in `directories`, with what those without a model of their own add to it.

    Raises InputError for a directory whose tokenizer.json belongs to another tokenizer.
    """
    for directory in directories:
        if not exists(directory / MODEL):
            chosen = read_tokenizer(directory, chosen) or chosen
    return chosen


def first_difference(a: TokenizerFiles, b: TokenizerFiles) -> int | None:
    """The first id below both sizes whose pieces differ: None when one vocabulary extends the other."""
    ids = list(range(min(a.pieces, b.pieces)))
    pairs = zip(a.processor.id_to_piece(ids), b.processor.id_to_piece(ids), strict=True)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), None)


def _read_model(path: Path) -> bytes | None:
    return read_bytes(path, MAX_TOKENIZER) if exists(path) else None


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if exists(path) else {}


def _check_pieces(files: TokenizerFiles, tokens: Mapping[str, Added]) -> None:
    """An added token with the id of a piece must be that piece, and a piece has one id."""
    plain = replace(files, added={})
    for text, token in tokens.items():
        if token.id < files.pieces and plain.text_of(token.id) != text:
            raise InputError(
                f"{token.file}: gives the token {text!r:.40} the id {token.id}, which is "
                f"{plain.text_of(token.id)!r:.40} in {files.file}; these files belong to different tokenizers"
            )
        piece = plain.id_of(text)
        if token.id >= files.pieces and piece is not None:
            raise InputError(
                f"{token.file}: gives the token {text!r:.40} the id {token.id}, but it is the piece {piece} of "
                f"{files.file} already, and transformers uses that; these files belong to different tokenizers"
            )


def _displace(added: dict[str, int], tokens: Mapping[str, Added]) -> list[str]:
    """Takes out of `added`, the tokens of earlier directories, what the later `tokens` contradict; says so."""
    notices = []
    by_id = {i: text for text, i in added.items()}
    for text, token in tokens.items():
        if added.get(text, token.id) != token.id:
            notices.append(f"{token.file}: the token {text!r:.40} has the id {token.id} here, {added[text]} before it")
        before = by_id.get(token.id, text)
        if before != text:
            notices.append(f"{token.file}: the id {token.id} is {text!r:.40} here, {before!r:.40} before it")
            del added[before]
    return notices


def _compare_pieces(files: TokenizerFiles, whole: TokenizerJson, own: bool) -> list[str]:
    """Compares the pieces with those of a tokenizer.json. own: whether the model lies in the same directory; then it is
    what the weights were checked against, and an older or longer list is a notice.
    """
    pieces = [str(piece) for piece in files.processor.id_to_piece(list(range(files.pieces)))]
    found = whole.pieces or {}
    i = first_other_piece(found, pieces, {i: text for text, i in files.added.items()})
    if i is None:
        return []
    ours = pieces[i] if i < len(pieces) else None
    if own and (ours is None or i not in found):
        return [
            f"{whole.file}: has {len(found)} pieces and {files.file.name} {len(pieces)}: it is another version of the "
            f"tokenizer, and {files.file.name} counts"
        ]
    raise InputError(
        f"{whole.file}: its id {i} is {found.get(i)!r:.40}, but {ours!r:.40} in {files.file}: these are different "
        "tokenizers; "
        + ("remove the wrong file" if own else "give the directory of the right one with --tokenizer DIR")
    )


def _with_habits(
    files: TokenizerFiles, config: Mapping[str, Any], whole: TokenizerJson | None, where: Path, notices: list[str]
) -> TokenizerFiles:
    """What stands before and after a text: by tokenizer_config.json, else tokenizer.json, else what came before."""

    def said(key: str) -> bool | None:
        value = config.get(key)
        if value is not None and not isinstance(value, bool):
            notices.append(f"{where}: {key} is {value!r:.40}, expected true or false: ignored")
        return value if isinstance(value, bool) else None

    prefix, legacy, bos, eos = (said(key) for key in ("add_prefix_space", "legacy", "add_bos_token", "add_eos_token"))
    if whole is not None:
        if legacy is None and whole.legacy:
            notices.append(
                f"{whole.file}: puts a space before every text between tokens, which transformers 5 does only where "
                "tokenizer_config.json says legacy true: as the file says"
            )
        prefix = whole.add_prefix_space if prefix is None else prefix
        legacy = whole.legacy if legacy is None else legacy
        if None not in (bos, whole.add_bos) and bos != whole.add_bos:
            notices.append(
                f"{where}: says add_bos_token {str(bos).lower()}, {whole.file.name} {str(whole.add_bos).lower()}: "
                "the second counts, as in transformers 5"
            )
        bos = bos if whole.add_bos is None else whole.add_bos
        eos = eos if whole.add_eos is None else whole.add_eos
    if eos:
        notices.append(f"{where.parent}: add_eos_token is true, which would end every prompt: ignored")
    return replace(
        files,
        add_bos=files.add_bos if bos is None else bos,
        add_prefix_space=files.add_prefix_space if prefix is None else prefix,
        legacy=files.legacy if legacy is None else legacy,
        notices=(*files.notices, *notices),
    )


def _chat_template(directory: Path, config: Mapping[str, Any]) -> Path | None:
    """The file of the directory with a chat template, None where none has one."""
    if config.get("chat_template"):
        return directory / CONFIG
    return next((path for pattern in _CHAT_TEMPLATES for path in sorted(directory.glob(pattern))), None)
