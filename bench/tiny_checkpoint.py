# SPDX-License-Identifier: Apache-2.0
"""Makes a small LLaMA checkpoint in Hugging Face's layout: `python bench/tiny_checkpoint.py DIR`.

It needs numpy and sentencepiece only and takes seconds. The layers are random; the output matrix is solved so that a
token is followed by what followed it in sample_text.txt: the model says things that look a little like its text.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece as spm

SAMPLE_TEXT = Path(__file__).with_name("sample_text.txt")

Array = npt.NDArray[np.float32]


def sample_lines() -> list[str]:
    """The lines of the bundled text: about forty of Chinese, then some of English."""
    return SAMPLE_TEXT.read_text(encoding="utf-8").splitlines()


def train_tokenizer(lines: Iterable[str], vocab_size: int, *, character_coverage: float = 0.995) -> bytes:
    """A SentencePiece BPE model with LLaMA's settings (byte fallback, split digits, identity normalization).

    It has at most `vocab_size` pieces: fewer when the text has no more to merge.
    """
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=character_coverage,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def llama_config(
    *, hidden: int, intermediate: int, layers: int, heads: int, vocab: int, kv_heads: int = 0, context: int = 2048
) -> dict[str, object]:
    """config.json of a LLaMA of this shape; kv_heads 0 means as many as heads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }


def tensor_shapes(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint, (Hugging Face name, shape), in the order of the forward pass."""
    hidden, inner, vocab = (int(str(config[key])) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv_heads = (int(str(config[key])) for key in ("num_attention_heads", "num_key_value_heads"))
    kv_size = hidden // heads * kv_heads
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(int(str(config["num_hidden_layers"]))):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", (hidden,)
        yield name + "self_attn.q_proj.weight", (hidden, hidden)
        yield name + "self_attn.k_proj.weight", (kv_size, hidden)
        yield name + "self_attn.v_proj.weight", (kv_size, hidden)
        yield name + "self_attn.o_proj.weight", (hidden, hidden)
        yield name + "post_attention_layernorm.weight", (hidden,)
        yield name + "mlp.gate_proj.weight", (inner, hidden)
        yield name + "mlp.up_proj.weight", (inner, hidden)
        yield name + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def safetensors_header(tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: str = "F16") -> bytes:
    """The length and JSON text that begin a safetensors file whose tensors follow in this order."""
    size = 2 if dtype in ("F16", "BF16") else 4
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + size * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_json(path: Path, value: object) -> None:
    """Writes readable JSON, as Hugging Face's files are."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(directory: Path, model: bytes) -> None:
    """tokenizer.model and the two small JSON files beside it, with LLaMA's settings."""
    (directory / "tokenizer.model").write_bytes(model)
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True},
    )
    write_json(directory / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def _followers(tokenizer: spm.SentencePieceProcessor) -> Array:
    """[vocab, vocab] logits of a bigram model of the sample text; a line ends with the end token."""
    counts = np.zeros((tokenizer.vocab_size(),) * 2)
    for line in sample_lines():
        ids = [tokenizer.bos_id(), *tokenizer.encode(line), tokenizer.eos_id()]
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
    return np.where(counts > 0, 16 + 2 * np.log(np.maximum(counts, 1)), 0).astype(np.float32)


def make_tiny(directory: Path, *, hidden: int = 512, layers: int = 4, vocab: int = 1200, seed: int = 1) -> None:
    """Writes the checkpoint: about 20 MB with the default sizes."""
    directory.mkdir(parents=True, exist_ok=True)
    model = train_tokenizer(sample_lines(), vocab)
    tokenizer = spm.SentencePieceProcessor(model_proto=model)
    config = llama_config(
        hidden=hidden, intermediate=hidden * 5 // 2, layers=layers, heads=hidden // 64, vocab=tokenizer.vocab_size()
    )
    random = np.random.default_rng(seed)
    embeddings = random.standard_normal((tokenizer.vocab_size(), hidden), np.float32)
    shapes = dict(tensor_shapes(config))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(safetensors_header(shapes.items()))
        for name, shape in shapes.items():
            if name == "model.embed_tokens.weight":
                value = embeddings
            elif name == "lm_head.weight":
                gram = embeddings.T @ embeddings + np.eye(hidden, dtype=np.float32)
                value = np.linalg.solve(gram, embeddings.T @ _followers(tokenizer)).T
            elif len(shape) == 1:
                value = np.ones(shape, np.float32)
            else:
                value = random.standard_normal(shape, np.float32) * np.float32(0.3 / shape[1] ** 0.5)
            file.write(value.astype(np.float16).tobytes())
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_tokenizer(directory, model)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make a small LLaMA checkpoint to try cnllama with.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    args = parser.parse_args()
    make_tiny(args.directory)
    size = (args.directory / "model.safetensors").stat().st_size
    print(f"{args.directory}: a random LLaMA with a tokenizer of its own, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
