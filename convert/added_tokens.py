# SPDX-License-Identifier: Apache-2.0
"""The tokens that a checkpoint's JSON files add to its SentencePiece model: texts, ids, flags, and which file wins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cnllama.added_tokens import FLAGS, MARKER, MAX_LENGTH
from cnllama.container import is_count
from cnllama.errors import InputError

from .tokenizer_json import TokenizerJson

ADDED, CONFIG, SPECIAL = "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# The order in which transformers gives ids to special tokens that the vocabulary lacks.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_ID = re.compile(r"[0-9]{1,10}", re.ASCII)
_MEND = "get the file again"


@dataclass(frozen=True)
class Added:
    """An added token as one file has it; flags None: the file tells no flags."""

    text: str
    id: int
    flags: frozenset[str] | None
    file: Path


def added_tokens(
    directory: Path, added: Mapping[str, Any], config: Mapping[str, Any], whole: TokenizerJson | None
) -> tuple[dict[str, Added], list[str]]:
    """(text -> token, notices) of the files that may add tokens: they must agree on a text's id.

    added, config, whole: added_tokens.json, tokenizer_config.json and tokenizer.json. Where two files call one id by
    two names, the one that transformers reads wins, with a notice. Raises InputError for damaged entries and
    contradictions.
    """
    found: dict[str, Added] = {}
    by_id: dict[int, Added] = {}
    notices: list[str] = []
    for token in (*_decoder(directory / CONFIG, config), *_whole(whole), *_plain(directory / ADDED, added)):
        same = found.get(token.text)
        if same is not None and same.id != token.id:
            raise InputError(
                f"{token.file}: gives the token {token.text!r:.40} the id {token.id}, {same.file.name} {same.id}; "
                "get all tokenizer files of one model"
            )
        other = by_id.get(token.id)
        if other is None:
            found[token.text] = by_id[token.id] = token
        elif other.text != token.text and other.file == token.file:
            raise InputError(
                f"{token.file}: gives the id {token.id} to {other.text!r:.40} and to {token.text!r:.40}, expected one "
                f"token; {_MEND}"
            )
        elif other.text != token.text:
            notices.append(
                f"{token.file}: calls the id {token.id} {token.text!r:.40}, {other.file.name} {other.text!r:.40}: "
                "the second counts, as in transformers"
            )
        elif other.flags is None:
            found[token.text] = by_id[token.id] = replace(other, flags=token.flags)
    return found, notices


def special_tokens(special: Mapping[str, Any], config: Mapping[str, Any], directory: Path) -> dict[str, frozenset[str]]:
    """Text -> flags of the tokens with a role, in transformers' order."""
    values = _merged(special, config)
    tokens: dict[str, frozenset[str]] = {}
    for key in (*_NAMED, *_LISTED):
        value = values.get(key)
        items = value if key in _LISTED and isinstance(value, list) else [value]
        if key == "extra_special_tokens" and isinstance(value, dict):
            items = list(value.values())
        for item in items:
            text, flags = _entry(item, f"{directory}: its {key}") if item is not None else ("", None)
            if text:
                tokens.setdefault(text, (flags or frozenset()) | {"special"})
    return tokens


def role_names(
    special: Mapping[str, Any], config: Mapping[str, Any], directory: Path
) -> tuple[dict[str, str | None], list[str]]:
    """(role -> text of the token that has it, None where the files say that none has; notices).

    special, config: special_tokens_map.json and tokenizer_config.json. Empty texts say nothing.
    """
    values = _merged(special, config)
    names: dict[str, str | None] = {}
    notices: list[str] = []
    for role in ROLES:
        said = [_content(source[role]) for source in (special, config) if role in source]
        found = _content(values.get(role))
        if said and (found is None or (isinstance(found, str) and found)):
            names[role] = found
        if len(said) == 2 and said[0] != said[1] and "" not in said:
            notices.append(
                f"{directory}: {role} is {said[0]!r:.40} in {SPECIAL} and {said[1]!r:.40} in {CONFIG}: {found!r:.40} "
                "counts, as in transformers"
            )
    return names, notices


def flags_to_store(text: str, flags: frozenset[str] | None, control: bool) -> tuple[str, ...]:
    """The `token_flags` of a .cnl for a token. control: whether it has a role or stands in a template.

    What no file tells: a token named like a marker is a control token, as transformers' special ones are, and any other
    one is a word.
    """
    if flags is None:
        flags = frozenset(("special",) if MARKER.fullmatch(text) else ("normalized",))
    return tuple(name for name in FLAGS if name in flags or (control and name == "special"))


def _merged(special: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 reads special_tokens_map.json only where tokenizer_config.json lists no added tokens."""
    if "added_tokens_decoder" in config:
        return {**special, **config}
    return {**config, **{key: value for key, value in special.items() if key in (*_NAMED, *_LISTED)}}


def _decoder(file: Path, config: Mapping[str, Any]) -> Iterator[Added]:
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        return
    if not isinstance(decoder, dict):
        raise InputError(f"{file}: added_tokens_decoder is {decoder!r:.40}, expected an object; {_MEND}")
    for key, value in decoder.items():
        number = int(key) if _ID.fullmatch(key) else key
        yield _token(file, *_entry(value, f"{file}: added token {key!r:.40}"), number)


def _whole(whole: TokenizerJson | None) -> Iterator[Added]:
    for entry in whole.added if whole else ():
        number = entry.get("id") if isinstance(entry, dict) else None
        yield _token(whole.file, *_entry(entry, f"{whole.file}: added token {number!r:.40}"), number)  # type: ignore[union-attr]


def _plain(file: Path, added: Mapping[str, Any]) -> Iterator[Added]:
    for text, number in added.items():
        yield _token(file, text, None, number)


def _token(file: Path, text: str, flags: frozenset[str] | None, number: object) -> Added:
    if not text or not isinstance(number, int) or not is_count(number, 0, 1 << 31):
        raise InputError(f"{file}: added token {text!r:.40} has id {number!r:.40}, expected 0 or more; {_MEND}")
    return Added(_checked(text, f"{file}: added token {number}"), number, flags, file)


def _checked(text: str, where: str) -> str:
    if len(text) > MAX_LENGTH:
        raise InputError(f"{where} is {text!r:.40} ..., expected at most {MAX_LENGTH:,} characters; {_MEND}")
    return text


def _entry(value: object, where: str) -> tuple[str, frozenset[str] | None]:
    """(text, flags) of an added token as transformers writes it: a text, or an object with the flags."""
    text = _content(value)
    if not isinstance(text, str):
        raise InputError(f"{where} is {value!r:.60}, expected a text or an object with its content; {_MEND}")
    _checked(text, where)
    if not isinstance(value, dict):
        return text, None
    for name in FLAGS:
        if name in value and not isinstance(value[name], bool):
            raise InputError(f"{where}: its {name} is {value[name]!r:.40}, expected true or false; {_MEND}")
    if not any(name in value for name in FLAGS):
        return text, None
    said = {name: value[name] for name in FLAGS if name in value}
    special = said.setdefault("special", False)
    said.setdefault("normalized", not special)
    return text, frozenset(name for name, flag in said.items() if flag)


def _content(value: object) -> object:
    return value.get("content") if isinstance(value, dict) else value
