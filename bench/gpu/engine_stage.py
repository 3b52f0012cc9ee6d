# SPDX-License-Identifier: Apache-2.0
"""Decode and prefill of a model of random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from measures import HEAD_SCHEME, SCHEME, Result, Sizes


def random_model(config: dict[str, Any]) -> dict[str, Any]:
    """Tensors of the right sizes, as Engine takes them. The same random rows are used again and again, so that they are
    made quickly; every matrix of a layer has memory of its own, or it would be uploaded once and read from the cache.
    """
    from cnllama import _core

    random = np.random.default_rng(0)
    known: dict[tuple[str, int, int], np.ndarray] = {}

    def matrix(scheme: str, rows: int, cols: int) -> tuple[np.ndarray, str, int, int]:
        if (scheme, rows, cols) not in known:
            few = random.standard_normal((32, cols), np.float32) * np.float32(cols**-0.5)
            known[scheme, rows, cols] = np.tile(_core.quantize(few, scheme)[0], -(-rows // 32))
        return known[scheme, rows, cols].copy(), scheme, rows, cols

    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    norm = (np.ones(hidden, np.float32).view(np.uint8), "f32", hidden, 1)
    tensors: dict[str, Any] = {
        "model.embed_tokens.weight": matrix(HEAD_SCHEME, vocab, hidden),
        "lm_head.weight": matrix(HEAD_SCHEME, vocab, hidden),
        "model.norm.weight": norm,
    }
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, (rows, cols) in shapes.items():
            tensors[f"{prefix}{name}.weight"] = matrix(SCHEME, rows, cols)
        tensors[prefix + "input_layernorm.weight"] = tensors[prefix + "post_attention_layernorm.weight"] = norm
    return tensors


def largest_engine(cuda: Any, sizes: Sizes, tensors: dict[str, Any]) -> tuple[Any, int]:
    """(an engine for as many of the sequences as the GPU has room for, how many). Raises RuntimeError when for none."""
    room = sizes.positions + 4 * sizes.steps + 8
    for sequences in sorted(sizes.batches, reverse=True):
        try:
            options = {"context": room, "max_sequences": sequences, "max_step_tokens": max(sizes.prompts)}
            return cuda.Engine(sizes.config, tensors, **options), sequences
        except RuntimeError:
            if sequences == min(sizes.batches):
                raise
    raise AssertionError


def engine(cuda: Any, result: Result, sizes: Sizes) -> None:
    """Decode and prefill: random weights, greedy, tokens chosen on the device."""
    tensors = random_model(sizes.config)
    read = sum(t[0].nbytes for name, t in tensors.items() if "embed_tokens" not in name)  # of every step
    begin = time.perf_counter()
    model, most = largest_engine(cuda, sizes, tensors)
    result.row("loading", time.perf_counter() - begin, "s")
    del tensors
    prompt = np.random.default_rng(1).integers(3, sizes.config["vocab_size"], max(sizes.prompts)).astype(np.int32)
    run = Run(model, result, sizes, prompt, read)
    prefill(run)
    for context, batches in ((0, sizes.batches), (sizes.positions, sizes.long_batches)):
        for batch in batches:
            if batch <= most:
                decode(run, context, batch)
            else:
                result.gap(f"decode, {batch} at once, context {context}", "not enough memory")
    one_by_one(run)
    result.note("replays", model.replays())
    result.note("memory", model.memory())


@dataclass(frozen=True)
class Run:
    """An engine, where its figures go, a prompt, and the bytes of weights that a step reads."""

    model: Any
    result: Result
    sizes: Sizes
    prompt: np.ndarray
    weight_bytes: int

    def fill(self, sequence: int, context: int) -> None:
        """Appends `context` tokens."""
        for begin in range(0, context, self.prompt.size):
            self.model.step([(sequence, self.prompt[: min(self.prompt.size, context - begin)], False)])


def prefill(run: Run) -> None:
    """Tokens a second of prompts."""
    model = run.model
    for tokens in run.sizes.prompts:
        sequence = model.open()
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            model.step([(sequence, run.prompt[:tokens], False)])
            seconds.append(time.perf_counter() - begin)
            model.trim(sequence, 0)
        model.close(sequence)
        run.result.row(f"prefill {tokens}", tokens / statistics.median(seconds), "tok/s")


def decode(run: Run, context: int, batch: int) -> None:
    """Tokens a second of all sequences together, and percent of what reading weights and cache would allow."""
    model, sizes = run.model, run.sizes
    sequences = [model.open() for _ in range(batch)]
    for sequence in sequences:
        run.fill(sequence, context)
    first = np.full(batch, 5, np.int32)
    warm, rounds = 4, 3
    model.generate(sequences, first, warm)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        model.generate(sequences, first, sizes.steps)
        seconds.append((time.perf_counter() - begin) / sizes.steps)
    rate, read = batch / statistics.median(seconds), run.result.ceiling("read")
    # The rounds follow each other in one cache: on average a step finds half of what they append there.
    kv_bytes = batch * (context + warm + rounds * sizes.steps / 2) * model.memory()["kv_per_token"]
    ceiling = batch * read / (run.weight_bytes + kv_bytes) if read else None
    run.result.row(f"decode, {batch} at once, context {context}", rate, "tok/s", ceiling=ceiling)
    for sequence in sequences:
        model.close(sequence)


def one_by_one(run: Run) -> None:
    """One sequence as a program runs it that samples on the host: all logits of every step, or the 64 largest."""
    model, steps, token = run.model, run.sizes.steps, np.array([5], np.int32)
    ways: dict[str, Callable[[int], object]] = {
        "all logits to the host": lambda sequence: model.step([(sequence, token, False)]),
        "64 logits to the host": lambda sequence: model.step_top([(sequence, token, False)], 64),
    }
    for name, step in ways.items():
        sequence = model.open()
        for _ in range(3):
            step(sequence)
        begin = time.perf_counter()
        for _ in range(steps):
            step(sequence)
        run.result.row(f"decode, {name}", steps / (time.perf_counter() - begin), "tok/s")
        model.close(sequence)
