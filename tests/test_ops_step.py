# SPDX-License-Identifier: Apache-2.0
"""The fused ops of a step give the bits of their parts, and a step has the barriers that docs/performance.md counts."""

import itertools

import models
import numpy as np
import pytest

from cnllama import _core

ops = _core.ops
ISAS = _core.isas()
THREADS = (1, 2, 3)


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
        np.testing.assert_array_equal(x, y)


def query_rows(lengths):
    """Of all positions of all sequences, those that are queries."""
    first, rows = 0, []
    for length, count in lengths:
        rows += range(first + length - count, first + length)
        first += length
    return rows


RAGGED = [(40, 40), (300, 7), (1, 1), (64, 1), (257, 2), (530, 3)]
FEW = [(300, 4), (1, 1), (257, 1), (513, 3)]


@pytest.mark.parametrize("kv_type", ["fp16", "int8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 128), (6, 2, 64), (5, 5, 80), (3, 1, 20), (32, 1, 16)]
)
@pytest.mark.parametrize("lengths", [RAGGED, FEW, [(700, 1)], [(100, 100)]], ids=["ragged", "few", "one", "prompt"])
def test_attention_rotates_appends_and_quantizes(heads, kv_heads, head_dim, kv_type, lengths):
    """A new position may be the first or last of a chunk; spans of 256 columns end inside of heads, or not."""
    rows = sum(n for n, _ in lengths)
    q, k, v = (normal(rows, n * head_dim, seed=n) for n in (heads, kv_heads, kv_heads))
    v = v[::-1].copy()
    angle = normal(rows, head_dim // 2, seed=3).astype(np.float64)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    q_turned, k_turned, _, _ = ops.rope_append(q, k, v, cos, sin, heads, kv_heads, lengths, kv_type)
    queries = query_rows(lengths)
    attended = ops.attention(q_turned[queries], k_turned, v, heads, kv_heads, lengths, kv_type)
    quantized = ops.quantize_activations(attended)
    for isa, threads in itertools.product(ISAS, THREADS):
        if isa == "scalar" and threads > 1:
            continue
        out, packed, barriers = ops.attention_step(
            q[queries], k, v, cos, sin, heads, kv_heads, lengths, kv_type, isa=isa, threads=threads
        )
        assert_same(out, attended)
        assert_same(packed, quantized)
        assert barriers == (1 if max(n for _, n in lengths) * heads // kv_heads <= 32 else 2)


@pytest.mark.parametrize("rows", [72, 256, 520])
@pytest.mark.parametrize("m", [1, 2, 7, 13, 40, 330])
def test_swiglu_quantizes(m, rows):
    cols = 96
    gate, up = (
        (_core.quantize(normal(rows, cols, seed=s, scale=0.3), "q4-a64")[0], "q4-a64", rows, normal(rows, seed=s + 5))
        for s in (1, 2)
    )
    x = normal(m, cols)
    h = ops.matmul_swiglu(x, gate, up, isa=ISAS[-1])
    quantized = ops.quantize_activations(h)
    for isa, threads in itertools.product(ISAS, THREADS):
        if isa == "scalar" and m > 40:
            continue
        out, packed = ops.matmul_swiglu_quantized(x, gate, up, isa=isa, threads=threads)
        assert_same(out, h)
        assert_same(packed, quantized)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_five_barriers_a_layer(threads, kv_heads):
    """qkv, attention, o, gate and up, down; embedding, gathering of the rows and lm_head once."""
    config = models.small_config(vocab=131, num_attention_heads=4, num_key_value_heads=kv_heads, num_hidden_layers=3)
    tensors = models.quantize_tensors(models.random_tensors(config, seed=1), "q4-a64")
    engine = _core.Engine(models.engine_config(config), tensors, threads=threads, context=700, max_step_tokens=256)
    ids = np.arange(128, dtype=np.int32)
    sequence = engine.open()
    for _ in range(5):
        engine.step([(sequence, ids, False)])

    def barriers(tokens):
        engine.step([(sequence, ids[:tokens], False)])  # any memory is taken here
        engine.trim(sequence, 640)
        before = engine.barriers()
        engine.step([(sequence, ids[:tokens], False)])
        engine.trim(sequence, 640)
        return engine.barriers() - before

    assert barriers(1) == barriers(2) == 3 * 5 + 3
    assert barriers(8) == 3 * 7 + 3  # the norms are shared out; the last one has one row
    assert barriers(40) == 3 * 8 + 3  # and keys are appended before attention begins
