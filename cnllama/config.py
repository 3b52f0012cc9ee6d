# SPDX-License-Identifier: Apache-2.0
"""The model configuration of a .cnl: its keys, their ranges, and the tensors that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cnllama.container import is_count
from cnllama.errors import InputError

# Nothing larger exists; the limits keep every product far inside 64 bits.
LIMITS = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 10,
    "max_position_embeddings": 1 << 26,
    "vocab_size": 1 << 22,
}
KEYS = (*LIMITS, "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings")
ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
ROPE_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")}
EMBEDDING, LM_HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Expected:
    """A tensor that the architecture has: a matrix [rows, cols], or with cols = 1 a vector [rows]."""

    rows: int
    cols: int
    vector: bool = False
    optional: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face stores it."""
        return (self.rows,) if self.vector else (self.rows, self.cols)


def check_config(config: object, where: str) -> dict[str, Any]:
    """The configuration of a .cnl, every value of the right type and range. `where` begins the InputError."""
    if not isinstance(config, dict):
        raise InputError(f"{where}: the config is a JSON {type(config).__name__}, expected an object")
    missing = [key for key in KEYS if key not in config]
    if missing:
        raise InputError(f"{where}: the config lacks {', '.join(missing)}; convert the model again")
    for key, limit in LIMITS.items():
        if not is_count(config[key], 1, limit):
            raise InputError(f"{where}: {key} is {config[key]!r:.40}, expected an integer from 1 to {limit:,}")
    _number(config, "rms_norm_eps", where, 1e-30, 1.0)
    _number(config, "rope_theta", where, 1.0, 1e15)
    if not isinstance(config["tie_word_embeddings"], bool):
        raise InputError(
            f"{where}: tie_word_embeddings is {config['tie_word_embeddings']!r:.40}, expected true or false"
        )
    heads, kv_heads, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if heads % kv_heads:
        raise InputError(
            f"{where}: num_attention_heads is {heads}, not a multiple of num_key_value_heads, {kv_heads}; "
            "correct the two in the model's config.json"
        )
    if head_dim % 2:
        raise InputError(f"{where}: head_dim is {head_dim}, expected an even number for rotary embeddings")
    if heads * head_dim > LIMITS["hidden_size"]:
        raise InputError(f"{where}: {heads} heads of {head_dim} are more than {LIMITS['hidden_size']:,} columns")
    _check_rope(config["rope_scaling"], config, where)
    return {key: config[key] for key in KEYS}


def expected_tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, Expected]]:
    """Every tensor of the architecture in file order, with its Hugging Face name; lm_head is absent when tied."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    yield EMBEDDING, Expected(vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", Expected(hidden, 1, vector=True)
        for part, name, shape in ("self_attn", "", attention), ("mlp", "post_attention_layernorm", mlp):
            if name:
                yield f"{prefix}{name}.weight", Expected(hidden, 1, vector=True)
            for projection, (rows, cols) in shape.items():
                yield f"{prefix}{part}.{projection}.weight", Expected(rows, cols)
            for projection, (rows, _) in shape.items():
                yield f"{prefix}{part}.{projection}.bias", Expected(rows, 1, vector=True, optional=True)
    yield FINAL_NORM, Expected(hidden, 1, vector=True)
    if not config["tie_word_embeddings"]:
        yield LM_HEAD, Expected(vocab, hidden)


def _number(values: Mapping[str, Any], key: str, where: str, low: float, high: float) -> None:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(f"{where}: {key} is {value!r:.40}, expected a number from {low:g} to {high:g}")


def _check_rope(scaling: object, config: Mapping[str, Any], where: str) -> None:
    if scaling is None:
        return
    where = f"{where}: rope_scaling"
    if not isinstance(scaling, dict):
        raise InputError(f"{where} is {scaling!r:.60}, expected an object or null")
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_REQUIRED:
        raise InputError(f"{where} has rope_type {kind!r:.40}, expected one of {', '.join(ROPE_REQUIRED)}")
    missing = [key for key in ROPE_REQUIRED[kind] if key not in scaling]
    if missing:
        raise InputError(f"{where} of type {kind} lacks {', '.join(missing)}")
    for key, value in scaling.items():
        if key == "rope_type":
            continue
        if key not in ROPE_REQUIRED[kind] + ROPE_OPTIONAL.get(kind, ()):
            raise InputError(f"{where} of type {kind} has {key!r:.40}, which is unknown; convert the model again")
        if key == "truncate":
            if not isinstance(value, bool):
                raise InputError(f"{where}: truncate is {value!r:.40}, expected true or false")
        elif key == "original_max_position_embeddings":
            if not is_count(value, 1, LIMITS["max_position_embeddings"]):
                raise InputError(f"{where}: {key} is {value!r:.40}, expected a positive integer")
        else:
            _number(scaling, key, where, 1.0 if key == "factor" else 1e-6, 1e6)
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise InputError(f"{where}: high_freq_factor must be over low_freq_factor")
    if kind == "yarn" and config["rope_theta"] <= 1:
        raise InputError(f"{where} of type yarn needs a rope_theta over 1")
    if kind == "dynamic" and config["head_dim"] <= 2:
        raise InputError(f"{where} of type dynamic needs a head_dim over 2")
