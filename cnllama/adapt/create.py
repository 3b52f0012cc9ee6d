# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt create`: a new LLaMA of any size with random weights, for small models and for trials."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cnllama.adapt.checkpoints import SCRATCH_FILES
from cnllama.adapt.kept import result_directory
from cnllama.adapt.progress import quiet
from cnllama.adapt.tokenfile import open_vocabulary
from cnllama.arguments import add_output_option
from cnllama.errors import InputError
from cnllama.files import copy_file
from cnllama.ownership import OwnedDirectory
from cnllama.paths import exists
from cnllama.stdio import show

_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
_SIZES = (
    ("hidden-size", 256, "width"),
    ("intermediate-size", 704, "width of the feed-forward part"),
    ("layers", 8, "layers"),
    ("heads", 8, "attention heads"),
    ("kv-heads", 0, "key and value heads, 0: as many"),
    ("context", 1024, "positions"),
    ("seed", 0, "of the weights"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "tokenizer", metavar="TOKENIZER", type=Path, help="tokenizer directory; its size is the model's"
    )
    add_output_option(parser, "DIR", "directory to write")
    for name, default, text in _SIZES:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default {default})")
    parser.set_defaults(check_options=check)
    parser.add_argument("--tie", action="store_true", help="one matrix for embed_tokens and lm_head")


def check(args: argparse.Namespace) -> None:
    """Raises InputError for sizes that do not divide."""
    heads, kv_heads = args.heads, args.kv_heads or args.heads
    sizes = (args.hidden_size, args.intermediate_size, args.layers, heads, kv_heads, args.context)
    if min(sizes) < 1 or args.hidden_size % (2 * heads) or heads % kv_heads:
        raise InputError(
            f"hidden size {args.hidden_size}, {heads} heads and {kv_heads} kv heads do not divide: expected heads of "
            "an even width, and heads a multiple of kv heads"
        )


def run(args: argparse.Namespace) -> int:
    """Writes the checkpoint. Raises InputError for sizes that do not divide."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    check(args)
    quiet()
    vocabulary = open_vocabulary(args.tokenizer)
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=args.tie,
        bos_token_id=vocabulary.tokenizer.bos_id,
        eos_token_id=vocabulary.tokenizer.eos_id,
    )
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    options = {name: getattr(args, name.replace("-", "_")) for name, _, _ in _SIZES} | {"tie": args.tie}
    inputs = {"tokenizer": [args.tokenizer]}
    with result_directory(
        args.output,
        "adapt create",
        inputs=inputs,
        options=options,
        last="config.json",
        needed=4 * parameters,
        scratch=SCRATCH_FILES,
    ) as own:
        if own is not None:
            torch.manual_seed(args.seed)
            _write(own, LlamaForCausalLM(config), args.tokenizer)
    show(f"{args.output}: {parameters:,} parameters, vocabulary {vocabulary.size:,}")
    return 0


def _write(own: OwnedDirectory, model: Any, tokenizer: Path) -> None:
    for name in _FILES:
        if exists(tokenizer / name):
            copy_file(tokenizer / name, own.path / name)
    scratch = own.make_scratch()
    model.save_pretrained(scratch / "model")
    own.publish_files(scratch / "model", "config.json")
    own.remove(own.SCRATCH)
