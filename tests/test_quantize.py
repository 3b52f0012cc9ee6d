# SPDX-License-Identifier: Apache-2.0
"""Which scheme a tensor gets, what a calibration reads, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from cnllama.convert.pack import convert, make_plan
from cnllama.convert.quantize.calibration import BUNDLED, parse_tokens, read_calibration
from cnllama.convert.quantize.rules import EMBEDDINGS, parse_rules, quantizations, scheme_table
from models import chinese_lines, command, load_transformers, make_llama
from reference import assert_agrees

from cnllama import _core
from cnllama.errors import InputError
from cnllama.format import open_cnl
from cnllama.llm import LLM
from cnllama.tokenizer import Tokenizer
from cnllama.verify import dequantized


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model: bytes) -> Tokenizer:
    return Tokenizer(tokenizer_model, {"add_bos": True})


CONFIG = {"max_position_embeddings": 1024}


def test_every_scheme_has_its_name_and_the_short_ones_exist() -> None:
    known = quantizations()
    assert set(known.values()) == set(_core.schemes())
    assert {name: name for name in _core.schemes()}.items() <= known.items()
    assert known["q4"] == "q4-a64"
    assert known["q8"] == "q8-s64"


def test_last_rule_wins_and_names_may_be_short(tiny_llama: Path) -> None:
    tensors = make_plan(tiny_llama).tensors
    rules = parse_rules(["*.down_proj=q8, lm_head=q4-s32", "layers.1.*=q4-s64,model.layers.1.mlp.down_proj.weight=q4"])
    table = scheme_table(tensors, "q4-a64", rules)
    assert table["lm_head.weight"] == ("q4-s32", *tensors["lm_head.weight"].shape)
    assert table["model.embed_tokens.weight"][0] == EMBEDDINGS
    assert table["model.layers.0.mlp.down_proj.weight"][0] == "q8-s64"
    assert table["model.layers.1.mlp.down_proj.weight"][0] == "q4-a64"
    assert table["model.layers.1.self_attn.q_proj.weight"][0] == "q4-s64"
    assert table["model.layers.1.input_layernorm.weight"] == ("f32", 96, 1)
    assert table["model.layers.2.mlp.up_proj.weight"][0] == "q4-a64"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*.down_prj=q8", r"--quant-rule \*.down_prj=q8-s64: no matrix .* closest are .*mlp\.down_proj"),
        ("*.input_layernorm=q8", "no matrix of this model has such a name"),
        ("lm_head=q9", r"--quant-rule 'lm_head=q9': the scheme 'q9' is unknown, expected one of .*q4-a64"),
        ("lm_head", r"expected PATTERN=SCHEME"),
        ("lm_head=q8,,", r"expected PATTERN=SCHEME"),
    ],
)
def test_bad_rules_are_one_sentence(tiny_llama: Path, text: str, expected: str) -> None:
    tensors = make_plan(tiny_llama).tensors
    with pytest.raises(InputError, match=expected) as caught:
        scheme_table(tensors, "q4-a64", parse_rules([text]))
    assert "\n" not in str(caught.value)


def test_a_rule_for_lm_head_of_a_tied_model(tmp_path: Path, tokenizer_model: bytes) -> None:
    tensors = make_plan(make_llama(tmp_path / "tied", tokenizer_model, tie_word_embeddings=True)).tensors
    with pytest.raises(InputError, match="its embeddings are tied, so give the rule for embed_tokens"):
        scheme_table(tensors, "q4-a64", parse_rules(["lm_head=q8"]))
    assert scheme_table(tensors, "q4-a64", parse_rules(["embed*=q4"]))["model.embed_tokens.weight"][0] == "q4-a64"


def test_mixed_schemes_run(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.cnl"
    rules = parse_rules(["embed_tokens=q4-s32,*.v_proj=q8,*.up_proj=q4-s64,lm_head=q4"])
    report = convert(tiny_llama, [], out, rules=rules)
    file = open_cnl(out)
    assert file.quantization["rules"] == [list(rule) for rule in rules]
    assert file.quantization["embeddings"] == "q4-s32"
    assert file.quantization["bits_per_weight"] == pytest.approx(report.bits_per_weight, abs=1e-4)
    stored = {n: np.concatenate(list(dequantized(t))) for n, t in file.tensors.items() if t.scheme != "raw"}
    import torch

    ids = list(range(5, 60))
    with LLM(out, ctx=128, threads=1) as llm:
        logits = llm.logits(ids)
    model = load_transformers(json.loads((tiny_llama / "config.json").read_text()), stored)
    assert_agrees(model(torch.tensor([ids])).logits[0].detach().numpy(), logits, mean=2e-3, peak=0.05)


def test_samples_are_spread_and_leave_the_end_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [f"{i:04} {line}" for i, line in enumerate(chinese_lines() * 40)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    found = read_calibration(path, tokenizer, CONFIG, (6, 64))
    assert found.samples.shape == (6, 64)
    assert found.samples.dtype == np.int32
    assert (found.samples[:, 0] == tokenizer.bos_id).all()
    whole = "\n".join(lines)[: 6 * 64 * 6]
    kept = whole.rindex(found.held_out)
    assert 0.05 < len(found.held_out) / len(whole) < 0.15
    assert whole.endswith(found.held_out)
    ids = tokenizer.encode(whole[:kept].rstrip("\n"))
    assert found.samples[0, 1:].tolist() == ids[:63]
    assert found.samples[-1, 1:].tolist() == ids[-63:]
    assert found.notices == ()
    assert read_calibration(path, tokenizer, CONFIG, (6, 64)).record() == found.record()
    assert found.record()["tokens"] == 6 * 64


def test_a_short_text_gives_fewer_samples_and_says_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(chinese_lines()[:12]), encoding="utf-8")
    found = read_calibration(path, tokenizer, CONFIG, (1000, 32))
    assert 1 <= len(found.samples) < 1000
    assert f"of the {1000 * 32:,} tokens" in found.notices[0]
    starts = {tuple(row[1:]) for row in found.samples.tolist()}
    assert len(starts) == len(found.samples)


def test_the_bundled_text_calibrates(tokenizer: Tokenizer) -> None:
    lines = BUNDLED.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) > 250
    assert all(line.strip() for line in lines)
    found = read_calibration(None, tokenizer, CONFIG)
    assert found.samples.shape[1] == 512
    assert found.samples.size > 10_000
    assert len(found.held_out) > 1000
    assert found.notices == ()


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("太短", (4, 64), "too few to calibrate with; give a text of a page or more"),
        ("", (4, 64), "there is no text in it"),
        ("文" * 1000, (4, 2048), "samples of 2048 tokens, the model was trained on 1024"),
    ],
)
def test_texts_that_cannot_calibrate(
    tmp_path: Path, tokenizer: Tokenizer, text: str, tokens: tuple[int, int], expected: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=expected):
        read_calibration(path, tokenizer, CONFIG, tokens)


def test_calibrate_tokens_are_parsed() -> None:
    assert parse_tokens("128x512") == (128, 512)
    assert parse_tokens(" 4X64 ") == (4, 64)
    for bad in ("128", "0x512", "4x8", "x", "4x-1", "", "1e3x512", "99999999x512"):
        with pytest.raises(InputError, match="expected SAMPLESxLENGTH"):
            parse_tokens(bad)


def test_without_torch_only_rtn(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"--quantizer gptq needs torch.*pip install 'cnllama\[convert\]'"):
        convert(tiny_llama, [], tmp_path / "x.cnl", quantizer="gptq")
    assert list(tmp_path.iterdir()) == []
    assert convert(tiny_llama, [], tmp_path / "x.cnl").quantizer == "rtn"


def test_command_refuses_quantization_in_one_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.cnl"
    for options, expected in (
        (["--quant", "q9"], "--quant: the scheme 'q9' is unknown, expected one of"),
        (["--quant-rule", "*.oproj=q8"], "closest are"),
        (["--quantizer", "exl"], "invalid choice"),
        (["--calibrate-tokens", "12"], "--calibrate-tokens is '12'"),
        (["--quantizer", "rtn", "--no-check"], "--calibrate, --device and --no-check need --quantizer gptq or awq"),
        (["--quantizer", "gptq", "--calibrate", tmp_path / "absent.txt"], "no such file"),
    ):
        done = command("cnllama.convert", tiny_llama, "-o", out, *options)
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
