# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json of a PEFT LoRA: every setting is read with its type and range, known to be idle, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnllama.container import is_count
from cnllama.errors import InputError

from .adapter_targets import Targets
from .patterns import Budget, Pattern

MAX_RANK = 1 << 20
MAX_SCALE = 1e15  # beyond it the squares of DoRA's norms leave float32, which PEFT computes in
_MAX_PATTERNS, _MAX_SAVED, _MAX_NAMES = 10_000, 1000, 100_000

_MERGE = (
    "merge it with PEFT (PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(DIR)) and convert "
    "DIR"
)
_TRAIN = "no merged weights can do that; train a plain LoRA"
# What W + scale * B A cannot express or what PEFT alone can merge, and the way out.
_REFUSED = {
    "alora_invocation_tokens": f"it acts on a part of the text only: {_TRAIN}",
    "arrow_config": f"it chooses between adapters for every token: {_TRAIN}",
    "enable_lora": "LoRA on parts of a fused matrix was dropped by PEFT, and LLaMA has none; train a plain LoRA",
    "kasa_config": f"it changes the base's weights; {_MERGE}",
    "layer_replication": "it repeats layers of the base; make a checkpoint of the longer model first, without LoRA",
    "megatron_config": "it was trained in Megatron's layers; export it from there as a plain LoRA",
    "monteclora_config": _MERGE,
    "target_parameters": _MERGE,
    "use_bdlora": _MERGE,
    "use_qalora": "its matrices fit a GPTQ base's pooled inputs; train it on the unquantized base",
    "velora_config": _MERGE,
}
# What says nothing about the merged weights: of PEFT, of its older versions, and of ms-swift's own LoraConfig.
_IDLE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "lora_dropout",
    "lora_dtype", "lora_ga_config", "lorap_emb_lr", "lorap_lr_ratio", "megatron_core", "merge_weights", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
_READ = {
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "modules_to_save", "peft_type",
    "r", "rank_pattern", "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
_BIASES = ("none", "all", "lora_only")
_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
_UNMERGEABLE = (
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING", "PROMPT_TUNING",
    "P_TUNING", "SHADOW", "XLORA",
)  # fmt: skip
# Initialisations that leave the base alone: those whose first B A is zero, and those whose is not.
_ZERO_START, _RANDOM_START = (True, "gaussian", "eva", "mica"), (False, None, "orthogonal")
_CHANGED_START = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class Settings:
    """What a checked adapter_config.json means for the weights.

    tokens: the rows that trainable_token_indices names, by name of a module; None without that setting.
    """

    where: Path
    rank: int
    alpha: float
    rank_patterns: tuple[tuple[Pattern, int], ...]
    alpha_patterns: tuple[tuple[Pattern, float], ...]
    rslora: bool
    dora: bool
    lora_bias: bool
    bias: str
    zero_start: bool
    ensure_tying: bool
    targets: Targets
    tokens: Mapping[str, tuple[int, ...]] | None
    warnings: list[str] = field(default_factory=list)

    def rank_of(self, module: str) -> int:
        """PEFT's rule: the first pattern that fits the end of the module's name, else r."""
        return next((rank for pattern, rank in self.rank_patterns if pattern.match(module)), self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """lora_alpha / rank, or / sqrt(rank) with rank-stabilised LoRA (arXiv 2312.03732)."""
        alpha = next((alpha for pattern, alpha in self.alpha_patterns if pattern.match(module)), self.alpha)
        scale = alpha / (math.sqrt(rank) if self.rslora else rank)
        if abs(scale) > MAX_SCALE:
            raise InputError(
                f"{self.where}: alpha {alpha:g} of {module} scales its LoRA by {scale:g}, expected at most "
                f"{MAX_SCALE:g}; correct it"
            )
        return scale


def read_settings(config: Mapping[str, Any], where: Path) -> Settings:
    """Checks the object in adapter_config.json. Raises InputError, by name, for what cannot be merged or read."""
    warnings = _check_kind(config, where)
    read = _Reader(config, where)
    start = _check_start(config, where)
    dora, lora_bias, bias = read.flag("use_dora"), read.flag("lora_bias"), config.get("bias", "none")
    if bias not in _BIASES or not isinstance(bias, str):
        raise InputError(f"{where}: bias is {bias!r:.40}, expected one of {', '.join(_BIASES)}")
    if dora and (lora_bias or start == "mica"):
        other = "lora_bias" if lora_bias else "init_lora_weights 'mica'"
        raise InputError(f"{where}: has use_dora and {other}, which PEFT does not combine; correct one of them")
    if lora_bias and not isinstance(start, bool):
        raise InputError(
            f"{where}: has lora_bias and init_lora_weights {start!r:.40}, which PEFT does not combine; correct one of "
            "them"
        )
    if config.get("loftq_config"):
        warnings.append(f"{where}: loftq_config is set: the adapter fits the base that LoftQ wrote, not the original")
    if read.flag("fan_in_fan_out"):
        warnings.append(f"{where}: fan_in_fan_out ignored, as PEFT does: LLaMA's layers are not stored so")
    rank = config.get("r", 8)
    if not is_count(rank, 1, MAX_RANK):
        raise InputError(f"{where}: r is {rank!r:.40}, expected an integer from 1 to {MAX_RANK:,}")
    return Settings(
        where,
        rank,
        read.number("lora_alpha", config.get("lora_alpha", 8)),
        read.patterns("rank_pattern", read.rank),
        read.patterns("alpha_pattern", read.number),
        read.flag("use_rslora"),
        dora,
        lora_bias,
        bias,
        start in _ZERO_START,
        read.flag("ensure_weight_tying"),
        read.targets(),
        read.tokens(),
        warnings,
    )


def _check_kind(config: Mapping[str, Any], where: Path) -> list[str]:
    """Warnings about settings that do not matter. Raises InputError for other methods and for unknown settings."""
    kind = config.get("peft_type")
    if kind != "LORA":
        mend = "it is no change of weights; train a LoRA" if kind in _UNMERGEABLE else _MERGE
        raise InputError(
            f"{where}: peft_type is {kind!r:.40}, expected 'LORA'; "
            f"{mend if isinstance(kind, str) else 'this is no adapter of PEFT, or the file is damaged'}"
        )
    task = config.get("task_type")
    if task is not None and task not in _TASKS:
        raise InputError(f"{where}: task_type is {task!r:.40}, expected 'CAUSAL_LM'; correct it")
    for key, mend in _REFUSED.items():
        if config.get(key) or config.get(key) == {}:  # of a nested configuration: its defaults
            raise InputError(f"{where}: {key} is {config[key]!r:.60}, which cannot be merged here; {mend}")
    for key, value in config.items():
        if key not in _REFUSED and key not in _IDLE and key not in _READ and value:
            raise InputError(
                f"{where}: the setting {key!r:.60} is {value!r:.60} and unknown here, as of a newer PEFT; {_MERGE}, or "
                "remove it if it concerned the training only"
            )
    if task not in (None, "CAUSAL_LM"):
        return [f"{where}: task_type is {task}: trained for something else, it is merged as PEFT does"]
    return []


def _check_start(config: Mapping[str, Any], where: Path) -> Any:
    """init_lora_weights. Raises InputError when the adapter stands on a base that PEFT changed."""
    start = config.get("init_lora_weights", True)
    lower = start.lower() if isinstance(start, str) else start
    if isinstance(lower, str) and lower.startswith(_CHANGED_START):
        raise InputError(
            f"{where}: init_lora_weights is {start!r:.40}, which changes the base's weights; save the adapter as a "
            "plain LoRA with model.save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL), where "
            "INITIAL is the adapter as it was before training"
        )
    if lower == "loftq":
        raise InputError(
            f"{where}: init_lora_weights is 'loftq', which changes the base's weights; give the base that LoftQ wrote "
            "and set init_lora_weights to true, or merge the two with PEFT (merge_and_unload) and convert the result"
        )
    if not any(start is known or (isinstance(known, str) and start == known) for known in _ZERO_START + _RANDOM_START):
        raise InputError(f"{where}: init_lora_weights is {start!r:.40}, which PEFT does not know; correct it")
    return start


class _Reader:
    """Values of a configuration by type; every method raises InputError for another one."""

    def __init__(self, config: Mapping[str, Any], where: Path) -> None:
        self._config, self._where, self._budget = config, where, Budget()

    def _refuse(self, key: str, expected: str) -> InputError:
        return InputError(f"{self._where}: {key} is {self._config.get(key)!r:.60}, expected {expected}")

    def flag(self, key: str) -> bool:
        """true, false, or null for false."""
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._refuse(key, "true or false")
        return bool(value)

    def number(self, key: str, value: object) -> float:
        """A finite float."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with suppress(OverflowError):
                if math.isfinite(float(value)):
                    return float(value)
        raise InputError(f"{self._where}: {key} is {value!r:.60}, expected a finite number")

    def rank(self, key: str, value: object) -> int:
        """A rank."""
        if isinstance(value, int) and is_count(value, 1, MAX_RANK):
            return value
        raise InputError(f"{self._where}: {key} is {value!r:.60}, expected an integer from 1 to {MAX_RANK:,}")

    def patterns(self, key: str, read: Callable[[str, object], Any]) -> tuple[tuple[Pattern, Any], ...]:
        """rank_pattern or alpha_pattern in their order."""
        value = self._config.get(key)
        if value is None:
            return ()
        if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
            raise self._refuse(key, f"an object of at most {_MAX_PATTERNS:,} patterns")
        return tuple(
            (self._pattern(rf"(.*\.)?({text})$", text, key), read(f"{key} of {text!r:.60}", number))
            for text, number in value.items()
        )

    def _pattern(self, text: str, shown: str, key: str) -> Pattern:
        return Pattern(text, shown, f"{self._where}: {key}", self._budget)

    def names(self, key: str) -> tuple[str, ...] | None:
        """A list of names, or None."""
        value = self._config.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > _MAX_NAMES:
            raise self._refuse(key, f"a list of at most {_MAX_NAMES:,} names")
        if not all(isinstance(name, str) and name for name in value):
            raise self._refuse(key, "a list of names of modules")
        return tuple(value)

    def names_or_pattern(self, key: str) -> frozenset[str] | Pattern | None:
        """A list of names or one regular expression for whole names, as PEFT reads target_modules."""
        value = self._config.get(key)
        if isinstance(value, str):
            return self._pattern(value, value, key)
        names = self.names(key)
        return None if names is None else frozenset(names)

    def targets(self) -> Targets:
        """Which modules have LoRA matrices and which are saved whole."""
        named = self._config.get("target_modules")
        layers, layer_patterns = self._layers()
        if isinstance(named, str) and (layers is not None or self._config.get("layers_pattern") is not None):
            raise self._refuse("target_modules", "a list of names beside layers_to_transform and layers_pattern")
        saved = self.names("modules_to_save") or ()
        if len(saved) > _MAX_SAVED:
            raise self._refuse("modules_to_save", f"at most {_MAX_SAVED:,} names")
        return Targets(
            self.names_or_pattern("target_modules"),
            self.names_or_pattern("exclude_modules") if self._config.get("exclude_modules") else None,
            tuple((name, self._pattern(rf"(^|.*\.){name}($|\..*)", name, "modules_to_save")) for name in saved),
            layers,
            layer_patterns,
            self._where,
        )

    def _layers(self) -> tuple[frozenset[int] | None, tuple[Pattern, ...]]:
        """layers_to_transform and layers_pattern; an empty list means every layer."""
        value = self._config.get("layers_to_transform")
        found = [value] if isinstance(value, int) else value
        if found is not None and not (
            isinstance(found, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in found)
        ):
            raise self._refuse("layers_to_transform", "a list of numbers of layers")
        patterns = self._config.get("layers_pattern")
        texts = [patterns] if isinstance(patterns, str) and patterns else patterns or []
        if not isinstance(texts, list) or len(texts) > 100 or not all(isinstance(text, str) and text for text in texts):
            raise self._refuse("layers_pattern", "a name or a short list of names")
        if texts and found is None:
            raise self._refuse("layers_pattern", "none where there is no layers_to_transform")
        compiled = (self._pattern(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", text, "layers_pattern") for text in texts)
        return frozenset(found) if found else None, tuple(compiled)

    def tokens(self) -> dict[str, tuple[int, ...]] | None:
        """trainable_token_indices by name of a module; a list is of the input embedding."""
        value = self._config.get("trainable_token_indices")
        if value is None:
            return None
        found = value if isinstance(value, dict) else {"model.embed_tokens": value}
        for ids in found.values():
            if not isinstance(ids, list) or not ids or not all(is_count(i, 0, 1 << 31) for i in ids):
                raise self._refuse("trainable_token_indices", "lists of token numbers from 0 on")
            if len(set(ids)) != len(ids):
                raise self._refuse("trainable_token_indices", "every token once")
        if not found:
            raise self._refuse("trainable_token_indices", "at least one list of tokens")
        return {name: tuple(ids) for name, ids in found.items()}
