# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt create`: a new LLaMA of any size with random weights, for small models and for trials."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from cnllama.adapt.progress import quiet
from cnllama.adapt.tokenfile import open_vocabulary
from cnllama.errors import InputError
from cnllama.stdio import show

_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "tokenizer", metavar="TOKENIZER", type=Path, help="tokenizer directory; its size is the model's"
    )
    parser.add_argument("-o", "--out", metavar="DIR", type=Path, required=True, help="directory to write")
    for name, default, text in (
        ("hidden-size", 256, "width"),
        ("intermediate-size", 704, "width of the feed-forward part"),
        ("layers", 8, "layers"),
        ("heads", 8, "attention heads"),
        ("kv-heads", 0, "key and value heads, 0: as many"),
        ("context", 1024, "positions"),
        ("seed", 0, "of the weights"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default {default})")
    parser.add_argument("--tie", action="store_true", help="one matrix for embed_tokens and lm_head")


def run(args: argparse.Namespace) -> int:
    """Writes the checkpoint. Raises InputError for sizes that do not divide."""
    heads, kv_heads = args.heads, args.kv_heads or args.heads
    sizes = (args.hidden_size, args.intermediate_size, args.layers, heads, kv_heads, args.context)
    if min(sizes) < 1 or args.hidden_size % (2 * heads) or heads % kv_heads:
        raise InputError(
            f"hidden size {args.hidden_size}, {heads} heads and {kv_heads} kv heads do not divide: expected heads of "
            "an even width, and heads a multiple of kv heads"
        )
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    quiet()
    vocabulary = open_vocabulary(args.tokenizer)
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=args.tie,
        bos_token_id=vocabulary.tokenizer.bos_id,
        eos_token_id=vocabulary.tokenizer.eos_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(args.out)
    for name in _FILES:
        if (args.tokenizer / name).exists():
            shutil.copyfile(args.tokenizer / name, args.out / name)
    parameters = sum(p.numel() for p in model.parameters())
    show(f"{args.out}: {parameters:,} parameters, vocabulary {vocabulary.size:,}")
    return 0
