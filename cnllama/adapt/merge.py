# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt merge`: adapters into a Hugging Face checkpoint, by the code that `cnllama convert` merges with."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cnllama.adapt.hf_checkpoint import OutTensor, write_safetensors
from cnllama.adapt.kept import result_directory
from cnllama.arguments import add_list_option, add_output_option
from cnllama.convert.merge import MergedTensor, bias_settings
from cnllama.convert.pack import Plan, make_plan
from cnllama.errors import InputError
from cnllama.files import copy_file, write_json
from cnllama.paths import exists
from cnllama.stdio import say, show

_SIZES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
_SHARD_BYTES = 4 << 30
_SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("base", metavar="BASE", type=Path, help="directory of a Hugging Face LLaMA")
    add_list_option(parser, "--lora", metavar="DIR", type=Path, required=True, help="adapters, in order")
    add_output_option(parser, "DIR", "checkpoint to write")
    parser.add_argument("--dtype", choices=sorted(_SIZES), default="float16", help="of the result (default float16)")


def run(args: argparse.Namespace) -> int:
    """Merges; prints what was written. Returns the exit code."""
    size = merge_checkpoint(args.base, args.lora, args.output, args.dtype, progress=sys.stderr.isatty())
    show(f"{args.output}: {size / 1e9:.2f} GB, merged from {args.base} and {len(args.lora)} adapters")
    return 0


def merge_checkpoint(base: Path, adapters: Sequence[Path], out: Path, dtype: str, progress: bool = False) -> int:
    """Writes safetensors shards tensor by tensor; returns their bytes. config.json, written last, completes it.

    What a killed run left in `out` is begun anew, and a finished result of the same inputs is left as it is. Raises
    InputError for adapters that do not fit, for values too large for float16, and where `out` holds anything else.
    """
    plan = make_plan(base, adapters)
    if any(bias_settings(plan.tensors).values()) and plan.checkpoint.config.get("model_type") == "mistral":
        raise InputError(
            f"{adapters[-1]}: gives layers biases, for which transformers' Mistral has no place; convert base and "
            "adapters directly with cnllama convert"
        )
    for notice in plan.notices:
        say(f"warning: {notice}")
    kind, item = _SIZES[dtype]
    size: int = sum(math.prod(tensor.shape) for tensor in plan.tensors.values()) * item
    inputs = {"base": [base], "adapters": adapters}
    options = {"dtype": dtype}
    with result_directory(out, "adapt merge", inputs=inputs, options=options, last="config.json", needed=size) as own:
        if own is not None:
            _write_weights(plan, out, kind, size, progress)
            _write_small_files(plan, base, out, dtype)
    return size


def _write_weights(plan: Plan, out: Path, kind: str, size: int, progress: bool) -> None:
    from tqdm import tqdm

    tensors = {name: _out_tensor(tensor, kind) for name, tensor in plan.tensors.items()}
    shards = _shards(tensors)
    weight_map: dict[str, str] = {}
    with tqdm(total=size, unit="B", unit_scale=True, desc="merging", disable=not progress) as bar:
        for number, names in enumerate(shards, 1):
            file = "model" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}"
            weight_map |= dict.fromkeys(names, f"{file}.safetensors")
            write_safetensors(out / f"{file}.safetensors", {name: tensors[name] for name in names}, bar.update)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)


def _out_tensor(tensor: MergedTensor, kind: str) -> OutTensor:
    return OutTensor(kind, tuple(tensor.shape), tensor.read, tensor.release, tensor.files())


def _write_small_files(plan: Plan, base: Path, out: Path, dtype: str) -> None:
    tokenizer = plan.vocabulary.tokenizer.file.parent
    copy_file(plan.vocabulary.tokenizer.file, out / "tokenizer.model")
    for name in _SMALL_FILES:
        source = next((d / name for d in (tokenizer, base) if exists(d / name)), None)
        if source is not None:
            copy_file(source, out / name)
    config = {**plan.checkpoint.config, "vocab_size": plan.config["vocab_size"]}
    config["tie_word_embeddings"] = plan.config["tie_word_embeddings"]
    config |= {key: True for key, there in bias_settings(plan.tensors).items() if there}
    config["torch_dtype"] = dtype
    config.pop("dtype", None)
    write_json(out / "config.json", config)


def _shards(tensors: Mapping[str, OutTensor]) -> list[list[str]]:
    """Names in file order, cut where a shard would grow too large."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
