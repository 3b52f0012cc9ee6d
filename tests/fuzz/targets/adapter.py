# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters on a sound base: adapter_config.json with its patterns, names and shapes of the tensors, tokenizers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

import models
import numpy as np

from fuzz import mutate_bytes, mutate_json, mutate_proto, mutate_safetensors, seeds
from fuzz.case import Case, Content
from fuzz.engine import Target
from fuzz.targets.checkpoint import ODD_NAMES, OUT, TOKENIZER_HINTS, damaged_json, run_conversion

BASE, LORA, SECOND = "base", "lora", "second"
_PATTERNS = [{pattern: 4} for pattern in mutate_json.PATTERNS]
_MODULES = ["q_proj", "v_proj", "embed_tokens", "lm_head", "all-linear", "down_proj"]
HINTS: mutate_json.Hints = {
    "peft_type": ["LORA", "ADALORA", "IA3", None],
    "r": [1, 4, 8, 1 << 20],
    "lora_alpha": [0, 8, 0.5, -1, 1e-320, 1e308],
    "rank_pattern": [*_PATTERNS, {}, None, {"q_proj": 2, "v_proj": 4}],
    "alpha_pattern": [*_PATTERNS, {}, None, {"q_proj": 1.5}, {"q_proj": 1e400}],
    "target_modules": [_MODULES, "all-linear", r".*\.q_proj", *mutate_json.PATTERNS[:16], [], None],
    "exclude_modules": [["lm_head"], r".*v_proj", *mutate_json.PATTERNS[:16]],
    "modules_to_save": [None, [], ["embed_tokens", "lm_head"], ["lm_head"], "lm_head"],
    "layers_to_transform": [None, 0, [0], [0, 1, 99], [-1], []],
    "layers_pattern": [None, "layers", ["layers"], *mutate_json.PATTERNS[:8]],
    "bias": ["none", "all", "lora_only"],
    "use_rslora": [True, False],
    "use_dora": [True, False],
    "use_qalora": [True],
    "lora_bias": [True],
    "fan_in_fan_out": [True],
    "init_lora_weights": [
        True,
        False,
        None,
        "gaussian",
        "pissa",
        "olora",
        "loftq",
        "eva",
        "pissa_niter_4",
        "orthogonal",
    ],
    "trainable_token_indices": [None, [], [1, 2], {"embed_tokens": [1, 2]}],
    "layer_replication": [None, [[0, 2], [1, 2]]],
    "target_parameters": [None, ["mlp.experts"]],
    "megatron_config": [None, {}],
    "loftq_config": [{}, None, {"loftq_bits": 4}],
    "eva_config": [None, {}],
    "ensure_weight_tying": [True, False],
    "auto_mapping": [None, {"base_model_class": "x"}],
    "base_model_name_or_path": ["a\nb", None, ""],
    "peft_version": ["0.17.0", 1],
}
_PREFIX = "base_model.model.model.layers.0."
TENSORS = (
    f"{_PREFIX}self_attn.q_proj.lora_A.weight", f"{_PREFIX}self_attn.q_proj.lora_B.default.weight",
    f"{_PREFIX}self_attn.k_proj.lora_A.weight", f"{_PREFIX}self_attn.q_proj.lora_magnitude_vector",
    f"{_PREFIX}self_attn.q_proj.lora_B.bias", f"{_PREFIX}self_attn.q_proj.base_layer.weight",
    f"{_PREFIX}self_attn.q_proj.base_layer.bias", f"{_PREFIX}input_layernorm.modules_to_save.default.weight",
    "base_model.model.model.embed_tokens.lora_embedding_A",
    "base_model.model.model.embed_tokens.lora_embedding_B.default",
    "base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.modules_to_save.weight",
    "base_model.model.lm_head.original_module.weight", "base_model.model.model.embed_tokens.weight",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "lora_A.weight", ".lora_A.weight",
    "base_model.model." * 200 + "lora_A.weight", "base_model.model.model.norm.weight",
)  # fmt: skip
_FILES = (
    (50, "adapter_config.json"), (36, "adapter_model.safetensors"), (4, "tokenizer.model"),
    (4, "tokenizer_config.json"), (3, "added_tokens.json"), (3, "special_tokens_map.json"), (3, "tokenizer.json"),
    (1, "chat_template.jinja"),
)  # fmt: skip
_VARIANTS = ("plain", "patterns", "grown", "embedding", "chain", "dora", "tokens", "biases")
_TABLE = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Adapter(Target):
    name: ClassVar[str] = "adapter"
    share: ClassVar[int] = 4
    needs: ClassVar[tuple[str, ...]] = ("cnllama.llm", "cnllama.convert.pack", "cnllama.cli.convert", "models")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.found = {
            variant: {path.name: path.read_bytes() for path in sorted((folder / variant / LORA).iterdir())}
            for variant in _VARIANTS
        }

    @staticmethod
    def make_seeds(folder: Path) -> None:
        for variant in _VARIANTS:
            config = {"tie_word_embeddings": variant == "embedding", "attention_bias": variant == "biases"}
            seeds.checkpoint(folder / variant / BASE, **config)
        seeds.adapter(folder / "plain" / LORA, seeds.layer_pairs())
        mixed = {**seeds.layer_pairs(), **seeds.lora_pair("1.self_attn.q_proj", seeds.HIDDEN, seeds.HIDDEN, 2)}
        patterns = {
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2},
            "alpha_pattern": {"v_proj": 16, "layers.0.mlp": 4},
        }
        seeds.adapter(folder / "patterns" / LORA, mixed, **patterns, use_rslora=True)
        rows = models.piece_count(seeds.grown_tokenizer())
        saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
        for variant in ("grown", "chain"):
            grown = seeds.adapter(folder / variant / LORA, {**seeds.layer_pairs(), **seeds.saved_rows(rows)}, **saved)
            models.write_tokenizer(grown, seeds.grown_tokenizer())
        seeds.adapter(folder / "chain" / SECOND, seeds.layer_pairs())
        random_values = np.random.default_rng(5)
        table = "base_model.model.model.embed_tokens.lora_embedding_"
        pair = {
            table + "A": random_values.standard_normal((4, 330), np.float32),
            table + "B": random_values.standard_normal((seeds.HIDDEN, 4), np.float32),
        }
        seeds.adapter(folder / "embedding" / LORA, {**seeds.layer_pairs(), **pair}, target_modules=_TABLE)
        _newer_adapters(folder)

    def mutant(self, rng: random.Random) -> Case:
        variant = rng.choice(_VARIANTS)
        found = self.found[variant]
        files: dict[str, Content] = {}
        steps: list[str] = []
        for _ in range(rng.choice([1, 1, 1, 1, 2])):
            file = rng.choices([name for _, name in _FILES], [weight for weight, _ in _FILES])[0]
            data = found.get(file, b"{}")
            content: Content
            if rng.random() < 0.02:
                content = rng.choice([None, mutate_bytes.special(rng)])
                done = [content.kind if content else "removed"]
            elif file == "adapter_model.safetensors":
                content, done = mutate_safetensors.mutate(rng, data, TENSORS)
            elif file == "tokenizer.model":
                content, done = mutate_proto.mutate(rng, found.get(file, seeds.grown_tokenizer()))
            else:
                content, done = damaged_json(rng, data, HINTS if file == "adapter_config.json" else TOKENIZER_HINTS)
            files[f"{LORA}/{file}"] = content
            steps += [f"{file}: {step}" for step in done]
        how = rng.choices(("plan", "convert", "command", "dry run", "values", "merge"), (83, 6, 5, 1, 3, 2))[0]
        name = rng.choice(ODD_NAMES) if rng.random() < 0.02 else LORA
        if name != LORA:
            steps.append(f"the directory is called {name!a}")
        if rng.random() < 0.003:
            kind = mutate_bytes.special(rng)
            files, steps = {LORA: kind}, [f"the adapter is a {kind.kind}"]
        return Case(variant, files, {"how": how, "name": name, "twice": rng.random() < 0.06}, steps)

    def names(self, case: Case, folder: Path) -> tuple[str, ...]:
        return tuple(str(folder / name) for name in (case.call["name"], BASE, SECOND, OUT))

    def run(self, case: Case, folder: Path) -> str:
        lora = folder / case.call["name"]
        if case.call["name"] != LORA:
            (folder / LORA).rename(lora)
        second = folder / SECOND
        loras = [lora, lora] if case.call["twice"] else [lora, second] if second.exists() else [lora]
        return run_conversion(case.call["how"], folder / BASE, loras, folder)


def _newer_adapters(folder: Path) -> None:
    """DoRA, rows of single tokens, and biases both of the layers and of lora_B."""
    pairs = seeds.layer_pairs()
    seeds.adapter(folder / "dora" / LORA, pairs | seeds.magnitudes(pairs), use_dora=True)
    ids = [5, 300, 329]
    tokens = {"trainable_token_indices": {"embed_tokens": ids}}
    seeds.adapter(folder / "tokens" / LORA, pairs | seeds.trained_tokens(ids), **tokens)
    attention: dict[str, np.ndarray] = {}
    for layer in range(seeds.LAYERS):
        for module in _ATTENTION:
            rows = seeds.HIDDEN // seeds.HEADS if module in ("k_proj", "v_proj") else seeds.HIDDEN
            name = f"{layer}.self_attn.{module}"
            attention |= seeds.lora_pair(name, rows, seeds.HIDDEN, seed=layer)
            attention[f"base_model.model.model.layers.{name}.base_layer.bias"] = np.full(rows, 0.1, np.float32)
    settings = {"bias": "lora_only", "target_modules": _ATTENTION, "lora_bias": True}
    seeds.adapter(folder / "biases" / LORA, attention | seeds.lora_biases(attention), **settings)
