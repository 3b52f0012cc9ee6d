# SPDX-License-Identifier: Apache-2.0
"""GPTQ and activation-aware scaling: better than rounding on what was calibrated, exact in what is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cnllama.convert import parity
from cnllama.convert.pack import convert, make_plan
from cnllama.convert.quantize import awq, gptq
from cnllama.convert.quantize.base import Work
from cnllama.convert.quantize.calibration import read_calibration
from cnllama.convert.quantize.llama import rotary_frequencies
from cnllama.convert.quantize.rules import scheme_table
from cnllama.convert.quantize.threads import torch_threads
from cnllama.convert.quantize.walk import Gram, Walk, gram_of, output_error, rounded_to_nearest
from models import ROPE_SCALINGS, load_transformers, make_llama, sample_lines
from reference import rotary_frequencies as reference_frequencies

from cnllama import _core
from cnllama.errors import CnllamaError
from cnllama.files import Output, temporary_name, write_file
from cnllama.format import open_cnl
from cnllama.ownership import OwnedDirectory
from cnllama.plan import Available
from cnllama.tokenizer import Tokenizer
from cnllama.verify import compare, dequantized, verify

TOKENS = (6, 64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(sample_lines()), encoding="utf-8")
    return path


def correlated(rows: int, cols: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, cols] and inputs [count, cols] that share a few directions."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols // 4, cols, generator=random)
    x = torch.randn(count, cols // 4, generator=random) @ mix + 0.3 * torch.randn(count, cols, generator=random)
    return torch.randn(rows, cols, generator=random), x


@pytest.mark.parametrize("scheme", ["q4-a64", "q4-s32", "q8-s64", *sorted({"q3-a64", "q2-s32"} & {*_core.schemes()})])
@pytest.mark.parametrize("cols", [192, 224])
def test_gptq_beats_rounding_and_packs_what_it_computed(scheme: str, cols: int) -> None:
    original, x = correlated(48, cols, 600)
    h = gram_of([x[:300], x[300:]], cols, "cpu").finish()
    weight, grid = original.clone(), gptq.Grid.of(scheme)
    q, scales, mins = gptq.solve(weight, gptq.inverse_factor(h.clone()), grid)
    plain = rounded_to_nearest(original, scheme, 0)
    assert output_error(weight - original, h) < 0.6 * output_error(plain - original, h)
    data = gptq.packed(q, scales, mins, scheme, 0)
    assert np.array_equal(_core.dequantize(data, scheme, 48, cols), weight.numpy())


def test_inverse_factor() -> None:
    _, x = correlated(4, 300, 900)
    h = gram_of([x], 300, "cpu").finish()
    upper = gptq.inverse_factor(h)  # which damps h
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(
        upper.double().t() @ upper.double() @ h.double(), torch.eye(300).double(), rtol=0, atol=1e-3
    )


def test_gram_is_the_second_moment() -> None:
    _, x = correlated(4, 96, 200)
    gram = Gram(96, "cpu")
    gram.add(x[:120].reshape(2, 60, 96))
    gram.add(x[120:])
    torch.testing.assert_close(gram.magnitude(), x.abs().mean(0))
    torch.testing.assert_close(gram.finish(), 2 / 200 * x.t() @ x)


def test_singular_hessians_are_damped() -> None:
    weight, x = correlated(32, 128, 3)
    x[:, 7] = 0  # a column that nothing reached
    before = weight.clone()
    upper = gptq.inverse_factor(gram_of([x], 128, "cpu").finish())
    assert torch.isfinite(upper).all()
    gptq.solve(weight, upper, gptq.Grid.of("q4-a64"))
    assert (weight - before).abs().max() < 8 * (rounded_to_nearest(before, "q4-a64", 0) - before).abs().max()
    nothing = torch.zeros(64, 64)
    assert torch.isfinite(gptq.inverse_factor(nothing)).all()
    with pytest.raises(CnllamaError, match="no Cholesky factor; calibrate with more text"):
        gptq.inverse_factor(torch.full((8, 8), float("nan")).fill_diagonal_(1.0))


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
def test_rotary_frequencies(kind: str) -> None:
    config = {
        "head_dim": 32,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "rope_scaling": ROPE_SCALINGS[kind],
    }
    ours, amplitude = rotary_frequencies(config)
    expected, expected_amplitude = reference_frequencies(config)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-6)
    assert amplitude == pytest.approx(expected_amplitude, rel=1e-6)


def walk_of(base: Path, text: Path, scheme: str = "q8-s64") -> tuple[Walk, dict[str, np.ndarray]]:
    """A walk after the embedding, and the model's tensors."""
    plan = make_plan(base)
    files = plan.vocabulary.tokenizer
    samples = read_calibration(text, Tokenizer(files.model, files.settings()), plan.config, TOKENS).samples
    walk = Walk(Work(plan.tensors, scheme_table(plan.tensors, scheme), plan.config, 1), samples, "cpu")
    list(walk.embed())
    return walk, {name: tensor.read() for name, tensor in plan.tensors.items()}


@pytest.fixture(scope="module", params=[(1, False), (3, True)], ids=["grouped", "biases"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Path:
    heads, bias = request.param
    return make_llama(
        tmp_path_factory.mktemp("small"), tokenizer_model, num_key_value_heads=heads, num_hidden_layers=2,
        attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip


def test_layers_compute_what_transformers_does(small: Path, text: Path) -> None:
    import json

    walk, tensors = walk_of(small, text)
    tensors["model.embed_tokens.weight"] = np.concatenate(list(_embedding(walk)))
    model = load_transformers(json.loads((small / "config.json").read_text()), tensors)
    with torch.no_grad():
        expected = model.model(torch.from_numpy(walk._samples.astype(np.int64))).last_hidden_state
    for prefix in walk.layers():
        for h in walk.hidden:
            awq._Layer(walk, prefix)._run(h, None)
    norm = torch.from_numpy(tensors["model.norm.weight"])
    torch.testing.assert_close(torch.cat(list(walk.normed(norm))), expected, rtol=1e-4, atol=1e-4)


def _embedding(walk: Walk) -> Any:
    name = "model.embed_tokens.weight"
    scheme, _, cols = walk.work.table[name]
    for piece in walk.embed():
        yield _core.dequantize(piece.data, scheme, piece.values // cols, cols)


def test_awq_leaves_the_float_model_alone(small: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "ALPHAS", (0.3, 0.7))  # none of them leaves the weights as they are
    walk, _ = walk_of(small, text, "q4-a64")
    before = torch.cat(list(walk.hidden))
    plain, scaled = before.clone(), before.clone()
    for prefix in walk.layers():
        awq._Layer(walk, prefix)._run(plain, None)
        layer = awq._Layer(walk, prefix)
        weights = {name: linear.weight.clone() for name, linear in layer._layer.items()}
        layer._scale()
        assert any(not torch.equal(weights[name], linear.weight) for name, linear in layer._layer.items())
        layer._run(scaled, None)
    assert not torch.equal(plain, before)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_awq_search_is_no_worse_than_rounding() -> None:
    weight, x = correlated(64, 128, 400)
    x[:, ::16] *= 20
    found = awq.search([weight], ["q4-a64"], gram_of([x], 128, "cpu"))
    assert found.error < 0.9 * found.rounded_error
    assert found.importance.shape == found.factor.shape == (128,)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_conversion_is_sound_and_repeatable(
    small: Path, text: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awq, "ALPHAS", awq.ALPHAS[::5])
    options = {"quantizer": name, "calibrate": text, "calibrate_tokens": TOKENS, "threads": 1}
    report = convert(small, [], tmp_path / "a.cnl", check=False, **options)
    convert(small, [], tmp_path / "b.cnl", check=False, **options)
    assert (tmp_path / "a.cnl").read_bytes() == (tmp_path / "b.cnl").read_bytes()
    file = open_cnl(tmp_path / "a.cnl")
    assert [check for check in verify(file, parity.check) if not check.passed] == []
    assert file.quantization["quantizer"] == report.quantizer == name
    assert file.quantization["calibration"]["tokens"] == TOKENS[0] * TOKENS[1]
    assert len(file.quantization["calibration"]["text_sha256"]) == 64
    assert report.held_out is None
    assert any("error of the output" in note for note in report.notes)
    convert(small, [], tmp_path / "plain.cnl")
    same = compare(open_cnl(tmp_path / "plain.cnl"), file)
    assert (same == []) is (name == "gptq")  # factors of awq move the statistics


def test_gptq_follows_what_was_packed(small: Path, text: Path, tmp_path: Path) -> None:
    """The whole of it on the model's own activations: the last hidden states are nearer to the float model's."""
    walk, tensors = walk_of(small, text)
    states = {}
    for quantizer in ("rtn", "gptq"):
        path = tmp_path / f"{quantizer}.cnl"
        options = {"calibrate": text, "calibrate_tokens": TOKENS, "check": False} if quantizer == "gptq" else {}
        convert(small, [], path, quantizer=quantizer, **options)
        stored = {
            n: np.concatenate(list(dequantized(t))) for n, t in open_cnl(path).tensors.items() if t.scheme != "raw"
        }
        states[quantizer] = _hidden(small, stored, walk)
    exact = _hidden(small, tensors, walk)
    assert (states["gptq"] - exact).norm() < 0.9 * (states["rtn"] - exact).norm()


def _hidden(base: Path, tensors: dict[str, np.ndarray], walk: Walk) -> torch.Tensor:
    import json

    model = load_transformers(json.loads((base / "config.json").read_text()), tensors)
    with torch.no_grad():
        found: torch.Tensor = model.model(torch.from_numpy(walk._samples.astype(np.int64))).last_hidden_state
    return found


def test_held_out_text_decides(tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, out = tmp_path / "plain.cnl", tmp_path / "x.cnl"
    convert(tiny_llama, [], plain)
    options: dict[str, Any] = {"quantizer": "gptq", "calibrate": text, "calibrate_tokens": TOKENS}
    report = convert(tiny_llama, [], out, **options)
    assert report.held_out is not None
    better = report.held_out["difference"] <= 2 * report.held_out["standard_error"]
    assert report.held_out["kept"] == report.quantizer == ("gptq" if better else "rtn")
    ratio = report.held_out["perplexity"] / report.held_out["rtn_perplexity"]
    assert np.log(ratio) == pytest.approx(report.held_out["difference"], abs=1e-9)
    honest = gptq.solve

    def spoiled(weight: torch.Tensor, *more: Any) -> Any:
        q, scales, mins = honest(weight, *more)
        weight.mul_(8)  # what the rows decode to, which the file's own check compares
        return q, scales * 8, mins * 8  # logits that are sure of nonsense

    monkeypatch.setattr(gptq, "solve", spoiled)
    report = convert(tiny_llama, [], out, **options)
    assert report.held_out is not None
    assert report.held_out["perplexity"] > report.held_out["rtn_perplexity"]
    assert report.quantizer == report.held_out["kept"] == "rtn"
    assert any("the gptq file was not kept: its perplexity on the held-out text is" in w for w in report.warnings)
    assert out.read_bytes() == plain.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.cnl", "x.cnl"]


def test_a_model_too_large_to_run_is_kept_unchecked(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnllama.plan.available_memory", lambda: Available(1 << 20, "test"))
    report = convert(tiny_llama, [], tmp_path / "x.cnl", quantizer="gptq", calibrate=text, calibrate_tokens=TOKENS)
    assert report.quantizer == "gptq"
    assert report.held_out is None
    assert any("was not checked against rtn" in warning for warning in report.warnings)
    assert [path.name for path in tmp_path.iterdir()] == ["x.cnl"]


def test_what_is_in_the_way_is_found_before_the_calibration(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    """Whatever it is called, a file beside the output is the user's, unless a killed run's record says otherwise."""
    (tmp_path / ".x.cnl.gptq").write_bytes(b"mine")
    left = temporary_name(tmp_path / "x.cnl", "scratch")
    with OwnedDirectory(left, "scratch"):
        write_file(left / "model.gptq", b"left by a killed run")
    with pytest.raises(CnllamaError, match="this is a directory"):
        convert(tiny_llama, [], tmp_path, quantizer="gptq", calibrate=text, calibrate_tokens=TOKENS)
    convert(tiny_llama, [], tmp_path / "x.cnl", quantizer="gptq", calibrate=text, calibrate_tokens=TOKENS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.cnl.gptq", "x.cnl"]
    assert (tmp_path / ".x.cnl.gptq").read_bytes() == b"mine"
    with Output(tmp_path / "y.cnl"):  # an output that was never written leaves nothing either
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.cnl.gptq", "x.cnl"]


def test_calibrated_file_keeps_the_mode_of_the_one_it_replaces(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "x.cnl").write_bytes(b"old")
    (tmp_path / "x.cnl").chmod(0o600)
    convert(tiny_llama, [], tmp_path / "x.cnl", quantizer="gptq", calibrate=text, calibrate_tokens=TOKENS)
    assert (tmp_path / "x.cnl").stat().st_mode & 0o777 == 0o600


def test_room_for_both_files_is_asked_before_the_calibration(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = convert(tiny_llama, [], tmp_path / "plain.cnl", quantizer="rtn").size
    monkeypatch.setattr("cnllama.space.free_bytes", lambda _: size * 3 // 2)
    monkeypatch.setattr(gptq, "solve", lambda *_: pytest.fail("it was calibrated"))
    with pytest.raises(CnllamaError, match=r"will have .* bytes but its disk has"):
        convert(tiny_llama, [], tmp_path / "x.cnl", quantizer="gptq", calibrate=text, calibrate_tokens=TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["plain.cnl"]


@pytest.mark.parametrize("asked", [1, 2, 100, 1 << 20])
def test_no_more_threads_than_processors_are_started(asked: int) -> None:
    before = torch.get_num_threads()
    with torch_threads(asked):
        assert torch.get_num_threads() == min(asked, os.cpu_count() or 1)
        assert torch.ones(300, 300).matmul(torch.ones(300, 300))[0, 0] == 300
    assert torch.get_num_threads() == before
