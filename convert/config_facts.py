# SPDX-License-Identifier: Apache-2.0
"""What config.json says, by itself and twice: types, the defaults of absent keys, RoPE. facts.py lists all facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnllama.config import LIMITS, ROPE_OPTIONAL, ROPE_REQUIRED
from cnllama.container import is_count, is_number
from cnllama.errors import InputError, printable

from .checkpoint import Checkpoint, SourceTensor

# What an absent key means in the config class of each model_type. None: null is allowed, and follows from other keys.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "sliding_window": 4096,
    },
}
DEFAULT_THETA = 10000.0
TYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16", "half": "F16",
    "bfloat16": "BF16",
}  # fmt: skip
_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
# Keys that some generic part of transformers reads for any model, and the values that change nothing.
_ORDINARY: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1.0),
    "is_causal": (True,),
    "is_encoder_decoder": (None, False),
    "attention_chunk_size": (None,),
    "per_layer_config": (None,),
    "kv_sharing_modes": (None,),
    "text_config": (None,),
    "attribute_map": (None, {}),
}
_SCALED_BY_LENGTH = ("yarn", "llama3")  # the types whose original length may stand outside, where it wins


@dataclass
class Reading:
    """A checkpoint while its facts are compared: what its files say and what has been decided so far.

    where: begins the errors about config.json. hf: it as it is. kind: the model_type that counts. config: of the .cnl.
    biased: whether it gives "self_attn" and "mlp" biases. claimed_type: of the weights, as safetensors spells it.
    adapters: the directories given with --lora.
    """

    where: str
    hf: Mapping[str, Any]
    directory: Path = Path()
    adapters: Sequence[Path] = ()
    kind: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    biased: dict[str, bool] = field(default_factory=dict)
    claimed_type: str | None = None
    checkpoint: Checkpoint | None = None
    tensors: dict[str, SourceTensor] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def value(self, key: str) -> Any:
        """Of a key of DEFAULTS, as config.json has it or as its absence means."""
        return self.hf.get(key, DEFAULTS[self.kind].get(key))

    def refuse(self, text: str) -> InputError:
        """The error of a sentence about config.json."""
        return InputError(f"{self.where}: {text}")

    def note(self, text: str) -> None:
        """Adds a sentence about config.json to what the user is told."""
        self.notices.append(f"{self.where}: {text}")


def family(r: Reading) -> None:
    """model_type counts, as in transformers' Auto classes; where there is none, architectures."""
    kind, architectures = r.hf.get("model_type"), r.hf.get("architectures")
    if architectures is None:
        architectures = []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise r.refuse(f"architectures is {architectures!r:.60}, expected a list of names")
    if kind is None:
        kind = next((kind for kind, name in _CLASSES.items() if name in architectures), None)
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise r.refuse(f"model_type is {r.hf.get('model_type')!r:.40}, expected 'llama' or 'mistral'")
    r.kind = kind
    if architectures and _CLASSES[kind] not in architectures:
        names = printable(", ".join(architectures))
        r.note(f"says model_type {kind} and architectures {names:.60}; model_type counts, as in transformers")
    if r.hf.get("auto_map"):
        r.note("names code of its own in auto_map, which is not run; the model is read as transformers' own class")


def other_files(r: Reading) -> None:
    """Files that config.json names in place of itself or of the usual weights."""
    names = r.hf.get("configuration_files")
    if names not in (None, [], ["config.json"]):
        raise r.refuse(
            f"configuration_files is {names!r:.60}: transformers reads one of them instead; rename the right one to "
            "config.json"
        )
    weights = r.hf.get("transformers_weights")
    if weights not in (None, "model.safetensors"):
        raise r.refuse(
            f"transformers_weights is {weights!r:.60}: transformers reads that file; rename it to model.safetensors "
            "and remove the key"
        )


def features(r: Reading) -> None:
    """What the engine lacks is refused by name, even where transformers' own class would not look at it."""
    quantization = r.hf.get("quantization_config", r.hf.get("compression_config"))
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        by = f"quantized by {method:.20}" if isinstance(method, str) else "quantized"
        raise r.refuse(
            f"quantization_config is {quantization!r:.60}: the weights are {by}; give the unquantized checkpoint"
        )
    if r.value("hidden_act") not in ("silu", "swish"):
        raise r.refuse(f"hidden_act is {r.value('hidden_act')!r:.60}; only silu is supported")
    layers = r.hf.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        raise r.refuse(f"layer_types is {layers!r:.60}; only full_attention is supported")
    for key, ordinary in _ORDINARY.items():
        if key in r.hf and r.hf[key] not in ordinary:
            raise r.refuse(f"{key} is {r.hf[key]!r:.60}; this variant is not supported")


def sizes(r: Reading) -> None:
    """Every size has the type and the default that it has in transformers' config class of this model_type."""
    for key, limit in LIMITS.items():
        value = r.value(key)
        if value is None and DEFAULTS[r.kind][key] is None:
            continue
        if not is_count(value, 1, limit):
            absent = "" if key in r.hf else " by default"
            raise r.refuse(f"{key} is {value!r:.40}{absent}, expected an integer from 1 to {limit:,}")
        r.config[key] = value
    hidden, heads = r.config["hidden_size"], r.config["num_attention_heads"]
    if "head_dim" not in r.config and hidden % heads:
        raise r.refuse(f"hidden_size is {hidden}, not a multiple of num_attention_heads, {heads}; correct the two")
    r.config.setdefault("head_dim", hidden // heads)
    r.config.setdefault("num_key_value_heads", heads)
    r.config |= {key: r.value(key) for key in ("rms_norm_eps", "tie_word_embeddings")}
    for part, key in (("self_attn", "attention_bias"), ("mlp", "mlp_bias")):
        r.biased[part] = r.value(key) if key in DEFAULTS[r.kind] else False
        if not isinstance(r.biased[part], bool):
            raise r.refuse(f"{key} is {r.biased[part]!r:.40}, expected true or false")


def window(r: Reading) -> None:
    """A window that is shorter than the context hides tokens, which the engine cannot."""
    width, length = r.value("sliding_window"), r.config["max_position_embeddings"]
    if width is None:
        return
    if not is_count(width, 1):
        raise r.refuse(f"sliding_window is {width!r:.40}, expected a positive integer or null")
    if width < length:
        absent = "" if "sliding_window" in r.hf else f" by default for model_type {r.kind}"
        raise r.refuse(
            f"sliding_window is {width}{absent}, less than the {length} of max_position_embeddings, and no windows are "
            f"supported; set it to null if the model was trained without one, else max_position_embeddings to {width}"
        )


def stored_type(r: Reading) -> None:
    """dtype, or torch_dtype where there is none, must be a type that weights can have; what is stored counts."""
    claimed = r.hf.get("dtype") if r.hf.get("dtype") is not None else r.hf.get("torch_dtype")
    if claimed is not None and (not isinstance(claimed, str) or claimed.removeprefix("torch.") not in TYPES):
        raise r.refuse(f"dtype is {claimed!r:.40}, expected one of {', '.join(TYPES)}; give the unquantized checkpoint")
    r.claimed_type = TYPES[claimed.removeprefix("torch.")] if claimed is not None else None


def rope(r: Reading) -> None:
    """rope_scaling counts before rope_parameters, what stands inside before what stands outside, but for one length."""
    found = {key: _rope_object(r, key) for key in ("rope_scaling", "rope_parameters")}
    scaling, parameters = found.values()
    chosen = scaling or parameters or {}
    theta, r.config["rope_scaling"] = _rope(r, chosen, r.note)
    r.config["rope_theta"] = theta
    if scaling and parameters:
        try:
            other = _rope(r, parameters, lambda text: None)
        except InputError:
            other = None
        if other != (theta, r.config["rope_scaling"]):
            r.note("says rope_scaling and rope_parameters, which differ; rope_scaling counts, as in transformers")


def _rope_object(r: Reading, key: str) -> dict[str, Any]:
    value = r.hf.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise r.refuse(f"{key} is {value!r:.60}, expected an object or null")
    nested = next((name for name, inner in value.items() if isinstance(inner, dict)), None)
    if nested is not None:
        raise r.refuse(f"{key} has an object of its own for {nested!r:.40}; one RoPE for all layers is supported")
    return value


def _rope(r: Reading, chosen: Mapping[str, Any], note: Callable[[str], None]) -> tuple[Any, dict[str, Any] | None]:
    """(theta, the .cnl's rope_scaling) of one of the two objects, under the names of transformers' rope_scaling."""
    theta = chosen.get("rope_theta", r.hf.get("rope_theta", DEFAULT_THETA))
    if "rope_theta" in chosen and r.hf.get("rope_theta", theta) != theta:
        note(
            f"says rope_theta {r.hf['rope_theta']!r:.40} and {theta!r:.40} inside the RoPE object; the inner one counts"
        )
    if chosen.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise r.refuse(
            f"partial_rotary_factor is {chosen['partial_rotary_factor']!r:.40}; this variant is not supported"
        )
    kind = chosen.get("rope_type", chosen.get("type", "default"))
    if kind != "default" and (not isinstance(kind, str) or kind not in ROPE_REQUIRED):
        raise r.refuse(
            f"RoPE scaling of type {kind!r:.40} is not supported, expected default, {', '.join(ROPE_REQUIRED)}"
        )
    if "rope_type" in chosen and chosen.get("type", kind) != kind:
        note(f"says rope_type {kind!r:.40} and type {chosen['type']!r:.40}; rope_type counts, as in transformers")
    read = (*ROPE_REQUIRED.get(kind, ()), *ROPE_OPTIONAL.get(kind, ()))
    ignored = sorted(set(chosen) - {*read, "rope_type", "type", "rope_theta", "partial_rotary_factor"})
    if ignored:
        note(f"RoPE of type {kind} has {printable(', '.join(ignored)):.60}, which is ignored, as in transformers")
    if kind == "default":
        return theta, None
    given = [key for key in read if chosen.get(key) is not None or (key == "truncate" and key in chosen)]
    result = {"rope_type": kind} | {key: chosen[key] for key in given}
    for key in ("mscale", "mscale_all_dim"):  # transformers treats zero like an absent one
        if result.get(key) == 0:
            del result[key]
    if kind in _SCALED_BY_LENGTH:
        result["original_max_position_embeddings"] = _original_length(r, chosen, kind, note)
    return theta, result


def _original_length(r: Reading, chosen: Mapping[str, Any], kind: str, note: Callable[[str], None]) -> Any:
    """The length before scaling: at the top of config.json, else with the RoPE type, else the present one."""
    key, length = "original_max_position_embeddings", r.config["max_position_embeddings"]
    inner = chosen.get(key) if chosen.get(key) is not None else length
    value = r.hf.get(key, inner)
    if not is_count(value, 1, LIMITS["max_position_embeddings"]):
        raise r.refuse(f"{key} is {value!r:.40}, expected a positive integer")
    if chosen.get(key) is not None and value != inner:
        note(f"says {key} {value} and {inner!r:.40} inside the RoPE object; the outer one counts, as in transformers")
    factor = chosen.get("factor")
    if kind == "yarn" and value != length and is_number(factor) and factor != length / value:
        note(
            f"says factor {factor:g}, and lengths of {length} and before scaling {value}, which are {length / value:g} "
            "times; the factor counts, as in transformers"
        )
    return value
