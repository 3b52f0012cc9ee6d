# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters made by peft, merged by us: equal to merge_and_unload, whatever the names; the broken ones refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnllama.convert.adapters import open_adapter
from cnllama.convert.pack import make_plan, merged_tensors
from models import LORA_TARGETS, Tensors, load_transformers, make_llama, random_tensors, write_json

from cnllama.errors import InputError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
CONFIG, LM_HEAD = "adapter_config.json", "base_model.model.lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Path:
    return make_llama(tmp_path_factory.mktemp("base"), tokenizer_model, dtype="float32")


@pytest.fixture(scope="module")
def tensors(base: Path) -> Tensors:
    from safetensors.numpy import load_file

    return load_file(base / "model.safetensors")


def config_of(base: Path) -> dict[str, Any]:
    return json.loads((base / "config.json").read_text())


def adapt(base: Path, tensors: Tensors, directory: Path, *, safe: bool = True, **lora: Any) -> Tensors:
    """Saves an adapter with random weights; returns peft's merged tensors."""
    model = load_transformers(config_of(base), tensors)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**({"r": 4, "target_modules": LORA_TARGETS} | lora)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(directory, safe_serialization=safe)
    merged = wrapped.merge_and_unload()
    return {name: value.numpy() for name, value in merged.state_dict().items()}


def assert_merged(ours: dict[str, np.ndarray], theirs: Tensors) -> None:
    assert set(ours) <= set(theirs)
    for name, values in ours.items():
        assert np.linalg.norm(values - theirs[name]) <= 1e-6 * np.linalg.norm(theirs[name]), name


@pytest.fixture
def adapter(base: Path, tensors: Tensors, tmp_path: Path) -> Path:
    adapt(base, tensors, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(adapter: Path, **changes: Any) -> None:
    write_json(adapter / CONFIG, json.loads((adapter / CONFIG).read_text()) | changes)


def rewrite(adapter: Path, change: Any) -> None:
    """Applies change(tensors) -> tensors to the adapter's weights."""
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(path)).items()}, path)


def refusal(base: Path, *adapters: Path) -> str:
    with pytest.raises(InputError) as caught:
        make_plan(base, adapters)
    return "\n".join([str(caught.value), *caught.value.details])


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"r": 8, "lora_alpha": 32},
        {"use_rslora": True, "lora_alpha": 5},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r".*layers\.[12]\..*(v|up)_proj"},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
        {"rank_pattern": {r"^model\.layers\.0\.self_attn\.k_proj": 3}, "use_rslora": True},
        {"target_modules": [*LORA_TARGETS, "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["norm", "input_layernorm"]},
        {"init_lora_weights": "gaussian"},
        {"fan_in_fan_out": True},
        {"use_dora": True, "rank_pattern": {"q_proj": 2}},
        {"use_dora": True, "target_modules": ["embed_tokens", "lm_head", "up_proj"]},
        {"trainable_token_indices": [5, 899]},
        {"trainable_token_indices": {"embed_tokens": [0], "lm_head": [7, 3]}},
        {"layers_to_transform": [0, 2]},
    ],
    ids=lambda lora: ",".join(map(str, lora)) or "plain",
)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.filterwarnings("ignore")
def test_merging_equals_peft(base: Path, tensors: Tensors, tmp_path: Path, lora: dict[str, Any], safe: bool) -> None:
    expected = adapt(base, tensors, tmp_path / "a", safe=safe, **lora)
    if not safe:
        to_bin(tmp_path / "a")
    ours = dict(merged_tensors(make_plan(base, [tmp_path / "a"])))
    assert set(ours) == set(tensors)
    assert_merged(ours, expected)
    assert any(not np.array_equal(ours[name], tensors[name]) for name in ours)


def to_bin(adapter: Path) -> None:
    """The .bin of older versions, which peft 0.18 and later no longer write."""
    from safetensors.torch import load_file

    path = adapter / "adapter_model.safetensors"
    if path.exists():
        torch.save(load_file(path), adapter / "adapter_model.bin")
        path.unlink()
    assert (adapter / "adapter_model.bin").exists()


def test_rows_merge_like_the_whole(base: Path, tensors: Tensors, tmp_path: Path) -> None:
    adapt(base, tensors, tmp_path / "a", target_modules=["embed_tokens", "q_proj", "lm_head"])
    for tensor in make_plan(base, [tmp_path / "a"]).tensors.values():
        whole = tensor.read()
        parts = np.concatenate([tensor.read(row, row + 32) for row in range(0, tensor.shape[0], 32)])
        np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_two_adapters_are_merged_in_order(base: Path, tensors: Tensors, tmp_path: Path) -> None:
    first = adapt(base, tensors, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    second = adapt(base, first, tmp_path / "b", r=2, target_modules=["q_proj", "lm_head"])
    assert_merged(dict(merged_tensors(make_plan(base, [tmp_path / "a", tmp_path / "b"]))), second)


def prefixed(old: str, new: str) -> Any:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        prefixed(".lora_A.weight", ".lora_A.default.weight"),
        prefixed(".lora_B.weight", ".lora_B.chinese.weight"),
        prefixed("base_model.model.model.", "base_model.model."),
        prefixed("base_model.model.model.", "base_model.model.base_model.model.model."),
        prefixed("base_model.model.", ""),
        prefixed("lm_head.weight", "lm_head.modules_to_save.weight"),
        prefixed("lm_head.weight", "lm_head.modules_to_save.default.weight"),
        prefixed("embed_tokens.weight", "embed_tokens.base_layer.weight"),
        lambda t: t | {LM_HEAD.replace("weight", "original_module.weight"): torch.ones_like(t[LM_HEAD])},
        lambda t: t | {LM_HEAD.replace("weight", "modules_to_save.weight"): t[LM_HEAD].clone()},
    ],
    ids=[
        "A.default",
        "B.name",
        "no model.",
        "twice",
        "none",
        "saved",
        "saved.default",
        "base_layer",
        "original",
        "both",
    ],
)
def test_names_of_every_version_mean_the_same(base: Path, tensors: Tensors, tmp_path: Path, change: Any) -> None:
    expected = adapt(base, tensors, tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    rewrite(tmp_path / "a", change)
    assert_merged(dict(merged_tensors(make_plan(base, [tmp_path / "a"]))), expected)


def test_empty_adapters(base: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    rewrite(adapter, lambda t: {name: value[:0] for name, value in t.items()})
    assert "tensors have size 0" in refusal(base, adapter)
    rewrite(adapter, lambda _: {})
    assert "and no tensors" in refusal(base, adapter)
    torch.save({}, adapter / "adapter_model.bin")
    weights.unlink()
    assert "and no tensors" in refusal(base, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"")
    assert "the file is empty" in refusal(base, adapter)
    (adapter / "adapter_model.bin").unlink()
    assert "there are no adapter weights" in refusal(base, adapter)
    (adapter / CONFIG).unlink()
    assert "there is no adapter_config.json" in refusal(base, adapter)
    assert "there is no such directory" in refusal(base, adapter / "absent")
    assert "this is a whole model, give it as BASE" in refusal(base, base)


def test_zero_and_broken_values(base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    for change, expected in (
        (lambda t: {n: v * ("lora_A" in n) for n, v in t.items()}, "every LoRA matrix B (or A) is zero"),
        (lambda t: {n: v * ("lora_B" in n) for n, v in t.items()}, "every LoRA matrix B (or A) is zero"),
        (lambda t: {n: v / 0 if "layers.1.mlp.up_proj.lora_B" in n else v for n, v in t.items()}, "NaN or infinity"),
        (lambda t: t | {LM_HEAD: torch.zeros(vocabulary(base), 96)}, "lm_head.weight is all zero"),
        (lambda t: dict(list(t.items())[1:]), "only one of lora_A and lora_B"),
        (lambda t: t | {"transformer.h.0.attn.weight": torch.ones(2)}, "transformer.h.0.attn.weight is in the adapter"),
    ):  # fmt: skip
        shutil.copytree(adapter, broken)
        rewrite(broken, change)
        assert expected in refusal(base, broken)
        shutil.rmtree(broken)
    rewrite(adapter, lambda t: {n: v * ("layers.0" not in n) for n, v in t.items()})
    assert any("7 of 21 LoRA pairs are zero" in notice for notice in make_plan(base, [adapter]).notices)


def vocabulary(base: Path) -> int:
    return int(config_of(base)["vocab_size"])


def test_adapter_of_another_size_names_both(
    base: Path, tensors: Tensors, tmp_path: Path, tokenizer_model: bytes
) -> None:
    """A 7B adapter on a 13B base, in small."""
    large = make_llama(
        tmp_path / "large",
        tokenizer_model,
        dtype="float32",
        hidden_size=160,
        num_attention_heads=5,
        intermediate_size=320,
    )
    adapt(base, tensors, tmp_path / "small")
    found = refusal(large, tmp_path / "small")
    assert "mlp.down_proj.weight is for shape [96, 224] and the base has [160, 320]" in found
    assert "hidden size 160" in found
    assert "vocabulary sizes found:" in found


def test_adapter_of_a_deeper_model_lists_what_fits_nothing(base: Path, tmp_path: Path, tokenizer_model: bytes) -> None:
    deep = make_llama(tmp_path / "deep", tokenizer_model, dtype="float32", num_hidden_layers=5)
    adapt(deep, random_tensors(config_of(deep)), tmp_path / "adapter")
    found = refusal(base, tmp_path / "adapter")
    assert "model.layers.3.self_attn." in found
    assert "in no LLaMA of 3 layers" in found


def test_saved_tensors_are_read_lazily(base: Path, adapter: Path) -> None:
    opened = open_adapter(adapter)
    assert len(opened.pairs) == 21
    assert opened.whole == {}
    assert opened.warnings == []
