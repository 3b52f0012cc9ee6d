# SPDX-License-Identifier: Apache-2.0
"""Exported models in llama.cpp itself: logits, tokens, chat template."""

from __future__ import annotations

from pathlib import Path

import gguf_check
import models
import numpy as np
import pytest
import reference
from cnllama.convert.gguf import export as export_module
from cnllama.convert.gguf.export import export
from cnllama.convert.pack import convert
from cnllama.convert.parity_corpus import TEXTS
from cnllama.convert.tokenizers import TokenizerFiles
from gguf_files import TURNS, Maker

from cnllama import LLM
from cnllama.format import open_cnl
from cnllama.templates import TEMPLATES, encode_chat
from cnllama.tokenizer import Tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install '.[bench]')")


@pytest.fixture(scope="module")
def tokenizer_for_check() -> bytes:
    return models.train_tokenizer(models.sample_lines(), 1200)


@pytest.mark.parametrize("case", gguf_check.CASES)
def test_llama_cpp_says_the_same(tokenizer_for_check: bytes, tmp_path: Path, case: str) -> None:
    cnl, gguf = both(case, tokenizer_for_check, tmp_path)
    result = gguf_check.compare(cnl, gguf)
    assert result.divergence.mean() < 1e-3
    assert result.same_top > 0.85
    assert result.differing == []


def both(case: str, tokenizer: bytes, folder: Path) -> tuple[Path, Path]:
    """(.cnl, .gguf) of a random model."""
    changes, scheme = gguf_check.CASES[case]
    base = gguf_check.write_checkpoint(folder / "base", tokenizer, changes)
    convert(base, [], folder / "x.cnl", quant=scheme)
    export(open_cnl(folder / "x.cnl"), folder / "x.gguf")
    return folder / "x.cnl", folder / "x.gguf"


@pytest.mark.parametrize("case", ["grouped-query", "biases"])
def test_the_difference_is_rounding(tokenizer_for_check: bytes, tmp_path: Path, case: str) -> None:
    """Both are close to the same weights with unrounded activations, and apart by the sum of the two: independent."""
    cnl, gguf = both(case, tokenizer_for_check, tmp_path)
    file = open_cnl(cnl)
    ids = models.ids_of(tokenizer_for_check, models.chinese_lines() * 10, 192)
    llm = llama_cpp.Llama(str(gguf), n_ctx=192, n_batch=192, n_threads=2, logits_all=True, verbose=False)
    truth = reference.Reference(file.config, file.engine_tensors(), quantized_activations=False).logits(ids)
    ours, theirs = gguf_check.our_logits(cnl, ids), gguf_check.their_logits(llm, ids)
    llm.close()
    mine, other, apart = (
        reference.divergence(a, b).mean() for a, b in ((truth, ours), (truth, theirs), (ours, theirs))
    )
    assert max(mine, other) < 1e-3
    assert apart == pytest.approx(mine + other, rel=0.25)


@pytest.mark.parametrize("fault", ["rows", "scaling"])
def test_the_comparison_sees_faults(
    tokenizer_for_check: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "rows":
        monkeypatch.setattr(export_module, "rotary_order", lambda rows, head_dim: np.arange(rows))
    else:
        monkeypatch.setattr("cnllama.convert.gguf.metadata._add_rope", lambda metadata, config: None)
    cnl, gguf = both("llama3 scaling", tokenizer_for_check, tmp_path)
    assert gguf_check.compare(cnl, gguf, tokens=128).divergence.mean() > 1e-2


@pytest.mark.parametrize("name", ["llama", "chinese_alpaca2"])
def test_llama_cpp_cuts_real_vocabularies_alike(shared_data: Path, tmp_path: Path, name: str) -> None:
    tokenizer = (shared_data / "tokenizers" / f"{name}.model").read_bytes()
    models.make_llama(tmp_path / "base", tokenizer)
    convert(tmp_path / "base", [], tmp_path / "x.cnl")
    export(open_cnl(tmp_path / "x.cnl"), tmp_path / "x.gguf")
    ours = Tokenizer(tokenizer, TokenizerFiles(Path("x"), tokenizer).settings())
    llm = llama_cpp.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    lines = (shared_data / "corpus" / "zh_prose.txt").read_text(encoding="utf-8").splitlines()[:2000]
    assert len(lines) > 1000
    for line in lines:
        if line:
            assert llm.tokenize(line.encode(), add_bos=False, special=False) == ours.encode(line)
    llm.close()


def test_llama_cpp_puts_no_space_before_text_where_we_put_none(tokenizer_for_check: bytes, tmp_path: Path) -> None:
    base = models.make_llama(tmp_path / "base", tokenizer_for_check)
    models.write_json(base / "tokenizer_config.json", {"add_prefix_space": False})
    convert(base, [], tmp_path / "x.cnl")
    export(open_cnl(tmp_path / "x.cnl"), tmp_path / "x.gguf")
    result = gguf_check.compare(tmp_path / "x.cnl", tmp_path / "x.gguf", tokens=16)
    assert (result.texts, result.differing) == (len(TEXTS) + len(models.sample_lines()), [])
    with LLM(tmp_path / "x.cnl", ctx=64) as llm:
        assert not llm.tokenizer.piece(llm.tokenize("天")[0]).startswith("▁")


def test_llama_cpp_takes_the_chat_template(make: Maker, tmp_path: Path) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    cnl = make("q4-a64", template="alpaca-2")
    export(open_cnl(cnl), tmp_path / "x.gguf")
    llm = llama_cpp.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    formatter = Jinja2ChatFormatter(llm.metadata["tokenizer.chat_template"], eos_token="</s>", bos_token="<s>")
    prompt = formatter(messages=TURNS)
    ids = llm.tokenize(prompt.prompt.encode(), add_bos=not prompt.added_special, special=True)
    tokenizer = Tokenizer(open_cnl(cnl).tokenizer_model, open_cnl(cnl).tokenizer)
    assert ids == encode_chat(TEMPLATES["alpaca-2"], tokenizer, TURNS)
    llm.close()
