# SPDX-License-Identifier: Apache-2.0
"""Which modules of a LLaMA an adapter_config.json names: PEFT's matching, over the names transformers gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnllama.config import expected_tensors
from cnllama.errors import InputError

from .patterns import Pattern

EMBED_MODULE, HEAD_MODULE = "model.embed_tokens", "lm_head"
EMBEDDING_MODULES = (EMBED_MODULE, HEAD_MODULE)
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")  # PEFT's EMBEDDING_LAYER_NAMES
_DUMMY = "dummy-target-modules"  # PEFT's target of an adapter that only saves modules
_DEFAULT = frozenset({"q_proj", "v_proj"})  # PEFT's for llama and mistral where nothing is named
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# From so many names on PEFT shortens the list, which changes what layers_to_transform acts on.
_SHORTENED = 20


@dataclass(frozen=True)
class Targets:
    """The settings that name modules. A pattern stands for a regular expression over whole names.

    saved: modules_to_save, each as it is and as the expression that keeps LoRA away from it. layers: of
    layers_to_transform, None for all.
    """

    named: frozenset[str] | Pattern | None
    excluded: frozenset[str] | Pattern | None
    saved: tuple[tuple[str, Pattern], ...]
    layers: frozenset[int] | None
    layer_patterns: tuple[Pattern, ...]
    where: Path
    _known: dict[tuple[str, bool], bool] = field(default_factory=dict, compare=False, repr=False)

    @property
    def nothing(self) -> bool:
        """Whether the adapter is one of saved modules only."""
        return isinstance(self.named, Pattern) and self.named.shown == _DUMMY

    @property
    def ties_saved(self) -> bool:
        """Whether PEFT's ensure_weight_tying sees an embedding in modules_to_save: by the last part of a name."""
        return any(name.split(".")[-1] in _EMBEDDING_NAMES for name, _ in self.saved)

    @property
    def ties_lora(self) -> bool:
        """Whether PEFT's ensure_weight_tying sees an embedding in target_modules."""
        if isinstance(self.named, Pattern):
            return any(self.named.fullmatch(name) for name in _EMBEDDING_NAMES)
        return any(name.split(".")[-1] in _EMBEDDING_NAMES for name in self.named or ())

    def saves(self, module: str) -> bool:
        """Whether modules_to_save names this very module: by the end of the name, as PEFT does."""
        return any(module.endswith(name) for name, _ in self.saved)

    def has_lora(self, module: str, *, unless_saved: bool = True) -> bool:
        """Whether the configuration puts LoRA on the module. unless_saved: modules_to_save keeps it away."""
        key = module, unless_saved
        if key not in self._known:
            kept = self.excludes(module) or (unless_saved and any(p.match(module) for _, p in self.saved))
            self._known[key] = not self.nothing and not kept and self._names(module)
        return self._known[key]

    def excludes(self, module: str) -> bool:
        """Whether exclude_modules keeps LoRA away from the module."""
        if isinstance(self.excluded, Pattern):
            return self.excluded.fullmatch(module)
        return self.excluded is not None and not self.excluded.isdisjoint(_ends(module))

    def _names(self, module: str) -> bool:
        named = _DEFAULT if self.named is None else self.named
        if isinstance(named, Pattern):
            if named.shown.lower() == "all-linear":
                return module.rpartition(".")[2] in _PROJECTIONS
            return named.fullmatch(module)
        if module in named:
            return True
        return not named.isdisjoint(_ends(module)) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        parts = module.split(".")
        if len(parts) < 4 or parts[1] != "layers":  # PEFT's own expression asks for something after the number
            return False
        if self.layer_patterns and not any(pattern.match(module) for pattern in self.layer_patterns):
            return False
        return int(parts[2]) in self.layers

    def check(self, modules: Mapping[str, str]) -> None:
        """Raises InputError for what PEFT would refuse, or hide, on a model of these modules (name -> kind)."""
        if isinstance(self.named, frozenset) and self.layers is not None and len(self.named) >= _SHORTENED:
            raise InputError(
                f"{self.where}: target_modules has {len(self.named)} names beside layers_to_transform, which PEFT "
                "reads in its own way from 20 names on; list the last parts of the names only"
            )
        targets = [name for name in modules if self.has_lora(name)]
        odd = [name for name in targets if modules[name] not in ("linear", "embedding")]
        if odd:
            raise InputError(f"{self.where}: target_modules names {odd[0]}, expected linear layers and embeddings")
        if not targets and not self.nothing:
            raise InputError(
                f"{self.where}: target_modules names no layer of this base, expected some, or {_DUMMY!r} for an "
                "adapter without LoRA; it was trained on another model"
            )
        saved = [name for name in modules if self.saves(name)]
        for name in saved:
            inner = [other for other in (*saved, *targets) if other.startswith(f"{name}.") or other == name]
            if modules[name] == "list" or len(inner) > 1:
                found = "a whole stack of layers" if modules[name] == "list" else f"{name}, and something in it"
                raise InputError(f"{self.where}: modules_to_save names {found}; name the layers one by one")

    def unused(self, modules: Mapping[str, str]) -> Iterator[str]:
        """Names that fit no module, which PEFT passes over in silence."""
        ends = {end for module in modules for end in _ends(module)}
        for name in sorted(self.named) if isinstance(self.named, frozenset) else ():
            if name not in ends:
                yield f"target_modules names {name!r:.60}"
        for name, _ in self.saved:
            if not any(module.endswith(name) for module in modules):
                yield f"modules_to_save names {name!r:.60}"


def modules_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Every module of transformers' LlamaForCausalLM and its kind: embedding, linear, norm, list, block or other."""
    found = {"model": "list", EMBED_MODULE: "embedding", "model.layers": "list", "model.rotary_emb": "other"}
    for name, tensor in expected_tensors({**config, "tie_word_embeddings": False}):
        module, _, _ = name.rpartition(".")
        parts = module.split(".")
        for length in range(3, len(parts)):
            found.setdefault(".".join(parts[:length]), "block")
        if parts[-2:-1] == ["mlp"]:
            found.setdefault(".".join([*parts[:-1], "act_fn"]), "other")
        found.setdefault(module, "norm" if tensor.vector else "linear")
    return found


def _ends(name: str) -> list[str]:
    """The name and what follows each of its dots."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
