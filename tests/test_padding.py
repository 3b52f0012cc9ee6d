# SPDX-License-Identifier: Apache-2.0
"""Rows that have no token: accepted as padding to a multiple, left out of the file, and never said by anyone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cnllama.convert.gguf.from_checkpoint import describe
from cnllama.convert.pack import convert, make_plan, merged_tensors
from cnllama.convert.vocab import padding
from hypothesis import given
from hypothesis import strategies as st
from models import make_llama, piece_count, random_tensors, small_config, write_json

from cnllama.errors import InputError
from cnllama.format import open_cnl
from cnllama.llm import LLM

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MULTIPLES = [8, 16, 32, 64, 128, 256, 512]


def padded(directory: Path, tokenizer: bytes, rows: int, **config: object) -> Path:
    """A checkpoint of that many rows whose last rows, if they could be said, would be said all the time."""
    tensors = random_tensors(small_config(rows, **config), seed=7)
    matrix = tensors[EMBED if config.get("tie_word_embeddings") else HEAD]
    matrix[piece_count(tokenizer) :] *= 30
    return make_llama(directory, tokenizer, dtype="float32", tensors=tensors, vocab_size=rows, **config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("multiple", MULTIPLES)
def test_rows_padded_to_a_multiple(tmp_path: Path, tokenizer_model: bytes, multiple: int, tied: bool) -> None:
    tokens = piece_count(tokenizer_model)
    rows = -(-tokens // multiple) * multiple
    assert rows > tokens, "the test's tokenizer needs no padding to this multiple"
    base = padded(tmp_path / "base", tokenizer_model, rows, tie_word_embeddings=tied)
    plan = make_plan(base)
    assert [notice for notice in plan.notices if f"the last {rows - tokens} rows are padding" in notice]
    whole = {name: tensor.read() for name, tensor in plan.checkpoint.tensors.items()}
    for name, values in merged_tensors(plan):
        assert np.array_equal(values, whole[name][: tokens if name in (EMBED, HEAD) else None]), name
        again = plan.tensors[name].read(tokens - 3, rows)
        assert np.array_equal(again, whole[name][tokens - 3 : tokens if name in (EMBED, HEAD) else rows]), name
        assert np.array_equal(plan.tensors[name].padded().read(), whole[name])
    assert plan.config["vocab_size"] == describe(plan).vocab_size == tokens


@pytest.mark.parametrize("surplus", [1, 7, 9, 63, 64, 600])
def test_other_surplus_is_the_tokenizer_of_another_model(tmp_path: Path, tokenizer_model: bytes, surplus: int) -> None:
    tokens = piece_count(tokenizer_model)
    rows = tokens + surplus
    base = padded(tmp_path / "base", tokenizer_model, rows)
    if surplus < padding(rows):
        assert make_plan(base).config["vocab_size"] == tokens
        return
    with pytest.raises(InputError, match=f"the tokenizer has {tokens} tokens but the model has {rows} rows"):
        make_plan(base)


@given(tokens=st.integers(1, 200_000), multiple=st.sampled_from(MULTIPLES))
def test_every_padding_is_explained_and_nothing_else(tokens: int, multiple: int) -> None:
    rows = -(-tokens // multiple) * multiple
    assert rows == tokens or rows - tokens < padding(rows)
    by_hand = [m for m in MULTIPLES if tokens % m == 0]
    assert padding(tokens) == max(by_hand, default=1)


def test_padding_is_never_said(tmp_path: Path, tokenizer_model: bytes) -> None:
    tokens = piece_count(tokenizer_model)
    rows = -(-tokens // 64) * 64
    convert(padded(tmp_path / "base", tokenizer_model, rows), [], tmp_path / "x.cnl", quant="q8")
    file = open_cnl(tmp_path / "x.cnl")
    assert file.vocab_size == tokens
    assert {name: t.rows for name, t in file.tensors.items() if name in (EMBED, HEAD)} == {EMBED: tokens, HEAD: tokens}
    with LLM(tmp_path / "x.cnl", ctx=128) as llm:
        assert llm.logits([1, 5]).shape == (2, tokens)
        found = llm.generate([[1, 5]], temperature=1.5, max_tokens=40, logprobs=tokens, ignore_eos=True, seed=3)[0]
        assert max(found.token_ids) < tokens
        for step in found.logprobs:
            assert sum(np.exp(value) for _, value in step.top) == pytest.approx(1, rel=1e-6)
        with pytest.raises(InputError, match="outside the vocabulary"):
            llm.logits([tokens])


def test_the_reference_has_the_same_tokens(tmp_path: Path, tokenizer_model: bytes) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from cnllama.eval.reference import open_reference

    rows = -(-piece_count(tokenizer_model) // 64) * 64
    model = open_reference(padded(tmp_path / "base", tokenizer_model, rows))
    assert model.vocab_size == piece_count(tokenizer_model)
    with torch.no_grad():
        assert model._model(torch.tensor([[1, 5]])).logits.shape == (1, 2, piece_count(tokenizer_model))


def test_rows_between_added_tokens_are_never_said(tmp_path: Path, tokenizer_model: bytes) -> None:
    """A last added token makes the padding before it part of the file."""
    tokens = piece_count(tokenizer_model)
    rows = -(-(tokens + 2) // 64) * 64
    base = padded(tmp_path / "base", tokenizer_model, rows)
    write_json(base / "added_tokens.json", {"[PAD]": tokens, "<last>": rows - 1})
    convert(base, [], tmp_path / "x.cnl", quant="q8")
    hole = list(range(tokens + 1, rows - 1))
    with LLM(tmp_path / "x.cnl", ctx=128) as llm:
        logits = llm.logits([1, 5])
        assert logits.shape == (2, rows)
        assert np.isneginf(logits[:, hole]).all()
        assert np.isfinite(np.delete(logits, hole, axis=1)).all()
        for temperature in (0.0, 1.5):
            found = llm.generate([[1, 5]], temperature=temperature, max_tokens=40, logprobs=8, ignore_eos=True, seed=3)
            assert not set(hole) & set(found[0].token_ids)
            for step in found[0].logprobs:
                assert not set(hole) & {token for token, _ in step.top}
                assert sum(np.exp(value) for _, value in step.top) <= 1 + 1e-9
        exact = logits[-1].astype(np.float64)
        expected = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
        first = llm.generate([[1, 5]], temperature=0, max_tokens=1, logprobs=1)[0].logprobs[0]
        assert first.logprob == pytest.approx(expected.max(), abs=1e-6)


def test_an_adapter_for_the_padded_rows(tmp_path: Path, tokenizer_model: bytes) -> None:
    pytest.importorskip("peft")
    from models import load_transformers

    tokens = piece_count(tokenizer_model)
    rows = -(-tokens // 64) * 64
    base = padded(tmp_path / "base", tokenizer_model, rows)
    config = json.loads((base / "config.json").read_text())
    model = load_transformers(config, dict(merged_with_padding(base)))
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    plan = make_plan(base, [tmp_path / "adapter"])
    expected = wrapped.merge_and_unload().state_dict()
    for name, values in merged_tensors(plan):
        whole = expected[name].numpy()
        np.testing.assert_allclose(values, whole[: values.shape[0]], rtol=1e-5, atol=1e-6)
    assert plan.config["vocab_size"] == tokens


def merged_with_padding(base: Path) -> list[tuple[str, np.ndarray]]:
    return [(name, tensor.padded().read()) for name, tensor in make_plan(base).tensors.items()]


def test_training_on_padded_rows_saves_an_adapter_for_them(tmp_path: Path, tokenizer_model: bytes) -> None:
    """`adapt resize --pad-to-multiple` makes padding; what is trained on it converts with it."""
    pytest.importorskip("peft")
    import adapt_data
    from test_adapt_pipeline import inside

    data = adapt_data.write_data(tmp_path)
    rows = -(-piece_count(tokenizer_model) // 64) * 64
    base = padded(tmp_path / "base", tokenizer_model, rows)
    words = ["--data", data / "zh.txt:1", "--max-steps", 2, "--block-size", 32, "--batch-size", 2, "--lr", "1e-3"]
    words += ["--cache", tmp_path / "tokens", "--save-every", 2]
    inside("adapt", "pretrain", base, "-o", tmp_path / "one", "--stage", 1, *words)
    inside("adapt", "pretrain", base, "--adapter", tmp_path / "one", "-o", tmp_path / "two", *words)
    plan = make_plan(base, [tmp_path / "one", tmp_path / "two"])
    assert {count for _, count in plan.adapters[0].stated_rows()} == {rows}, "trained embeddings keep the base's rows"
    assert plan.config["vocab_size"] == piece_count(tokenizer_model)
