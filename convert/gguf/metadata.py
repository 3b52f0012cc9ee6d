# SPDX-License-Identifier: Apache-2.0
"""The metadata of a GGUF file: architecture, rotary scaling and tokenizer under llama.cpp's keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .container import ALIGNMENT, GgmlType, Value, float32, text, uint32
from .tokenizer import tokenizer_metadata

# llama.cpp's name for the type that most of the weights have.
_FILE_TYPES = {
    GgmlType.F32: 0,
    GgmlType.F16: 1,
    GgmlType.Q4_0: 2,
    GgmlType.Q4_1: 3,
    GgmlType.Q8_0: 7,
    GgmlType.Q5_0: 8,
    GgmlType.Q5_1: 9,
}
_QUANTIZATION_VERSION = 2

FloatArray = npt.NDArray[np.float64]


class Described(Protocol):
    """A model as its metadata describe it: what a CnlFile says of itself, or what a checkpoint would be packed with."""

    @property
    def path(self) -> Path:
        """Named in messages; its stem is the model's name."""

    @property
    def config(self) -> Mapping[str, Any]:
        """As in a .cnl."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def tokenizer_model(self) -> bytes:
        """The SentencePiece model."""

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        """The `tokenizer` metadata of a .cnl."""

    @property
    def generation(self) -> Mapping[str, Any]:
        """The `generation` metadata of a .cnl."""

    @property
    def template(self) -> str:
        """A name of templates.py."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """With "content_sha256" where the model has one."""


@dataclass
class Metadata:
    """Keys of the file, the tensor that goes with a rotary scaling, and what llama.cpp will do otherwise than we do."""

    values: dict[str, Value]
    rope_factors: FloatArray | None = None  # [head_dim / 2]
    warnings: list[str] = field(default_factory=list)


def make_metadata(file: Described, main_type: GgmlType) -> Metadata:
    """Everything but the table of tensors. Raises InputError for a tokenizer that llama.cpp cannot reproduce."""
    result = Metadata(
        {
            "general.architecture": text("llama"),
            "general.type": text("model"),
            "general.name": text(file.path.stem),
            "general.alignment": uint32(ALIGNMENT),
            "general.file_type": uint32(_FILE_TYPES[main_type]),
            "general.quantization_version": uint32(_QUANTIZATION_VERSION),
        }
    )
    if "content_sha256" in file.fingerprint:
        result.values["cnllama.content_sha256"] = text(file.fingerprint["content_sha256"])
    result.values |= _architecture(file.config)
    _add_rope(result, file.config)
    result.values |= tokenizer_metadata(file, result.warnings)
    return result


def _architecture(config: Mapping[str, Any]) -> dict[str, Value]:
    counts = {
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "rope.dimension_count": "head_dim",
    }
    values = {f"llama.{key}": uint32(config[name]) for key, name in counts.items()}
    values["llama.attention.layer_norm_rms_epsilon"] = float32(config["rms_norm_eps"])
    values["llama.rope.freq_base"] = float32(config["rope_theta"])
    return values


def _add_rope(metadata: Metadata, config: Mapping[str, Any]) -> None:
    """Scaling by llama.cpp's own rule where it has the same one, else by a factor for each frequency."""
    scaling = config["rope_scaling"]
    if scaling is None:
        return
    kind, factor = scaling["rope_type"], scaling.get("factor", 1.0)
    prefix = "llama.rope.scaling."
    if kind == "dynamic":
        metadata.warnings.append(
            f"llama.cpp has no dynamic RoPE scaling: the file is the same model up to "
            f"{config['max_position_embeddings']} positions and runs unscaled beyond"
        )
    elif kind == "linear":
        metadata.values |= {prefix + "type": text("linear"), prefix + "factor": float32(factor)}
    elif kind == "llama3":
        metadata.rope_factors = _plain(config) / _llama3(scaling, _plain(config))
    else:
        natural = 0.1 * math.log(factor) + 1  # the amplitude that llama.cpp gives YaRN by itself
        amplitude = _amplitude(scaling)
        standard = scaling.get("beta_fast", 32.0) == 32 and scaling.get("beta_slow", 1.0) == 1
        if standard and scaling.get("truncate", True):
            metadata.values |= {
                prefix + "type": text("yarn"),
                prefix + "factor": float32(factor),
                prefix + "original_context_length": uint32(scaling["original_max_position_embeddings"]),
            }
            amplitude /= natural
        else:  # llama.cpp reads other ramps for other architectures only
            metadata.rope_factors = _plain(config) / _yarn(scaling, config)
        if amplitude != 1:
            metadata.values[prefix + "attn_factor"] = float32(amplitude)


def _plain(config: Mapping[str, Any]) -> FloatArray:
    """[head_dim / 2] inverse frequencies without scaling."""
    exponents: FloatArray = np.arange(config["head_dim"] // 2) * (-2 / config["head_dim"])
    return np.power(float(config["rope_theta"]), exponents)


def _llama3(scaling: Mapping[str, Any], plain: FloatArray) -> FloatArray:
    context, low, high = (
        scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    # Turns within the original context decide: few are interpolated, many are left, between the two it is blended.
    smooth = np.clip((context * plain / (2 * math.pi) - low) / (high - low), 0, 1)
    return np.asarray((1 - smooth) * plain / scaling["factor"] + smooth * plain)


def _yarn(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> FloatArray:
    dims, theta = config["head_dim"], config["rope_theta"]

    def dimension(turns: float) -> float:
        context = scaling["original_max_position_embeddings"]
        return float(dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta)))

    low, high = dimension(scaling.get("beta_fast", 32.0)), dimension(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    plain = _plain(config)
    ramp = np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
    return np.asarray(plain / scaling["factor"] * ramp + plain * (1 - ramp))


def _amplitude(scaling: Mapping[str, Any]) -> float:
    """What YaRN multiplies cos and sin with."""
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    growth = 0.1 * math.log(scaling["factor"])
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return float((growth * scaling["mscale"] + 1) / (growth * scaling["mscale_all_dim"] + 1))
    return growth + 1
