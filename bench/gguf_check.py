# SPDX-License-Identifier: Apache-2.0
"""Runs models here and, exported to GGUF, in llama.cpp, and compares what they say.

    python bench/gguf_check.py [FILE.cnl ...] [--tokenizer FILE]

Without files: small random models of every kind that changes names, row order or rotation: grouped queries, tied
embeddings, biases, each scaling rule, each weight scheme. A row of the table is one model: the divergence of the two
next-token distributions over a Chinese text, how often the most likely token is the same, and on how many texts of the
tokenizer corpus the ids are the same. Both programs round activations to 8 bits, in groups of 256 columns and of 32, so
the distributions are close and not equal. Needs llama-cpp-python, numpy and sentencepiece.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cnllama.convert.gguf.export import export
from cnllama.convert.pack import convert
from cnllama.convert.parity_corpus import TEXTS
from tiny_checkpoint import (
    llama_config,
    safetensors_header,
    sample_lines,
    tensor_shapes,
    train_tokenizer,
    write_json,
    write_tokenizer,
)

from cnllama import LLM, _core
from cnllama.errors import CnllamaError
from cnllama.format import open_cnl

Logits = npt.NDArray[np.float32]

TOKENS = 384
ORIGINAL = {"original_max_position_embeddings": 64}  # so that the text is long enough for scaling to matter
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL
YARN = {"rope_type": "yarn", "factor": 4.0} | ORIGINAL
# Changes to the configuration, and the weight scheme.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "multi-head": ({}, "q4-a64"),
    "multi-head, symmetric 64": ({}, "q4-s64"),
    "multi-head, symmetric 32": ({}, "q4-s32"),
    "multi-head, 8 bits": ({}, "q8"),
    "grouped-query": ({"num_key_value_heads": 2}, "q4-a64"),
    "wide heads": ({"head_dim": 96, "num_key_value_heads": 1}, "q4-a64"),
    "tied embeddings": ({"tie_word_embeddings": True}, "q4-a64"),
    "biases": ({"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}, "q4-a64"),
    "linear scaling": ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "q4-a64"),
    "llama3 scaling": ({"rope_scaling": LLAMA3}, "q4-a64"),
    "YaRN": ({"rope_scaling": YARN}, "q4-a64"),
    "YaRN, own amplitude": ({"rope_scaling": YARN | {"attention_factor": 1.0}}, "q4-a64"),
    "YaRN, own ramp": ({"rope_scaling": YARN | {"beta_fast": 8.0, "truncate": False}}, "q4-a64"),
}


@dataclass(frozen=True)
class Comparison:
    """One model in both programs. divergence: KL of theirs from ours in nats at every position; equal, texts: of the
    tokenizer corpus; differing: the texts whose ids are not the same.
    """

    divergence: npt.NDArray[np.float64]
    same_top: float
    texts: int
    differing: list[str]


def write_checkpoint(directory: Path, tokenizer: bytes, changes: dict[str, Any], seed: int = 0) -> Path:
    """A random Hugging Face checkpoint: attention far from uniform, logits neither flat nor sure of one token."""
    from sentencepiece import SentencePieceProcessor

    vocab = SentencePieceProcessor(model_proto=tokenizer).get_piece_size()
    config = llama_config(hidden=256, intermediate=704, layers=3, heads=4, vocab=vocab) | changes
    head_dim = int(config.get("head_dim", 64))
    random = np.random.default_rng(seed)
    values: dict[str, npt.NDArray[np.float32]] = {}
    for name, shape in tensor_shapes(config):
        stem = name.removesuffix(".weight")
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if len(shape) == 1:
            values[name] = random.uniform(0.7, 1.3, shape).astype(np.float32)
            continue
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}
        rows, cols = shape
        if stem[-6:] in heads:
            rows = int(str(config[heads[stem[-6:]]])) * head_dim
        elif stem.endswith("o_proj"):
            cols = int(str(config["num_attention_heads"])) * head_dim
        std = cols**-0.5 * (1.2 if stem.endswith(("q_proj", "k_proj")) else 1.5 if name == "lm_head.weight" else 1.0)
        if name == "model.embed_tokens.weight":
            std = 0.05 if config["tie_word_embeddings"] else 1.0
        values[name] = (random.standard_normal((rows, cols)) * std).astype(np.float32)
        if config.get("attention_bias" if ".self_attn." in name else "mlp_bias") and ".layers." in name:
            values[stem + ".bias"] = (random.standard_normal(rows) * 0.3).astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(safetensors_header([(name, value.shape) for name, value in values.items()], "F32"))
        for value in values.values():
            file.write(value.tobytes())
    write_json(directory / "config.json", config)
    write_tokenizer(directory, tokenizer)
    return directory


def our_logits(cnl: Path, ids: list[int]) -> Logits:
    """[len(ids), vocabulary] of this project's engine."""
    with LLM(cnl, ctx=len(ids)) as llm:
        return llm.logits(ids)


def their_logits(llm: Any, ids: list[int]) -> Logits:
    """[len(ids), vocabulary] of an open llama_cpp.Llama."""
    llm.reset()
    llm.eval(ids)
    return np.array(llm.scores[: len(ids)], np.float32)


def compare(cnl: Path, gguf: Path, tokens: int = TOKENS) -> Comparison:
    """Runs the same ids through both programs and the same texts through both tokenizers."""
    import llama_cpp

    with LLM(cnl, ctx=64) as ours:
        tokenizer = ours.tokenizer
    ids = tokenizer.encode("\n".join(line for line in sample_lines() * 20 if ord(line[0]) > 127), bos=True)[:tokens]
    llm = llama_cpp.Llama(str(gguf), n_ctx=tokens, n_batch=tokens, n_threads=2, logits_all=True, verbose=False)
    try:
        ours_log, theirs_log = (log_softmax(x) for x in (our_logits(cnl, ids), their_logits(llm, ids)))
        texts = [*TEXTS, *sample_lines()]
        differing = [
            text
            for text in texts
            if llm.tokenize(text.encode(), add_bos=False, special=False) != tokenizer.encode(text)
        ]
    finally:
        llm.close()
    divergence = (np.exp(ours_log) * (ours_log - theirs_log)).sum(axis=1)
    same_top = float((ours_log.argmax(axis=1) == theirs_log.argmax(axis=1)).mean())
    return Comparison(divergence, same_top, len(texts), differing)


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """In float64, along the last axis."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def print_row(label: str, cnl: Path, work: Path) -> list[str]:
    """Exports, compares, prints a line of the table; returns the texts that the tokenizers cut otherwise."""
    gguf = work / "model.gguf"
    report = export(open_cnl(cnl), gguf)
    inner = next(m for m in report.matrices if ".layers." in m.name)
    exact = "all" if not any(m.error for m in report.matrices) else f"{max(m.error for m in report.matrices):.2%} off"
    result = compare(cnl, gguf)
    print(
        f"| {label} | {inner.scheme} | {inner.type.name} | {exact} | {result.divergence.mean():.1e} | "
        f"{result.divergence.max():.1e} | {result.same_top:.1%} | "
        f"{result.texts - len(result.differing)} of {result.texts} |",
        flush=True,
    )
    return result.differing


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="a .cnl file (default: random models)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model of the random models")
    args = parser.parse_args()
    import llama_cpp

    print(f"llama-cpp-python {llama_cpp.__version__}, our kernels {_core.isa()}, {TOKENS} tokens of Chinese text\n")
    print("| model | scheme | GGML type | weights exact | mean KL | largest KL | same top token | same ids |")
    print("|---|---|---|---|---|---|---|---|")
    differing: dict[str, None] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            for file in args.files:
                differing |= dict.fromkeys(print_row(file.stem, file, work))
            if not args.files:
                given = args.tokenizer.read_bytes() if args.tokenizer else train_tokenizer(sample_lines(), 1200)
                for label, (changes, scheme) in CASES.items():
                    base = write_checkpoint(work / "base", given, changes)
                    convert(base, [], work / "model.cnl", quant=scheme)
                    differing |= dict.fromkeys(print_row(label, work / "model.cnl", work))
    except CnllamaError as error:
        print(f"gguf_check: {error}", file=sys.stderr)
        return error.exit_code
    for text in differing:
        print(f"\nother ids: {text!r}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
