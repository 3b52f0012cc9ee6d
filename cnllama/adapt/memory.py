# SPDX-License-Identifier: Apache-2.0
"""What training will take in memory, before anything is loaded, and the one option that makes it fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from cnllama.adapt.lora import Trained, adapter_shapes, count_parameters, prepare
from cnllama.errors import InputError
from cnllama.plan import available_memory

_PROCESS = 600 << 20  # torch, transformers and their libraries
_OPTIMIZER_BYTES = {"adamw": 8, "adamw-8bit": 2}


@dataclass(frozen=True)
class Shape:
    """What decides the memory of a step.

    batch: sequences on one device at a time; length: tokens of each; frozen_bytes: of a parameter that does not train;
    autocast: activations of matrix products are 2 bytes instead of 4, which the weights are converted to.
    """

    batch: int
    length: int
    frozen_bytes: int
    autocast: bool
    checkpointing: bool
    optimizer: str


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device. Activations are an estimate, the rest is counted. saved: of the result on the disk."""

    trained: int
    total: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    saved: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + _PROCESS

    def lines(self, available: int, source: str) -> list[str]:
        """The table for people."""
        parts = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer),
            ("activations (estimate)", self.activations),
            ("logits", self.logits),
            ("process", _PROCESS),
        ]
        return [
            f"parameters: {self.total:,}, of which {self.trained:,} are trained ({self.trained / self.total:.1%})",
            *(f"  {name:<24}{size / 1e9:9.2f} GB" for name, size in parts),
            f"  {'needed':<24}{self.bytes / 1e9:9.2f} GB of {available / 1e9:.2f} GB ({source})",
        ]


def plan_memory(config: Any, trained: Trained, shape: Shape) -> MemoryPlan:
    """Builds the model without memory (torch's meta device) and counts. config: transformers' LlamaConfig."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = prepare(LlamaForCausalLM(config), trained)
    trains, total = count_parameters(model)
    tokens = shape.batch * shape.length
    width = 2 if shape.autocast else 4
    hidden, inner = config.hidden_size, config.intermediate_size
    # Per token and layer: inputs of the seven matrix products, q, k, v, both norms' float32 inputs, gate, up, product.
    layer = width * (8 * hidden + 4 * inner) + 8 * hidden
    if trained.mode == "lora":
        layer += width * 4 * hidden  # dropped-out copies of the inputs of LoRA
    kept = 4 * hidden if shape.checkpointing else layer
    activations = tokens * (kept * config.num_hidden_layers + (layer if shape.checkpointing else 0))
    if trained.mode != "full" and width != shape.frozen_bytes:
        activations += width * max(p.numel() for p in model.parameters())  # converted, one matrix at a time
    return MemoryPlan(
        trained=trains,
        total=total,
        weights=trains * 4 + (total - trains) * shape.frozen_bytes,
        gradients=trains * 4,
        optimizer=trains * _OPTIMIZER_BYTES[shape.optimizer],
        activations=activations,
        logits=tokens * config.vocab_size * (8 + width),
        saved=4 * (total if trained.mode == "full" else sum(map(math.prod, adapter_shapes(model).values()))),
    )


def available(device: str) -> tuple[int, str]:
    """(bytes, who says so) on "cpu" or "cuda"."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0]), f"free on {torch.cuda.get_device_name()}"
    found = available_memory()
    return found.bytes, found.source


def refuse_unless_fits(config: Any, trained: Trained, shape: Shape, room: int, source: str) -> MemoryPlan:
    """The plan. Raises InputError when it needs more than `room` bytes, naming an option that would do."""
    plan = plan_memory(config, trained, shape)
    if plan.bytes <= room:
        return plan
    found = f"training needs about {plan.bytes / 1e9:.1f} GB and there are {room / 1e9:.1f} GB ({source})"
    for mend, other_trained, other_shape in _mends(trained, shape):
        needed = plan_memory(config, other_trained, other_shape).bytes
        if needed <= room:
            raise InputError(f"{found}; with {mend} it needs about {needed / 1e9:.1f} GB")
    raise InputError(f"{found}; no option here makes it fit, so take a smaller model, more devices or DeepSpeed ZeRO-3")


def _mends(trained: Trained, shape: Shape) -> Iterator[tuple[str, Trained, Shape]]:
    """Cheapest first, then together."""
    checkpointing = replace(shape, checkpointing=True)
    if not shape.checkpointing:
        yield "--gradient-checkpointing", trained, checkpointing
    if shape.batch > 1:
        mend = f"--batch-size 1 --grad-accum {shape.batch}"
        yield mend, trained, replace(shape, batch=1)
        yield mend + " --gradient-checkpointing", trained, replace(checkpointing, batch=1)
    small = replace(checkpointing, batch=1, optimizer="adamw-8bit")
    yield "--batch-size 1 --gradient-checkpointing --optimizer adamw-8bit", trained, small
    if trained.mode == "full":
        yield "--batch-size 1 --gradient-checkpointing and no --full", Trained(), replace(small, optimizer="adamw")
    elif shape.frozen_bytes == 4:
        half = replace(small, frozen_bytes=2)
        yield "--batch-size 1 --gradient-checkpointing --optimizer adamw-8bit --dtype bfloat16", trained, half
