# SPDX-License-Identifier: Apache-2.0
"""What a directory or a list of tensor names is when it is not the checkpoint that was expected, and the mend."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cnllama.errors import InputError, printable
from cnllama.paths import PathLike, exists, is_dir, is_file
from cnllama.signatures import what_the_file_is

_LISTED = 5
_LOOKED_AT = 2000  # entries of a directory
_META = "convert them with transformers' convert_llama_weights_to_hf.py"
_UNQUANTIZED = "give the unquantized checkpoint that it was made from"
_GATHER = "gather them first, with accelerate merge-weights DIR OUT"
_ZERO = "gather them first, with the zero_to_fp32.py that lies beside them"
_PYTORCH = "save the model with PyTorch, as safetensors"
# File names of other layouts -> what they are and the mend; the first that a directory holds counts.
_LAYOUTS: tuple[tuple[str, str, str], ...] = (
    ("consolidated*.pth", "Meta's own .pth files", _META),
    ("consolidated*.safetensors", "weights under Meta's or Mistral's own names", "get the Hugging Face files"),
    ("*.gguf", "a GGUF file for llama.cpp", "get the Hugging Face checkpoint that it was made from"),
    ("ggml-*.bin", "a GGML file for llama.cpp", "get the Hugging Face checkpoint that it was made from"),
    ("zero_pp_rank_*", "the shards of a DeepSpeed run", _ZERO),
    ("mp_rank_*", "the shards of a DeepSpeed run", _ZERO),
    ("global_step*", "the shards of a DeepSpeed run", _ZERO),
    ("pytorch_model_fsdp*", "the shards of an FSDP run", _GATHER),
    ("*.distcp", "the shards of an FSDP run", _GATHER),
    ("tf_model*.h5", "weights for TensorFlow", _PYTORCH),
    ("*.ckpt.index", "weights for TensorFlow", _PYTORCH),
    ("flax_model*.msgpack", "weights for Flax", _PYTORCH),
    ("*.onnx", "a model for ONNX", "get the Hugging Face checkpoint that it was made from"),
    ("openvino_model*", "a model for OpenVINO", "get the Hugging Face checkpoint that it was made from"),
    ("*.aria2", "an unfinished download", "finish it"),
    ("*.incomplete", "an unfinished download", "finish it"),
    ("*.crdownload", "an unfinished download", "finish it"),
    ("model.*.safetensors", "a variant of the weights", "rename it to model.safetensors (and the index as well)"),
    ("pytorch_model.*.bin", "a variant of the weights", "rename it to pytorch_model.bin (and the index as well)"),
)  # fmt: skip


def no_checkpoint(directory: Path) -> str:
    """What stands where a directory with a config.json was expected: a sentence without its beginning."""
    expected = "expected the directory of a Hugging Face LLaMA"
    if not exists(directory):
        return f"there is no such directory, {expected}"
    if not is_dir(directory):
        contents = what_the_file_is(directory)
        beside = directory.name.endswith((".safetensors", ".bin", ".json")) and _there(directory.parent / "config.json")
        mend = f"; give the directory {directory.parent}" if beside else ""
        what = f" ({contents.what})" if contents is not None and not beside else ""
        return f"this is a file{what}, {expected}{mend}"
    if _there(directory / "adapter_config.json"):
        return "this is a LoRA adapter, expected a base model; give it with --lora"
    if _there(directory / "params.json"):
        return f"there is no config.json but Meta's params.json: these are Meta's own files; {_META}"
    return f"there is no config.json, {expected}{_elsewhere(directory)}"


def no_weights(directory: Path) -> str:
    """What stands in a directory with a config.json where weights were expected: a sentence without its beginning."""
    names = _entries(directory)
    shards = sorted(n for n in names if re.fullmatch(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)", n))
    if shards:
        index = "pytorch_model.bin" if shards[0].endswith(".bin") else "model.safetensors"
        return f"{shards[0]} is a shard without an index; get {index}.index.json too"
    layout = foreign_layout(directory)
    if layout is not None:
        return f"there are no weights in Hugging Face's layout but {layout}"
    if "adapter_config.json" in names:
        return "there are no weights but a LoRA adapter; give the base model as BASE and this directory with --lora"
    other = sorted(n for n in names if n.endswith(".safetensors"))
    if other and {"quantize_config.json", "quant_config.json"} & names:
        return f"{other[0]} is quantized, as quantize_config.json says; {_UNQUANTIZED}"
    if len(other) == 1:
        return f"there is no model.safetensors but {printable(other[0])}; rename it, if it holds the whole model"
    expected = "expected model.safetensors or pytorch_model.bin or the index file of shards"
    return f"there are no weights, {expected}{_elsewhere(directory, beside_config=True)}"


def foreign_layout(directory: Path) -> str | None:
    """What it is, with a file's name, and the mend, of the first of _LAYOUTS that the directory holds."""
    names = sorted(_entries(directory))
    for pattern, what, mend in _LAYOUTS:
        expression = re.compile(re.escape(pattern).replace(r"\*", ".*"))
        found = next((name for name in names if expression.fullmatch(name)), None)
        if found is not None:
            return f"{what} ({printable(found)}); {mend}"
    return None


def _there(path: PathLike, kind: Callable[[PathLike], bool] = exists) -> bool:
    """The same as a guess: what cannot be told, here where the mend is looked for, is no."""
    try:
        return kind(path)
    except InputError:
        return False


def _entries(directory: Path) -> set[str]:
    try:
        return {path.name for path in islice(directory.iterdir(), _LOOKED_AT)}
    except OSError:
        return set()


def _elsewhere(directory: Path, beside_config: bool = False) -> str:
    """The mend where the checkpoint lies one step away, else nothing."""
    hub = _hub_snapshot(directory)
    if hub is not None:
        return hub
    holders = sorted(path for path in _children(directory) if _there(path / "config.json"))
    runs = [path for path in _children(directory) if re.fullmatch(r"checkpoint-\d+", path.name)]
    if runs:
        last = max(runs, key=lambda path: int(path.name.split("-")[1]))
        how = " with --lora" if _there(last / "adapter_config.json") else ""
        return f"; these are the checkpoints of a training run, give one of them{how}: {last}"
    if len(holders) == 1:
        return f"; the checkpoint lies in {holders[0]}, give that"
    if holders:
        return f"; several lie in it, give one of them: {', '.join(str(path) for path in holders[:3])}"
    if not beside_config and _there(directory.absolute().parent / "config.json"):
        return f"; it lies one step up, give {directory.absolute().parent}"
    layout = foreign_layout(directory)
    return f"; what lies there is {layout}" if layout and not beside_config else ""


def _children(directory: Path) -> list[Path]:
    """The directories in it."""
    return [directory / name for name in sorted(_entries(directory)) if _there(directory / name, is_dir)]


def _hub_snapshot(directory: Path) -> str | None:
    """The mend for a model's directory in the hub's cache, or its snapshots, refs or blobs."""
    here = directory.absolute()
    top = next((path for path in (here, here.parent) if path.name.startswith("models--")), None)
    if top is None:
        return None
    snapshots = [path for path in _children(top / "snapshots") if _there(path / "config.json")]
    if not snapshots:
        return "; this is a model in the hub's cache, and no snapshot of it has a config.json: download it again"
    wanted = next((text for text in _texts(top / "refs")), "")
    chosen = next((path for path in snapshots if path.name == wanted), snapshots[-1])
    return f"; this is a model in the hub's cache, give the snapshot in it: {chosen}"


def _texts(refs: Path) -> Iterator[str]:
    """The hashes that the names in `refs` stand for, main first."""
    for name in sorted(_entries(refs), key=lambda name: name != "main"):
        try:
            if is_file(refs / name) and (refs / name).stat().st_size < 100:
                yield (refs / name).read_text(encoding="ascii", errors="replace").strip()
        except (OSError, InputError):
            continue


def no_state_dict(state: object) -> str:
    """What a .bin holds instead of a table of tensors."""
    if not isinstance(state, dict):
        return f"holds a {type(state).__name__}, expected a table of tensors; save the model's state_dict"
    keys = [key for key in state if isinstance(key, str)]
    inner = next(
        (k for k in ("state_dict", "module", "model", "model_state_dict") if isinstance(state.get(k), dict)), None
    )
    mend = f"save what lies under {inner!r} alone" if inner else "save the model's state_dict alone"
    listed = ", ".join(repr(printable(key)[:30]) for key in keys[:_LISTED])
    return f"holds no plain table of tensors but {listed or 'other objects'}; {mend}"


class _Family(NamedTuple):
    """Names that belong together: a pattern that one of them matches, what they are, and the mend."""

    pattern: re.Pattern[str]
    what: str
    mend: str


def _family(pattern: str, what: str, mend: str) -> _Family:
    return _Family(re.compile(pattern), what, mend)


_OTHER = "it cannot run here; give a LLaMA"
_FAMILIES = (
    _family(
        r"(^|\.)lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)|\.base_layer\.|\.modules_to_save\.",
        "of a LoRA that was not merged",
        "merge it before saving (model = model.merge_and_unload()), or give the base and the adapter with --lora",
    ),
    _family(r"\.biases$", "of weights quantized by MLX", _UNQUANTIZED),
    _family(r"\.(qweight|qzeros|g_idx|scales)$", "of weights quantized by GPTQ or AWQ", _UNQUANTIZED),
    _family(
        r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format)$|\.quant_state\.",
        "of weights quantized by bitsandbytes",
        _UNQUANTIZED,
    ),
    _family(
        r"\.(weight_scale|weight_scale_inv|input_scale|output_scale|activation_scale|k_scale|v_scale|kv_scale)$",
        "of weights quantized to 8-bit floats or integers",
        _UNQUANTIZED,
    ),
    _family(
        r"\.(weight_packed|weight_shape|weight_zero_point|W_q|codes|codebooks|q_weight|q_scale|q_invperm|trellis|suh|svh"
        r"|Qidxs|weight_scales|_packed_weight)$",
        "of quantized weights",
        _UNQUANTIZED,
    ),
    _family(
        r"^(blk\.\d+\.|token_embd\.|output_norm\.)",
        "those of GGUF, of llama.cpp",
        "get the Hugging Face checkpoint that it was made from",
    ),
    _family(
        r"(^|\.)attention\.w[qkvo]\.weight$|(^|\.)feed_forward\.w[123]\.weight$|^tok_embeddings\.weight$",
        "Meta's or Mistral's own",
        _META,
    ),
    _family(r"\.attention\.wqkv\.", "those of InternLM2", _OTHER),
    _family(
        r"\.(block_sparse_moe|experts|shared_expert\w*)\.|\.mlp\.gate\.weight$", "those of a mixture of experts", _OTHER
    ),
    _family(r"\.(q_a_proj|kv_a_proj\w*|kv_b_proj|q_b_proj)\.", "those of DeepSeek's latent attention", _OTHER),
    _family(
        r"\.self_attn\.(q_norm|k_norm)\.", "those of a model that normalizes queries and keys (Qwen3, OLMo2)", _OTHER
    ),
    _family(r"\.(pre|post)_feedforward_layernorm\.", "those of Gemma or OLMo2", _OTHER),
    _family(r"\.W_pack\.", "those of Baichuan", _OTHER),
    _family(
        r"\.(qkv_proj|gate_up_proj)\.",
        "those of fused matrices (Phi-3, or an engine's own copy)",
        "get the original files",
    ),
    _family(r"\.query_key_value\.", "those of GPT-NeoX, Falcon, BLOOM or ChatGLM", _OTHER),
    _family(r"(^|\.)(c_attn|c_fc|c_proj|wte|wpe)\.", "those of GPT-2 or the first Qwen", _OTHER),
    _family(
        r"(^|\.)(vision_tower|vision_model|visual|mm_projector|multi_modal_projector)\.",
        "of a model with images",
        _OTHER,
    ),
    _family(
        r"^(score|classifier|v_head|value_head|reward_head)\b",
        "of a classifier, reward or value model",
        "save its language model alone",
    ),
    _family(
        r"(^|\.)(exp_avg|exp_avg_sq|optimizer)(\.|$)", "of an optimizer's state", "save the model's state_dict alone"
    ),
)
_WRAPPERS = {
    "module.": "DataParallel adds it: save model.module",
    "_orig_mod.": "torch.compile adds it: save model._orig_mod",
    "_fsdp_wrapped_module.": "FSDP adds it: save the gathered model",
    "_forward_module.": "Lightning adds it: save the model inside",
    "base_model.model.": "PEFT adds it: save model.merge_and_unload()",
    "pretrained_model.": "TRL adds it: save model.pretrained_model",
    "language_model.": "a model with images adds it: save its language model",
}


def wrong_names(missing: Sequence[str], unknown: Sequence[str], expected: Collection[str], layers: int) -> str:
    """What is wrong with the names of a checkpoint's tensors: a sentence without its beginning.

    missing: names that the architecture has and the files lack. unknown: the reverse, as stored or canonical. expected:
    all names of the architecture. layers: how many config.json states.
    """
    found = _prefix(missing, unknown)
    if found is not None:
        prefix, count = found
        reason = next(
            (text for known, text in _WRAPPERS.items() if known in prefix), "the program that saved it adds it"
        )
        return (
            f"{count} names begin with {printable(prefix)!r} ({unknown[0]}); {reason}, or take it off: "
            f"{{name.removeprefix({printable(prefix)!r}): tensor for name, tensor in state_dict.items()}}"
        )
    for family in _FAMILIES:
        example = next((name for name in unknown if family.pattern.search(name)), None)
        if example is not None:
            place = f" where {missing[0]} is expected" if missing else ""
            return f"the names are {family.what} ({example}{place}); {family.mend}"
    depth = _depth(missing, unknown, expected, layers)
    if depth is not None:
        return depth
    if not unknown:
        return f"{some(missing)} missing; get all files of the checkpoint again"
    other = "this is another architecture, or config.json is another model's"
    if not missing:
        return f"{some(unknown)} in the checkpoint and in no LLaMA of this config.json; {other}"
    return (
        f"{some(missing)} missing, and in their place {some(unknown)} there, which no LLaMA of this config has; {other}"
    )


def _prefix(missing: Sequence[str], unknown: Sequence[str]) -> tuple[str, int] | None:
    """The prefix without which most unknown names are missing ones, and how many have it."""
    wanted = {*missing, *(name.removeprefix("model.") for name in missing)}
    counts: Counter[str] = Counter()
    for name in unknown:
        dots = [i + 1 for i, character in enumerate(name) if character == "."]
        cut = next((i for i in dots if name[i:] in wanted), None)
        if cut is not None:
            counts[name[:cut]] += 1
    if not counts:
        return None
    prefix, count = counts.most_common(1)[0]
    return (prefix, count) if 2 * count > len(unknown) else None


def _depth(missing: Sequence[str], unknown: Sequence[str], expected: Collection[str], layers: int) -> str | None:
    """The sentence for a checkpoint whose only fault is another number of layers."""
    if unknown and not missing:
        beyond = [_layer(name) for name in unknown]
        if layers not in beyond or not all(_LAYER.sub("model.layers.0.", name) in expected for name in unknown):
            return None
        return (
            f"config.json says num_hidden_layers {layers} but the files hold {max(beyond) + 1} layers ({unknown[0]}); "
            f"set it to {max(beyond) + 1}, transformers would drop the others"
        )
    lacking = {_layer(name) for name in missing}
    first = min(lacking, default=-1)
    if unknown or first < 1 or lacking != set(range(first, layers)):
        return None
    return (
        f"config.json says num_hidden_layers {layers} but the files hold {first} layers ({missing[0]} is missing); "
        "get the missing files"
    )


_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


def _layer(name: str) -> int:
    """The number of the layer that a tensor is of; -1 for another one."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def some(names: Sequence[str]) -> str:
    """'tensors a, b and 7 more are'."""
    if len(names) == 1:
        return f"tensor {names[0]} is"
    listed, more = ", ".join(names[:_LISTED]), len(names) - _LISTED
    return f"tensors {listed}{f' and {more} more' if more > 0 else ''} are"
