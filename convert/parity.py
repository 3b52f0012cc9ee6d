# SPDX-License-Identifier: Apache-2.0
"""Tokenizer parity: the run time's ids on a corpus of hard texts are those of the original SentencePiece model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cnllama.errors import InputError
from cnllama.format import CnlFile
from cnllama.tokenizer import Tokenizer

from .parity_corpus import TEXTS, VERSION
from .tokenizers import load_sentencepiece


def record(model: bytes, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The `parity` metadata of a .cnl. Raises InputError at the first text on which the two paths differ."""
    digest = hashlib.sha256()
    for text, original, ours in _encoded(model, settings, where):
        if original != ours:
            raise InputError(f"{where}: {_difference(text, original, ours)}; report this model to cnllama's authors")
        digest.update(np.asarray([len(ours), *ours], "<i4").tobytes())
    return {"corpus": VERSION, "texts": len(TEXTS), "sha256": digest.hexdigest()}


def check(file: CnlFile) -> str | None:
    """What differs when the parity of a packed file is checked again, None when nothing does."""
    if file.parity.get("corpus") != VERSION:
        return f"its parity corpus is {file.parity.get('corpus')!r:.20} and this cnllama has {VERSION!r}"
    try:
        found = record(file.tokenizer_model, file.tokenizer, str(file.path))
    except InputError as error:
        return str(error)
    if found["sha256"] != file.parity.get("sha256"):
        return f"the ids of the corpus hash to {found['sha256']}, recorded is {file.parity.get('sha256')!r:.70}"
    return None


def _encoded(model: bytes, settings: Mapping[str, Any], where: str) -> Iterator[tuple[str, list[int], list[int]]]:
    tokenizer = Tokenizer(model, dict(settings))  # first: it refuses a damaged model in one sentence
    original = load_sentencepiece(model, where)
    dummy_prefix = settings["add_dummy_prefix"]
    if original.encode("a", out_type=str)[0].startswith("\u2581") != dummy_prefix:
        # A message's repeated field is merged into the first: this sets normalizer_spec.add_dummy_prefix alone.
        patched = model + bytes([0x1A, 2, 0x18, dummy_prefix])
        original = load_sentencepiece(patched, where)
    for text in TEXTS:
        yield text, original.encode(text), tokenizer.encode(text)


def _difference(text: str, original: list[int], ours: list[int]) -> str:
    shorter = min(len(original), len(ours))
    at = next((i for i in range(shorter) if original[i] != ours[i]), shorter)
    return (
        f"the tokenizer differs from SentencePiece on {text!r:.60} at token {at}: "
        f"{ours[at : at + 3]}, expected {original[at : at + 3]}"
    )
