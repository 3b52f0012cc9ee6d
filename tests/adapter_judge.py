# SPDX-License-Identifier: Apache-2.0
"""PEFT as the judge of our merging: tiny models, adapters that PEFT saves, and what its forward pass makes of them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cnllama.convert.pack import Plan, make_plan, merged_tensors
from models import write_json, write_tokenizer

from cnllama.errors import InputError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
LINEAR = [name for names in PROJECTIONS.values() for name in names]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Tensors = dict[str, np.ndarray]
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
_IDS = [1, 5, 3, 17, 30, 9]


@cache
def tokenizer() -> bytes:
    """A SentencePiece model of 40 pieces: the others of the tests have 256 for the bytes alone."""
    import sentencepiece

    model = io.BytesIO()
    text = ["ab cd ef gh ij kl mn op qr st uv wx yz"] * 20
    settings = {"model_type": "bpe", "vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **settings)
    return model.getvalue()


@cache
def pieces() -> int:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer()).get_piece_size()


@dataclass
class Base:
    """A model: its tensors by Hugging Face's names, lm_head also where it is tied, and what it is built with."""

    tensors: Any
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def rows(self) -> int:
        return int(self.tensors[EMBED].shape[0])

    def config(self) -> dict[str, Any]:
        return _SIZES | {
            "vocab_size": self.rows,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tied,
        }

    def load(self, rows: int = 0, seed: int = 0) -> Any:
        """LlamaForCausalLM, grown to `rows` with random rows, which no judgement may depend on."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**self.config(), pad_token_id=None)).eval()
        found = model.load_state_dict({name: value.clone() for name, value in self.tensors.items()}, strict=False)
        assert not found.unexpected_keys
        assert not found.missing_keys
        if rows > self.rows:
            torch.manual_seed(seed)
            model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    def save(self, directory: Path) -> Path:
        """As a checkpoint with its tokenizer."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True)
        stored = {n: t.contiguous() for n, t in self.tensors.items() if not (self.tied and n == HEAD)}
        save_file(stored, directory / "model.safetensors", {"format": "pt"})
        write_json(directory / "config.json", {"model_type": "llama", "rope_theta": 10000.0} | self.config())
        write_tokenizer(directory, tokenizer())
        return directory


def random_base(seed: int = 0, *, tied: bool = False, attention_bias: bool = False, mlp_bias: bool = False) -> Base:
    """Random weights, biases that are not zero, norms that are not one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    base = Base({EMBED: torch.empty(pieces(), 1)}, tied, attention_bias, mlp_bias)
    model = LlamaForCausalLM(LlamaConfig(**base.config(), initializer_range=0.3, pad_token_id=None))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn(weight.shape) * 0.3)
    base.tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return base


def save_adapter(model: Any, directory: Path, seed: int = 1, *, embeddings: Any = "auto", **lora: Any) -> None:
    """What PEFT saves after every trained value moved a little from where it started."""
    import peft
    import torch

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | lora)))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in wrapped.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        wrapped.save_pretrained(directory, save_embedding_layers=embeddings)


@dataclass
class Judgement:
    """PEFT's forward pass: the matrix that every layer applies, the logits, and the tensors of merge_and_unload.

    merged is None where PEFT cannot merge. head_bias: whether lm_head adds something of its own.
    """

    tensors: Any
    logits: Any
    merged: Any
    head_bias: bool

    def base(self, before: Base) -> Base:
        """What the next adapter stands on."""
        import torch

        tied = before.tied and torch.equal(self.tensors[EMBED], self.tensors[HEAD])
        biased = [any(part in name and name.endswith("bias") for name in self.tensors) for part in PROJECTIONS]
        return Base(self.tensors, tied, *biased)


def judge(base: Base, adapter: Path, rows: int = 0, seed: int = 0, *, merge: bool = True) -> Judgement:
    """Loads the adapter as PEFT does. Raises whatever PEFT raises."""
    import peft
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base.load(rows, seed), adapter).eval()
        logits = model(torch.tensor([_IDS])).logits[0]
        inner = model.get_base_model()
        tensors, head_bias = _effective(inner)
        merged = None
        if merge:
            with contextlib.suppress(RuntimeError):  # of lora_bias on a layer without a bias
                merged = {n: t.clone() for n, t in model.merge_and_unload().state_dict().items()}
    return Judgement(tensors, logits, merged, head_bias)


def _effective(model: Any) -> tuple[Any, bool]:
    """Every tensor of a plain LlamaForCausalLM that computes the same, by running each layer on a unit matrix."""
    import torch

    embedding = model.get_input_embeddings()
    found = {EMBED: embedding(torch.arange(embedding.weight.shape[0]))}
    biases = {}
    for name, size in [("lm_head", 32), *_linear_layers()]:
        layer = model.get_submodule(name)
        zero = layer(torch.zeros(1, size))[0]
        found[f"{name}.weight"] = (layer(torch.eye(size)) - zero).T.contiguous()
        biases[name] = zero
    head_bias = bool(biases.pop("lm_head").any())
    for part in PROJECTIONS:
        group = {f"{name}.bias": bias for name, bias in biases.items() if part in name}
        if any(bias.any() for bias in group.values()):
            found |= group
    for name in (
        "model.norm",
        *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")),
    ):
        found[f"{name}.weight"] = model.get_submodule(name).weight.clone()
    return found, head_bias


def _linear_layers() -> list[tuple[str, int]]:
    return [
        (f"model.layers.{i}.{part}.{name}", 48 if name == "down_proj" else 32)
        for i in (0, 1)
        for part, names in PROJECTIONS.items()
        for name in names
    ]


def relative(ours: np.ndarray, theirs: Any) -> float:
    """||ours - theirs|| / ||theirs||."""
    theirs = np.asarray(theirs)
    scale = np.linalg.norm(theirs)
    return float(np.linalg.norm(ours - theirs) / scale) if scale else float(np.abs(ours).max())


def assert_judged(plan: Plan, judged: Judgement, limit: float = 1e-5) -> Tensors:
    """Our merged tensors and the logits of a model made of them are PEFT's; returns the tensors."""
    import torch

    ours = dict(merged_tensors(plan))
    whole = ours | ({} if HEAD in ours else {HEAD: ours[EMBED]})
    assert set(judged.tensors) <= set(whole)
    for name, values in whole.items():
        if name in judged.tensors:
            assert relative(values, judged.tensors[name]) <= limit, name
        else:
            assert name.endswith(".bias")
            assert not values.any(), name
    biased = [any(part in name and name.endswith("bias") for name in ours) for part in PROJECTIONS]
    model = Base({n: torch.from_numpy(v) for n, v in whole.items()}, plan.config["tie_word_embeddings"], *biased)
    with torch.no_grad():
        logits = model.load()(torch.tensor([_IDS])).logits[0]
    assert relative(logits.numpy(), judged.logits) <= limit
    assert plan.config["tie_word_embeddings"] is (HEAD not in ours)
    return whole


def check(directory: Path, base: Base, *adapters: dict[str, Any]) -> Plan:
    """Saves base and adapters (arguments of LoraConfig), each on the one before it, and compares; returns the plan."""
    root = base.save(directory / "base")
    saved: list[Path] = []
    plan = make_plan(root)
    for number, lora in enumerate(adapters):
        path = directory / f"adapter{number}"
        save_adapter(base.load(), path, seed=number + 1, **lora)
        judged = judge(base, path, merge=False)
        saved.append(path)
        plan = make_plan(root, saved)
        assert_judged(plan, judged)
        base = judged.base(base)
    return plan


def plan_of(root: Path, *adapters: Path) -> tuple[Plan | None, str]:
    """The plan, or None and the sentence of its refusal."""
    try:
        return make_plan(root, adapters), ""
    except InputError as error:
        return None, str(error)


def sentence(root: Path, adapter: Path) -> str:
    """The refusal of an adapter: one sentence, which the table of sizes may follow."""
    plan, refusal = plan_of(root, adapter)
    assert plan is None
    lines = refusal.split("\n")
    assert len(lines) == 1 or lines[1] == "vocabulary sizes found:"
    return lines[0]


def edit_config(adapter: Path, **changes: Any) -> None:
    """Changes keys of adapter_config.json; ... removes one."""
    config = json.loads((adapter / CONFIG).read_text()) | changes
    (adapter / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(adapter: Path, change: Any) -> None:
    """Applies change(tensors) -> tensors to the weight file."""
    from safetensors.torch import load_file, save_file

    changed = change(load_file(adapter / WEIGHTS))
    save_file({n: v.contiguous().clone() for n, v in changed.items()}, adapter / WEIGHTS, {"format": "pt"})
