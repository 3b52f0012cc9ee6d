# SPDX-License-Identifier: Apache-2.0
"""Factories of small models: tokenizers, Hugging Face checkpoints, PEFT adapters, tensors for the engine.

torch, transformers and peft are imported inside the functions that need them: most tests do without.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tiny_checkpoint import llama_config, sample_lines, train_tokenizer, write_json, write_tokenizer

__all__ = ["llama_config", "sample_lines", "train_tokenizer", "write_json", "write_tokenizer"]

Tensors = dict[str, np.ndarray]
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROPE_SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.2,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.3,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def chinese_lines() -> list[str]:
    """The Chinese part of the bundled text."""
    return [line for line in sample_lines() if ord(line[0]) > 127]


def english_lines() -> list[str]:
    """The rest of it."""
    return [line for line in sample_lines() if ord(line[0]) <= 127]


def merge_tokenizers(base: bytes, extra: bytes) -> bytes:
    """`base` with every piece of `extra` that it lacks appended at score 0, as Chinese-LLaMA was made."""
    from sentencepiece import sentencepiece_model_pb2 as sp_model

    merged, added = sp_model.ModelProto.FromString(base), sp_model.ModelProto.FromString(extra)
    present = {piece.piece for piece in merged.pieces}
    for piece in added.pieces:
        if piece.piece not in present:
            merged.pieces.add(piece=piece.piece, score=0.0)
    return merged.SerializeToString()


def piece_count(model: bytes) -> int:
    """Pieces of a SentencePiece model."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()


def small_config(vocab: int, **changes: Any) -> dict[str, Any]:
    """A config.json of hidden 96, 3 layers and 3 heads over one kv head, with `changes` (None removes a key)."""
    config: dict[str, Any] = llama_config(
        hidden=96, intermediate=224, layers=3, heads=3, kv_heads=1, vocab=vocab, context=1024
    )
    config.update(changes)
    return {key: value for key, value in config.items() if value is not None}


def head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def logit_std(vocab: int) -> float:
    """The spread of random logits whose distribution has an entropy of about 5 nats."""
    return max(1.0, 2 * (math.log(vocab) - 5)) ** 0.5


def random_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """float32 tensors by Hugging Face name, with weights that make the model do something.

    q and k are scaled so that attention is far from uniform, norms are not one, logits have the spread of `logit_std`.
    Biases are there when the config has attention_bias or mlp_bias, lm_head when embeddings are not tied.
    """
    random = np.random.default_rng(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_size = config["num_attention_heads"] * head_dim(config)
    kv_size = config["num_key_value_heads"] * head_dim(config)
    spread = logit_std(vocab) / hidden**0.5
    tensors: Tensors = {}

    def matrix(name: str, rows: int, cols: int, std: float, bias: bool = False) -> None:
        tensors[name + ".weight"] = random.standard_normal((rows, cols), np.float32) * np.float32(std)
        if bias:
            tensors[name + ".bias"] = random.standard_normal(rows, np.float32) * np.float32(0.3)

    def norm(name: str) -> None:
        tensors[name + ".weight"] = random.uniform(0.7, 1.3, hidden).astype(np.float32)

    # Each layer adds half of what the embedding is, as in a trained model. A tied one would then only repeat its input:
    # there the layers add as much as the embedding, and the logits are flatter.
    tied = bool(config.get("tie_word_embeddings"))
    if tied:
        spread *= 0.6
    residual = spread if tied else 0.5
    matrix("model.embed_tokens", vocab, hidden, spread if tied else 1.0)
    for layer in range(config["num_hidden_layers"]):
        attn, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        attn_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
        norm(f"model.layers.{layer}.input_layernorm")
        matrix(attn + "q_proj", q_size, hidden, 1.2 / hidden**0.5, attn_bias)
        matrix(attn + "k_proj", kv_size, hidden, 1.2 / hidden**0.5, attn_bias)
        matrix(attn + "v_proj", kv_size, hidden, 1.0 / hidden**0.5, attn_bias)
        matrix(attn + "o_proj", hidden, q_size, residual / q_size**0.5, attn_bias)
        norm(f"model.layers.{layer}.post_attention_layernorm")
        matrix(mlp + "gate_proj", inner, hidden, 1.0 / hidden**0.5, mlp_bias)
        matrix(mlp + "up_proj", inner, hidden, 1.0 / hidden**0.5, mlp_bias)
        matrix(mlp + "down_proj", hidden, inner, residual / inner**0.5, mlp_bias)
    norm("model.norm")
    if not tied:
        matrix("lm_head", vocab, hidden, spread)
    return tensors


def write_weights(directory: Path, tensors: Tensors, *, kind: str = "safetensors", shards: int = 1) -> None:
    """model.safetensors or pytorch_model.bin, one file or shards with their index, as transformers writes them."""
    names = list(tensors)
    parts = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map = {}
    for index, part in enumerate(parts):
        file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{index + 1:05}-of-{shards:05}.{suffix}"
        weight_map.update(dict.fromkeys(part, file))
        chosen = {name: tensors[name] for name in part}
        if kind == "safetensors":
            from safetensors.numpy import save_file

            save_file(chosen, directory / file, metadata={"format": "pt"})
        else:
            import torch

            torch.save({name: torch.from_numpy(value) for name, value in chosen.items()}, directory / file)
    if shards > 1:
        total = sum(value.nbytes for value in tensors.values())
        write_json(
            directory / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def make_llama(
    directory: Path,
    tokenizer: bytes,
    *,
    kind: str = "safetensors",
    shards: int = 1,
    dtype: str = "float16",
    seed: int = 0,
    tensors: Tensors | None = None,
    **config: Any,
) -> Path:
    """Writes a Hugging Face LLaMA directory and returns it.

    kind is "safetensors" or "bin"; config changes `small_config`; the vocabulary is the tokenizer's unless given.
    """
    directory.mkdir(parents=True, exist_ok=True)
    full = small_config(config.pop("vocab_size", piece_count(tokenizer)), **config)
    if tensors is None:
        tensors = random_tensors(full, seed)
    write_weights(directory, {k: v.astype(dtype) for k, v in tensors.items()}, kind=kind, shards=shards)
    write_json(directory / "config.json", full | {"torch_dtype": dtype})
    write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_tokenizer(directory, tokenizer)
    return directory


def make_adapter(
    model: Any,
    directory: Path,
    tokenizer: bytes,
    *,
    added_tokens: dict[str, int] | None = None,
    safe_serialization: bool = True,
    seed: int = 0,
    **lora: Any,
) -> Any:
    """Saves an adapter made by `peft` on a LlamaForCausalLM and returns the model with it merged.

    The vocabulary grows to the tokenizer's pieces plus `added_tokens` (text to id); embed_tokens and lm_head are saved
    whole, as Chinese-LLaMA's adapters do. Every trainable weight is random, none is zero. lora: LoraConfig's arguments.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    vocab = piece_count(tokenizer) + len(added_tokens or {})
    if vocab != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocab, mean_resizing=False)
    settings: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": LORA_TARGETS,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "task_type": "CAUSAL_LM",
    }
    wrapped = get_peft_model(model, LoraConfig(**(settings | lora)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2 / weight.shape[1] ** 0.5)
            elif "modules_to_save" in name:
                std = 1.0 if "embed_tokens" in name else logit_std(vocab) / weight.shape[1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    wrapped.save_pretrained(directory, safe_serialization=safe_serialization)
    write_tokenizer(directory, tokenizer)
    if added_tokens:
        write_json(directory / "added_tokens.json", added_tokens)
    return wrapped.merge_and_unload()


def load_transformers(config: dict[str, Any], tensors: Tensors) -> Any:
    """transformers' LlamaForCausalLM in float32 with exactly these tensors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "torch_dtype"}))
    state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in tensors.items()}
    if config.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.float().eval()


def quantize_tensors(
    tensors: Tensors, scheme: str = "q4-a64", embeddings: str = "q8-s64"
) -> dict[str, tuple[np.ndarray, str, int, int]]:
    """The engine's tensors of a model's: matrices packed, vectors as they are."""
    from cnllama import _core

    packed = {}
    for name, value in tensors.items():
        if value.ndim == 1:
            packed[name] = (np.ascontiguousarray(value, np.float32).view(np.uint8), "f32", value.shape[0], 1)
        else:
            chosen = embeddings if name in ("model.embed_tokens.weight", "lm_head.weight") else scheme
            packed[name] = (_core.quantize(np.ascontiguousarray(value, np.float32), chosen)[0], chosen, *value.shape)
    return packed


def dequantize(entry: tuple[np.ndarray, str, int, int]) -> np.ndarray:
    """float32 values of one of the engine's tensors, [rows, cols] or [n]."""
    from cnllama import _core

    data, scheme, rows, cols = entry
    if scheme == "f32":
        return np.ascontiguousarray(data).reshape(-1).view(np.float32)[:rows]
    return _core.dequantize(data, scheme, rows, cols)


def engine_config(config: dict[str, Any]) -> dict[str, Any]:
    """The .cnl's config of a config.json, as design.md lists its keys."""
    sizes = ("hidden", "intermediate", "vocab")
    counts = ("hidden_layers", "attention_heads", "key_value_heads")
    keys = [f"{name}_size" for name in sizes] + [f"num_{name}" for name in counts]
    keys += ["max_position_embeddings", "rms_norm_eps", "rope_theta"]
    return {key: config[key] for key in keys} | {
        "head_dim": head_dim(config),
        "rope_scaling": config.get("rope_scaling"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
    }


def command(*args: object, stdin: str | None = None, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m …` with text streams captured: command("cnllama.convert", base, "-o", out)."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, args)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
        **kwargs,
    )


def convert(base: Path, out: Path, *options: object) -> Path:
    """Converts in a subprocess, as a user does, and returns the file. Fails with the converter's words.

    By rounding, which is quick and whose bits are the same everywhere, unless the options say otherwise.
    """
    plain = () if "--quantizer" in options else ("--quantizer", "rtn")
    done = command("cnllama.convert", base, "-o", out, *plain, *options)
    assert done.returncode == 0, f"convert ended with {done.returncode}: {done.stderr[-2000:]}"
    assert out.is_file()
    return out


def json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def ids_of(model: bytes, lines: Iterable[str], count: int) -> list[int]:
    """The first `count` ids of BOS and these lines, encoded by the sentencepiece library."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [processor.bos_id()]
    for line in lines:
        ids += processor.encode(line + "\n")
    assert len(ids) >= count, f"the text has {len(ids)} tokens, the test needs {count}"
    return ids[:count]
