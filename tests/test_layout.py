# SPDX-License-Identifier: Apache-2.0
"""The packed layout and the weight quantizer, against the layout written a second time in ops_reference.py."""

import numpy as np
import ops_reference as ref
import pytest

from cnllama import _core

SHAPES = [(1, 64), (5, 40), (16, 256), (33, 224), (40, 352), (64, 576), (17, 1000), (32, 32)]


def weights(rows, cols, seed=0):
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * 0.02).astype(np.float32)


def test_schemes_are_those_of_the_layout():
    for name, scheme in _core.schemes().items():
        mine = ref.SCHEMES[name]
        assert (scheme["bits"], scheme["group"], scheme["asymmetric"]) == (mine.bits, mine.group, mine.asymmetric)
    assert _core.schemes().keys() == ref.SCHEMES.keys()
    for scheme in _core.schemes().values():
        of_group = 32 if scheme["asymmetric"] else 16
        assert scheme["bits_per_weight"] == scheme["bits"] + of_group / scheme["group"]


@pytest.mark.parametrize("scheme", ref.SCHEMES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_sizes(scheme, rows, cols):
    assert _core.padded_rows(rows) == ref.round_up(rows, 32)
    expected = ref.round_up(rows, 32) // 16 * ref.panel_bytes(ref.SCHEMES[scheme], cols)
    assert _core.packed_bytes(scheme, rows, cols) == expected
    assert expected % 64 == 0
    packed, _, _ = _core.quantize(weights(rows, cols), scheme)
    assert packed.nbytes == expected


@pytest.mark.parametrize("scheme", ref.SCHEMES)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_dequantize_reads_the_layout(scheme, rows, cols):
    packed, _, _ = _core.quantize(weights(rows, cols), scheme)
    expected = ref.dequantize(packed, scheme, rows, cols)
    actual = _core.dequantize(packed, scheme, rows, cols)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)
    part = _core.dequantize(packed, scheme, rows, cols, rows // 2, rows)
    np.testing.assert_array_equal(part, actual[rows // 2 :])


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_every_value_survives_packing(scheme):
    s = ref.SCHEMES[scheme]
    rng = np.random.default_rng(1)
    q = rng.integers(s.smallest, 1 << s.bits, (48, 384)).astype(np.uint8)
    scale = rng.uniform(0.001, 0.01, (48, 384 // s.group)).astype(np.float16)
    low = rng.uniform(-0.1, 0.1, scale.shape).astype(np.float16)
    packed = ref.pack(q, scale, low, scheme)
    for got, expected in zip(ref.unpack(packed, scheme, 48, 384), (q, scale, low), strict=True):
        if expected is low and not s.asymmetric:
            continue
        wide = expected if expected.shape == q.shape else np.repeat(expected, s.group, axis=1)
        np.testing.assert_array_equal(got, wide)
    dequantized = _core.dequantize(packed, scheme, 48, 384)
    np.testing.assert_allclose(dequantized, ref.dequantize(packed, scheme, 48, 384), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_padding_contributes_nothing(scheme):
    s = ref.SCHEMES[scheme]
    packed, _, _ = _core.quantize(weights(5, 40), scheme)
    q, scale, low = ref.unpack(packed, scheme, 32, ref.round_up(40, s.group))
    assert not scale[5:].any()
    assert not low[5:].any()
    assert (q[5:] == s.zero).all()
    assert (q[:, 40:] == s.zero).all()


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_same_bytes_for_all_threads_and_instruction_sets(scheme):
    w = weights(100, 352)
    w[7, 64:128] = 0
    w[9] = 0.125
    before = _core.isa()
    try:
        _core.use_isa("scalar")
        expected = _core.quantize(w, scheme, threads=1)
        for isa in _core.isas():
            _core.use_isa(isa)
            for threads in (1, 2, 3):
                packed, error, squares = _core.quantize(w, scheme, threads=threads)
                np.testing.assert_array_equal(packed, expected[0])
                assert (error, squares) == expected[1:]
    finally:
        _core.use_isa(before)
    # Pieces of 32 rows give the same bytes as the whole: the converter streams.
    pieces = [_core.quantize(w[i : i + 32], scheme)[0] for i in range(0, 100, 32)]
    np.testing.assert_array_equal(np.concatenate(pieces), expected[0])


# Relative errors (root of squared error over squares) of Gaussian weights, just above what the search leaves.
ERRORS = {
    **{"q8-s32": 0.0052, "q8-s64": 0.0059, "q8-s128": 0.0065, "q6-s32": 0.0205, "q6-s64": 0.0231, "q6-s128": 0.0253},
    **{"q5-s32": 0.041, "q5-s64": 0.046, "q5-a64": 0.0415, "q5-s128": 0.0505, "q5-a128": 0.0465},
    **{"q4-s32": 0.083, "q4-s64": 0.091, "q4-a64": 0.084, "q4-s128": 0.0985, "q4-a128": 0.093},
    **{"q3-s32": 0.166, "q3-s64": 0.18, "q3-a64": 0.167, "q3-a128": 0.18},
    **{"q2-s32": 0.335, "q2-a64": 0.323, "q2-a128": 0.337},
}


@pytest.mark.parametrize(("scheme", "limit"), ERRORS.items(), ids=ERRORS)
def test_quantizer_error(scheme, limit):
    w = weights(256, 1024)
    packed, error, squares = _core.quantize(w, scheme)
    left = w.astype(np.float64) - ref.dequantize(packed, scheme, *w.shape)
    assert error == pytest.approx((left**2).sum(), rel=1e-3)
    assert squares == pytest.approx((w.astype(np.float64) ** 2).sum(), rel=1e-5)
    assert np.sqrt(error / squares) < limit


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_error_is_never_above_the_plain_rule(scheme):
    """Heavy tails, one sign, offsets, outliers: the search keeps the best, and the plain rule is among the tried."""
    s = ref.SCHEMES[scheme]
    rng = np.random.default_rng(3)
    w = np.concatenate(
        [
            rng.standard_t(3, (16, 256)),
            np.abs(rng.standard_normal((16, 256))),
            rng.standard_normal((16, 256)) + 3,
            rng.standard_normal((16, 256)) * (1 + 20 * (rng.random((16, 256)) < 0.01)),
        ]
    ).astype(np.float32)
    packed, _, _ = _core.quantize(w, scheme)
    left = ((w - ref.dequantize(packed, scheme, *w.shape)) ** 2).reshape(64, -1, s.group).sum(axis=2)
    groups = w.astype(np.float64).reshape(64, -1, s.group)
    if s.asymmetric:
        low = groups.min(axis=2, keepdims=True)
        top = (1 << s.bits) - 1
        step = (groups.max(axis=2, keepdims=True) - low) / top
        q = np.clip(np.rint((groups - low) / step), 0, top)
    else:
        low = 0.0
        extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2)
        smallest, largest = s.smallest - s.zero, s.zero - 1
        step = extreme / smallest
        q = np.clip(np.rint(groups / step), smallest, largest)
    plain = ((q * step + low - groups) ** 2).sum(axis=2)
    assert (left <= plain * 1.02 + 1e-12).all()  # the fp16 rounding of the scale may cost a little


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_special_groups(scheme):
    w = np.zeros((4, 256), np.float32)
    w[1] = 0.5
    w[2, 3] = -1.0
    w[3] = 1e-12  # its scale underflows fp16
    packed, _, _ = _core.quantize(w, scheme)
    back = _core.dequantize(packed, scheme, 4, 256)
    assert not back[0].any()
    np.testing.assert_allclose(back[1], 0.5, rtol=2e-3)
    assert back[2, 3] == pytest.approx(-1.0, rel=2e-3)
    np.testing.assert_allclose(back[2, :3], 0, atol=0.07)
    assert np.abs(back[3]).max() < 1e-6


@pytest.mark.parametrize("scheme", ref.SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_named(scheme, bad):
    w = weights(40, 300)
    w[37, 290] = bad
    with pytest.raises(ValueError, match="row 37, column 290"):
        _core.quantize(w, scheme, threads=2)


@pytest.mark.parametrize("scheme", ref.SCHEMES)
def test_scale_beyond_fp16_is_named(scheme):
    w = weights(40, 300)
    w[35, 70] = 1e9
    with pytest.raises(ValueError, match=f"row 35, column {70 - 70 % ref.SCHEMES[scheme].group} "):
        _core.quantize(w, scheme, threads=2)


def test_refusals():
    with pytest.raises(ValueError, match="q4-s64, q4-a64, q4-s32, q8-s64"):
        _core.quantize(weights(1, 32), "q5")
    with pytest.raises(ValueError, match="2 dimensions"):
        _core.quantize(np.zeros(3, np.float32), "q4-a64")
    with pytest.raises(ValueError, match="rows and columns"):
        _core.packed_bytes("q4-a64", 0, 5)
    with pytest.raises(ValueError, match="rows and columns"):
        _core.packed_bytes("q4-a64", 1 << 40, 1 << 40)
    with pytest.raises(ValueError, match="bytes, not 7"):
        _core.dequantize(np.zeros(7, np.uint8), "q4-a64", 5, 40)
    packed, _, _ = _core.quantize(weights(5, 40), "q4-a64")
    for begin, end in [(-1, 3), (3, 2), (0, 6)]:
        with pytest.raises(ValueError, match="not inside"):
            _core.dequantize(packed, "q4-a64", 5, 40, begin, end)


def test_half_conversions_equal_numpy():
    every = np.arange(65536, dtype=np.uint16)
    floats = every.view(np.float16).astype(np.float32)
    mine = np.array([_core.ops.half_to_float(int(i)) for i in every], np.float32)
    np.testing.assert_array_equal(mine, floats)
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.standard_normal(2000) * 10.0 ** rng.integers(-9, 6, 2000), [65519.99, 65520.0, 0.0, -0.0]])
    finite = np.sort(floats[np.isfinite(floats)]).astype(np.float64)
    x = np.concatenate([x, ((finite[:-1] + finite[1:]) / 2)[::7]]).astype(np.float32)  # ties
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    mine = np.array([_core.ops.float_to_half(float(v)) for v in x], np.uint16)
    np.testing.assert_array_equal(mine, expected)
