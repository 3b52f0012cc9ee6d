# SPDX-License-Identifier: Apache-2.0
"""Facts an adapter states twice, each broken on purpose; directories that are no adapter; what damaged files say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from adapter_judge import (
    WEIGHTS,
    Base,
    assert_judged,
    edit_config,
    edit_tensors,
    judge,
    random_base,
    save_adapter,
    sentence,
)
from cnllama.convert.pack import make_plan

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
PREFIX = "base_model.model."
LAYER = f"{PREFIX}model.layers.1.self_attn.q_proj"
TARGETS = ["q_proj", "up_proj"]


@pytest.fixture(scope="module")
def base() -> Base:
    return random_base(mlp_bias=True)


@pytest.fixture(scope="module")
def root(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base.save(tmp_path_factory.mktemp("base") / "base")


def without(part: str) -> Any:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def moved(old: str, new: str) -> Any:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def beside(name: str, value: Any) -> Any:
    return lambda tensors: tensors | {f"{PREFIX}{name}": value}


# (arguments of LoraConfig, changes of the config, change of the tensors, what the refusal says)
BROKEN: list[tuple[dict[str, Any], dict[str, Any], Any, str]] = [
    ({}, {"r": 8}, None, "says rank 8; the two files are not of one adapter"),
    ({}, {"rank_pattern": {"q_proj": 2}}, None, "says rank 2"),
    ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {}}, None, "says rank 4"),
    ({}, {}, without(f"{LAYER}.lora_B"), "model.layers.1.self_attn.q_proj has only one of lora_A and lora_B"),
    ({}, {}, moved("q_proj.lora_B.weight", "q_proj.lora_embedding_B"), "has only one of lora_A and lora_B"),
    (
        {"use_dora": True},
        {"use_dora": False},
        None,
        "has a lora_magnitude_vector but adapter_config.json says",
    ),
    ({}, {"use_dora": True}, None, "has no lora_magnitude_vector but adapter_config.json says use_dora true"),
    ({"use_dora": True}, {}, without(f"{LAYER}.lora_magnitude"), "has no lora_magnitude_vector"),
    ({"lora_bias": True}, {"lora_bias": False}, None, "has a lora_B.bias but adapter_config.json says lora_bias false"),
    ({}, {"lora_bias": True}, None, "has no lora_B.bias but adapter_config.json says lora_bias true"),
    ({"lora_bias": True, "target_modules": ["lm_head"]}, {}, None, "a bias of lm_head, which has no place for one"),
    ({}, {"target_modules": ["q_proj"]}, None, "up_proj.lora_A.weight is in the file but adapter_config.json has no"),
    ({}, {"exclude_modules": ["layers.0.mlp.up_proj"]}, None, "layers.0.mlp.up_proj.lora_A.weight is in the file but"),
    ({}, {"layers_to_transform": [1]}, None, "layers.0.mlp.up_proj.lora_A.weight is in the file but"),
    ({}, {"target_modules": ["q_proj", "up_proj", "lm_head"], "init_lora_weights": False}, None, "start it at random"),
    ({"init_lora_weights": "orthogonal"}, {}, without("layers.1."), "and 1 more, whose LoRA is not in"),
    ({"modules_to_save": ["norm"]}, {"modules_to_save": ["norm", "k_proj"]}, None, "k_proj.weight is not in the file"),
    ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, {}, without("layers.0.mlp.up_proj.bias"), "was lost"),
    (
        {"modules_to_save": ["embed_tokens"]},
        {},
        without("embed_tokens"),
        "model.embed_tokens.weight is not in the file",
    ),
    ({}, {"modules_to_save": ["lm_head"]}, None, "lm_head.weight is not in the file"),
    ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": [1]}, None, "has shape [2, 32], but"),
    ({"trainable_token_indices": [1, 2]}, {"trainable_token_indices": None}, None, "has no place for it"),
    (
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": {"lm_head": [1, 2]}},
        None,
        "has no place for it",
    ),
    ({"trainable_token_indices": [1]}, {"trainable_token_indices": [99]}, None, "the new rows are missing"),
    ({}, {"trainable_token_indices": [1]}, None, "has no trainable_tokens_delta in the file"),
    ({}, {}, beside("model.layers.0.self_attn.q_proj.weight", torch.ones(32, 32)), "has no place for it"),
    ({}, {}, beside("model.layers.0.self_attn.v_proj.base_layer.weight", torch.ones(16, 32)), "has no place for it"),
    ({}, {}, beside("lm_head.modules_to_save.weight", torch.ones(40, 32)), "has no place for it"),
    ({}, {}, beside("model.layers.0.self_attn.o_proj.bias", torch.ones(32)), "the base's layers have none"),
    ({}, {}, beside("score.weight", torch.ones(2, 32)), "in the adapter and in no LLaMA of 2 layers"),
    ({}, {}, beside("model.layers.7.mlp.up_proj.lora_A.weight", torch.ones(4, 32)), "only one of lora_A and lora_B"),
    ({}, {}, moved("layers.1.", "layers.9."), "in the adapter and in no LLaMA of 2 layers"),
    ({}, {}, moved("base_model.", "module.base_model."), "the prefix 'module.' of DistributedDataParallel"),
    ({}, {}, moved("model.model.", "model._orig_mod.model."), "the prefix '_orig_mod.' of torch.compile"),
    ({}, {}, moved("q_proj.lora_", "q_proj.base_layer.lora_"), "merge the first into the base"),
    ({}, {}, moved(".up_proj.", ".down_proj."), "whose model.layers.0.mlp.gate_proj.weight has that shape"),
    ({}, {}, lambda t: {n: v[:-1] if "up_proj.lora_B" in n else v for n, v in t.items()}, "is for shape [47, 32]"),
    ({}, {}, lambda t: t | {f"{LAYER}.lora_A.default.weight": t[f"{LAYER}.lora_A.weight"]}, "q_proj's A twice"),
    (
        {},
        {},
        lambda t: {n.replace(".weight", f".{'zh' if 'layers.0' in n else 'en'}.weight"): v for n, v in t.items()},
        "holds 2 adapters (en, zh), save one adapter per file",
    ),
    (
        {"modules_to_save": ["norm"]},
        {},
        lambda t: t | {f"{PREFIX}model.norm.modules_to_save.weight": t[f"{PREFIX}model.norm.weight"] + 1},
        "stand for the same values and differ",
    ),
    ({}, {}, beside("lm_head.weight", torch.tensor(1.0)), "is a single number"),
    ({}, {}, lambda t: {n: v[:0] for n, v in t.items()}, "tensors have size 0"),
    ({"use_dora": True}, {}, lambda t: {n: v / 0 if "magn" in n else v for n, v in t.items()}, "NaN or infinity"),
    ({"trainable_token_indices": [1]}, {}, lambda t: {n: v / 0 if "delta" in n else v for n, v in t.items()}, "NaN"),
]


@pytest.mark.parametrize(("lora", "changes", "change", "expected"), BROKEN, ids=[row[3][:40] for row in BROKEN])
def test_two_sources_that_disagree_are_refused(
    root: Path, base: Base, tmp_path: Path, lora: dict[str, Any], changes: dict[str, Any], change: Any, expected: str
) -> None:
    save_adapter(base.load(), tmp_path / "a", **({"target_modules": TARGETS} | lora))
    if change is None:
        edit_config(tmp_path / "a", **changes)
    else:
        edit_tensors(tmp_path / "a", change)
    assert expected in sentence(root, tmp_path / "a")


# (arguments of LoraConfig, changes of the config, change of the tensors, the notice)
TAKEN: list[tuple[dict[str, Any], dict[str, Any], Any, str]] = [
    (
        {},
        {},
        without("layers.1."),
        "names model.layers.1.self_attn.q_proj and 1 more, whose LoRA is not in adapter_mod",
    ),
    ({}, {"target_modules": None}, without("up_proj"), "and 1 more, whose LoRA is not in"),
    ({"use_dora": True}, {}, without("layers.1.mlp"), "names model.layers.1.mlp.up_proj, whose LoRA is not in"),
    ({}, {"target_modules": [*TARGETS, "embed_tokens"]}, None, "names model.embed_tokens, whose LoRA is not in"),
    ({"bias": "all"}, {}, without("gate_proj.bias"), "bias is 'all', but tensors model.layers.0.mlp.gate_proj.bias"),
    ({"bias": "lora_only"}, {"bias": "none"}, None, "in the file although bias is 'none'"),
    (
        {},
        {},
        beside("model.norm.weight", torch.full((32,), 2.0)),
        "tensor model.norm.weight is in the file and not",
    ),
    ({}, {}, beside("model.layers.0.self_attn.q_proj.base_layer.weight", torch.ones(32, 32)), "not listed in"),
]


@pytest.mark.parametrize(("lora", "changes", "change", "notice"), TAKEN, ids=[row[3][:40] for row in TAKEN])
def test_what_peft_only_warns_of_is_its_result_and_a_notice(
    root: Path, base: Base, tmp_path: Path, lora: dict[str, Any], changes: dict[str, Any], change: Any, notice: str
) -> None:
    save_adapter(base.load(), tmp_path / "a", **({"target_modules": TARGETS} | lora))
    edit_config(tmp_path / "a", **changes)
    if change is not None:
        edit_tensors(tmp_path / "a", change)
    plan = make_plan(root, [tmp_path / "a"])
    assert_judged(plan, judge(base, tmp_path / "a"))
    assert [found for found in plan.notices if notice in found] == plan.notices


@pytest.fixture
def named(base: Base, tmp_path: Path) -> Path:
    """An adapter that PEFT saved under its name."""
    import peft

    model = peft.get_peft_model(base.load(), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="zh")
    for weight in model.parameters():
        weight.data.add_(0.1)
    model.save_pretrained(tmp_path / "named")
    return tmp_path / "named"


def test_directories_that_hold_the_adapter_elsewhere(root: Path, named: Path) -> None:
    assert f"PEFT saved the adapter under its name, give {named / 'zh'}" in sentence(root, named)
    assert make_plan(root, [named / "zh"]).notices == []
    shutil.copytree(named / "zh", named / "en")
    assert "it holds 2 adapters under their names (en, zh), give one of them" in sentence(root, named)
    for step in (500, 1500, 900):
        shutil.copytree(named / "zh", named / f"checkpoint-{step}")
    found = sentence(root, named)
    assert f"its last checkpoint is {named / 'checkpoint-1500'}, give that" in found
    hub = Path(shutil.copytree(named / "zh", named / "models--a--b" / "snapshots" / "0123"))
    assert f"this is the hub's cache of one, give {hub}" in sentence(root, hub.parent.parent)
    weights = named / "zh" / WEIGHTS
    assert sentence(root, weights).endswith(
        f"this is a file, expected the directory of a PEFT adapter; give {named / 'zh'}"
    )
    assert "this is a whole model, give it as BASE" in sentence(root, root)
    assert "there is no such directory" in sentence(root, named / "absent")
    (named / "zh" / "adapter_model.safetensors").rename(named / "zh" / "pytorch_model.bin")
    assert "pytorch_model.bin is no name that PEFT reads" in sentence(root, named / "zh")


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 9876543210\n",
        b"<!DOCTYPE html><html><head><title>401</title></head></html>",
        b"",
        b"GGUF\x03\0\0\0",
        b"PK\x03\x04",
        b"\x80\x02cos\nsystem\nX\x02\0\0\0idq\x01\x85R.",
        bytes(range(256)) * 10,
    ],
    ids=lambda value: value[:8].decode("latin-1") if isinstance(value, bytes) else value,
)
def test_weight_files_that_are_none(root: Path, named: Path, name: str, content: bytes) -> None:
    (named / "zh" / WEIGHTS).unlink()
    (named / "zh" / name).write_bytes(content)
    assert sentence(root, named / "zh").startswith(str(named / "zh" / name))
