# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that contradict themselves: what transformers loads, or a refusal; never silently another model."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnllama.convert.facts import from_hf
from hf_reference import (
    EMBED,
    HEAD,
    HEADS,
    LENGTH,
    Config,
    Tensors,
    by_transformers,
    check,
    small,
    write,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import piece_count, random_tensors, write_json
from reference import rotary_frequencies

from cnllama.errors import InputError

pytest.importorskip("transformers")
UP = "model.layers.0.mlp.up_proj.weight"


ABSENT = "absent"
ROPES: list[Any] = [
    ABSENT,
    None,
    {},
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"type": "linear", "factor": 2.0},
    {"type": "default", "rope_type": "linear", "factor": 4.0, "rope_theta": 700.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "finetuned": True},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0, "truncate": None},
    {"rope_type": "yarn", "factor": 2.0, "truncate": False, "beta_fast": 8, "beta_slow": None},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "factor": 2.0},
]
CONFIGS: dict[str, list[Any]] = {
    "model_type": ["llama", "mistral"],
    "architectures": [["LlamaForCausalLM"], ["MistralForCausalLM"], ["QWenLMHeadModel"], ABSENT],
    "tie_word_embeddings": [True, False, ABSENT],
    "attention_bias": [True, False, ABSENT],
    "mlp_bias": [True, ABSENT],
    "num_hidden_layers": [2, 1, 3],
    "num_key_value_heads": [1, ABSENT, 2],
    "head_dim": [ABSENT, None, 16],
    "max_position_embeddings": [LENGTH, ABSENT, 16],
    "sliding_window": [None, ABSENT, 32, 4096],
    "rms_norm_eps": [1e-5, ABSENT],
    "vocab_size": [None, 64, ABSENT],
    "rope_theta": [ABSENT, 10000.0, 5000.0],
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "original_max_position_embeddings": [ABSENT, 32, 16],
    "layer_types": [ABSENT, ["full_attention"] * 2, ["sliding_attention"] * 2],
    "is_causal": [ABSENT, True, False],
    "torch_dtype": ["float32", "float16", ABSENT],
    "pretraining_tp": [1, 2],
}
STORED: dict[str, list[str]] = {
    "head": ["own", "equal", "absent"],
    "embedding": ["there", "absent"],
    "biases": ["none", "zero", "some"],
    "spelling": ["full", "bare", "twice"],
    "copy": ["none", "equal", "other"],
    "container": ["one", "bin", "shards", "forgotten", "swapped"],
    "dtype": ["float32", "float16", "float64"],
}


ODDITIES = [(key, value) for table in (CONFIGS, STORED) for key, values in table.items() for value in values[1:]]


def drawn_with(*oddities: tuple[str, Any]) -> tuple[Config, dict[str, str]]:
    """(keys of config.json, what the files hold): the ordinary ones but for these."""
    config, how = ({key: values[0] for key, values in table.items()} for table in (CONFIGS, STORED))
    for key, value in oddities:
        (config if key in config else how)[key] = value
    return config, how


def stored_tensors(config: Config, how: dict[str, str], rows: int) -> Tensors:
    """What the files hold: the tensors of two layers with the sizes that the config gives, but for what `how` says."""
    kv = config["num_key_value_heads"]
    shape = {"num_key_value_heads": HEADS if kv == ABSENT else kv, "attention_bias": how["biases"] != "none"}
    tensors = random_tensors(small(rows, tie_word_embeddings=False, **shape), seed=3)
    if how["biases"] == "zero":
        tensors = {name: value * (not name.endswith(".bias")) for name, value in tensors.items()}
    if how["head"] == "equal":
        tensors[HEAD] = tensors[EMBED]
    for key, name in (("head", HEAD), ("embedding", EMBED)):
        if how[key] == "absent":
            del tensors[name]
    if how["spelling"] == "bare":
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    elif how["spelling"] == "twice":
        tensors = {f"model.{name}": value for name, value in tensors.items()}
    if how["copy"] != "none":
        other = UP if how["spelling"] == "bare" else UP.removeprefix("model.")
        value = tensors[UP.removeprefix("model.") if how["spelling"] == "bare" else next(n for n in tensors if UP in n)]
        tensors[other] = value if how["copy"] == "equal" else value * 2
    return {name: value.astype(how["dtype"]) for name, value in tensors.items()}


def write_drawn(directory: Path, small_tokenizer: bytes, config: Config, how: dict[str, str]) -> Path:
    rows = piece_count(small_tokenizer)
    full = {**small(rows), **{key: value for key, value in config.items() if value != ABSENT}}
    for key, value in config.items():
        if value == ABSENT:
            full.pop(key, None)
    if config["vocab_size"] is None:
        full["vocab_size"] = rows
    container = {"bin": {"kind": "bin"}, "one": {}}.get(how["container"], {"shards": 2})
    write(directory, small_tokenizer, full, stored_tensors(config, how, rows), **container)
    index = directory / "model.safetensors.index.json"
    if how["container"] in ("forgotten", "swapped"):
        content = json.loads(index.read_text())
        names, files = list(content["weight_map"]), sorted(set(content["weight_map"].values()))
        if how["container"] == "forgotten":
            del content["weight_map"][names[3]]
        else:
            content["weight_map"][names[3]] = next(f for f in files if f != content["weight_map"][names[3]])
        write_json(index, content)
    return directory


def test_never_silently_another_model(tmp_path: Path, small_tokenizer: bytes) -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(oddities=st.lists(st.sampled_from(ODDITIES), max_size=6))
    def holds(oddities: list[tuple[str, Any]]) -> None:
        outcomes[check(write_drawn(tmp_path / "drawn", small_tokenizer, *drawn_with(*oddities)))] += 1

    holds()
    assert outcomes["both"] > 30, f"too few checkpoints were compared: {outcomes}"
    assert outcomes["refused"] > 20, f"too few were refused: {outcomes}"


@pytest.mark.parametrize("oddity", ODDITIES, ids=lambda oddity: f"{oddity[0]}-{oddity[1]}"[:50])
def test_each_oddity_by_itself(tmp_path: Path, small_tokenizer: bytes, oddity: tuple[str, Any]) -> None:
    check(write_drawn(tmp_path / "base", small_tokenizer, *drawn_with(oddity)))


@pytest.mark.parametrize("pair", list(itertools.product([True, False], STORED["head"], STORED["embedding"])), ids=str)
def test_tied_embeddings_are_what_transformers_makes_of_them(
    tmp_path: Path, small_tokenizer: bytes, pair: tuple[bool, str, str]
) -> None:
    drawn = drawn_with(*zip(("tie_word_embeddings", "head", "embedding"), pair, strict=True))
    directory = write_drawn(tmp_path / "base", small_tokenizer, *drawn)
    loads = by_transformers(directory) is not None
    assert check(directory) == ("both" if loads else "refused")


def test_every_combination_of_rope() -> None:
    """rope_theta, rope_scaling, rope_parameters and the length before scaling, all of ROPES with each other."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.utils import logging

    logging.set_verbosity_error()
    keys = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
    compared = 0
    for values in itertools.product(*(CONFIGS[key] for key in keys)):
        given_values = {key: value for key, value in zip(keys, values, strict=True) if value != ABSENT}
        config = {k: v for k, v in small(300).items() if k != "rope_theta"} | json.loads(json.dumps(given_values))
        try:
            theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(config))))
            ours = from_hf(config, "config.json")
        except (InputError, TypeError, KeyError):  # ours says a sentence, theirs fails at a null
            continue
        frequencies, amplitude = rotary_frequencies(ours, 8)
        np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=1e-5, err_msg=str(given_values))
        assert amplitude == pytest.approx(theirs.attention_scaling), given_values
        compared += 1
    assert compared > 800


def test_every_combination_of_window_and_length() -> None:
    """Where the window of transformers' class hides a token of the context, the config is refused, else not."""
    from transformers import LlamaConfig, MistralConfig

    for kind, window, length in itertools.product(
        ("llama", "mistral"), (ABSENT, None, 32, 63, 64, 65, 4096), (ABSENT, 64, 4096, 4097)
    ):
        given_values = {"sliding_window": window, "max_position_embeddings": length}
        config = {k: v for k, v in given_values.items() if v != ABSENT}
        theirs = {"llama": LlamaConfig, "mistral": MistralConfig}[kind](**config)
        hides = (getattr(theirs, "sliding_window", None) or 1 << 30) < theirs.max_position_embeddings
        if hides:
            with pytest.raises(InputError, match="sliding_window is"):
                from_hf({"model_type": kind, **config}, "x")
        else:
            assert from_hf({"model_type": kind, **config}, "x")["max_position_embeddings"] == (
                theirs.max_position_embeddings
            )
