# SPDX-License-Identifier: Apache-2.0
"""Oracle 2: transformers' LlamaForCausalLM in float32 on the dequantized weights, 512 tokens of Chinese.

What remains between the two is the engine's own rounding (int8 activations, the cache), measured as the
Kullback-Leibler divergence of the next-token distributions at every position.
"""

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from reference import assert_agrees

from cnllama import _core

torch = pytest.importorskip("torch", reason="the oracle is transformers, which needs torch")
pytest.importorskip("transformers", reason="the oracle is transformers")

TOKENS = 512
MEAN_KL, MAX_KL = 1e-3, 1e-2
MEAN_KL_INT8, MAX_KL_INT8 = 1e-3, 1e-2  # the int8 cache: measured within 10 % of the fp16 one

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mha": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "mqa-wide": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64},
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True},
    "all-biases": {"attention_bias": True, "mlp_bias": True},
    "long-rows": {"hidden_size": 320, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 800},
} | {
    f"rope-{name}": {"rope_scaling": scaling, "max_position_embeddings": 256}
    for name, scaling in models.ROPE_SCALINGS.items()
    if scaling
}


def transformers_logits(config: dict[str, Any], packed: Any, ids: list[int]) -> np.ndarray:
    """float32 [len(ids), vocab] of the model with these packed weights dequantized."""
    model = models.load_transformers(config, {name: models.dequantize(entry) for name, entry in packed.items()})
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def engine_logits(config: dict[str, Any], packed: Any, ids: list[int], **options: Any) -> np.ndarray:
    engine = _core.Engine(models.engine_config(config), packed, context=TOKENS, **options)
    sequence, array = engine.open(rope_length=len(ids)), np.array(ids, np.int32)
    return np.concatenate([engine.step([(sequence, part, True)]) for part in np.split(array, [200, 400])])


@pytest.fixture(scope="module")
def chinese_ids(tokenizer_model: bytes) -> list[int]:
    """512 tokens of the bundled Chinese text."""
    return models.ids_of(tokenizer_model, models.chinese_lines(), TOKENS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_agree(name: str, chinese_ids: list[int], tokenizer_model: bytes) -> None:
    config = models.small_config(models.piece_count(tokenizer_model), **ARCHITECTURES[name])
    packed = models.quantize_tensors(models.random_tensors(config, seed=3))
    reference = transformers_logits(config, packed, chinese_ids)
    ours = engine_logits(config, packed, chinese_ids)
    assert_agrees(reference, ours, MEAN_KL, MAX_KL)
    int8 = engine_logits(config, packed, chinese_ids, kv_type="int8")
    assert_agrees(reference, int8, MEAN_KL_INT8, MAX_KL_INT8)
    assert not np.array_equal(int8, ours)


@pytest.mark.parametrize("scheme", ["q4-s64", "q4-s32", "q8-s64"])
def test_other_schemes_agree(scheme: str, chinese_ids: list[int], tokenizer_model: bytes) -> None:
    config = models.small_config(models.piece_count(tokenizer_model))
    packed = models.quantize_tensors(models.random_tensors(config, seed=3), scheme)
    reference = transformers_logits(config, packed, chinese_ids)
    assert_agrees(reference, engine_logits(config, packed, chinese_ids), MEAN_KL, MAX_KL)


def test_real_text_and_tokenizer_agree(shared_data: Path) -> None:
    """LLaMA's own 32,000 pieces on held-out prose: most characters are spelled in bytes."""
    tokenizer = (shared_data / "tokenizers" / "llama.model").read_bytes()
    lines = (shared_data / "eval" / "zh_prose.txt").read_text(encoding="utf-8").splitlines()[:20]
    ids = models.ids_of(tokenizer, lines, TOKENS)
    config = models.small_config(32000)
    packed = models.quantize_tensors(models.random_tensors(config, seed=4))
    assert_agrees(transformers_logits(config, packed, ids), engine_logits(config, packed, ids), MEAN_KL, MAX_KL)


def test_decode_step_by_step_agrees(chinese_ids: list[int], tokenizer_model: bytes) -> None:
    config = models.small_config(models.piece_count(tokenizer_model), **ARCHITECTURES["gqa"])
    packed = models.quantize_tensors(models.random_tensors(config, seed=3))
    engine = _core.Engine(models.engine_config(config), packed, context=TOKENS)
    sequence = engine.open()
    steps = [engine.step([(sequence, np.array([i], np.int32), False)])[0] for i in chinese_ids]
    assert_agrees(transformers_logits(config, packed, chinese_ids), np.stack(steps), MEAN_KL, MAX_KL)
    np.testing.assert_array_equal(np.stack(steps), engine_logits(config, packed, chinese_ids))
