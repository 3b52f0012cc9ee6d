# SPDX-License-Identifier: Apache-2.0
"""Training in plain PyTorch, weights and losses in float64: what a stage must do, without any training library."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, silu

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IGNORED = -100

Weights = dict[str, torch.Tensor]
Sample = tuple[list[int], list[int]]  # ids, labels


@dataclass(frozen=True)
class Recipe:
    """What docs/adapt.md says of a stage. mode: "embeddings", "lora" or "full"; dropout is none."""

    mode: str
    lr: float
    total: int
    warmup: float = 0.05
    weight_decay: float = 0.01
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    rank: int = 8
    alpha: float = 32.0
    old_rows: int = 0
    frozen: torch.dtype = torch.float64  # what does not train is rounded to this type


@dataclass
class Run:
    """Losses, norms of the gradients and learning rates of every step, and the weights after the last."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    weights: Weights = field(default_factory=dict)


def read_weights(directory: Path) -> tuple[dict[str, Any], Weights]:
    """config.json and the weights in float64."""
    from safetensors.torch import load_file

    tensors = load_file(directory / "model.safetensors")
    return json.loads((directory / "config.json").read_text()), {n: t.double() for n, t in tensors.items()}


def logits(weights: Weights, config: Mapping[str, Any], ids: Sequence[int]) -> torch.Tensor:
    """The forward pass of a LLaMA on one sequence: [n, rows]."""
    n, heads, kv_heads = len(ids), config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    frequencies = config.get("rope_theta", 10000.0) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(n, dtype=torch.float64), frequencies)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weights[name + ".weight"]

    def turned(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sin

    def split(x: torch.Tensor, count: int) -> torch.Tensor:
        return x.view(n, count, width).transpose(0, 1).repeat_interleave(heads // count, 0)

    x = weights[EMBED][torch.tensor(ids)]
    hidden_future = torch.full((n, n), -math.inf, dtype=torch.float64).triu(1)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(at + "input_layernorm", x)
        q, k, v = (y @ weights[f"{at}self_attn.{p}.weight"].T for p in PROJECTIONS[:3])
        q, k, v = turned(split(q, heads)), turned(split(k, kv_heads)), split(v, kv_heads)
        mixed = (q @ k.transpose(1, 2) / math.sqrt(width) + hidden_future).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).reshape(n, -1) @ weights[at + "self_attn.o_proj.weight"].T
        y = norm(at + "post_attention_layernorm", x)
        gate, up, down = (weights[f"{at}mlp.{p}.weight"] for p in PROJECTIONS[4:])
        x = x + (silu(y @ gate.T) * (y @ up.T)) @ down.T
    return norm("model.norm", x) @ weights.get(HEAD, weights[EMBED]).T


def summed_loss(weights: Weights, config: Mapping[str, Any], samples: Sequence[Sample]) -> tuple[torch.Tensor, int]:
    """(sum of the losses of all tokens that are learned, how many there are); every sample is run alone."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels in samples:
        targets = torch.tensor(labels[1:])
        if (targets != IGNORED).any():
            out = logits(weights, config, ids)[:-1]
            total = total + cross_entropy(out, targets, ignore_index=IGNORED, reduction="sum")
            count += int((targets != IGNORED).sum())
    return total, count


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate of step 1 .. total with the cosine schedule, as docs/adapt.md gives it."""
    w = min(math.ceil(recipe.warmup * recipe.total), recipe.total - 1)
    if step <= w:
        return recipe.lr * step / (w + 1)
    return recipe.lr * (1 + math.cos(math.pi * (step - 1 - w) / (recipe.total - w))) / 2


def train(
    config: Mapping[str, Any],
    base: Weights,
    steps: Sequence[Sequence[Sample]],
    recipe: Recipe,
    lora: Mapping[str, torch.Tensor] | None = None,
) -> Run:
    """Trains on the samples of each step. lora: matrices A, {projection}.lora_A.weight -> [rank, in]; B begins at 0."""
    trained = _trained(base, recipe, lora or {})
    frozen = {name: value.to(recipe.frozen).double() for name, value in base.items()}
    decayed = [p for p in trained.values() if p.ndim > 1]
    plain = [p for p in trained.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, recipe.beta2),
        eps=1e-8,
    )
    run = Run()
    for number, samples in enumerate(steps, 1):
        loss, count = summed_loss(_merged(frozen, trained, recipe), config, samples)
        optimizer.zero_grad()
        (loss / count).backward()
        run.losses.append(float(loss.detach() / count))
        run.norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), recipe.max_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = rate(number, recipe)
        run.rates.append(rate(number, recipe))
        optimizer.step()
    whole = _merged(base, trained, replace(recipe, mode="embeddings" if recipe.mode == "lora" else recipe.mode))
    run.weights = (
        {name: whole[name].detach() for name in base}
        if recipe.mode == "full"
        else {name: whole[name].detach() for name in (EMBED, HEAD) if name in whole}
    )
    run.weights |= {name: value.detach() for name, value in trained.items() if ".lora_" in name}
    return run


def _trained(base: Weights, recipe: Recipe, lora: Mapping[str, torch.Tensor]) -> Weights:
    names = list(base) if recipe.mode == "full" else [name for name in (EMBED, HEAD) if name in base]
    trained = {name: base[name][recipe.old_rows :] for name in names}
    for name, matrix in lora.items():
        rows = base[name.replace("lora_A.", "")].shape[0]
        trained[name] = matrix.double()
        trained[name.replace("lora_A", "lora_B")] = torch.zeros(rows, recipe.rank, dtype=torch.float64)
    return {name: value.clone().requires_grad_() for name, value in trained.items()}


def _merged(frozen: Weights, trained: Weights, recipe: Recipe) -> Weights:
    """The weights that the forward pass sees."""
    weights = dict(frozen)
    for name, value in trained.items():
        if ".lora_" not in name:
            weights[name] = torch.cat([frozen[name][: recipe.old_rows], value])
        elif "lora_A" in name and recipe.mode == "lora":
            product = trained[name.replace("lora_A", "lora_B")] @ value
            plain = name.replace("lora_A.", "")
            weights[plain] = frozen[plain] + recipe.alpha / recipe.rank * product
    return weights


def update_error(found: Weights, expected: Weights, before: Weights) -> float:
    """The distance of two results, relative to how far the weights went."""
    apart = sum(float((found[n].double() - expected[n]).square().sum()) for n in expected)
    moved = sum(float((expected[n] - before.get(n, torch.zeros_like(expected[n]))).square().sum()) for n in expected)
    return float(np.sqrt(apart / moved))
