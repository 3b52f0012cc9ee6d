# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: its unpacking against the native one, its float forward pass against transformers."""

import models
import numpy as np
import pytest
from reference import SCHEMES, Reference, quantize_activations, rotary_frequencies, round_cache, unpack

from cnllama import _core

torch = pytest.importorskip("torch", reason="the oracle is checked against transformers, which needs torch")


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize(("rows", "cols"), [(1, 64), (33, 40), (50, 352), (16, 1000)])
def test_unpack_is_what_the_native_code_unpacks(scheme: str, rows: int, cols: int) -> None:
    weight = np.random.default_rng(rows + cols).standard_normal((rows, cols), np.float32)
    packed = _core.quantize(weight, scheme)[0]
    ours = unpack(packed, scheme, rows, cols)
    np.testing.assert_allclose(ours, _core.dequantize(packed, scheme, rows, cols), rtol=1e-6, atol=1e-7)
    bound = {2: 0.4, 3: 0.2, 4: 0.12, 5: 0.06, 6: 0.03, 8: 0.008}[sum(SCHEMES[scheme][0])]
    assert np.linalg.norm(ours - weight) < bound * np.linalg.norm(weight), "unpacked weights are not near the originals"


@pytest.mark.parametrize("scaling", models.ROPE_SCALINGS.values(), ids=models.ROPE_SCALINGS)
@pytest.mark.parametrize("length", [100, 700])
def test_rotary_frequencies_are_transformers(scaling: dict[str, object] | None, length: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = models.small_config(320, max_position_embeddings=512, rope_scaling=scaling)
    model = models.load_transformers(config, models.random_tensors(config))
    if scaling is None:
        expected, amplitude = model.model.rotary_emb.inv_freq, 1.0
    else:
        compute = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
        expected, amplitude = compute(model.config, torch.device("cpu"), seq_len=length)
    ours, our_amplitude = rotary_frequencies(models.engine_config(config), length)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5)
    assert our_amplitude == pytest.approx(amplitude)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"rope_scaling": models.ROPE_SCALINGS["llama3"], "max_position_embeddings": 1024},
    ],
    ids=["plain", "gqa-head20", "tied-biases", "llama3"],
)
def test_float_forward_is_transformers(changes: dict[str, object]) -> None:
    config = models.small_config(320, **changes)
    packed = models.quantize_tensors(models.random_tensors(config, seed=5))
    oracle = Reference(models.engine_config(config), packed, quantized_activations=False)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 320, 60)]
    dequantized = {name: models.dequantize(entry) for name, entry in packed.items()}
    with torch.no_grad():
        expected = models.load_transformers(config, dequantized)(torch.tensor([ids])).logits[0].numpy()
    # The only difference left is the cache's fp16.
    assert np.abs(oracle.logits(ids) - expected).max() < 2e-3 * expected.std()


def test_activations_are_int8_for_every_256_columns() -> None:
    x = np.random.default_rng(1).standard_normal((3, 600), np.float32) * np.float32(10)
    x[1, 256:512] = 0
    rounded = quantize_activations(x)
    for begin in (0, 256, 512):
        block, q = x[:, begin : begin + 256], rounded[:, begin : begin + 256]
        scale = np.abs(block).max(axis=1, keepdims=True) / 127
        assert (np.abs(q - block) <= scale * 0.5001).all()
        assert len(np.unique(q[0])) <= 255
    assert not rounded[1, 256:512].any()


def test_int8_cache_rounds_each_head_by_its_peak() -> None:
    x = np.random.default_rng(2).standard_normal((4, 2, 32), np.float32)
    x[0, 0] = 0
    rounded = round_cache(x, "int8")
    assert not rounded[0, 0].any()
    assert (np.abs(rounded - x) <= np.abs(x).max(axis=-1, keepdims=True) * 0.0045).all()
    assert np.abs(round_cache(x, "fp16") - x).max() < 2e-3
