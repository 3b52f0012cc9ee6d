# SPDX-License-Identifier: Apache-2.0
"""Reading Hugging Face directories: every container gives the same numbers, every damage its own sentence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnllama.convert.checkpoint import open_checkpoint, open_weights
from cnllama.convert.facts import from_hf, settle
from models import make_llama, random_tensors, small_config, write_json, write_weights

from cnllama.errors import InputError


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint, free to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def edit_config(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    write_json(path, json.loads(path.read_text()) | changes)
    return path


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        settle(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_container_holds_the_same_values(tmp_path: Path, kind: str, shards: int) -> None:
    tensors = random_tensors(small_config(300))
    write_weights(tmp_path, tensors, kind=kind, shards=shards)
    write_json(tmp_path / "config.json", small_config(300))
    found = open_checkpoint(tmp_path).tensors
    assert set(found) == set(tensors)
    for name, values in tensors.items():
        assert found[name].shape == values.shape
        assert np.array_equal(found[name].read(), values)
        assert np.array_equal(found[name].read(3, 7), values[3:7])
        found[name].release()
        assert np.array_equal(found[name].read(1), values[1:]), "released pages come back"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_every_dtype_becomes_float32_exactly(tmp_path: Path, suffix: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    special = [0.0, -0.0, 1e-40, 65504.0, -1.5, 3.0e38, 6.1e-5, 5.9e-8]
    values = torch.tensor([special, special[::-1]]).to(getattr(torch, kind))
    path = tmp_path / f"x.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)({"a": values, "b": values.t().contiguous()}, path)
    for name, expected in (("a", values), ("b", values.t())):
        read = open_weights(path)[name].read()
        assert read.dtype == np.float32
        assert read.tobytes() == expected.float().contiguous().numpy().tobytes()


def test_strided_and_shared_bin_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    whole = torch.arange(24.0).reshape(4, 6)
    torch.save({"t": whole.t(), "part": whole[1:3, 2:], "tied": whole}, tmp_path / "x.bin")
    found = open_weights(tmp_path / "x.bin")
    found["tied"].release()
    assert np.array_equal(found["t"].read(2, 4), whole.t()[2:4].numpy())
    assert np.array_equal(found["part"].read(), whole[1:3, 2:].numpy())


def test_bin_of_the_old_format(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(3)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    found = open_weights(tmp_path / "x.bin")["a"]
    found.release()
    assert found.read().tolist() == [1, 1, 1], "memory that no file backs must not be dropped"


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3, dtype=torch.int8)}, tmp_path / "x.safetensors")
    torch.save({"a": torch.ones(3, dtype=torch.int8)}, tmp_path / "x.bin")
    for path in (tmp_path / "x.safetensors", tmp_path / "x.bin"):
        with pytest.raises(InputError, match="expected one of F64, F32, F16, BF16"):
            open_weights(path)["a"].read()


def test_corrupt_bin_files(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, path)
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], good[:20], b"\x80\x02garbage", b"\xff" * 100):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="PyTorch cannot read it as plain weights"):
            open_weights(path)
    for other, expected in ((b"", "empty"), (bytes(100), "nothing but zeros"), (b"not a pickle", "a text")):
        path.write_bytes(other)
        with pytest.raises(InputError, match=expected):
            open_weights(path)


def test_bin_without_torch_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.bin").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"needs torch; run: pip install 'cnllama\[convert\]'"):
        open_weights(tmp_path / "x.bin")


class Harmful:
    """What weights_only must keep from running."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (open, ("harm", "w"))


def test_bin_with_code_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / "x.bin")
    with pytest.raises(InputError, match="holds code"):
        open_weights(tmp_path / "x.bin")
    assert not (tmp_path / "harm").exists()


def test_bin_that_is_no_state_dict(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for value in ([torch.ones(1)], {"state_dict": {"a": torch.ones(1)}}):
        torch.save(value, tmp_path / "x.bin")
        with pytest.raises(InputError, match=r"expected a table of tensors|save what lies under 'state_dict' alone"):
            open_weights(tmp_path / "x.bin")


def test_missing_and_wrong_directories(tmp_path: Path, base: Path) -> None:
    assert "there is no such directory" in refusal(tmp_path / "absent")
    assert "this is a file" in refusal(base / "config.json")
    (base / "model.safetensors").rename(base / "kept")
    assert "there are no weights" in refusal(base)
    (base / "kept").rename(base / "model-00001-of-00002.safetensors")
    assert "a shard without an index" in refusal(base)
    (base / "config.json").unlink()
    assert "there is no config.json" in refusal(base)
    write_json(base / "adapter_config.json", {})
    assert "give it with --lora" in refusal(base)


def test_shards_that_do_not_fit_their_index(tmp_path: Path, tokenizer_model: bytes) -> None:
    base = make_llama(tmp_path / "base", tokenizer_model, shards=3)
    index = base / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    (base / "model-00002-of-00003.safetensors").rename(base / "away")
    assert "model-00002-of-00003.safetensors, which is not there (1 of 3" in refusal(base)
    (base / "away").rename(base / "model-00002-of-00003.safetensors")
    for file, expected in (("../etc/passwd", "a name in the same directory"), (7, "a name in the same directory")):
        write_json(index, {"weight_map": good["weight_map"] | {"x": file}})
        assert expected in refusal(base)
    write_json(index, {"weight_map": good["weight_map"] | {"x": "model-00001-of-00003.safetensors"}})
    assert "holds x, which it does not" in refusal(base)
    write_json(index, {"weight_map": {}})
    assert "no weight_map" in refusal(base)
    index.write_text("{")
    assert "not valid JSON" in refusal(base)


def test_tensors_that_do_not_fit_the_config(base: Path, tmp_path: Path) -> None:
    config = small_config(300)
    tensors = random_tensors(config)
    other = tmp_path / "other"
    other.mkdir()
    write_json(other / "config.json", config)
    write_weights(other, {k: v for k, v in tensors.items() if "layers.1.mlp" not in k})
    assert "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight" in refusal(other)
    write_weights(other, tensors | {"model.layers.0.self_attn.odd.weight": np.ones(32, np.float32)})
    assert "odd.weight is in the checkpoint and in no LLaMA" in refusal(other)
    write_weights(other, tensors | {"model.layers.0.self_attn.q_proj.weight": np.ones((64, 96), np.float32)})
    assert "has shape [64, 96], config.json asks for [96, 96]" in refusal(other)
    edit_config(base, num_hidden_layers=2)
    assert "model.layers.2." in refusal(base)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"model_type": "mistral", "sliding_window": 512}, "sliding_window is 512, less than the 1024"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu"),
        ({"quantization_config": {"bits": 4}}, "give the unquantized checkpoint"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"num_attention_heads": 5}, "hidden_size is 96, not a multiple of num_attention_heads, 5"),
        ({"num_key_value_heads": 2}, "num_attention_heads is 3, not a multiple of num_key_value_heads, 2"),
        ({"hidden_size": "96"}, "hidden_size is '96', expected an integer"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"head_dim": 31}, "head_dim is 31, expected an even number"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
        ({"rope_scaling": "linear"}, "expected an object or null"),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, "type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks low_freq_factor, high_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            "high_freq_factor must be over low_freq_factor",
        ),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configs_that_are_refused(base: Path, changes: dict[str, Any], expected: str) -> None:
    edit_config(base, **changes)
    assert expected in refusal(base)


def test_config_defaults_and_both_spellings_of_rope() -> None:
    minimal = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }  # fmt: skip
    config = from_hf(minimal, "x")
    assert config["head_dim"] == 16
    assert config["num_key_value_heads"] == 4
    assert config["rope_scaling"] is None
    assert config["rope_theta"] == 10000.0
    assert from_hf({"architectures": ["LlamaForCausalLM"]} | minimal | {"model_type": None}, "x") == config
    old = from_hf(minimal | {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0}}, "x")
    new = from_hf(minimal | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}}, "x")
    assert old == new
    assert new["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert from_hf(minimal | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "x")["rope_theta"] == 7.0


def test_bare_llama_model_and_old_buffers(tmp_path: Path) -> None:
    config = small_config(300, tie_word_embeddings=True)
    tensors = random_tensors(config)
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    write_json(tmp_path / "config.json", config)
    write_weights(tmp_path, bare)
    assert set(open_checkpoint(tmp_path).tensors) == set(tensors)
