# SPDX-License-Identifier: Apache-2.0
"""Schemes beside the first four: expanded for the 8-bit kernels; and what quantizers of our own build upon: weighted
fits, packing of given integers.
"""

import itertools

import models
import numpy as np
import ops_reference as ref
import pytest
from ops_data import activations, assert_same, normal, packed_matrix
from reference import Reference

from cnllama import _core

ops = _core.ops
ISAS = _core.isas()
TOKENS = (1, 2, 5, 12, 13, 40)


# ---- matmul


@pytest.mark.parametrize("scheme", ref.OTHERS)
@pytest.mark.parametrize(("rows", "cols"), [(5, 40), (33, 192), (49, 1000), (32, 1664)])
def test_matmul(scheme, rows, cols):
    """Half of a last group missing, a short superblock, columns that are cut: the bits of scalar everywhere."""
    matrix = packed_matrix(rows, cols, scheme)
    x = activations(40, cols)
    first = ops.matmul(x, [matrix], isa="scalar")[0]
    expected, bound = ref.matmul(x, matrix[0], scheme, rows)
    assert (np.abs(first - expected) <= bound).all()
    for isa, m in itertools.product(ISAS, TOKENS):
        assert_same(ops.matmul(x[:m], [matrix], isa=isa, threads=1 + m % 2)[0], first[:m])


@pytest.mark.parametrize("scheme", ["q3-a64", "q5-s32", "q4-s128"])
def test_blocks_of_tokens(scheme):
    matrix = packed_matrix(33, 600, scheme, bias=True)
    x = activations(330, 600)
    expected = np.concatenate([ops.matmul(x[i : i + 12], [matrix], isa="scalar")[0] for i in range(0, 330, 12)])
    for isa in ISAS[1:]:
        assert_same(ops.matmul(x, [matrix], isa=isa, threads=2)[0], expected)


@pytest.mark.parametrize("m", [1, 9, 33])
def test_fused_projections_may_have_schemes_of_their_own(m):
    x = activations(m, 288)
    names = ("q6-s64", "q4-a64", "q2-s32", "q8-s32", "q5-a128")
    matrices = [packed_matrix(48 + i, 288, name, seed=i, bias=i % 2 == 0) for i, name in enumerate(names)]
    alone = [ops.matmul(x, [matrix], isa="scalar")[0] for matrix in matrices]
    for isa, threads in itertools.product(ISAS, (1, 3)):
        for out, expected in zip(ops.matmul(x, matrices, isa=isa, threads=threads), alone, strict=True):
            assert_same(out, expected)


@pytest.mark.parametrize("m", [1, 6, 33])
def test_swiglu_and_residual(m):
    gate, up = packed_matrix(72, 352, "q5-a64", seed=5, bias=True), packed_matrix(72, 352, "q3-s64", seed=7)
    x, residual = activations(m, 352), normal(m, 72, seed=9)
    h, added = ops.matmul_swiglu(x, gate, up, isa="scalar"), ops.matmul_add(x, up, residual, isa="scalar")
    g, g_bound = ref.matmul(x, gate[0], gate[1], 72, gate[3])
    u, u_bound = ref.matmul(x, up[0], up[1], 72)
    expected = ref.silu(g) * u
    bound = 1.1 * g_bound * np.abs(u) + np.abs(ref.silu(g)) * u_bound + 1e-6 * np.abs(expected) + 1e-30
    assert (np.abs(h - expected) <= bound).all()
    assert (np.abs(added - (residual + u)) <= u_bound + 2e-7 * np.abs(residual)).all()
    for isa in ISAS:
        assert_same(ops.matmul_swiglu(x, gate, up, isa=isa, threads=2), h)
        assert_same(ops.matmul_add(x, up, residual, isa=isa, threads=2), added)


# ---- the whole engine


@pytest.mark.parametrize("scheme", ref.OTHERS)
def test_engine_is_the_reference(scheme):
    """Every matrix of a model, tied embeddings included, in one scheme."""
    config = models.small_config(131, hidden_size=96, intermediate_size=160, tie_word_embeddings=True)
    tensors = models.quantize_tensors(models.random_tensors(config, seed=3), scheme, embeddings=scheme)
    config, ids = models.engine_config(config), np.random.default_rng(7).integers(0, 131, 14).astype(np.int32)
    reference = Reference(config, tensors)
    oracle = np.concatenate([reference.logits([int(i)]) for i in ids[:12]] + [reference.logits(ids[12:].tolist())])
    engine = _core.Engine(config, tensors, threads=2, context=64, max_sequences=14)
    pieces = [ids[i : i + 1] for i in range(12)] + [ids[12:]]
    logits = engine.step([(engine.open(), piece, True) for piece in pieces])
    # Float noise, but in the few that have a first value tipped over to its other int8 neighbour.
    error = np.abs(logits - oracle).max(axis=1) / oracle.std()
    assert (error < 1e-5).sum() >= 11
    assert error.max() < 0.15
    one = engine.open()
    assert_same(np.concatenate([engine.step([(one, ids[i : i + 1], True)]) for i in (12, 13)]), logits[12:])


@pytest.mark.usefixtures("best_isa")
def test_a_mixed_model_has_the_same_bits_everywhere():
    config = models.small_config(131, hidden_size=128, intermediate_size=352)
    values = models.random_tensors(config, seed=4)
    tensors = models.quantize_tensors(values, "q4-a64", embeddings="q6-s64")
    for i, name in enumerate(n for n, value in values.items() if n.endswith("_proj.weight")):
        scheme = ref.OTHERS[i % len(ref.OTHERS)]
        tensors[name] = (_core.quantize(values[name], scheme)[0], scheme, *values[name].shape)
    ids = np.random.default_rng(8).integers(0, 131, 40).astype(np.int32)
    first = None
    for isa, threads in itertools.product(ISAS, (1, 2)):
        _core.use_isa(isa)
        engine = _core.Engine(models.engine_config(config), tensors, threads=threads, context=64)
        for chunks in ([40], [13, 1, 26]):
            sequence, at = engine.open(), 0
            for size in chunks:
                last = engine.step([(sequence, ids[at : at + size], False)])
                at += size
            first = last if first is None else first
            assert_same(last, first)
            engine.close(sequence)


# ---- quantizing


def test_more_bits_leave_less_error():
    w = normal(64, 1024)
    error = {scheme: _core.quantize(w, scheme)[1] for scheme in _core.schemes()}
    by_bits = (("s32", "865432"), ("s64", "86543"), ("s128", "8654"), ("a64", "5432"), ("a128", "5432"))
    for kind, bits in by_bits:
        errors = [error[f"q{b}-{kind}"] for b in bits]
        assert all(low < 0.5 * high for low, high in itertools.pairwise(errors)), kind
    for bits in "865432":
        same = [error.get(f"q{bits}-{kind}") for kind in ("s32", "s64", "s128")]
        same = [e for e in same if e is not None]
        assert same == sorted(same)


def weighted_error(w, packed, scheme, importance):
    """Of each group of each row."""
    left = (w.astype(np.float64) - ref.dequantize(packed, scheme, *w.shape)) ** 2 * importance
    return left.reshape(len(w), -1, ref.SCHEMES[scheme].group).sum(axis=2)


@pytest.mark.usefixtures("best_isa")
@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_importance(scheme):
    w = normal(40, 384, seed=2)
    importance = np.random.default_rng(3).uniform(0, 1, 384).astype(np.float32) ** 6
    packed, error, squares = _core.quantize(w, scheme, 1, importance)
    plain, plain_error, plain_squares = _core.quantize(w, scheme)
    left, without = (weighted_error(w, p, scheme, importance) for p in (packed, plain))
    assert left.sum() < 0.97 * without.sum()
    assert error == pytest.approx(weighted_error(w, packed, scheme, 1.0).sum(), rel=1e-3)
    assert error > plain_error
    assert squares == plain_squares
    for isa, threads in itertools.product(ISAS, (1, 3)):
        _core.use_isa(isa)
        again, *errors = _core.quantize(w, scheme, threads, importance * np.float32(1024))
        np.testing.assert_array_equal(again, packed)
        assert errors == [error, squares]


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_importance_that_says_nothing(scheme):
    w = normal(20, 300)
    plain = _core.quantize(w, scheme)
    for importance in (np.ones(300, np.float32), np.full(300, 1e-30, np.float32), np.zeros(300, np.float32)):
        packed, *errors = _core.quantize(w, scheme, importance=importance)
        np.testing.assert_array_equal(packed, plain[0])
        assert errors == list(plain[1:])


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_a_single_important_column_is_met(scheme):
    """Numbers far apart: the one that counts comes out as well as its half-precision scale allows."""
    w = normal(33, 128)
    importance = np.full(128, 1e-12, np.float32)
    importance[[5, 70]] = 1e6
    back = _core.dequantize(_core.quantize(w, scheme, importance=importance)[0], scheme, *w.shape)
    assert np.isfinite(back).all()
    where = [5] if ref.SCHEMES[scheme].group == 128 else [5, 70]
    plain = _core.dequantize(_core.quantize(w, scheme)[0], scheme, *w.shape)
    assert np.abs(back - w)[:, where].mean() < 0.5 * np.abs(plain - w)[:, where].mean() + 1e-4


def test_importance_is_checked():
    w = normal(5, 64)
    for importance, words in (
        (np.ones(63, np.float32), "one value for each of 64 columns"),
        (np.ones((1, 64), np.float32), "one value for each of 64 columns"),
        (np.full(64, -1, np.float32), "importance is -1.0.* at column 0"),
        (np.where(np.arange(64) == 9, np.nan, 1), "importance is nan at column 9"),
        (np.where(np.arange(64) == 9, np.inf, 1), "importance is inf at column 9"),
    ):
        for function in (_core.quantize, _core.fit_groups):
            with pytest.raises(ValueError, match=words):
                function(w, "q4-a64", importance=importance)


# ---- fits and packing


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_fit_groups_is_what_quantize_does(scheme):
    w = normal(50, 384)
    for importance in (None, np.linspace(0, 1, 384, dtype=np.float32)):
        scales, mins = _core.fit_groups(w, scheme, 2, importance)
        q, expected_scales, expected_mins = _core.unpack(_core.quantize(w, scheme, 2, importance)[0], scheme, 50, 384)
        assert scales.dtype == mins.dtype == np.float16
        np.testing.assert_array_equal(scales, expected_scales)
        np.testing.assert_array_equal(mins, expected_mins)
        assert mins.any() == ref.SCHEMES[scheme].asymmetric
        assert q.min() >= ref.SCHEMES[scheme].smallest
    alone, _ = _core.fit_groups(np.ascontiguousarray(w[:, 128:256]), scheme)
    group = ref.SCHEMES[scheme].group
    np.testing.assert_array_equal(alone, _core.fit_groups(w, scheme)[0][:, 128 // group : 256 // group])


@pytest.mark.parametrize("scheme", ref.SCHEMES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 5), (33, 200), (48, 384)])
def test_pack_and_unpack(scheme, rows, cols):
    s = ref.SCHEMES[scheme]
    rng = np.random.default_rng(rows)
    q = rng.integers(s.smallest, 1 << s.bits, (rows, cols)).astype(np.uint8)
    groups = -(-cols // s.group)
    scales = rng.uniform(-0.01, 0.01, (rows, groups)).astype(np.float16)
    mins = rng.uniform(-0.1, 0.1, (rows, groups)).astype(np.float16) * np.float16(s.asymmetric)
    packed = _core.pack(q, scales, mins, scheme, threads=2)
    assert packed.nbytes == _core.packed_bytes(scheme, rows, cols)
    wide = np.full((rows, groups * s.group), s.zero, np.uint8)
    wide[:, :cols] = q
    np.testing.assert_array_equal(packed, ref.pack(wide, scales, mins, scheme))
    for got, expected in zip(_core.unpack(packed, scheme, rows, cols), (q, scales, mins), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    # Strided inputs are read as they are meant.
    np.testing.assert_array_equal(_core.pack(np.asfortranarray(q), scales[::-1][::-1], mins, scheme), packed)


def test_packing_is_checked():
    q, halves = np.full((3, 70), 7, np.uint8), np.ones((3, 2), np.float16)
    nothing = np.zeros_like(halves)
    bad, nan = q.copy(), halves.copy()
    bad[2, 69], nan[1, 1] = 16, np.nan
    for arguments, words in (
        ((bad, halves, nothing, "q4-s64"), "q is 16 at row 2, column 69, outside 0 to 15 of q4-s64"),
        ((bad * 0, halves, nothing, "q8-s64"), "q is 0 at row 0, column 0, outside 1 to 255"),
        ((q, halves[:, :1], nothing, "q4-s64"), r"scales must be float16 \[3 x 2\]"),
        ((q, halves.astype(np.float32), nothing, "q4-s64"), "scales must be float16"),
        ((q, halves, nothing.astype(np.int16), "q4-a64"), "mins must be float16"),
        ((q, nan, nothing, "q4-s64"), "scales are not finite at row 1, group 1"),
        ((q, halves, halves, "q4-s64"), "mins must be zeros: q4-s64 is symmetric"),
        ((q[0], halves, nothing, "q4-s64"), "q must have 2 dimensions, not 1"),
        ((q, halves, nothing, "q7-s64"), "unknown weight scheme 'q7-s64'; there are: q4-s64, .*, q2-a128"),
    ):
        with pytest.raises(ValueError, match=words):
            _core.pack(*arguments)
    packed = _core.pack(q, halves, nothing, "q4-s64")
    with pytest.raises(ValueError, match="bytes, not"):
        _core.unpack(packed, "q4-s64", 33, 70)
    with pytest.raises(ValueError, match="70 columns, not a multiple of the group of q4-s64, 64"):
        _core.fit_groups(normal(3, 70), "q4-s64")
