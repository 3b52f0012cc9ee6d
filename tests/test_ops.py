# SPDX-License-Identifier: Apache-2.0
"""Every op: close to the float64 oracle, and the same bits on every instruction set, thread count and batch size."""

import itertools

import numpy as np
import ops_reference as ref
import pytest
from ops_data import activations, assert_same, normal, packed_matrix

from cnllama import _core

ops = _core.ops
ISAS = _core.isas()
TOKENS = (1, 2, 5, 6, 7, 12, 13, 33, 128)
THREADS = (1, 2, 3)


# ---- activations


@pytest.mark.parametrize("cols", [1, 40, 64, 224, 256, 352, 1000])
def test_quantize_activations(cols):
    x = activations(33, cols)
    expected_q, expected_scales = ref.quantize_activations(x)
    for isa, threads in itertools.product(ISAS, THREADS):
        q, scales, sums32, sums64 = ops.quantize_activations(x, isa=isa, threads=threads)
        np.testing.assert_array_equal(q, expected_q)
        np.testing.assert_array_equal(scales, expected_scales)
        wide = expected_q.astype(np.int32)
        np.testing.assert_array_equal(sums32, wide.reshape(33, -1, 32).sum(axis=2))
        np.testing.assert_array_equal(sums64, wide.reshape(33, -1, 64).sum(axis=2))


def test_rounding_is_to_nearest_even():
    x = np.full((1, 256), 0.0, np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    for isa in ISAS:
        q, scales, _, _ = ops.quantize_activations(x, isa=isa)
        assert q[0, :6].tolist() == [127, 0, 2, 2, 0, -2]
        assert scales[0, 0] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_activations_show(bad):
    x = normal(2, 512)
    x[0, 300] = bad
    matrix = packed_matrix(5, 512, "q4-a64")
    for isa in ISAS:
        _, scales, _, _ = ops.quantize_activations(x, isa=isa)
        assert np.isfinite(scales[0, 0])
        assert np.isnan(scales[0, 1])
        out = ops.matmul(x, [matrix], isa=isa)[0]
        assert np.isnan(out[0]).all()
        assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("cols", [16, 40, 256, 1000])
def test_rms_norm(cols):
    x, gamma = activations(33, cols), normal(cols, seed=3)
    expected = ref.rms_norm(x, gamma, 1e-5)
    first = ops.quantize_activations(x, gamma, 1e-5, isa="scalar")
    q, scales = first[:2]
    back = ref.dequantize_activations(q, scales, cols)
    step = np.repeat(scales, 256, axis=1)[:, :cols]
    assert (np.abs(back - expected) <= 0.501 * step + 1e-6 * np.abs(expected)).all()
    for isa, threads in itertools.product(ISAS, THREADS):
        for got, want in zip(ops.quantize_activations(x, gamma, 1e-5, isa=isa, threads=threads), first, strict=True):
            assert_same(got, want)
    alone = ops.quantize_activations(x[5:6], gamma, 1e-5, isa="scalar")
    for got, want in zip(alone, first, strict=True):
        assert_same(got[0], want[5])


def test_rms_norm_uses_eps():
    x = np.full((1, 64), 1e-4, np.float32)
    _, scales, _, _ = ops.quantize_activations(x, np.ones(64, np.float32), 1.0)
    assert scales[0, 0] * 127 == pytest.approx(1e-4, rel=1e-4)


# ---- matmul


@pytest.mark.parametrize("scheme", ref.FIRST)
@pytest.mark.parametrize(("rows", "cols"), [(5, 64), (33, 40), (49, 224), (64, 352), (40, 1600), (33, 2880)])
def test_matmul(scheme, rows, cols):
    matrix = packed_matrix(rows, cols, scheme)
    x = activations(128, cols)
    first = ops.matmul(x, [matrix], isa="scalar")[0]
    expected, bound = ref.matmul(x, matrix[0], scheme, rows)
    assert (np.abs(first - expected) <= bound).all()
    for isa, m in itertools.product(ISAS, TOKENS):
        for threads in THREADS if m in (1, 33) else (2,):
            assert_same(ops.matmul(x[:m], [matrix], isa=isa, threads=threads)[0], first[:m])


@pytest.mark.parametrize("scheme", ref.FIRST)
def test_matmul_of_a_chinese_vocabulary(scheme):
    matrix = packed_matrix(49954, 64, scheme, bias=True)
    x = activations(7, 64)
    first = ops.matmul(x, [matrix], isa="scalar", threads=2)[0]
    expected, bound = ref.matmul(x, matrix[0], scheme, 49954, matrix[3])
    assert (np.abs(first - expected) <= bound).all()
    for isa, m in itertools.product(ISAS, (1, 7)):
        assert_same(ops.matmul(x[:m], [matrix], isa=isa, threads=2)[0], first[:m])


def test_token_position_in_a_tile_does_not_matter():
    matrix = packed_matrix(33, 320, "q4-a64")
    x = activations(13, 320)
    expected = ops.matmul(x, [matrix], isa="scalar")[0]
    for isa in ISAS:
        for i in range(13):
            assert_same(ops.matmul(np.roll(x, i, axis=0), [matrix], isa=isa)[0], np.roll(expected, i, axis=0))


def test_fused_projections_are_the_separate_ones():
    x = activations(9, 288)
    matrices = [
        packed_matrix(48, 288, "q4-a64", seed=3, bias=True),
        packed_matrix(5, 288, "q8-s64", seed=4),
        packed_matrix(33, 288, "q4-s32", seed=5, bias=True),
    ]
    for isa, threads in itertools.product(ISAS, THREADS):
        fused = ops.matmul(x, matrices, isa=isa, threads=threads)
        for out, matrix in zip(fused, matrices, strict=True):
            assert_same(out, ops.matmul(x, [matrix], isa="scalar")[0])
            expected, bound = ref.matmul(x, matrix[0], matrix[1], matrix[2], matrix[3])
            assert (np.abs(out - expected) <= bound).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m", [1, 2, 33])
def test_matmul_add(m, bias):
    matrix = packed_matrix(49, 352, "q4-a64", bias=bias)
    x, residual = activations(m, 352), normal(m, 49, seed=9)
    first = ops.matmul_add(x, matrix, residual, isa="scalar")
    expected, bound = ref.matmul(x, matrix[0], matrix[1], 49, matrix[3])
    assert (np.abs(first - (residual + expected)) <= bound + 2e-7 * np.abs(residual)).all()
    for isa, threads in itertools.product(ISAS, THREADS):
        assert_same(ops.matmul_add(x, matrix, residual, isa=isa, threads=threads), first)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("m", [1, 6, 33])
def test_matmul_swiglu(m, bias):
    gate = packed_matrix(72, 352, "q4-a64", seed=5, bias=bias)
    up = packed_matrix(72, 352, "q4-s64", seed=7, bias=bias)
    x = activations(m, 352)
    first = ops.matmul_swiglu(x, gate, up, isa="scalar")
    g, g_bound = ref.matmul(x, gate[0], gate[1], 72, gate[3])
    u, u_bound = ref.matmul(x, up[0], up[1], 72, up[3])
    expected = ref.silu(g) * u
    bound = 1.1 * g_bound * np.abs(u) + np.abs(ref.silu(g)) * u_bound + 1e-6 * np.abs(expected) + 1e-30
    assert (np.abs(first - expected) <= bound).all()
    for isa, threads in itertools.product(ISAS, THREADS):
        assert_same(ops.matmul_swiglu(x, gate, up, isa=isa, threads=threads), first)


def test_matmul_refuses_wrong_sizes():
    packed, scheme, rows, _ = packed_matrix(5, 64, "q4-a64")
    with pytest.raises(ValueError, match="size of the matrix"):
        ops.matmul(normal(1, 128), [(packed, scheme, rows, None)])
    with pytest.raises(ValueError, match="5 values"):
        ops.matmul(normal(1, 64), [(packed, scheme, rows, normal(4))])


# ---- element-wise


@pytest.mark.parametrize("isa", ISAS)
def test_exp(isa):
    x = np.concatenate([np.linspace(-87.3, 88.3, 200_001), normal(20_000) * 1e-3]).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    out = ops.exp(x, isa=isa)
    ulp = np.spacing(expected.astype(np.float32)).astype(np.float64)
    assert (np.abs(out - expected) / ulp).max() < 2
    assert_same(out, ops.exp(x, isa="scalar"))
    edges = np.array([0.0, -88, -1e4, -np.inf, 89, np.inf, np.nan], np.float32)
    out = ops.exp(edges, isa=isa)
    assert out[:4].tolist() == [1, 0, 0, 0]
    assert (out[4:6] > 2e38).all()
    assert np.isnan(out[6])


@pytest.mark.parametrize("isa", ISAS)
def test_silu(isa):
    x = np.linspace(-80, 80, 100_001).astype(np.float32)
    expected = ref.silu(x)
    out = ops.silu(x, isa=isa)
    assert (np.abs(out - expected) <= 4e-7 * np.abs(expected)).all()
    assert_same(out, ops.silu(x, isa="scalar"))
    assert ops.silu(np.array([200.0, -200.0], np.float32), isa=isa).tolist() == pytest.approx([200, 0], abs=1e-30)


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_embed_and_gather(scheme):
    packed, _, _, _ = packed_matrix(50, 352, scheme)
    tokens = [0, 49, 17, 17, 31, 32]
    table = _core.dequantize(packed, scheme, 50, 352)
    for threads in THREADS:
        assert_same(ops.embed(packed, scheme, 50, 352, tokens, threads=threads), table[tokens])
        assert_same(ops.gather_rows(table, tokens, threads=threads), table[tokens])
    with pytest.raises(ValueError, match="outside"):
        ops.embed(packed, scheme, 50, 352, [50])


# ---- cache and attention

HEADS = [(4, 4), (3, 1), (8, 2)]
HEAD_DIMS = [16, 20, 64, 80, 128]


@pytest.mark.parametrize("kv_type", ["fp16", "int8"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rope_append(head_dim, kv_type):
    heads, kv_heads, lengths = 6, 2, [(70, 1), (3, 1), (129, 1)]
    rows = sum(n for n, _ in lengths)
    q, k, v = (
        normal(rows, heads * head_dim),
        normal(rows, kv_heads * head_dim, seed=1),
        normal(rows, kv_heads * head_dim, seed=2),
    )
    angle = normal(rows, head_dim // 2, seed=3).astype(np.float64)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    arguments = (q, k, v, cos, sin, heads, kv_heads, lengths, kv_type)
    first = ops.rope_append(*arguments, isa="scalar")
    np.testing.assert_allclose(first[0], ref.rope(q, cos, sin, head_dim), rtol=0, atol=1e-6)
    np.testing.assert_allclose(first[1], ref.rope(k, cos, sin, head_dim), rtol=0, atol=1e-6)
    # + 0: the sign of a zero is lost in int8
    assert_same(first[2] + np.float32(0), ref.stored_kv(first[1], head_dim, kv_type).astype(np.float32) + np.float32(0))
    assert_same(first[3] + np.float32(0), ref.stored_kv(v, head_dim, kv_type).astype(np.float32) + np.float32(0))
    for isa, threads in itertools.product(ISAS, THREADS):
        for got, want in zip(ops.rope_append(*arguments, isa=isa, threads=threads), first, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("kv_type", ["fp16", "int8"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_attention(heads, kv_heads, head_dim, kv_type):
    """A ragged batch: a prefill, a chunk in the middle, decodes right at, before and behind chunk and page borders."""
    lengths = [(40, 40), (300, 7), (1, 1), (64, 1), (65, 1), (256, 1), (257, 2), (530, 3)]
    positions, queries = sum(n for n, _ in lengths), sum(n for _, n in lengths)
    q = normal(queries, heads * head_dim, scale=2.0)
    k, v = normal(positions, kv_heads * head_dim, seed=1), normal(positions, kv_heads * head_dim, seed=2)
    arguments = (heads, kv_heads, lengths, kv_type)
    first = ops.attention(q, k, v, *arguments, isa="scalar", threads=2)
    np.testing.assert_allclose(first, ref.attention(q, k, v, *arguments), rtol=0, atol=3e-6)
    for isa, threads in itertools.product(ISAS, THREADS):
        if isa != "scalar" or threads == 1:
            assert_same(ops.attention(q, k, v, *arguments, isa=isa, threads=threads), first)


@pytest.mark.parametrize("kv_type", ["fp16", "int8"])
@pytest.mark.parametrize("isa", ISAS)
def test_attention_does_not_know_how_the_prompt_was_cut(isa, kv_type):
    heads, kv_heads, d, n = 6, 2, 32, 290
    q, k, v = normal(n, heads * d), normal(n, kv_heads * d, seed=1), normal(n, kv_heads * d, seed=2)
    whole = ops.attention(q, k, v, heads, kv_heads, [(n, n)], kv_type, isa=isa, threads=2)
    for cut in (1, 5, 64, 255, 256, 257):
        for begin in range(0, n, cut) if cut > 60 else (0, 100, n - cut):
            stop = min(n, begin + cut)
            part = ops.attention(
                q[begin:stop], k[:stop], v[:stop], heads, kv_heads, [(stop, stop - begin)], kv_type, isa=isa, threads=3
            )
            assert_same(part, whole[begin:stop])


def test_a_batch_is_the_sequences_alone():
    heads, kv_heads, d = 8, 4, 64
    lengths = [(700, 1), (5, 2), (333, 1), (64, 1)]
    rng = np.random.default_rng(0)
    parts = [
        tuple(
            rng.standard_normal((n, w)).astype(np.float32)
            for n, w in ((c, heads * d), (n, kv_heads * d), (n, kv_heads * d))
        )
        for n, c in lengths
    ]
    q, k, v = (np.concatenate(x) for x in zip(*parts, strict=True))
    together = ops.attention(q, k, v, heads, kv_heads, lengths, threads=2)
    alone = [ops.attention(*part, heads, kv_heads, [one], threads=1) for part, one in zip(parts, lengths, strict=True)]
    assert_same(together, np.concatenate(alone))


@pytest.mark.parametrize("isa", ISAS)
def test_later_tokens_do_not_leak(isa):
    """Keys and values behind a query may be anything, NaN and infinity included."""
    q, k, v = normal(20, 32), normal(20, 32, seed=1), normal(20, 32, seed=2)
    before = ops.attention(q, k, v, 1, 1, [(20, 20)], isa=isa)
    k[12:], v[12:] = np.nan, np.inf
    after = ops.attention(q, k, v, 1, 1, [(20, 20)], isa=isa)
    assert_same(after[:12], before[:12])
    assert np.isnan(after[12:]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_attention_survives_extreme_scores(isa):
    q, k, v = np.full((1, 16), 200.0, np.float32), normal(300, 16), normal(300, 16, seed=2)
    k[17] = 100.0
    out = ops.attention(q, k, v, 1, 1, [(300, 1)], isa=isa)
    np.testing.assert_allclose(out[0], v[17].astype(np.float16), rtol=1e-6)


def test_attention_refuses_wrong_sizes():
    k = normal(5, 32)
    for q, heads, lengths in [(normal(1, 32), 1, [(6, 1)]), (normal(2, 32), 1, [(5, 1)]), (normal(1, 48), 3, [(5, 6)])]:
        with pytest.raises(ValueError, match=r"must|needs|divide"):
            ops.attention(q, k, k, heads, 1, lengths)


# ---- the choice of instruction set


def test_use_isa():
    before = _core.isa()
    try:
        for name in ISAS:
            _core.use_isa(name)
            assert _core.isa() == name
        with pytest.raises(ValueError, match="unknown; this machine supports: scalar"):
            _core.use_isa("avx9000")
        assert _core.isa() == ISAS[-1]
    finally:
        _core.use_isa(before)
    assert ISAS[0] == "scalar"
