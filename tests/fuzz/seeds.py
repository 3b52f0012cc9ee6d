# SPDX-License-Identifier: Apache-2.0
"""Sound files to begin with: the smallest checkpoints, adapters and tokenizers that the product takes."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np

HIDDEN, INNER, LAYERS, HEADS = 32, 48, 2, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
BOS_FIRST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
}
GENERATION = {
    "bos_token_id": 1,
    "eos_token_id": [2, 332],
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_length": 512,
    "transformers_version": "5.0.0",
}


@functools.cache
def tokenizer() -> bytes:
    """A SentencePiece model of 330 pieces, 256 of them bytes."""
    return models.train_tokenizer(models.english_lines(), 330)


@functools.cache
def grown_tokenizer() -> bytes:
    """The same with pieces of Chinese text behind it."""
    return models.merge_tokenizers(
        tokenizer(), models.train_tokenizer(models.chinese_lines(), 1000, character_coverage=0.98)
    )


def checkpoint(folder: Path, **options: Any) -> Path:
    """A Hugging Face LLaMA of 330 rows; options as models.make_llama's."""
    return models.make_llama(folder, tokenizer(), **{**SIZES, **options})


def whole_tokenizer(folder: Path, rows: int) -> None:
    """Every file that a tokenizer may come in, with four added tokens at the end of `rows` rows."""
    added = {"[PAD]": rows - 4, "<|im_start|>": rows - 3, "<|im_end|>": rows - 2, "新词": rows - 1}
    models.write_json(folder / "added_tokens.json", added)
    listed = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": text != "新词"}
        for text, i in added.items()
    ]
    config = models.json_of(folder / "tokenizer_config.json") | {
        "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in listed},
        "add_prefix_space": True,
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "pad_token": {"__type": "AddedToken", "content": "[PAD]"},
        "model_max_length": 128,
    }
    models.write_json(folder / "tokenizer_config.json", config)
    pieces = pieces_of((folder / "tokenizer.model").read_bytes())
    vocab = {piece: i for i, piece in enumerate(pieces)} | added
    body = {"version": "1.0", "added_tokens": listed, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    body |= {"normalizer": None, "pre_tokenizer": METASPACE, "post_processor": BOS_FIRST}
    (folder / "tokenizer.json").write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8")


def pieces_of(model: bytes) -> list[str]:
    """Texts of all pieces."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]


def only_head(folder: Path) -> Path:
    """Makes the matrix of a tied checkpoint lie in the file as lm_head.weight alone."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def adapter(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """A PEFT adapter directory: adapter_config.json as PEFT writes it, and the tensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
    }
    models.write_json(folder / "adapter_config.json", settings | config)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def lora_pair(module: str, rows: int, cols: int, rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """lora_A [rank, cols] and lora_B [rows, rank] of a matrix, under PEFT's names."""
    random = np.random.default_rng(seed)
    name = f"base_model.model.model.layers.{module}"
    return {
        f"{name}.lora_A.weight": random.standard_normal((rank, cols), np.float32) * np.float32(0.1),
        f"{name}.lora_B.weight": random.standard_normal((rows, rank), np.float32) * np.float32(0.1),
    }


def layer_pairs(rank: int = 4) -> dict[str, np.ndarray]:
    """Pairs of three matrices in every layer of `checkpoint` (one key-value head)."""
    tensors: dict[str, np.ndarray] = {}
    for layer in range(LAYERS):
        tensors |= lora_pair(f"{layer}.self_attn.q_proj", HIDDEN, HIDDEN, rank, layer)
        tensors |= lora_pair(f"{layer}.self_attn.v_proj", HIDDEN // HEADS, HIDDEN, rank, 10 + layer)
        tensors |= lora_pair(f"{layer}.mlp.down_proj", HIDDEN, INNER, rank, 20 + layer)
    return tensors


def saved_rows(rows: int) -> dict[str, np.ndarray]:
    """embed_tokens and lm_head saved whole by an adapter."""
    random = np.random.default_rng(rows)
    return {
        f"base_model.model.{name}.weight": random.standard_normal((rows, HIDDEN), np.float32)
        for name in ("model.embed_tokens", "lm_head")
    }


def magnitudes(pairs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DoRA's vector for each of the pairs."""
    ending = ".lora_B.weight"
    return {
        name.removesuffix(ending) + ".lora_magnitude_vector": np.abs(value).sum(1) + np.float32(0.5)
        for name, value in pairs.items()
        if name.endswith(ending)
    }


def lora_biases(pairs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A bias of lora_B for each of the pairs."""
    ending = ".lora_B.weight"
    return {
        name.removesuffix("weight") + "bias": value.mean(1) for name, value in pairs.items() if name.endswith(ending)
    }


def trained_tokens(ids: Sequence[int]) -> dict[str, np.ndarray]:
    """New rows of embed_tokens for the ids."""
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    return {name: np.random.default_rng(3).standard_normal((len(ids), HIDDEN), np.float32)}
