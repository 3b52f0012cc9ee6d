# SPDX-License-Identifier: Apache-2.0
"""bench/make_model.py: both files are sound, hold the same weights, and run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import make_checkpoint
import make_model
import models
import numpy as np
import ops_reference as ref
import pytest
from cnllama.convert import parity
from cnllama.convert.gguf.export import gguf_name

from cnllama import LLM, _core
from cnllama.errors import InputError
from cnllama.format import open_cnl
from cnllama.verify import verify

pytest.importorskip("google.protobuf", reason="protobuf, which the benchmarks need, is not installed")
gguf = pytest.importorskip("gguf", reason="the package gguf, which reads the files that are tested, is not installed")

VOCAB = 1301  # odd: the last panels are padding in part
Made = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The tiny shape in every scheme: scheme -> (.cnl, .gguf)."""
    folder = tmp_path_factory.mktemp("made")
    return {
        scheme: make_model.make_model("tiny", folder / scheme, vocab=VOCAB, scheme=scheme)[:2]
        for scheme in make_model.GGUF_TYPES
    }


@pytest.mark.parametrize("scheme", make_model.GGUF_TYPES)
def test_files_are_sound_and_the_same(made: Made, scheme: str) -> None:
    cnl, other = made[scheme]
    file = open_cnl(cnl)
    assert [check.name for check in verify(file, parity.check) if not check.passed] == []
    tensors = {t.name: t for t in gguf.GGUFReader(other).tensors}
    half = file.config["head_dim"] // 2
    for name, tensor in file.tensors.items():
        if tensor.scheme in ("raw", "f32"):
            continue
        expected = ref.dequantize(tensor.data, tensor.scheme, tensor.rows, tensor.cols).astype(np.float32)
        if ".q_proj" in name or ".k_proj" in name:
            expected = expected.reshape(-1, 2, half, tensor.cols).swapaxes(1, 2).reshape(expected.shape)
        found = tensors[gguf_name(name)]
        np.testing.assert_array_equal(gguf.quants.dequantize(found.data, found.tensor_type), expected, err_msg=name)
        assert expected.std() == pytest.approx(tensor.cols**-0.5, rel=0.1)
        assert abs(expected.mean()) < 0.05 * tensor.cols**-0.5


@pytest.mark.parametrize("scheme", make_model.GGUF_TYPES)
def test_the_model_runs(made: Made, scheme: str) -> None:
    with LLM(made[scheme][0], ctx=128) as llm:
        logits = llm.logits(list(range(3, 103)))
    assert logits.shape == (100, VOCAB)
    assert np.isfinite(logits).all()
    assert logits.std(axis=1).min() > 0.1


@pytest.mark.parametrize("scheme", make_model.GGUF_TYPES)
def test_padding_is_what_the_layout_asks_for(scheme: str) -> None:
    for cols in (40, 688, 300):
        panels = make_model.draw_panels(np.random.default_rng(0), scheme, cols, 2)
        s = ref.SCHEMES[scheme]
        padded = ref.round_up(cols, s.group)
        q, scale, low = ref.unpack(panels, scheme, 32, padded)
        if not s.asymmetric:
            assert (q[:, cols:] == s.zero).all()
        assert (q[:, :cols].min(), q[:, :cols].max()) == ((0, 15) if s.bits == 4 else (1, 255))
        assert (scale != 0).all()
        assert np.isfinite(low).all()
        np.testing.assert_array_equal(ref.pack(*packable(q, scale, low, s.group), scheme), panels)


def packable(q: np.ndarray, scale: np.ndarray, low: np.ndarray, group: int) -> tuple[np.ndarray, ...]:
    return q.astype(np.uint8), scale[:, ::group].astype(np.float16), low[:, ::group].astype(np.float16)


def test_rows_of_padding_are_zero(made: Made) -> None:
    tensor = open_cnl(made["q4-a64"][0]).tensors["lm_head.weight"]
    q, scale, _ = ref.unpack(tensor.data, tensor.scheme, _core.padded_rows(VOCAB), tensor.cols)
    assert not scale[VOCAB:].any()
    assert (q[VOCAB:] == 128).all()
    assert scale[:VOCAB].all()


def test_matrices_differ(made: Made) -> None:
    file = open_cnl(made["q4-s32"][0])
    seen = {}
    for name, tensor in file.tensors.items():
        if tensor.scheme not in ("raw", "f32"):
            assert seen.setdefault(tensor.data.tobytes(), name) == name
            panels = tensor.data.reshape(_core.padded_rows(tensor.rows) // 16, -1)
            assert len(np.unique(panels, axis=0)) == len(panels)


def test_a_small_pool_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_model, "POOL_BYTES", 1 << 14)
    random = np.random.default_rng(0)
    pool = make_model.Pool(random, "q4-a64", 256, 1000)
    drawn = make_model.draw_matrix(random, pool, 1001)
    assert len(pool.panels) < len(drawn.chosen) == 62
    assert drawn.end is not None
    values = ref.dequantize(np.concatenate([pool.panels[drawn.chosen], drawn.end]).reshape(-1), "q4-a64", 1001, 256)
    statistics = drawn.statistics()
    assert statistics.count == values.size
    assert statistics.mean == pytest.approx(values.mean(), abs=1e-6)
    assert statistics.rms == pytest.approx(np.sqrt((values**2).mean()), rel=1e-6)
    assert statistics.absmax == pytest.approx(np.abs(values).max(), rel=1e-6)


def test_a_seed_gives_the_same_bytes(made: Made, tmp_path: Path) -> None:
    again = make_model.make_model("tiny", tmp_path, vocab=VOCAB)
    other = make_model.make_model("tiny", tmp_path / "other", vocab=VOCAB, seed=1)
    for mine, same, different in zip(made["q4-s32"], again[:2], other[:2], strict=True):
        assert mine.read_bytes() == same.read_bytes() != different.read_bytes()


def test_shapes_are_those_of_the_checkpoints() -> None:
    assert make_model.SHAPES is make_checkpoint.SHAPES
    assert {"1b", "7b", "13b", "8b-gqa", "tiny"} <= set(make_model.SHAPES)


def test_a_given_tokenizer_decides_the_vocabulary(tmp_path: Path) -> None:
    model = models.train_tokenizer(models.sample_lines(), 900)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    pieces = models.piece_count(model)
    cnl, _, _ = make_model.make_model("tiny", tmp_path / "own", tokenizer=path)
    assert (open_cnl(cnl).vocab_size, open_cnl(cnl).tokenizer_model) == (pieces, model)
    cnl, _, _ = make_model.make_model("tiny", tmp_path / "grown", tokenizer=path, vocab=pieces + 7)
    assert open_cnl(cnl).vocab_size == open_cnl(cnl).tokenizer["pieces"] == pieces + 7
    with pytest.raises(InputError, match=f"--vocab is 5 and the tokenizer has {pieces} pieces"):
        make_model.make_model("tiny", tmp_path, tokenizer=path, vocab=5)


def test_command(tmp_path: Path) -> None:
    script = Path(make_model.__file__)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    done = run("tiny", "--out", tmp_path, "--vocab", VOCAB)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"tiny-q4.cnl", "tiny-q4_0.gguf"}
    assert "the same weights, value for value (q4-s32 = F32, q4-s32 = Q4_0, q8-s64 = Q8_0)" in done.stdout
    for arguments, words in (
        (["tiny", "--out", script / "x"], "not a directory"),
        (["tiny", "--out", tmp_path, "--tokenizer", tmp_path / "none"], "there is no such file"),
        (["tiny", "--out", tmp_path, "--tokenizer", script], "this is no SentencePiece model"),
        (["tiny", "--out", tmp_path, "--vocab", 3], "--vocab is 3"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
