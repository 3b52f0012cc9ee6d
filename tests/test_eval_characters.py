# SPDX-License-Identifier: Apache-2.0
"""Perplexity per character: numerator and denominator are of the same text, whatever the tokenizer does to it.

What a token spells is SentencePiece's own alignment of pieces and text, which the code under test does not use.
"""

from __future__ import annotations

import functools
import io
import math
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import sentencepiece
from eval_data import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st

from cnllama import LLM
from cnllama.eval.models import EngineScorer
from cnllama.eval.perplexity import compare, perplexity
from cnllama.eval.texts import windows
from cnllama.tokenizer import Tokenizer

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "no prefix": {"add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False, "character_coverage": 0.98},
    "normalizes": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no bytes, no prefix": {"byte_fallback": False, "character_coverage": 0.98, "add_dummy_prefix": False},
    "unigram": {"model_type": "unigram", "split_digits": False},
}
ALPHABET = "从前有一个农夫天空大海 \nab1，。😀兲㎏ﬁ１"


@functools.cache
def model_of(kind: str) -> bytes:
    """A SentencePiece model with LLaMA's settings but for those of the kind."""
    model = io.BytesIO()
    options = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.995, "split_digits": True}
    options |= {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "vocab_size": 900}
    options |= {"allow_whitespace_only_pieces": True, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    lines = [*models.sample_lines(), *["从前", "天空 天空", "大海"] * 20]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **(options | KINDS[kind])
    )
    return model.getvalue()


@functools.cache
def pair_of(kind: str) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """(the tokenizer without BOS, the library's processor of the same model)."""
    model = model_of(kind)
    return Tokenizer(model, {"add_bos": False}), sentencepiece.SentencePieceProcessor(model_proto=model)


def aligned(kind: str, document: str) -> list[int]:
    """Characters of the document that are complete after each of its tokens, as the library aligns them."""
    processor = pair_of(kind)[1]
    pieces = processor.encode(document, return_type="proto").pieces
    data, ends, reached = document.encode("utf-8"), [], 0
    for piece in pieces:
        reached = max(reached, piece.end)
        ends.append(len(data[:reached].decode("utf-8")))
    return ends


def left_out(kind: str, document: str) -> tuple[int, int]:
    """(tokens, characters) of a document without BOS that nothing predicts: the first, and its whole character."""
    tokenizer, processor = pair_of(kind)
    ids = tokenizer.encode(document)
    ends, count = aligned(kind, document), 1
    if processor.is_byte(ids[0]):
        while ends[count - 1] == 0:
            count += 1
    return count, ends[count - 1]


@pytest.mark.parametrize("kind", KINDS)
@given(
    documents=st.lists(st.text(ALPHABET, min_size=1, max_size=40), min_size=1, max_size=3),
    size=st.integers(2, 12),
    data=st.data(),
)
@settings(deadline=None, max_examples=100)
def test_characters_are_those_of_the_predicted_tokens(
    kind: str, documents: list[str], size: int, data: st.DataObject
) -> None:
    tokenizer = pair_of(kind)[0]
    documents = [document for document in documents if tokenizer.encode(document)]
    found = windows(tokenizer, documents, size, data.draw(st.integers(1, size)))
    tokens = characters = 0
    for document in documents:
        count, spelled = left_out(kind, document)
        length = len(tokenizer.encode(document))
        tokens += length - count
        characters += len(document) - spelled if count < length else 0
    assert sum(len(window.targets) for window in found) == tokens
    assert sum(window.characters for window in found) == characters
    assert all(window.characters >= 0 for window in found)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(ALPHABET, min_size=1, max_size=40), size=st.integers(2, 12))
@settings(deadline=None, max_examples=50)
def test_behind_a_bos_every_character_counts(kind: str, text: str, size: int) -> None:
    tokenizer = Tokenizer(model_of(kind), {"add_bos": True})
    found = windows(tokenizer, [text], size, size)
    assert [i for window in found for i in window.targets] == tokenizer.encode(text)
    assert sum(window.characters for window in found) == (len(text) if tokenizer.encode(text) else 0)


@pytest.fixture(scope="module", params=["llama", "no prefix"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(kind of tokenizer, a packed random model that puts no BOS before a text)."""
    folder = tmp_path_factory.mktemp("bare")
    base = models.make_llama(folder / "hf", model_of(request.param), seed=3)
    settings = models.json_of(base / "tokenizer_config.json") if (base / "tokenizer_config.json").exists() else {}
    models.write_json(base / "tokenizer_config.json", settings | {"add_bos_token": False})
    return request.param, models.convert(base, folder / "bare.cnl")


DOCUMENTS = ["从前有一个农夫，天空", "😀大海", "a", "兲天空\n大海 ab"]


def test_the_number_is_numpy_s(packed: tuple[str, Path], tmp_path: Path) -> None:
    """From the engine's logits alone: e to the loss of the predicted tokens over the characters that they spell."""
    kind, cnl = packed
    nll, tokens, characters = 0.0, 0, 0
    with LLM(cnl, ctx=64) as llm:
        assert not llm.tokenizer.add_bos
        for document in DOCUMENTS:
            ids = llm.tokenize(document)
            count, spelled = left_out(kind, document)
            if len(ids) <= count:
                continue
            logits = llm.logits(ids).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            nll -= sum(float(logits[i - 1, ids[i]]) for i in range(count, len(ids)))
            tokens += len(ids) - count
            characters += len(document) - spelled
    assert characters < sum(map(len, DOCUMENTS))
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    done = evaluate("ppl", cnl, text, "--documents", "--ctx", 64, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    (row,) = models.json_of(tmp_path / "r.json")["texts"]
    assert (row["tokens"], row["characters"]) == (tokens, characters)
    assert row["text_characters"] == sum(map(len, DOCUMENTS))
    assert row["characters_per_token"] == pytest.approx(characters / tokens)
    assert row["perplexity_per_character"] == pytest.approx(math.exp(nll / characters), rel=1e-6)
    assert row["bits_per_character"] == pytest.approx(nll / characters / math.log(2), rel=1e-6)
    assert row["perplexity_per_token"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert f"{characters} characters of {row['text_characters']} in " in done.stdout


def test_divergence_divides_likewise(packed: tuple[str, Path]) -> None:
    with LLM(packed[1], ctx=64) as first, LLM(packed[1], ctx=64) as second:
        parts = windows(first.tokenizer, DOCUMENTS, 8, 3)
        with EngineScorer(first) as ours, EngineScorer(second) as other:
            figures = compare(ours, other, parts).figures()
            plain = perplexity(ours, parts).figures()
    assert figures["characters"] == plain["characters"]
    assert figures["perplexity_per_character"] == pytest.approx(plain["perplexity_per_character"], rel=1e-6)


def test_a_text_of_which_nothing_is_predicted_is_refused(packed: tuple[str, Path], tmp_path: Path) -> None:
    with LLM(packed[1], ctx=64) as llm:
        single = next(t for t in ("a", "从", "1") if len(llm.tokenize(t)) == 1)
    text = tmp_path / "t.txt"
    text.write_text(single, encoding="utf-8")
    done = evaluate("ppl", packed[1], text)
    assert done.returncode == 2, done.stdout
    assert "the text has nothing to predict: give a longer one" in done.stderr
