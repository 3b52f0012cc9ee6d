# SPDX-License-Identifier: Apache-2.0
"""Tokenizer parity: the run time's ids on a corpus of hard texts are those of the original SentencePiece model, cut at
the added tokens as transformers cuts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from cnllama.added_tokens import SPACES, AddedToken, is_word
from cnllama.errors import InputError
from cnllama.format import CnlFile
from cnllama.sentencepiece_model import as_control, with_dummy_prefix
from cnllama.tokenizer import Tokenizer

from .parity_corpus import TEXTS, VERSION, own_texts
from .tokenizers import load_sentencepiece

_FIRST = "1"  # the corpus of TEXTS alone, without the file's own tokens


class _Case(NamedTuple):
    text: str
    special: bool
    original: list[int]
    ours: list[int]


def record(model: bytes, settings: Mapping[str, Any], where: str, version: str = VERSION) -> dict[str, Any]:
    """The `parity` metadata of a .cnl. Raises InputError at the first text on which the two paths differ."""
    digest = hashlib.sha256()
    count = 0
    for case in _encoded(model, settings, where, version):
        if case.original != case.ours:
            raise InputError(f"{where}: {_difference(case)}; report this model to cnllama's authors")
        digest.update(np.asarray([len(case.ours), *case.ours], "<i4").tobytes())
        count += 1
    return {"corpus": version, "texts": count, "sha256": digest.hexdigest()}


def check(file: CnlFile) -> str | None:
    """What differs when the parity of a packed file is checked again, None when nothing does."""
    version = file.parity.get("corpus")
    if version not in (_FIRST, VERSION):
        return f"its parity corpus is {version!r:.20} and this cnllama has {_FIRST!r} and {VERSION!r}"
    try:
        found = record(file.tokenizer_model, file.tokenizer, str(file.path), version)
    except InputError as error:
        return str(error)
    if found["sha256"] != file.parity.get("sha256"):
        return f"the ids of the corpus hash to {found['sha256']}, recorded is {file.parity.get('sha256')!r:.70}"
    return None


def _encoded(model: bytes, settings: Mapping[str, Any], where: str, version: str) -> Iterator[_Case]:
    tokenizer = Tokenizer(model, dict(settings), where)  # first: it refuses a damaged model in one sentence
    original = _Original(model, settings, where)
    for text in TEXTS:
        yield _Case(text, False, original.encode(text, False), tokenizer.encode(text))
    if version == _FIRST:
        return
    for text in own_texts(original.names):
        for special in (False, True):
            yield _Case(text, special, original.encode(text, special), tokenizer.encode(text, special=special))


class _Original:
    """SentencePiece itself on what lies between the added tokens, found by one pattern of all their names."""

    def __init__(self, model: bytes, settings: Mapping[str, Any], where: str) -> None:
        processor = load_sentencepiece(model, where)
        flags = settings.get("token_flags", {})
        added = [AddedToken.stored(text, i, flags.get(text)) for text, i in settings["added_tokens"].items()]
        hidden = [t.id for t in added if t.special and t.id < processor.get_piece_size()]
        model = as_control(model, hidden) if hidden else model
        pieces = range(processor.get_piece_size())
        known = {t.text: t for t in added}
        for i in pieces:
            if processor.is_control(i) or processor.is_unknown(i):
                known.setdefault(processor.id_to_piece(i), AddedToken(processor.id_to_piece(i), i))
        prefix = settings["add_dummy_prefix"]
        self._plain = load_sentencepiece(with_dummy_prefix(model, False), where)
        self._prefixed = load_sentencepiece(with_dummy_prefix(model, True), where) if prefix else self._plain
        self._always = settings.get("legacy", True)
        self._passes = [{t: k for t, k in known.items() if k.normalized is late} for late in (False, True)]
        self.names = list(known)

    def encode(self, text: str, special: bool) -> list[int]:
        """The ids, without BOS."""
        parts: list[str | AddedToken] = [text]
        for tokens in self._passes:
            parts = [
                n for part in parts for n in ([part] if isinstance(part, AddedToken) else _cut(part, tokens, special))
            ]
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            else:
                ids += (self._prefixed if self._always or i == 0 else self._plain).encode(part)
        return ids


def _cut(text: str, tokens: Mapping[str, AddedToken], special: bool) -> list[str | AddedToken]:
    """The text in parts, ordinary and tokens. Of several names at one place the longest counts."""
    names = sorted((name for name in tokens if name in text), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
    parts: list[str | AddedToken] = []
    at = 0
    for match in pattern.finditer(text):
        token, before, after = tokens[match[0]], text[: match.start()], text[match.end() :]
        in_word = any(is_word(c) for c in before[-1:] + after[:1])
        if (token.special and not special) or (token.single_word and in_word):
            continue
        begin = max(at, len(before.rstrip(SPACES))) if token.lstrip else match.start()
        end = len(text) - len(after.lstrip(SPACES) if token.rstrip else after)
        parts += [text[at:begin], *([token] if begin < end else [])]
        at = end
    return [part for part in (*parts, text[at:]) if part != ""]


def _difference(case: _Case) -> str:
    shorter = min(len(case.original), len(case.ours))
    at = next((i for i in range(shorter) if case.original[i] != case.ours[i]), shorter)
    return (
        f"the tokenizer differs from SentencePiece on {case.text!r:.60} at token {at}: "
        f"{case.ours[at : at + 3]}, expected {case.original[at : at + 3]}"
    )
