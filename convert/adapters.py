# SPDX-License-Identifier: Apache-2.0
"""PEFT LoRA directories: the config and the tensors under all the names PEFT has given them; empty ones are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cnllama.config import EMBEDDING, LM_HEAD
from cnllama.container import is_count, read_json
from cnllama.errors import InputError

from .checkpoint import SourceTensor, canonical_name, open_weights

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# What merging W + scale * B A cannot express, by the name of its setting.
_REFUSED = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication",
    "trainable_token_indices", "target_parameters", "enable_lora", "arrow_config", "kasa_config", "monteclora_config",
    "velora_config", "megatron_config",
)  # fmt: skip
_KNOWN = {
    *_REFUSED, "auto_mapping", "base_model_name_or_path", "peft_version", "revision", "peft_type", "task_type",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias",
    "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "merge_weights",
}  # fmt: skip
_BASE_KEPT = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations that leave the base weights alone

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_LORA_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.[^.]+)?")
_SAVED = re.compile(r"(?P<module>.+?)(?P<wrapper>\.modules_to_save(?:\.[^.]+)?|\.base_layer|)\.(?P<kind>weight|bias)")
_IGNORED = re.compile(r".+\.original_module\.(weight|bias)")


@dataclass(frozen=True)
class Pair:
    """delta = scale * B A for a matrix [rows, cols]: A [r, cols], B [rows, r].

    An embedding's are stored transposed (A [r, vocabulary], B [hidden, r]): delta = scale * (B A)^T.
    """

    a: SourceTensor
    b: SourceTensor
    scale: float
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that the pair fits."""
        rows, cols = self.b.shape[0], self.a.shape[1]
        return (cols, rows) if self.embedding else (rows, cols)


@dataclass
class Adapter:
    """One --lora directory: pairs and whole saved tensors by the base's tensor name."""

    directory: Path
    file: Path
    pairs: dict[str, Pair] = field(default_factory=dict)
    saved: dict[str, SourceTensor] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def vocabulary_rows(self) -> dict[str, int]:
        """Rows of the embed_tokens and lm_head that the adapter saves whole."""
        return {name: self.saved[name].shape[0] for name in (EMBEDDING, LM_HEAD) if name in self.saved}

    def check_values(self) -> None:
        """Reads the LoRA matrices; raises InputError when they are zero or not finite: the training was lost."""
        idle = []
        for name, pair in self.pairs.items():
            a, b = pair.a.read(), pair.b.read()
            for tensor, values in ((pair.a, a), (pair.b, b)):
                if not np.isfinite(values).all():
                    raise InputError(
                        f"{self.file}: tensor {tensor.name} holds NaN or infinity, expected finite numbers; "
                        "the training diverged or the file is damaged"
                    )
            if not a.any() or not b.any():
                idle.append(name)
            pair.a.release()
            pair.b.release()
        if self.pairs and len(idle) == len(self.pairs):
            self._refuse("every LoRA matrix B (or A) is zero, so it changes nothing", "its training was not saved")
        for name, tensor in self.saved.items():
            if not any(tensor.read(row, row + 1024).any() for row in range(0, tensor.shape[0], 1024)):
                self._refuse(f"the saved {name} is all zero", "its training was not saved")
            tensor.release()
        if idle:
            self.warnings.append(f"{self.file}: {len(idle)} of {len(self.pairs)} LoRA pairs are zero ({idle[0]}, ...)")

    def _refuse(self, found: str, reason: str) -> NoReturn:
        raise InputError(f"{self.file}: {found}; {reason}, save the adapter again")


def open_adapter(directory: Path) -> Adapter:
    """Reads adapter_config.json and the weight file's header; no weights.

    Raises InputError for a missing or empty file and, by name, for every PEFT feature that is not a plain LoRA.
    """
    if not directory.is_dir():
        found = "this is a file" if directory.exists() else "there is no such directory"
        raise InputError(f"{directory}: {found}, expected the directory of a PEFT adapter")
    if not (directory / "adapter_config.json").exists():
        mend = "this is a whole model, give it as BASE" if (directory / "config.json").exists() else "get it too"
        raise InputError(f"{directory}: there is no adapter_config.json, expected a PEFT adapter; {mend}")
    where = directory / "adapter_config.json"
    config = read_json(where)
    file = next((directory / name for name in _FILES if (directory / name).exists()), None)
    if file is None:
        raise InputError(f"{directory}: there are no adapter weights, expected {' or '.join(_FILES)}")
    adapter = Adapter(directory, file, warnings=_check_config(config, where))
    tensors = open_weights(file)
    if not tensors:
        adapter._refuse(f"the file has {file.stat().st_size:,} bytes and no tensors", "the training was lost on saving")
    empty = [name for name, tensor in tensors.items() if tensor.size == 0]
    if empty:
        adapter._refuse(
            f"{len(empty)} of {len(tensors)} tensors have size 0 ({empty[0]})",
            "sharded training (ZeRO-3) saved it without gathering the weights",
        )
    _sort_tensors(adapter, tensors, config, where)
    return adapter


def _check_config(config: Mapping[str, Any], where: Path) -> list[str]:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"{where}: peft_type is {kind!r:.40}, expected 'LORA'; only LoRA can be merged")
    for key in _REFUSED:
        if config.get(key):
            raise InputError(f"{where}: {key} is {config[key]!r:.60}; this variant of LoRA cannot be merged here")
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias is {config['bias']!r:.40}, expected 'none'; trained biases are not supported")
    start = config.get("init_lora_weights")
    if start not in _BASE_KEPT:
        raise InputError(
            f"{where}: init_lora_weights is {start!r:.40}, which changes the base weights; convert the adapter to a "
            "plain LoRA with PEFT first"
        )
    if not is_count(config.get("r"), 1, 1 << 20):
        raise InputError(f"{where}: r is {config.get('r')!r:.40}, expected a positive integer")
    alphas = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
    if not all(isinstance(a, (int, float)) and not isinstance(a, bool) and math.isfinite(a) for a in alphas):
        raise InputError(f"{where}: lora_alpha or alpha_pattern is {alphas!r:.80}, expected finite numbers")
    ranks = list((config.get("rank_pattern") or {}).values())
    if not all(is_count(rank, 1, 1 << 20) for rank in ranks):
        raise InputError(f"{where}: rank_pattern is {ranks!r:.80}, expected positive integers")
    warnings = [f"{where}: unknown setting {key!r:.60} ignored" for key in config if key not in _KNOWN]
    if config.get("fan_in_fan_out"):
        warnings.append(f"{where}: fan_in_fan_out ignored, as PEFT does: LLaMA's layers are not stored so")
    return warnings


def _sort_tensors(
    adapter: Adapter, tensors: Mapping[str, SourceTensor], config: Mapping[str, Any], where: Path
) -> None:
    sides: dict[tuple[str, bool], dict[str, SourceTensor]] = {}
    rank_of_wrapper: dict[str, int] = {}
    for key, tensor in tensors.items():
        name = key
        while name.startswith("base_model.model."):
            name = name.removeprefix("base_model.model.")
        name = canonical_name(name)
        if _IGNORED.fullmatch(name):
            continue
        lora = _LORA.fullmatch(name) or _LORA_EMBEDDING.fullmatch(name)
        if lora:
            pair = sides.setdefault((lora["module"], "lora_embedding" in name), {})
            if lora["side"] in pair:
                raise InputError(f"{adapter.file}: holds {lora['module']}'s LoRA twice; save one adapter per file")
            pair[lora["side"]] = tensor
            continue
        saved = None if ".lora_" in name else _SAVED.fullmatch(name)
        if saved is None:
            adapter.unmatched.append(key)
            continue
        target = f"{saved['module']}.{saved['kind']}"
        rank = 1 + saved["wrapper"].startswith(".modules_to_save")
        if rank > rank_of_wrapper.get(target, 0):  # the trained copy beats the one beside it
            adapter.saved[target], rank_of_wrapper[target] = tensor, rank
    for (module, embedding), pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise InputError(f"{adapter.file}: {module} has only one of lora_A and lora_B; get the file again")
        adapter.pairs[f"{module}.weight"] = _make_pair(module, pair, embedding, config, where)


def _make_pair(
    module: str, pair: Mapping[str, SourceTensor], embedding: bool, config: Mapping[str, Any], where: Path
) -> Pair:
    a, b = pair["A"], pair["B"]
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"], where)
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"], where)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise InputError(
            f"{a.file}: {module} has LoRA matrices A {list(a.shape)} and B {list(b.shape)} but {where.name} says rank "
            f"{rank}; the two files are not of one adapter"
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Pair(a, b, scale, embedding)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any, where: Path) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise InputError(f"{where}: {pattern!r:.60} in a pattern is no regular expression") from None
    return default
