# SPDX-License-Identifier: Apache-2.0
"""Every row of the table of facts: what differs is said or refused, what agrees is not mentioned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnllama.convert.config_facts import DEFAULTS
from cnllama.convert.facts import FACTS, NOTICE, REFUSED, from_hf, settle
from hf_reference import EMBED, HEAD, HIDDEN, LENGTH, Config, Tensors, check, small, write
from models import piece_count, random_tensors

from cnllama.errors import InputError

pytest.importorskip("transformers")
UP = "model.layers.0.mlp.up_proj.weight"


def zeros_for(config: Config, key: str) -> Tensors:
    names = {name: np.zeros_like(value) for name, value in random_tensors(config | {key: True}).items()}
    return {name: value for name, value in names.items() if name.endswith(".bias")}


Change = Callable[[Config, Tensors], Any]


def put(**changes: Any) -> Change:
    return lambda config, tensors: config.update(changes)


def tensor(name: str, value: Callable[[Tensors], np.ndarray]) -> Change:
    return lambda config, tensors: tensors.update({name: value(tensors)})


def drop(name: str) -> Change:
    return lambda config, tensors: tensors.pop(name)


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
BIAS = "model.layers.1.self_attn.k_proj.bias"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
# name of the fact -> (what contradicts it, "" for what does not, words of the notice or of the refusal)
CASES: dict[str, list[tuple[Change, str, str]]] = {
    "architecture": [
        (put(architectures=["LlamaForCausalLM", "X"]), "", ""),
        (put(architectures=["InternLMForCausalLM"]), NOTICE, "model_type counts"),
        (put(auto_map={"AutoModel": "x.Y"}), NOTICE, "code of its own"),
        (put(model_type=None), "", ""),
        (put(model_type=None, architectures=["GPT2LMHeadModel"]), REFUSED, "model_type is None"),
        (put(model_type=["llama"]), REFUSED, "model_type is ['llama']"),
        (put(architectures="LlamaForCausalLM"), REFUSED, "expected a list of names"),
        (put(architectures=[7]), REFUSED, "expected a list of names"),
    ],
    "files": [
        (put(configuration_files=["config.4.0.0.json", "config.json"]), REFUSED, "rename the right one"),
        (put(configuration_files=["config.json"]), "", ""),
        (put(transformers_weights="other.safetensors"), REFUSED, "rename it to model.safetensors"),
    ],
    "features": [
        (put(quantization_config={"quant_method": "gptq"}), REFUSED, "quantized by gptq"),
        (put(quantization_config=0), REFUSED, "give the unquantized checkpoint"),
        (put(compression_config={"format": "pack-quantized"}), REFUSED, "give the unquantized checkpoint"),
        (put(hidden_act="gelu"), REFUSED, "only silu"),
        (put(hidden_act=None), REFUSED, "only silu"),
        (put(hidden_act="swish"), "", ""),
        (put(layer_types=["full_attention", "sliding_attention"]), REFUSED, "only full_attention"),
        (put(is_causal=False), REFUSED, "is_causal is False"),
        (put(is_causal=None), REFUSED, "is_causal is None"),
        (put(per_layer_config=[{}]), REFUSED, "this variant"),
        (put(attribute_map={"hidden_size": "x"}), REFUSED, "this variant"),
        (put(partial_rotary_factor=0.5), REFUSED, "partial_rotary_factor is 0.5"),
    ],
    "sizes": [
        (put(hidden_size=True), REFUSED, "hidden_size is True"),
        (put(num_hidden_layers=2.0), REFUSED, "num_hidden_layers is 2.0"),
        (put(vocab_size="300"), REFUSED, "vocab_size is '300'"),
        (put(max_position_embeddings=None), REFUSED, "max_position_embeddings is None"),
        (put(model_type="mistral", num_key_value_heads=None), REFUSED, "num_key_value_heads is None"),
        (put(tie_word_embeddings=1), REFUSED, "tie_word_embeddings is 1"),
        (put(attention_bias="no"), REFUSED, "attention_bias is 'no'"),
        (put(rms_norm_eps="1e-6"), REFUSED, "rms_norm_eps is '1e-6'"),
        (put(num_attention_heads=5), REFUSED, "not a multiple of num_attention_heads, 5"),
    ],
    "window": [
        (put(sliding_window=LENGTH - 1), REFUSED, f"less than the {LENGTH}"),
        (put(sliding_window=LENGTH), "", ""),
        (put(model_type="mistral", max_position_embeddings=4097), REFUSED, "4096 by default for model_type mistral"),
        (put(model_type="mistral", sliding_window=None, max_position_embeddings=4097), NOTICE, "model_type counts"),
        (put(sliding_window=True), REFUSED, "sliding_window is True"),
    ],
    "claimed type": [
        (put(torch_dtype="float8_e4m3fn"), REFUSED, "dtype is 'float8_e4m3fn'"),
        (put(dtype=7), REFUSED, "dtype is 7"),
        (put(dtype="torch.float32", torch_dtype="int8"), "", ""),
    ],
    "RoPE": [
        (put(rope_theta=5.0, rope_parameters={"rope_theta": 7.0, "rope_type": "default"}), NOTICE, "inner one counts"),
        (
            put(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "linear", "factor": 4.0}),
            NOTICE,
            "rope_scaling counts",
        ),
        (
            put(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "linear", "factor": 2.0}),
            "",
            "",
        ),
        (put(rope_scaling={"type": "yarn", "rope_type": "linear", "factor": 2.0}), NOTICE, "rope_type counts"),
        (put(rope_scaling={"type": "linear", "factor": 2.0, "alpha": 8}), NOTICE, "alpha, which is ignored"),
        (
            put(
                original_max_position_embeddings=32,
                rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
            ),
            NOTICE,
            "the outer one counts",
        ),
        (
            put(rope_scaling={"type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16}),
            NOTICE,
            "the factor counts",
        ),
        (put(rope_parameters={"full_attention": {"rope_type": "default"}}), REFUSED, "one RoPE for all layers"),
        (put(rope_scaling=[1]), REFUSED, "rope_scaling is [1]"),
        (put(rope_theta=None), REFUSED, "rope_theta is None"),
        (put(rope_theta=True), REFUSED, "rope_theta is True"),
        (put(rope_scaling={"type": "yarn", "factor": 2.0, "truncate": None}), REFUSED, "truncate is None"),
        (put(rope_scaling={"type": "linear", "factor": "2"}), REFUSED, "factor is '2'"),
        (put(rope_scaling={"type": "linear", "factor": 10**399}), REFUSED, "factor is 1000"),
        (put(rope_scaling={"type": ["linear"], "factor": 2}), REFUSED, "is not supported"),
    ],
    "names": [
        (drop(UP), REFUSED, f"tensor {UP} is missing"),
        (tensor("model.layers.0.mlp.odd", lambda t: t[UP]), REFUSED, "in no LLaMA of this config.json"),
        (put(num_hidden_layers=1), REFUSED, "set it to 2"),
        (put(num_hidden_layers=3), REFUSED, "the files hold 2 layers"),
        (drop(HEAD), REFUSED, "set tie_word_embeddings to true"),
    ],
    "shapes": [
        (put(intermediate_size=64), REFUSED, "config.json asks for [32, 64]"),
        (put(num_key_value_heads=2), REFUSED, "config.json asks for [32, 32]"),
        (put(head_dim=8), REFUSED, "config.json asks for [8, 32]"),
        (tensor("model.norm.weight", lambda t: np.ones((1, HIDDEN), np.float32)), REFUSED, "has shape [1, 32]"),
        (tensor("model.norm.weight", lambda t: np.ones((), np.float32)), REFUSED, "has shape []"),
    ],
    "types": [
        (put(torch_dtype="float16"), NOTICE, "says the weights are F16 but they are stored as F32"),
        (tensor("model.norm.weight", lambda t: np.ones(HIDDEN, np.int64)), REFUSED, "has dtype I64"),
        (tensor("model.norm.weight", lambda t: np.full(HIDDEN, 1 / 3)), "", ""),
    ],
    "copies": [
        (tensor(UP.removeprefix("model."), lambda t: t[UP]), "", ""),
        (tensor(UP.removeprefix("model."), lambda t: t[UP] * 2), REFUSED, "one tensor with two values"),
        (tensor(UP.removeprefix("model."), lambda t: t[UP][:1]), REFUSED, "has shape [1, 32]"),
    ],
    "tied embeddings": [
        (put(tie_word_embeddings=True), NOTICE, "they are not tied"),
        (lambda c, t: (c.update(tie_word_embeddings=True), t.update({HEAD: t[EMBED]})), "", ""),
        (lambda c, t: (c.update(tie_word_embeddings=True), t.pop(EMBED)), "", ""),
    ],
    "biases": [
        (lambda c, t: t.update(zeros_for(c, "attention_bias")), "", ""),
        (tensor(BIAS, lambda t: np.ones(16, np.float32)), REFUSED, '"attention_bias": true'),
        (put(attention_bias=True), NOTICE, "zero, as in transformers"),
        (put(mlp_bias=True), NOTICE, "zero, as in transformers"),
        (
            lambda c, t: (c.update(MISTRAL, attention_bias=True), t.update({BIAS: np.ones(16, np.float32)})),
            REFUSED,
            '"model_type": "llama"',
        ),
    ],
    "frequencies": [
        (tensor(FREQUENCIES, lambda t: (10000.0 ** -(np.arange(8) / 8)).astype(np.float16)), "", ""),
        (tensor(FREQUENCIES, lambda t: (5e5 ** -(np.arange(8) / 8)).astype(np.float32)), NOTICE, "rope_theta counts"),
        (tensor(FREQUENCIES, lambda t: np.ones(3, np.int32)), "", ""),
    ],
    "rows": [(put(vocab_size=77), NOTICE, "the rows count")],
}  # fmt: skip


def test_every_row_of_the_table_has_cases() -> None:
    assert {*CASES, "weights"} == {fact.name for fact in FACTS}
    for fact in FACTS:
        outcomes = {outcome for _, outcome, _ in CASES.get(fact.name, [])} - {""}
        for promised in (NOTICE, REFUSED):
            if fact.name in CASES and promised in fact.difference:
                assert promised in outcomes, f"{fact.name} promises {promised} and no case shows it"


def test_the_documented_table_is_the_table() -> None:
    text = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [[fact.name, fact.sources, fact.difference] for fact in FACTS]


@pytest.mark.parametrize(
    ("change", "outcome", "words"),
    [case for cases in CASES.values() for case in cases],
    ids=[f"{name}-{i}" for name, cases in CASES.items() for i in range(len(cases))],
)
def test_a_row_of_the_table(tmp_path: Path, small_tokenizer: bytes, change: Change, outcome: str, words: str) -> None:
    config = small(piece_count(small_tokenizer))
    tensors = random_tensors(config)
    change(config, tensors)
    directory = write(tmp_path / "base", small_tokenizer, config, tensors)
    if outcome == REFUSED:
        with pytest.raises(InputError) as caught:
            settle(directory)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    notices = settle(directory).notices
    assert len(notices) == (outcome == NOTICE), notices
    assert all(words in notice for notice in notices)
    assert check(directory) == "both" or outcome == NOTICE or config["model_type"] is None


@pytest.mark.parametrize("kind", DEFAULTS)
def test_an_absent_key_means_what_transformers_class_means(kind: str) -> None:
    from transformers import LlamaConfig, MistralConfig

    theirs = {"llama": LlamaConfig, "mistral": MistralConfig}[kind]()
    declared = set(type(theirs).__dataclass_fields__)
    for key, default in DEFAULTS[kind].items():
        assert key in declared or key in ("attention_bias", "sliding_window"), f"{kind} has no {key}"
        expected = getattr(theirs, key, None)
        if default is None and key != "sliding_window":  # it follows from the others
            ours = from_hf({"model_type": kind, "sliding_window": None}, "x")[key]
            assert ours == expected
        else:
            assert default == expected, key
    assert ("attention_bias" in DEFAULTS[kind]) == ("attention_bias" in declared)
