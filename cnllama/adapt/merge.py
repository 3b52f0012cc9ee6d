# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt merge`: adapters into a Hugging Face checkpoint, by the code that `cnllama convert` merges with."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnllama.adapt.output import write_json
from cnllama.container import Output
from cnllama.convert.merge import MergedTensor
from cnllama.convert.pack import make_plan
from cnllama.errors import InputError, from_os_error
from cnllama.stdio import say, show

_SIZES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
_CHUNK_VALUES = 1 << 23
_SHARD_BYTES = 4 << 30
_SMALL_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("base", metavar="BASE", type=Path, help="directory of a Hugging Face LLaMA")
    parser.add_argument("--lora", metavar="DIR", type=Path, nargs="+", required=True, help="adapters, in order")
    parser.add_argument("-o", "--out", metavar="DIR", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--dtype", choices=sorted(_SIZES), default="float16", help="of the result (default float16)")


def run(args: argparse.Namespace) -> int:
    """Merges; prints what was written. Returns the exit code."""
    size = merge_checkpoint(args.base, args.lora, args.out, args.dtype, progress=sys.stderr.isatty())
    show(f"{args.out}: {size / 1e9:.2f} GB, merged from {args.base} and {len(args.lora)} adapters")
    return 0


def merge_checkpoint(base: Path, adapters: Sequence[Path], out: Path, dtype: str, progress: bool = False) -> int:
    """Writes safetensors shards tensor by tensor; returns their bytes. config.json, written last, completes it.

    Raises InputError for adapters that do not fit, and for values too large for float16.
    """
    from tqdm import tqdm

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already, expected a new or empty directory")
    plan = make_plan(base, adapters)
    for notice in plan.notices:
        say(f"warning: {notice}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(out, error) from None
    shards = _shards(plan.tensors, _SIZES[dtype][1])
    total: int = sum(math.prod(tensor.shape) for tensor in plan.tensors.values())
    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="w", unit_scale=True, desc="merging", disable=not progress) as bar:
        for number, names in enumerate(shards, 1):
            stem = "model" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}"
            weight_map |= dict.fromkeys(names, f"{stem}.safetensors")
            _write_shard(out / f"{stem}.safetensors", [plan.tensors[name] for name in names], dtype, bar)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total * _SIZES[dtype][1]}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)
    tokenizer = plan.vocabulary.tokenizer.file.parent
    shutil.copyfile(plan.vocabulary.tokenizer.file, out / "tokenizer.model")
    for name in _SMALL_FILES:
        source = next((d / name for d in (tokenizer, base) if (d / name).exists()), None)
        if source is not None:
            shutil.copyfile(source, out / name)
    config = {**plan.checkpoint.config, "vocab_size": plan.config["vocab_size"]}
    config["tie_word_embeddings"] = plan.config["tie_word_embeddings"]
    config["torch_dtype"] = dtype
    config.pop("dtype", None)
    write_json(out / "config.json", config)
    return total * _SIZES[dtype][1]


def _shards(tensors: Mapping[str, MergedTensor], item: int) -> list[list[str]]:
    """Names in file order, cut where a shard would grow too large."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = math.prod(tensor.shape) * item
        if shards[-1] and size + bytes_ > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return shards


def _write_shard(path: Path, tensors: Sequence[MergedTensor], dtype: str, bar: Any) -> None:
    kind, item = _SIZES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + math.prod(tensor.shape) * item
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    output = Output(path)
    try:
        output.write(struct.pack("<Q", len(text)) + text, 0)
        offset = 8 + len(text)
        for tensor in tensors:
            step = tensor.shape[0] if len(tensor.shape) == 1 else max(1, _CHUNK_VALUES // tensor.shape[1])
            for row in range(0, tensor.shape[0], step):
                data = _encode(tensor, tensor.read(row, min(row + step, tensor.shape[0])), dtype)
                output.write(data, offset)
                offset += len(data)
                bar.update(len(data) // item)
            tensor.release()
        output.commit()
    except BaseException:
        output.discard()
        raise


def _encode(tensor: MergedTensor, values: np.ndarray[Any, np.dtype[np.float32]], dtype: str) -> bytes:
    if not np.isfinite(values).all():
        raise InputError(f"{tensor.files()}: tensor {tensor.name} holds NaN or infinity, expected finite numbers")
    if dtype == "float32":
        return np.ascontiguousarray(values, "<f4").tobytes()
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if not np.isfinite(half).all():
            raise InputError(
                f"{tensor.files()}: tensor {tensor.name} reaches {np.abs(values).max():g}, more than float16 holds; "
                "merge with --dtype bfloat16"
            )
        return half.tobytes()
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    # round to nearest, ties to even
    rounded: bytes = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2").tobytes()
    return rounded
