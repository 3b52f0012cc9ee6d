# SPDX-License-Identifier: Apache-2.0
"""Matrices and activations that the tests of the ops share, with the values at which kernels go wrong."""

import numpy as np
import ops_reference as ref

from cnllama import _core


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def packed_matrix(rows, cols, scheme, seed=1, bias=False):
    """(packed, scheme, rows, bias): half of the rows quantized, the others at the extremes of the integers."""
    s = ref.SCHEMES[scheme]
    rng = np.random.default_rng(seed)
    packed, _, _ = _core.quantize(normal(rows, cols, seed=seed, scale=0.02), scheme)
    q, scale, low = ref.unpack(packed, scheme, rows, cols)
    if cols % s.group == 0:
        top, bottom = (1 << s.bits) - 1, s.smallest
        q[1::4] = top
        q[3::4] = np.where(rng.random((len(q[3::4]), cols)) < 0.5, top, bottom)
        scale[2::8, : s.group] = 0
        q[2::8, : s.group] = s.zero
        packed = ref.pack(q.astype(np.uint8), scale[:, :: s.group], low[:, :: s.group], scheme)
    return packed, scheme, rows, normal(rows, seed=seed + 1) if bias else None


def activations(m, cols, seed=2):
    """Normal rows; one constant at the extreme, one zero in part, one of alternating extremes, outliers."""
    x = normal(m, cols, seed=seed)
    if m > 1:
        x[1] = 3.0
        x[-1, ::2] = -5.0
        x[-1, 1::2] = 5.0
    if m > 4:
        x[2, : min(256, cols)] = 0
        x[3, cols // 2] = 1000.0
    return x


def assert_same(actual, expected):
    """Bitwise, but any NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    if actual.dtype == np.float32:
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(actual), nan)
        actual, expected = actual[~nan].view(np.uint32), expected[~nan].view(np.uint32)
    np.testing.assert_array_equal(actual, expected)
