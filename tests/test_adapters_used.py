# SPDX-License-Identifier: Apache-2.0
"""Who merges adapters: the packed file, GGUF, the merged checkpoint, training, the reference; rows and precision."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapter_judge import (
    HEAD,
    Base,
    Judgement,
    assert_judged,
    check,
    edit_config,
    edit_tensors,
    judge,
    random_base,
    relative,
    save_adapter,
)
from cnllama.convert.gguf.export import gguf_name
from cnllama.convert.gguf.from_checkpoint import write_checkpoint
from cnllama.convert.merge import changed_names
from cnllama.convert.pack import convert, make_plan
from models import write_json

from cnllama import LLM
from cnllama.adapt.lora import MergedBase
from cnllama.adapt.merge import merge_checkpoint
from cnllama.adapt.stage import _open_model
from cnllama.cli.main import main
from cnllama.container import read_json
from cnllama.errors import InputError
from cnllama.eval.reference import open_reference

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = [1, 5, 3, 17, 30, 9]

# One adapter of each kind that changes what tensors a model has.
KINDS: dict[str, tuple[dict[str, bool], dict[str, Any]]] = {
    "untied": ({"tied": True}, {"modules_to_save": ["embed_tokens"]}),
    "untied by LoRA": ({"tied": True}, {"target_modules": ["lm_head", "v_proj"]}),
    "tied rows": ({"tied": True}, {"trainable_token_indices": [4, 7]}),
    "new biases": ({}, {"lora_bias": True, "target_modules": ["v_proj", "down_proj"]}),
    "trained biases": ({"attention_bias": True, "mlp_bias": True}, {"bias": "all"}),
    "DoRA": ({}, {"use_dora": True, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
}


Case = tuple[Path, Path, Base, Judgement]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    options, lora = KINDS[request.param]
    folder = tmp_path_factory.mktemp("kind")
    base = random_base(3, **options)
    save_adapter(base.load(), folder / "a", **lora)
    return base.save(folder / "base"), folder / "a", base, judge(base, folder / "a", merge=False)


def test_the_packed_file(kind: Case, tmp_path: Path) -> None:
    root, adapter, _, judged = kind
    convert(root, [adapter], tmp_path / "x.cnl", quant="q8")
    ours = np.asarray(LLM(tmp_path / "x.cnl").logits(IDS))
    assert relative(ours, judged.logits) < 0.08  # of 8 bits
    assert main(["verify", str(tmp_path / "x.cnl")]) == 0


def test_the_merged_checkpoint(kind: Case, tmp_path: Path) -> None:
    """transformers and our own converter read it as what PEFT ran."""
    from transformers import LlamaForCausalLM

    root, adapter, _, judged = kind
    merge_checkpoint(root, [adapter], tmp_path / "m", "float32")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative(model(torch.tensor([IDS])).logits[0].numpy(), judged.logits) <= 1e-5
    assert_judged(make_plan(tmp_path / "m"), judged)


def test_the_base_of_further_training(kind: Case, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    root, adapter, _, judged = kind
    config, _ = _open_model(SimpleNamespace(model=root, adapters=[adapter]))
    model = LlamaForCausalLM.from_pretrained(root, config=config, dtype=torch.float32).eval()
    MergedBase(root, [adapter]).fold(model)
    with torch.no_grad():
        assert relative(model(torch.tensor([IDS])).logits[0].numpy(), judged.logits) <= 1e-5


def test_the_reference_of_evaluations(kind: Case) -> None:
    root, adapter, _, judged = kind
    model = open_reference(root, [adapter])._model
    with torch.no_grad():
        assert relative(model(torch.tensor([IDS])).logits[0].numpy(), judged.logits) <= 1e-5


def test_the_gguf(kind: Case, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf, which reads the file, is not installed")
    root, adapter, _, _ = kind
    plan = make_plan(root, [adapter])
    write_checkpoint(plan, tmp_path / "x.gguf", "f32")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert found.keys() == {gguf_name(name) for name in plan.tensors}
    for name in changed_names(plan.checkpoint, plan.tensors):
        if "q_proj" not in name and "k_proj" not in name:  # llama.cpp turns their rows
            assert relative(found[gguf_name(name)], plan.tensors[name].read()) <= 1e-6


def test_biases_for_a_model_that_knows_none(tmp_path: Path) -> None:
    """transformers' Mistral has no biases at all: the checkpoint would lose them, the packed file does not."""
    base = random_base()
    root = base.save(tmp_path / "base")
    config = read_json(root / "config.json") | {"model_type": "mistral", "sliding_window": None}
    write_json(root / "config.json", config)
    save_adapter(base.load(), tmp_path / "a", lora_bias=True)
    assert_judged(make_plan(root, [tmp_path / "a"]), judge(base, tmp_path / "a"))
    with pytest.raises(InputError, match="gives layers biases, for which transformers' Mistral has no place"):
        merge_checkpoint(root, [tmp_path / "a"], tmp_path / "m", "float32")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("step", [1, 7, 32])
def test_rows_are_the_rows_of_the_whole(kind: Case, step: int) -> None:
    """In any pieces and any order, also where DoRA's norms are of columns."""
    root, adapter, _, _ = kind
    for tensor in make_plan(root, [adapter]).tensors.values():
        whole, rows = tensor.read(), tensor.shape[0]
        tensor.release()
        for begin in reversed(range(0, rows, step)):
            part = tensor.read(begin, min(begin + step, rows))
            np.testing.assert_allclose(part, whole[begin : begin + step], rtol=2e-6, atol=1e-6)


def test_stored_values_are_not_changed_by_reading(kind: Case) -> None:
    root, adapter, _, _ = kind
    for tensor in make_plan(root, [adapter]).tensors.values():
        first = tensor.read().copy()
        np.testing.assert_array_equal(tensor.read(), first)
        tensor.release()
        np.testing.assert_array_equal(tensor.read(), first)


@pytest.mark.parametrize("rank", [1, 8, 64, 300, 1024])
@pytest.mark.parametrize("cancelling", [False, True], ids=["random", "cancelling"])
def test_the_product_is_that_of_float64(tmp_path: Path, rank: int, cancelling: bool) -> None:
    """Also for an adapter that PEFT converted from PiSSA: two large products whose difference is what was learned."""
    base = random_base()
    base.tensors["model.layers.0.self_attn.q_proj.weight"].zero_()  # nothing hides the product's error
    root = base.save(tmp_path / "base")
    targets = {"target_modules": ["model.layers.0.self_attn.q_proj"]}
    save_adapter(base.load(), tmp_path / "a", r=rank, lora_alpha=7, **targets)
    random = np.random.default_rng(rank)

    def parts(tensors: Any) -> Any:
        a, b = random.standard_normal((rank, 32)), random.standard_normal((32, rank))
        if cancelling and rank > 1:
            half = rank // 2
            a[half : 2 * half] = a[:half] + 1e-4 * random.standard_normal((half, 32))
            b[:, half : 2 * half] = -b[:, :half]
            a[2 * half :] = 0
        values = {"A": a, "B": b}
        return {n: torch.tensor(values[n[-8]], dtype=torch.float32) for n in tensors}

    edit_tensors(tmp_path / "a", parts)
    tensor = make_plan(root, [tmp_path / "a"]).tensors["model.layers.0.self_attn.q_proj.weight"]
    (update,) = tensor.updates
    a, b = (part.read().astype(np.float64) for part in (update.pair.a, update.pair.b))  # type: ignore[attr-defined]
    assert relative(tensor.read().astype(np.float64), 7 / rank * (b @ a)) <= 1e-6


def test_rank_stabilised_scale(tmp_path: Path) -> None:
    lora = {"r": 6, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"layers.1.*": 2}}
    plan = check(tmp_path, random_base(), lora)
    updates: list[Any] = [update for tensor in plan.tensors.values() for update in tensor.updates]
    assert [update.pair.scale for update in updates] == [5 / math.sqrt(6), 5 / math.sqrt(2)]


def test_dora_on_a_row_of_zeros(tmp_path: Path) -> None:
    """PEFT divides by the norm: NaN there, one sentence here."""
    base = random_base()
    base.tensors["model.layers.0.self_attn.q_proj.weight"][5] = 0
    root = base.save(tmp_path / "base")
    save_adapter(base.load(), tmp_path / "a", use_dora=True)
    edit_tensors(tmp_path / "a", lambda t: {n: zero_row(n, v) for n, v in t.items()})
    plan = make_plan(root, [tmp_path / "a"])
    with pytest.raises(InputError, match=r"DoRA divides by the norm of .*q_proj\.weight, which is 0 at row 5"):
        plan.tensors["model.layers.0.self_attn.q_proj.weight"].read()


def zero_row(name: str, value: Any) -> Any:
    if "layers.0" in name and "lora_B" in name:
        value[5] = 0
    return value


def test_values_beyond_float32_are_refused_by_name(tmp_path: Path) -> None:
    base = random_base()
    root = base.save(tmp_path / "base")
    save_adapter(base.load(), tmp_path / "a", lora_alpha=1e15)
    edit_config(tmp_path / "a", lora_alpha=1e15)
    edit_tensors(tmp_path / "a", lambda t: {n: v * 1e13 for n, v in t.items()})
    with pytest.raises(InputError, match=r"q_proj\.weight is (-?inf|nan) at row"):
        convert(root, [tmp_path / "a"], tmp_path / "x.cnl")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".cnl"] == []


def test_which_tensors_change(tmp_path: Path) -> None:
    base = random_base(tied=True)
    root = base.save(tmp_path / "base")
    save_adapter(
        base.load(), tmp_path / "a", modules_to_save=["model.norm", "lm_head"], target_modules=["layers.1.mlp.up_proj"]
    )
    plain, plan = make_plan(root), make_plan(root, [tmp_path / "a"])
    changed = {HEAD, "model.norm.weight", "model.layers.1.mlp.up_proj.weight"}
    assert changed_names(plan.checkpoint, plan.tensors) == changed
    assert changed_names(plain.checkpoint, plain.tensors) == set()
