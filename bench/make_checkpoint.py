# SPDX-License-Identifier: Apache-2.0
"""Writes a random fp16 LLaMA checkpoint of a real model's shape, for measuring conversion and speed.

    python bench/make_checkpoint.py 7b --out DIR [--lora] [--shards N] [--tokenizer FILE]

DIR is what the converter takes as BASE; with --lora, DIR/lora is a PEFT adapter that grows the vocabulary to 49,953
with its own tokenizer. Weights are windows of one block of noise with another scale for each row: written as fast as
the disk takes them, in little memory, finite, and no row equal to another. Needs numpy, sentencepiece and tqdm.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sentencepiece import sentencepiece_model_pb2 as sp_model
from tiny_checkpoint import (
    llama_config,
    safetensors_header,
    sample_lines,
    tensor_shapes,
    train_tokenizer,
    write_json,
    write_tokenizer,
)
from tqdm import tqdm

Half = npt.NDArray[np.float16]

SHAPES: dict[str, dict[str, object]] = {
    "tiny": llama_config(hidden=256, intermediate=688, layers=4, heads=4, vocab=32000),
    "1b": llama_config(hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4, vocab=32000),
    "7b": llama_config(hidden=4096, intermediate=11008, layers=32, heads=32, vocab=32000),
    "13b": llama_config(hidden=5120, intermediate=13824, layers=40, heads=40, vocab=32000),
    "8b-gqa": llama_config(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=32000, context=8192),
}
GROWN_VOCAB = 49953
LORA_RANK = 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHUNK_BYTES = 8 << 20

TensorList = list[tuple[str, tuple[int, ...]]]


class RandomRows:
    """Rows of N(0, 1/columns) values: windows of one block of noise, each row with its own scale near one."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._noise = self._random.standard_normal(1 << 22, np.float32)

    def chunks(self, shape: tuple[int, ...]) -> Iterator[Half]:
        """The tensor's values in order, in pieces of about 8 MB. A vector (norm weights) is close to one."""
        if len(shape) == 1:
            yield (1 + 0.02 * self._random.standard_normal(shape[0], np.float32)).astype(np.float16)
            return
        rows, cols = shape
        step = max(1, min(rows, CHUNK_BYTES // (2 * cols), len(self._noise) // (2 * cols)))
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            start = int(self._random.integers(len(self._noise) - count * cols + 1))
            block = self._noise[start : start + count * cols].reshape(count, cols)
            scale = self._random.uniform(0.5, 1.5, (count, 1)).astype(np.float32) / np.float32(cols**0.5)
            yield (block * scale).astype(np.float16)


def write_tensors(path: Path, tensors: TensorList, rows: RandomRows, progress: tqdm[object]) -> None:
    """One safetensors file of random fp16 tensors."""
    with path.open("wb", buffering=0) as file:
        file.write(safetensors_header(tensors))
        for _, shape in tensors:
            for chunk in rows.chunks(shape):
                file.write(chunk.tobytes())
                progress.update(chunk.nbytes)


def byte_size(tensors: TensorList) -> int:
    """Bytes of these tensors in fp16."""
    return sum(2 * int(np.prod(shape)) for _, shape in tensors)


def split(tensors: TensorList, shards: int) -> list[TensorList]:
    """`tensors` in order, in at most `shards` runs of about equal bytes."""
    target = byte_size(tensors) / shards
    parts: list[TensorList] = [[]]
    written = 0
    for tensor in tensors:
        if parts[-1] and written >= target * len(parts):
            parts.append([])
        parts[-1].append(tensor)
        written += byte_size([tensor])
    return parts


def pad_pieces(model: bytes, size: int) -> bytes:
    """A SentencePiece model with pieces added up to `size`: Chinese characters it lacks, then words nobody writes."""
    proto = sp_model.ModelProto.FromString(model)
    present = {piece.piece for piece in proto.pieces}
    missing = size - len(present)
    if missing < 0:
        sys.exit(f"the tokenizer has {len(present)} pieces, more than the vocabulary of {size}: give another one")
    characters = (chr(code) for code in range(0x4E00, 0x9FD6) if chr(code) not in present)
    words = (f"⟨{index}⟩" for index in range(size))
    for piece in itertools.islice(itertools.chain(characters, words), missing):
        proto.pieces.add(piece=piece, score=0.0)
    return bytes(proto.SerializeToString())


def lora_tensors(config: dict[str, object], vocab: int) -> TensorList:
    """Names and shapes of a PEFT adapter on all seven projections, with saved embeddings of `vocab` rows."""
    tensors: TensorList = []
    for name, shape in tensor_shapes(config):
        stem = "base_model.model." + name.removesuffix(".weight")
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors.append((stem + ".weight", (vocab, shape[1])))
        elif stem.endswith(PROJECTIONS):
            tensors.append((stem + ".lora_A.weight", (LORA_RANK, shape[1])))
            tensors.append((stem + ".lora_B.weight", (shape[0], LORA_RANK)))
    return tensors


def write_base(directory: Path, config: dict[str, object], shards: int, model: bytes) -> int:
    """The base checkpoint: shards with their index, config.json, tokenizer. Returns the number of shards."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = split(list(tensor_shapes(config)), shards)
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        names = ["model.safetensors"]
    rows, total = RandomRows(1), sum(byte_size(part) for part in parts)
    with tqdm(total=total, unit="B", unit_scale=True, desc="base", disable=None) as progress:
        for name, part in zip(names, parts, strict=True):
            write_tensors(directory / name, part, rows, progress)
    if len(parts) > 1:
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor, _ in part}
        write_json(
            directory / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_tokenizer(directory, pad_pieces(model, int(str(config["vocab_size"]))))
    return len(parts)


def write_lora(directory: Path, config: dict[str, object], model: bytes) -> None:
    """A PEFT adapter that saves embed_tokens and lm_head of 49,953 rows and carries their tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = lora_tensors(config, GROWN_VOCAB)
    with tqdm(total=byte_size(tensors), unit="B", unit_scale=True, desc="lora", disable=None) as progress:
        write_tensors(directory / "adapter_model.safetensors", tensors, RandomRows(2), progress)
    write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": LORA_RANK,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": list(PROJECTIONS),
            "modules_to_save": ["embed_tokens", "lm_head"],
        },
    )
    write_tokenizer(directory, pad_pieces(model, GROWN_VOCAB))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a random fp16 LLaMA checkpoint of a real model's shape.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--lora", action="store_true", help="also write DIR/lora, an adapter with a larger vocabulary")
    parser.add_argument(
        "--shards", type=int, default=0, metavar="N", help="files of weights (default: about 5 GB each)"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model (default: trained on the spot)")
    args = parser.parse_args()
    config = SHAPES[args.shape]
    model = args.tokenizer.read_bytes() if args.tokenizer else train_tokenizer(sample_lines(), 1200)
    shards = args.shards or -(-byte_size(list(tensor_shapes(config))) // 5_000_000_000)
    if shards < 1:
        parser.error(f"--shards {shards}: at least 1")
    written = write_base(args.out, config, shards, model)
    if args.lora:
        write_lora(args.out / "lora", config, model)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: LLaMA {args.shape}, {written} shard(s){', adapter' if args.lora else ''}, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
