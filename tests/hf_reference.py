# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints for the facts' tests, and what transformers and the converter make of a directory."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnllama.convert.pack import Plan, make_plan, merged_tensors
from models import small_config, write_json, write_tokenizer, write_weights
from reference import rotary_frequencies

from cnllama.errors import InputError

os.environ["TQDM_DISABLE"] = "1"

Tensors = dict[str, np.ndarray]
Config = dict[str, Any]
HIDDEN, HEADS, LENGTH = 32, 2, 64
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def small(vocab: int, **changes: Any) -> Config:
    """A config.json of hidden 32, 2 layers and 2 heads over one kv head, for 64 positions."""
    shape = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    return small_config(vocab, **(shape | {"max_position_embeddings": LENGTH, "torch_dtype": "float32"} | changes))


def write(directory: Path, tokenizer: bytes, config: Config, tensors: Tensors, **container: Any) -> Path:
    """The directory anew, with these files and no others. container: of write_weights."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_json(directory / "config.json", config)
    write_weights(directory, tensors, **container)
    write_tokenizer(directory, tokenizer)
    return directory


def refusal(directory: Path, **options: Any) -> str:
    """The sentence with which a plan is refused."""
    with pytest.raises(InputError) as caught:
        make_plan(directory, **options)
    sentence = str(caught.value)
    assert sentence.isprintable(), "one line, no control character"
    return sentence


def check(directory: Path) -> str:
    """What became of a checkpoint: "refused", "both" or "ours alone". Fails where the two are not the same model."""
    ours, theirs = by_converter(directory), by_transformers(directory)
    if isinstance(ours, str):
        assert "\n" not in ours.split("\nvocabulary sizes found:")[0]
        assert str(directory) in ours
        return "refused"
    if theirs is None:
        return "ours alone"
    assert_same(ours[0], theirs)
    return "both"


@dataclass(frozen=True)
class Loaded:
    """tensors: float32, lm_head there even where it is tied, biases of zero left out. facts: of the config."""

    tensors: Tensors
    facts: dict[str, Any]
    frequencies: np.ndarray
    amplitude: float


def by_transformers(directory: Path) -> Loaded | None:
    """None where transformers refuses, or has to make weights up."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    except Exception:  # whatever its parts raise
        return None
    if any(not name.endswith(".bias") for name in info["missing_keys"]):
        return None
    tensors = {name: value.float().numpy() for name, value in model.state_dict().items()}
    config, rotary = model.config, model.model.rotary_emb
    facts = {
        "tied": bool(np.array_equal(tensors[EMBED], tensors[HEAD])),
        "layers": len(model.model.layers),
        "eps": model.model.norm.variance_epsilon,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "length": config.max_position_embeddings,
        "window": _window(config),
    }
    return Loaded(_without_zeros(tensors), facts, rotary.inv_freq.numpy(), float(rotary.attention_scaling))


def _window(config: Any) -> int:
    """Tokens that a position sees, which is no less than there are positions where there is no window."""
    window = getattr(config, "sliding_window", None)
    length = int(config.max_position_embeddings)
    return length if window is None else min(length, int(window))


def by_converter(directory: Path) -> tuple[Loaded, Plan] | str:
    """The sentence where it refuses."""
    try:
        plan = make_plan(directory)
    except InputError as error:
        return str(error)
    tensors = dict(merged_tensors(plan))
    tensors.setdefault(HEAD, tensors[EMBED])
    frequencies, amplitude = rotary_frequencies(plan.config, 8)
    facts = {
        "tied": plan.config["tie_word_embeddings"] or bool(np.array_equal(tensors[EMBED], tensors[HEAD])),
        "layers": plan.config["num_hidden_layers"],
        "eps": plan.config["rms_norm_eps"],
        "heads": plan.config["num_attention_heads"],
        "kv_heads": plan.config["num_key_value_heads"],
        "head_dim": plan.config["head_dim"],
        "length": plan.config["max_position_embeddings"],
        "window": plan.config["max_position_embeddings"],
    }
    return Loaded(_without_zeros(tensors), facts, np.asarray(frequencies), float(amplitude)), plan


def _without_zeros(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.endswith(".bias") or value.any()}


def assert_same(ours: Loaded, theirs: Loaded) -> None:
    """Equal tensors to 1e-6, and a config of one meaning."""
    assert ours.facts == theirs.facts
    assert set(ours.tensors) == set(theirs.tensors)
    for name, expected in theirs.tensors.items():
        np.testing.assert_allclose(ours.tensors[name], expected, rtol=1e-6, atol=0, err_msg=name)
    np.testing.assert_allclose(ours.frequencies, theirs.frequencies, rtol=1e-5)
    np.testing.assert_allclose(ours.amplitude, theirs.amplitude, rtol=1e-6)
