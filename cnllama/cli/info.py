# SPDX-License-Identifier: Apache-2.0
"""`cnllama info`: what is in a packed file."""

from __future__ import annotations

import argparse
from typing import Any

from cnllama import _core
from cnllama.arguments import add_model_file
from cnllama.format import CnlFile, open_cnl
from cnllama.stdio import show, to_json

HELP = "show what is in a .cnl file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add_model_file(parser, "file", "a .cnl file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the description. Returns the exit code."""
    facts = describe(open_cnl(args.file))
    if args.json:
        print(to_json(facts))
    else:
        show(*lines(facts))
    return 0


def describe(file: CnlFile) -> dict[str, Any]:
    """Everything `info` shows, as JSON values. Sizes in bytes."""
    fingerprint = {key: value for key, value in file.fingerprint.items() if key != "tensors"}
    return {
        "file": str(file.path),
        "size": file.size,
        "config": file.config,
        "quantization": file.quantization,
        "tensors": len(file.tensors),
        "parameters": sum(t.rows * t.cols for t in file.tensors.values() if t.scheme != "raw"),
        "template": file.template,
        "generation": file.generation,
        "tokenizer": file.tokenizer,
        "parity": file.parity,
        "fingerprint": fingerprint,
        "source": file.source,
        "isa": _core.isa(),
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts for people."""
    config, tokenizer, source = facts["config"], facts["tokenizer"], facts["source"]
    heads = f"{config['num_attention_heads']} heads over {config['num_key_value_heads']} of {config['head_dim']}"
    scaling = config["rope_scaling"]
    rope = f"theta {config['rope_theta']:g}" + (f", {scaling['rope_type']} x {scaling['factor']:g}" if scaling else "")
    quantization = facts["quantization"]
    rows = {
        "file": f"{facts['file']}, {facts['size']:,} bytes, {facts['tensors']} tensors",
        "model": f"LLaMA, {facts['parameters']:,} weights, {config['num_hidden_layers']} layers, "
        f"hidden {config['hidden_size']}, intermediate {config['intermediate_size']}, {heads}",
        "context": f"{config['max_position_embeddings']} positions, {rope}",
        "vocabulary": f"{config['vocab_size']} rows, {tokenizer['pieces']} pieces, "
        f"{len(tokenizer['added_tokens'])} added" + (", tied" if config["tie_word_embeddings"] else ""),
        "scheme": f"{quantization.get('scheme')}, embeddings {quantization.get('embeddings')}, "
        f"{quantization.get('bits_per_weight')} bits per weight, by {quantization.get('quantizer', 'rtn')}",
        "template": facts["template"],
        "end tokens": ", ".join(map(str, facts["generation"]["eos_token_ids"])),
        "tokenizer": f"sha256 {tokenizer['sha256']}",
        "parity": f"corpus {facts['parity'].get('corpus')}, {facts['parity'].get('texts')} texts, "
        f"sha256 {facts['parity'].get('sha256')}",
        "content": f"sha256 {facts['fingerprint']['content_sha256']}",
        "source": ", ".join(f"{key} {value}" for key, value in source.items()),
        "kernels": facts["isa"],
    }
    width = max(map(len, rows))
    return [f"{key:<{width}}  {value}" for key, value in rows.items()]
