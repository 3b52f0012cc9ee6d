# SPDX-License-Identifier: Apache-2.0
"""The facts of a checkpoint that more than one source states: config.json, its own defaults, tensors, their index.

Every fact is compared at conversion. Where the sources agree, nothing is said; where they differ, the value is the one
that transformers 5 would take, with a notice, or the checkpoint is refused in one sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cnllama.config import check_config

from . import config_facts as c
from . import tensor_facts as t
from .checkpoint import Checkpoint, read_config
from .config_facts import Reading

NOTICE, REFUSED, EITHER = "notice", "refused", "notice or refused"


@dataclass(frozen=True)
class Fact:
    """name: what is stated. sources: who states it. difference: what a difference leads to. settle: compares them,
    decides in the Reading, and raises InputError where it refuses.
    """

    name: str
    sources: str
    difference: str
    settle: Callable[[Reading], None]


CONFIG_FACTS = (
    Fact("architecture", "model_type, architectures, auto_map", EITHER, c.family),
    Fact("files", "configuration_files, transformers_weights, the usual names", REFUSED, c.other_files),
    Fact("features", "keys of other variants, what the engine runs", REFUSED, c.features),
    Fact("sizes", "config.json, the defaults of transformers' config class", REFUSED, c.sizes),
    Fact("window", "sliding_window, max_position_embeddings", REFUSED, c.window),
    Fact("claimed type", "dtype, torch_dtype", REFUSED, c.stored_type),
    Fact("RoPE", "rope_theta, rope_scaling, rope_parameters, original_max_position_embeddings", EITHER, c.rope),
)
TENSOR_FACTS = (
    Fact("weights", "files of both formats, the index and its shards, an adapter beside them", EITHER, t.weights),
    Fact("names", "tensors, num_hidden_layers, tie_word_embeddings", REFUSED, t.names),
    Fact("shapes", "tensors, sizes in config.json", REFUSED, t.shapes),
    Fact("types", "tensors, dtype", EITHER, t.types),
    Fact("copies", "shards, `layers.` and `model.layers.`", REFUSED, t.copies),
    Fact("tied embeddings", "tie_word_embeddings, embed_tokens, lm_head", NOTICE, t.tied),
    Fact("biases", "attention_bias, mlp_bias, tensors", EITHER, t.biases),
    Fact("frequencies", "rope_theta, rotary_emb.inv_freq", NOTICE, t.frequencies),
    Fact("rows", "vocab_size, embed_tokens", NOTICE, t.rows),
)
FACTS = CONFIG_FACTS + TENSOR_FACTS


@dataclass(frozen=True)
class Settled:
    """checkpoint: with the tensors that count, lm_head only where it is not tied. config: of a .cnl without adapters.
    notices: for the user.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    notices: list[str]


def settle(directory: Path, adapters: Sequence[Path] = ()) -> Settled:
    """Opens a checkpoint and compares every fact of it. adapters: the directories that will be merged into it.

    Weights are read only where two tensors, or a tensor and zero, must be compared. Raises InputError.
    """
    reading = Reading(str(directory / "config.json"), read_config(directory), directory, adapters)
    config = _settle_config(reading)
    for fact in TENSOR_FACTS:
        fact.settle(reading)
    assert reading.checkpoint is not None
    config |= {key: reading.config[key] for key in ("tie_word_embeddings", "vocab_size")}
    return Settled(replace(reading.checkpoint, tensors=reading.tensors), config, reading.notices)


def from_hf(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The .cnl configuration of a Hugging Face config.json by itself, vocab_size as it claims.

    where: begins the InputError for another architecture, a value out of range, and for every feature that the engine
    lacks, by name.
    """
    return _settle_config(Reading(where, hf))


def _settle_config(reading: Reading) -> dict[str, Any]:
    for fact in CONFIG_FACTS:
        fact.settle(reading)
    return check_config(reading.config, reading.where)
