# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel against the CPU's, bit for bit: on the GPU, or in the host emulation where there is none.

The CPU's ops are themselves compared with float64 in test_ops.py.
"""

from types import SimpleNamespace

import cuda_backend
import numpy as np
import pytest

from cnllama import _core

SCHEMES = ("q4-s64", "q4-a64", "q4-s32", "q8-s64")


@pytest.fixture(scope="module")
def cuda() -> SimpleNamespace:
    ops = cuda_backend.load().ops
    # The emulation is deterministic.
    return SimpleNamespace(ops=cuda_backend.Repeated(ops) if cuda_backend.on_a_gpu() else ops)


@pytest.fixture(params=["forward", "reverse", "7"])
def order(request, monkeypatch) -> str:
    """The order in which the emulation runs threads and blocks; a missing barrier shows as a difference."""
    if cuda_backend.on_a_gpu() and request.param != "forward":
        pytest.skip("a GPU has an order of its own")
    monkeypatch.setenv("CNLLAMA_EMULATOR_ORDER", request.param)
    return request.param


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint32)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    np.testing.assert_array_equal(bits(got), bits(np.ascontiguousarray(expected)))


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(seed: int, scheme: str, rows: int, cols: int) -> np.ndarray:
    return _core.quantize(draw(seed, rows, cols), scheme)[0]


# --- layout


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (33, 64), (48, 96), (17, 250), (64, 576)])
def test_repack_moves_every_value(cuda, scheme, rows, cols) -> None:
    panels = packed(1, scheme, rows, cols)
    whole = cuda.ops.tiled(panels, scheme, rows, cols)
    np.testing.assert_array_equal(whole, cuda.ops.tiled(panels, scheme, rows, cols, pairs=1))
    # Read back through the embedding's way of reading, which shares nothing with the packer.
    tokens = np.arange(rows, dtype=np.int32)
    same(cuda.ops.embed(panels, scheme, rows, cols, tokens), _core.dequantize(panels, scheme, rows, cols))


def test_embedding_gathers_rows(cuda, order) -> None:
    panels = packed(2, "q8-s64", 40, 300)
    tokens = np.array([39, 0, 17, 17, 8], np.int32)
    same(cuda.ops.embed(panels, "q8-s64", 40, 300, tokens), _core.ops.embed(panels, "q8-s64", 40, 300, tokens))


def test_gather_rows(cuda) -> None:
    x, rows = draw(3, 5, 300), np.array([4, 0, 0, 2], np.int32)
    same(cuda.ops.gather_rows(x, rows), x[rows])


# --- norms and quantization


@pytest.mark.parametrize(("tokens", "cols"), [(1, 64), (3, 250), (9, 4096), (2, 8500)])
@pytest.mark.parametrize("with_gamma", [False, True])
def test_quantization(cuda, order, tokens, cols, with_gamma) -> None:
    x = draw(4, tokens, cols)
    x[-1, : cols // 2] = 0.0
    gamma = draw(5, cols) if with_gamma else None
    got = cuda.ops.quantize_activations(x, gamma, 1e-5)
    values, scales, sums32, sums64 = _core.ops.quantize_activations(x, gamma, 1e-5)
    np.testing.assert_array_equal(got[0], values)
    same(got[1], scales)
    np.testing.assert_array_equal(got[2], sums32)
    np.testing.assert_array_equal(got[3], sums64)


def test_quantization_of_nothing_and_of_nan(cuda) -> None:
    x = np.zeros((3, 320), np.float32)
    x[1, 300] = np.nan
    x[2, 0] = np.inf
    _, scales, *_ = cuda.ops.quantize_activations(x)
    np.testing.assert_array_equal(np.isnan(scales), [[False, False], [False, True], [True, False]])
    assert not scales[0].any()


# --- products


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 13, 33])
@pytest.mark.parametrize("cols", [64, 300, 2304])
def test_products_with_few_tokens(cuda, scheme, tokens, cols) -> None:
    rows = 50
    x, bias = draw(6, tokens, cols), draw(7, rows)
    matrices = [(packed(8, scheme, rows, cols), scheme, rows, bias), (packed(9, scheme, 16, cols), scheme, 16, None)]
    for got, expected in zip(cuda.ops.matmul(x, matrices), _core.ops.matmul(x, matrices), strict=True):
        same(got, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_with_many_tokens(cuda, scheme) -> None:
    x = draw(10, 100, 600)
    matrices = [
        (packed(11, scheme, 70, 600), scheme, 70, None),
        (packed(12, scheme, 33, 600), scheme, 33, draw(13, 33)),
    ]
    for got, expected in zip(cuda.ops.matmul(x, matrices), _core.ops.matmul(x, matrices), strict=True):
        same(got, expected)


def test_products_with_the_widest_tile(cuda) -> None:
    x = draw(14, 300, 320)
    matrices = [(packed(15, "q4-a64", 150, 320), "q4-a64", 150, None)]
    same(cuda.ops.matmul(x, matrices)[0], _core.ops.matmul(x, matrices)[0])


@pytest.mark.parametrize("tokens", [1, 20, 90])
def test_order_of_threads_changes_nothing(cuda, order, tokens) -> None:
    x = draw(16, tokens, 2900)  # twelve superblocks: more than the warps of a block
    matrices = [(packed(17, "q4-a64", 40, 2900), "q4-a64", 40, None)]
    same(cuda.ops.matmul(x, matrices)[0], _core.ops.matmul(x, matrices)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dp4a_has_the_same_bits(cuda, scheme) -> None:
    x, bias = draw(18, 1, 600), draw(19, 40)
    matrix = (packed(20, scheme, 40, 600), scheme, 40, bias)
    same(cuda.ops.matmul(x, [matrix], kernel="dp4a")[0], _core.ops.matmul(x, [matrix])[0])
    up = (packed(21, scheme, 40, 600), scheme, 40, None)
    same(cuda.ops.matmul_swiglu(x, matrix, up, kernel="dp4a"), _core.ops.matmul_swiglu(x, matrix, up))


@pytest.mark.parametrize("tokens", [1, 12, 70])
def test_residual(cuda, tokens) -> None:
    x, residual = draw(22, tokens, 500), draw(23, tokens, 45)
    for bias in (None, draw(24, 45)):
        matrix = (packed(25, "q4-a64", 45, 500), "q4-a64", 45, bias)
        same(cuda.ops.matmul_add(x, matrix, residual), _core.ops.matmul_add(x, matrix, residual))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 12, 70])
def test_swiglu(cuda, scheme, tokens) -> None:
    x = draw(26, tokens, 320) * 3
    gate = (packed(27, scheme, 45, 320), scheme, 45, draw(28, 45))
    up = (packed(29, scheme, 45, 320), scheme, 45, None)
    same(cuda.ops.matmul_swiglu(x, gate, up), _core.ops.matmul_swiglu(x, gate, up))


# --- attention


def heads_of(seed: int, lengths, heads: int, kv_heads: int, d: int):
    keys, queries = sum(n for n, _ in lengths), sum(count for _, count in lengths)
    return draw(seed, queries, heads * d), draw(seed + 1, keys, kv_heads * d), draw(seed + 2, keys, kv_heads * d)


@pytest.mark.parametrize("kv_type", ["fp16", "int8"])
@pytest.mark.parametrize("kernel", ["decode", "prefill", "auto"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "lengths"),
    [
        (2, 2, 64, [(1, 1)]),
        (3, 1, 32, [(70, 20), (300, 1), (5, 5)]),
        (8, 2, 128, [(600, 3), (256, 1), (257, 12)]),
        (10, 1, 48, [(40, 40)]),
        (2, 1, 150, [(280, 2)]),
    ],
)
def test_attention(cuda, kv_type, kernel, heads, kv_heads, d, lengths) -> None:
    q, k, v = heads_of(30, lengths, heads, kv_heads, d)
    got = cuda.ops.attention(q, k, v, heads, kv_heads, lengths, kv_type, kernel=kernel)
    same(got, _core.ops.attention(q, k, v, heads, kv_heads, lengths, kv_type))


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_order_of_threads_changes_no_attention(cuda, order, kernel) -> None:
    lengths = [(530, 2), (20, 20)]
    q, k, v = heads_of(33, lengths, 4, 2, 32)
    got = cuda.ops.attention(q, k, v, 4, 2, lengths, "int8", kernel=kernel)
    same(got, _core.ops.attention(q, k, v, 4, 2, lengths, "int8"))


@pytest.mark.parametrize("kv_type", ["fp16", "int8"])
@pytest.mark.parametrize("d", [32, 50])
def test_rope(cuda, order, kv_type, d) -> None:
    lengths, heads, kv_heads = [(3, 1), (66, 2)], 4, 2
    rows = sum(n for n, _ in lengths)
    q, k, v = draw(36, rows, heads * d), draw(37, rows, kv_heads * d), draw(38, rows, kv_heads * d)
    angle = draw(39, rows, d // 2)
    arguments = (q, k, v, np.cos(angle), np.sin(angle), heads, kv_heads, lengths, kv_type)
    got, expected = cuda.ops.rope_append(*arguments), _core.ops.rope_append(*arguments)
    same(got[0], expected[0])
    same(got[1], expected[1])


# --- choice


def test_argmax(cuda, order) -> None:
    logits = draw(40, 4, 5000)
    logits[1, [70, 4000]] = 9.0
    logits[2, 33] = np.nan
    logits[3] = -np.inf
    expected = [int(logits[0].argmax()), 70, -1, 0]
    assert cuda.ops.argmax(logits).tolist() == expected


def largest(row: np.ndarray, k: int) -> np.ndarray:
    """Ids in the order of what the device must find: the lowest id among equals, 0 and -0 alike."""
    return np.lexsort((np.arange(row.size), -row))[:k]


@pytest.mark.parametrize(("vocab", "k"), [(40, 40), (1024, 7), (1025, 100), (9300, 33), (3000, 1024)])
def test_largest_logits(cuda, order, vocab, k) -> None:
    logits = draw(46, 3, vocab)
    logits[1] = np.round(logits[1] * 4) / 4  # many equals
    logits[1, :5] = [-0.0, 0.0, -0.0, 0.0, 0.0]
    logits[2, 11:] = -np.inf
    ids, values = cuda.ops.top(logits, k)
    for i, row in enumerate(logits):
        expected = largest(row, k)
        assert ids[i, :k].tolist() == expected.tolist()
        same(values[i, :k], row[expected])


def test_what_is_not_a_number_comes_first(cuda) -> None:
    logits = draw(47, 2, 2100)
    logits[0, [3, 2000, 1500]] = [np.inf, np.nan, -np.nan]
    ids, values = cuda.ops.top(logits, 5)
    assert ids[0, :3].tolist() == [3, 1500, 2000]
    assert np.isnan(values[0, 1:3]).all()
    assert ids[0, 3:5].tolist() == largest(np.nan_to_num(logits[0], nan=-9, posinf=-9), 2).tolist()
    assert ids[1, 0] == logits[1].argmax()


# --- bad input


def test_wrong_sizes_are_refused(cuda) -> None:
    matrix = (packed(41, "q4-a64", 32, 64), "q4-a64", 32, None)
    with pytest.raises(ValueError, match="wrong size"):
        cuda.ops.matmul(draw(42, 1, 128), [matrix])
    with pytest.raises(ValueError, match="no kernels for weight scheme 'q5'"):
        cuda.ops.matmul(draw(42, 1, 64), [(matrix[0], "q5", 32, None)])
    with pytest.raises(ValueError, match="dp4a for one token"):
        cuda.ops.matmul(draw(42, 2, 64), [matrix], kernel="dp4a")
