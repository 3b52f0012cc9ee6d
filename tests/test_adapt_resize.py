# SPDX-License-Identifier: Apache-2.0
"""Growing a checkpoint to a merged tokenizer: values of new rows, untouched values of all others, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import sentencepiece
from cnllama.convert.checkpoint import open_checkpoint

from cnllama.adapt.hf_checkpoint import OutTensor, encode, write_safetensors
from cnllama.adapt.resize import resize
from cnllama.cli.main import main
from cnllama.errors import InputError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def english() -> bytes:
    return models.train_tokenizer(models.english_lines(), 400)


@pytest.fixture(scope="module")
def merged(english: bytes) -> bytes:
    return models.merge_tokenizers(english, models.train_tokenizer(models.chinese_lines(), 850))


@pytest.fixture
def tokenizer(tmp_path: Path, merged: bytes) -> Path:
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    models.write_tokenizer(directory, merged)
    return directory


def read_all(directory: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_checkpoint(directory).tensors.items()}


def expected_mean(old: np.ndarray, model: bytes, piece: str) -> np.ndarray:
    """The mean of the rows of a piece's text, by SentencePiece itself: a marker keeps its dummy prefix apart."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if piece.startswith("\u2581"):
        ids = processor.encode(piece[1:].replace("\u2581", " "))
    else:
        ids = processor.encode("\n" + piece.replace("\u2581", " "))
        ids = ids[len(processor.encode("\n")) :]
    return old[ids].mean(0)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_means_and_everything_else_stays(
    tmp_path: Path, tokenizer: Path, english: bytes, merged: bytes, kind: str, shards: int, tied: bool
) -> None:
    base = models.make_llama(tmp_path / "base", english, kind=kind, shards=shards, tie_word_embeddings=tied)
    done = resize(base, tokenizer, tmp_path / "out")
    rows, old_rows = models.piece_count(merged), models.piece_count(english)
    before, after = read_all(base), read_all(tmp_path / "out")
    assert done.rows == rows
    assert list(before) == list(after) or set(before) == set(after)
    matrices = [EMBED] if tied else [EMBED, HEAD]
    assert [g.name for g in done.growth] == matrices
    for name, value in before.items():
        if name not in matrices:
            assert np.array_equal(after[name], value), name
            continue
        assert after[name].shape == (rows, value.shape[1])
        assert np.array_equal(after[name][:old_rows], value)
        processor = sentencepiece.SentencePieceProcessor(model_proto=merged)
        for i in range(old_rows, rows):
            mean = expected_mean(value, english, processor.id_to_piece(i))
            np.testing.assert_allclose(after[name][i], mean, rtol=2e-3, atol=2e-3, err_msg=processor.id_to_piece(i))
    growth = done.growth[0]
    assert (growth.old_rows, growth.new_rows) == (old_rows, rows)
    assert growth.old_norm == pytest.approx(np.linalg.norm(before[EMBED], axis=1).mean(), rel=1e-4)
    assert growth.new_norm == pytest.approx(np.linalg.norm(after[EMBED][old_rows:], axis=1).mean(), rel=1e-2)
    config = models.json_of(tmp_path / "out" / "config.json")
    assert config == models.json_of(base / "config.json") | {"vocab_size": rows}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == merged
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".cnllama.json"]


def test_transformers_loads_the_result(tmp_path: Path, tokenizer: Path, english: bytes, merged: bytes) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base = models.make_llama(tmp_path / "base", english, shards=2)
    resize(base, tokenizer, tmp_path / "out")
    old = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    new = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert new.get_input_embeddings().num_embeddings == models.piece_count(merged)
    ids = torch.tensor([[1, 300, 301, 302]])
    with torch.no_grad():
        ours, theirs = new(ids).logits[..., : models.piece_count(english)], old(ids).logits
    assert torch.equal(ours, theirs)
    assert len(transformers.LlamaTokenizer.from_pretrained(tmp_path / "out")) == models.piece_count(merged)


def test_a_resized_checkpoint_converts(tmp_path: Path, tokenizer: Path, english: bytes) -> None:
    base = models.make_llama(tmp_path / "base", english)
    resize(base, tokenizer, tmp_path / "out")
    models.convert(tmp_path / "out", tmp_path / "out.cnl")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("init", ["normal", "zeros"])
def test_other_initializations(tmp_path: Path, tokenizer: Path, english: bytes, init: str, dtype: str) -> None:
    base = models.make_llama(tmp_path / "base", english, dtype=dtype)
    resize(base, tokenizer, tmp_path / "a", init=init, seed=1)
    old = read_all(base)[EMBED]
    new = read_all(tmp_path / "a")[EMBED][len(old) :]
    if init == "zeros":
        assert not new.any()
        return
    assert new.std() == pytest.approx(old.std(), rel=0.05)
    assert len(np.unique(new[:, 0])) > len(new) * 0.9
    resize(base, tokenizer, tmp_path / "b", init=init, seed=1)
    resize(base, tokenizer, tmp_path / "c", init=init, seed=2)
    assert np.array_equal(read_all(tmp_path / "b")[EMBED][len(old) :], new)
    assert not np.array_equal(read_all(tmp_path / "c")[EMBED][len(old) :], new)


def test_padding_rows_are_initialized_too(tmp_path: Path, tokenizer: Path, english: bytes, merged: bytes) -> None:
    pieces, size = models.piece_count(english), models.piece_count(merged)
    config = models.small_config(pieces + 5)
    tensors = models.random_tensors(config)
    tensors[EMBED][pieces:] = 1000
    base = models.make_llama(tmp_path / "base", english, tensors=tensors, vocab_size=pieces + 5)
    done = resize(base, tokenizer, tmp_path / "out", multiple=64)
    assert done.rows % 64 == 0
    assert size <= done.rows < size + 64
    embed = read_all(tmp_path / "out")[EMBED]
    mean = embed[:pieces].astype(np.float64).mean(0)
    np.testing.assert_allclose(embed[size:], np.tile(mean, (done.rows - size, 1)), atol=2e-3)
    assert np.abs(embed).max() < 100


def test_added_tokens_get_the_mean_of_their_text(
    tmp_path: Path, tokenizer: Path, english: bytes, merged: bytes
) -> None:
    size = models.piece_count(merged)
    models.write_json(tokenizer / "added_tokens.json", {"[PAD]": size})
    base = models.make_llama(tmp_path / "base", english)
    done = resize(base, tokenizer, tmp_path / "out")
    assert done.rows == size + 1
    old, new = read_all(base)[EMBED], read_all(tmp_path / "out")[EMBED]
    np.testing.assert_allclose(new[size], expected_mean(old, english, "[PAD]"), atol=2e-3)
    assert models.json_of(tmp_path / "out" / "added_tokens.json") == {"[PAD]": size}


def test_bfloat16_keeps_its_bits_and_rounds_to_even(tmp_path: Path, tokenizer: Path, english: bytes) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    base = models.make_llama(tmp_path / "base", english, dtype="float32")
    state = {name: value.to(torch.bfloat16) for name, value in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    resize(base, tokenizer, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in state.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name][: len(value)], value)
    values = np.random.default_rng(0).standard_normal(10000, np.float32)
    bits = np.frombuffer(encode(values, "BF16"), np.int16)
    assert torch.equal(torch.from_numpy(bits.copy()).view(torch.bfloat16), torch.from_numpy(values).to(torch.bfloat16))


def test_the_released_vocabulary_grows_a_model(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "tokenizers"
    base = models.make_llama(tmp_path / "base", (folder / "llama.model").read_bytes())
    names = (str(folder / name) for name in ("llama.model", "chinese_sp_20k.model"))
    assert main(["tokenizer", "merge", *names, "-o", str(tmp_path / "merged")]) == 0
    done = resize(base, tmp_path / "merged", tmp_path / "out")
    assert done.rows == 49953
    embed = read_all(tmp_path / "out")[EMBED]
    # 人工智能 is new; the old model spells it with these four characters.
    old = sentencepiece.SentencePieceProcessor(model_file=str(folder / "llama.model"))
    new = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "merged" / "tokenizer.model"))
    parts = [old.piece_to_id(character) for character in "人工智能"]
    np.testing.assert_allclose(embed[new.piece_to_id("人工智能")], embed[parts].mean(0), atol=2e-3)


# refusals


def test_refusals(tmp_path: Path, tokenizer: Path, english: bytes, merged: bytes) -> None:
    base = models.make_llama(tmp_path / "base", english)
    (tmp_path / "other.model").write_bytes(models.train_tokenizer(models.chinese_lines(), 850))
    same, bare, padded = tmp_path / "same", tmp_path / "bare", tmp_path / "padded"
    for copy in (same, bare, padded):
        shutil.copytree(base, copy)
    (bare / "tokenizer.model").unlink()
    models.write_json(padded / "added_tokens.json", {"<extra>": models.piece_count(english)})
    wide = models.make_llama(tmp_path / "wide", english, vocab_size=models.piece_count(english) + 1)
    models.write_json(wide / "added_tokens.json", {"<extra>": models.piece_count(english)})
    short = models.make_llama(tmp_path / "short", english, vocab_size=models.piece_count(english) - 1)
    out = tmp_path / "out"
    cases: list[tuple[str, tuple[Path, Path, Path], dict[str, Any]]] = [
        ("does not extend the old tokenizer", (base, tmp_path / "other.model", out), {}),
        ("nothing to grow", (base, same, out), {}),
        (r"there is no tokenizer\.model", (bare, tokenizer, out), {}),
        (r"there is no tokenizer\.model", (base, tmp_path, out), {}),
        ("no such file", (base, tmp_path / "none", out), {}),
        ("no such directory", (tmp_path / "none", tokenizer, out), {}),
        ("rows; get the right one", (short, tokenizer, out), {}),
        ("rows; get the right one", (padded, tokenizer, out), {}),
        ("'<extra>'; give the base without", (wide, tokenizer, out), {}),
        ("one of the inputs", (base, tokenizer, base), {}),
        ("one of the inputs", (base, tokenizer, tokenizer), {}),
        ("cnllama did not write this", (base, tokenizer, same), {}),
        ("this is a file", (base, tokenizer, base / "config.json"), {}),
        ("no initialization 'ones'", (base, tokenizer, out), {"init": "ones"}),
        ("multiple of 0", (base, tokenizer, out), {"multiple": 0}),
    ]
    for words, arguments, options in cases:
        with pytest.raises(InputError, match=words):
            resize(*arguments, **options)
    assert not out.exists()


def test_nan_in_the_base_is_refused_and_leaves_no_checkpoint(tmp_path: Path, tokenizer: Path, english: bytes) -> None:
    for number, name in enumerate((EMBED, "model.norm.weight")):
        tensors = models.random_tensors(models.small_config(models.piece_count(english)))
        tensors[name].flat[7] = np.nan
        base = models.make_llama(tmp_path / f"base{number}", english, tensors=tensors)
        out = tmp_path / f"out{number}"
        with pytest.raises(InputError, match="NaN or infinity"):
            resize(base, tokenizer, out)
        assert not (out / "config.json").exists()
        assert not list(out.glob("*.safetensors"))
        assert not list(out.glob(".*"))


def test_a_config_that_lies_about_the_rows_is_a_warning(tmp_path: Path, tokenizer: Path, english: bytes) -> None:
    base = models.make_llama(tmp_path / "base", english)
    models.write_json(base / "config.json", models.json_of(base / "config.json") | {"vocab_size": 32000})
    done = resize(base, tokenizer, tmp_path / "out")
    assert "says vocab_size 32000" in done.warnings[0]
    assert models.json_of(tmp_path / "out" / "config.json")["vocab_size"] == done.rows


def test_command_line(tmp_path: Path, tokenizer: Path, english: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    base = models.make_llama(tmp_path / "base", english)
    arguments = ["adapt", "resize", str(base), str(tokenizer), "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "norm of new rows" in output
    assert EMBED in output
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert main(arguments) == 0, "the same again is finished already"
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert main([*arguments, "--init", "zeros"]) == 2
    message = capsys.readouterr().err
    assert "had options init 'mean', this one has 'zeros'" in message
    assert message.count("\n") == 1


def test_any_shape_is_written(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    values = {"a": np.arange(5, dtype=np.float32), "b": np.float32(3).reshape(()), "空": np.ones((2, 3, 4), np.float32)}

    def tensor(value: np.ndarray) -> OutTensor:
        return OutTensor("F32", value.shape, lambda begin, end: value[begin:end] if value.ndim else value, lambda: None)

    write_safetensors(tmp_path / "x.safetensors", {name: tensor(value) for name, value in values.items()})
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(loaded[name], value) for name, value in values.items())
    header = (tmp_path / "x.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_single_numbers_and_empty_tensors_stay(tmp_path: Path, tokenizer: Path, english: bytes, kind: str) -> None:
    """A tensor without dimensions is read like the others; one without values costs nothing, however long."""
    tensors = models.random_tensors(models.small_config(models.piece_count(english)))
    tensors["model.layers.0.scale"] = np.array(1.5, np.float32)
    tensors["model.layers.0.nothing"] = np.empty((1 << 40, 0), np.float32)
    base = models.make_llama(tmp_path / "base", english, kind=kind, tensors=tensors)
    resize(base, tokenizer, tmp_path / "out")
    after = read_all(tmp_path / "out")
    assert after["model.layers.0.scale"] == np.float32(1.5)
    assert after["model.layers.0.nothing"].shape == (1 << 40, 0)
