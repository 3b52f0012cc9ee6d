# SPDX-License-Identifier: Apache-2.0
"""Random adapters over all options, one to three in a row: tensors and logits are those of PEFT's forward pass."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapter_judge import (
    EMBED,
    HEAD,
    LINEAR,
    Base,
    Judgement,
    assert_judged,
    judge,
    pieces,
    plan_of,
    random_base,
    relative,
    save_adapter,
)
from models import write_json

pytest.importorskip("peft")
GROUPS, CASES = 8, 26  # 208 chains

# What PEFT runs and we refuse all the same, and why.
REFUSED = {
    "has no place for one in this engine": "a bias of lm_head",
    "no tensors": "an adapter that trains nothing",
    "stand for the same values and differ": "tied LoRA that PEFT itself does not keep tied (mica, orthogonal)",
    "which PEFT does not combine": "DoRA beside mica on an adapter without LoRA",
}


def draw_lora(draw: random.Random, rows: int) -> dict[str, Any]:
    """Arguments of LoraConfig; PEFT refuses some of the combinations."""

    def maybe(chance: float, key: str, *values: Any) -> None:
        if draw.random() < chance:
            lora[key] = draw.choice(values)

    names = draw.sample(LINEAR, draw.randint(1, 4))
    if draw.random() < 0.35:
        names += draw.sample(["embed_tokens", "lm_head"], draw.randint(1, 2))
    full = [f"model.layers.{draw.randint(0, 1)}.self_attn.{draw.choice(LINEAR[:4])}", "layers.1.mlp.up_proj", names[0]]
    lora: dict[str, Any] = {
        "r": draw.choice([1, 2, 4, 6]),
        "lora_alpha": draw.choice([1, 8, 16, 2.5, -3]),
        "target_modules": draw.choice(
            [names, names, full, f".*(?:{'|'.join(names)})", "all-linear", "dummy-target-modules"]
        ),
    }
    if isinstance(lora["target_modules"], list):
        maybe(0.2, "layers_to_transform", 0, [1], [0, 1])
        if "layers_to_transform" in lora:
            maybe(0.4, "layers_pattern", "layers", ["h", "layers"])
    maybe(0.2, "exclude_modules", ["k_proj"], r".*layers\.0\..*", ["layers.1.mlp.up_proj"], "lm_head")
    maybe(0.3, "rank_pattern", {"q_proj": 3}, {r"layers\.1\..*": 5, "up_proj": 2}, {"embed_tokens": 3}, {"lm_head": 2})
    maybe(0.3, "alpha_pattern", {"q_proj": 3}, {"embed_tokens": 30}, {"lm_head": 20, r"^model\.layers\.0\..*": 2})
    maybe(0.3, "use_rslora", True)
    maybe(0.3, "use_dora", True)
    if "use_dora" not in lora:
        maybe(0.2, "lora_bias", True)
    maybe(0.3, "bias", "all", "lora_only")
    saved = ["embed_tokens", "lm_head", "norm", "input_layernorm", "k_proj", "layers.1.mlp", "self_attn"]
    maybe(0.35, "modules_to_save", draw.sample(saved, 1), draw.sample(saved, 2))
    maybe(0.3, "ensure_weight_tying", True)
    one, two = draw.sample(range(rows), 3), draw.sample(range(rows), 2)
    by_name: list[Any] = [{"embed_tokens": one}, {"lm_head": one}, {"embed_tokens": one, "lm_head": one}]
    maybe(0.3, "trainable_token_indices", one, *by_name, {"embed_tokens": one, "lm_head": two})
    maybe(0.2, "fan_in_fan_out", True)
    maybe(0.3, "init_lora_weights", "gaussian", "orthogonal", False, "mica", "eva")
    return lora


def next_adapter(draw: random.Random, base: Base, directory: Path) -> tuple[Judgement, int]:
    """Draws until PEFT can save, load and run one; (its judgement, the rows it needs)."""
    while True:
        rows = base.rows + draw.choice([0, 0, 0, 2])
        shutil.rmtree(directory, ignore_errors=True)
        try:
            grown = {"embeddings": True} if rows > base.rows else {}
            save_adapter(base.load(rows), directory, draw.randint(0, 999), **grown, **draw_lora(draw, rows))
            judged = judge(base, directory, rows, seed=1)
        except Exception:  # whatever PEFT raises for what it does not combine
            continue
        added = {f"[T{i}]": i for i in range(pieces(), rows)}
        write_json(directory / "added_tokens.json", added)
        return judged, rows


def depends_on_chance(base: Base, directory: Path, rows: int, judged: Judgement) -> bool:
    """Whether another random start, of rows or of LoRA, gives another model."""
    again = judge(base, directory, rows, seed=2, merge=False)
    return any(relative(again.tensors[name].numpy(), values) > 1e-5 for name, values in judged.tensors.items())


def check_merge(base: Base, judged: Judgement) -> None:
    """merge_and_unload and the forward pass differ for tied embeddings only, as our notices say."""
    for name, values in (judged.merged or {}).items():
        if not (base.tied and name in (EMBED, HEAD)):
            assert relative(values.numpy(), judged.tensors.get(name, values)) <= 1e-5, name


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.filterwarnings("ignore")
def test_chains_are_what_peft_runs(group: int, tmp_path: Path) -> None:
    merged = 0
    for seed in range(group * CASES, (group + 1) * CASES):
        draw = random.Random(seed)
        options = {key: draw.random() < 0.45 for key in ("tied", "attention_bias", "mlp_bias")}
        base = random_base(seed, **options)
        root = base.save(tmp_path / f"base{seed}")
        adapters: list[Path] = []
        for number in range(draw.choice([1, 1, 1, 2, 3])):
            path = tmp_path / f"{seed}-{number}"
            judged, rows = next_adapter(draw, base, path)
            why = f"seed {seed}: {json.loads((path / 'adapter_config.json').read_text())}"
            plan, refusal = plan_of(root, *adapters, path)
            if plan is None:
                known = any(part in refusal for part in REFUSED)
                assert known or depends_on_chance(base, path, rows, judged), f"{refusal}\n{why}"
                break
            assert not judged.head_bias, why
            try:
                assert_judged(plan, judged)
                check_merge(base, judged)
            except AssertionError as error:
                raise AssertionError(why) from error
            adapters.append(path)
            base = judged.base(base)
            merged += 1
    assert merged >= CASES  # the draws are not all refused
