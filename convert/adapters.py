# SPDX-License-Identifier: Apache-2.0
"""PEFT LoRA directories: the config, and the tensors under all the names PEFT gave them; empty ones are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from cnllama.config import EMBEDDING, LM_HEAD
from cnllama.container import read_json
from cnllama.errors import InputError
from cnllama.paths import exists, is_dir, names_in

from .adapter_config import Settings, read_settings
from .adapter_targets import EMBED_MODULE, HEAD_MODULE
from .checkpoint import SourceTensor, canonical_name, open_weights
from .updates import Pair

_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."

# NAME is the adapter's, which PEFT's writer leaves out and raw state dicts keep.
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<name>[^.]+))?\.(?P<kind>weight|bias)")
_LORA_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<name>[^.]+))?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?P<name>(?!weight$)[^.]+))?(?:\.weight)?")
_DELTA = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<name>[^.]+))?")
_WHOLE = re.compile(
    r"(?P<module>.+?)(?:\.(?P<own>base_layer|token_adapter\.base_layer)"
    r"|\.(?P<wrapped>original_module|modules_to_save(?:\.[^.]+)?)(?P<rest>(?:\.[^.]+)*?))?\.(?P<kind>weight|bias)"
)


@dataclass
class Adapter:
    """One --lora directory, its tensors sorted by the base's tensor they belong to.

    pairs: LoRA by name of the weight. tokens: new rows by name of the weight. whole: tensors like the base's own, by
    name and by what stands before "weight" there: "", "base_layer", "original_module", "token_adapter.base_layer",
    "modules_to_save". What they mean is decided by the config and by the base (adapter_facts.py, tying.py).
    """

    directory: Path
    file: Path
    settings: Settings
    pairs: dict[str, Pair] = field(default_factory=dict)
    tokens: dict[str, SourceTensor] = field(default_factory=dict)
    whole: dict[str, dict[str, SourceTensor]] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def stated_rows(self) -> Iterator[tuple[str, int]]:
        """Every number of rows that the file states for embed_tokens or lm_head, with the name it states it for."""
        for name in (EMBEDDING, LM_HEAD):
            for tensor in self.whole.get(name, {}).values():
                yield name, tensor.shape[0]
            if name in self.pairs:
                yield f"{name} (LoRA)", self.pairs[name].shape[0]

    def check_values(self) -> None:
        """Reads the trained values; raises InputError when they are zero or not finite: the training was lost."""
        idle = []
        for name, pair in self.pairs.items():
            a, b = self._finite(pair.a), self._finite(pair.b)
            others = [part for part in (pair.magnitude, pair.bias) if part is not None]
            for tensor in others:
                self._finite(tensor)
            if not others and (pair.scale == 0 or not a.any() or not b.any()):
                idle.append(name)
            for tensor in (pair.a, pair.b, *others):
                tensor.release()
        if self.pairs and len(idle) == len(self.pairs):
            self.refuse("every LoRA matrix B (or A) is zero, so it changes nothing; its training was not saved")
        for tensor in self.tokens.values():
            self._finite(tensor)
        for name, forms in self.whole.items():
            for form, tensor in forms.items():
                if form != "original_module" and not name.endswith(".bias") and not _any(tensor):
                    self.refuse(f"the saved {name} is all zero; its training was not saved")
                tensor.release()
        if idle:
            self.warnings.append(f"{self.file}: {len(idle)} of {len(self.pairs)} LoRA pairs are zero ({idle[0]}, ...)")

    def refuse(self, found: str, mend: str = "save the adapter again") -> NoReturn:
        """Raises InputError about its weight file."""
        raise InputError(f"{self.file}: {found}, {mend}")

    def _finite(self, tensor: SourceTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        values = tensor.read()
        if not np.isfinite(values).all():
            raise InputError(
                f"{self.file}: tensor {tensor.name} holds NaN or infinity, expected finite numbers; "
                "the training diverged or the file is damaged"
            )
        return values


def open_adapter(directory: Path) -> Adapter:
    """Reads adapter_config.json and the weight file's header; no weights.

    Raises InputError for a missing or empty file and, by name, for every PEFT feature that is not merged here.
    """
    _check_directory(directory)
    settings = read_settings(read_json(directory / _CONFIG), directory / _CONFIG)
    file = next((directory / name for name in _FILES if exists(directory / name)), None)
    if file is None:
        raise InputError(
            f"{directory}: there are no adapter weights, expected {' or '.join(_FILES)}{_others(directory)}"
        )
    adapter = Adapter(directory, file, settings, warnings=list(settings.warnings))
    tensors = open_weights(file)
    if not tensors:
        adapter.refuse(f"the file has {file.stat().st_size:,} bytes and no tensors; the training was lost on saving")
    single = next((name for name, tensor in tensors.items() if not tensor.shape), None)
    if single is not None:
        adapter.refuse(f"tensor {single} is a single number, expected a vector or matrix", "get the file again")
    empty = [name for name, tensor in tensors.items() if tensor.size == 0]
    if empty:
        adapter.refuse(
            f"{len(empty)} of {len(tensors)} tensors have size 0 ({empty[0]}); sharded training (ZeRO-3) saved it "
            "without gathering the weights"
        )
    _sort_tensors(adapter, tensors)
    return adapter


def _check_directory(directory: Path) -> None:
    """Raises InputError for what holds no adapter_config.json, saying what it is instead and where the adapter lies."""
    if not is_dir(directory):
        if not exists(directory):
            raise InputError(f"{directory}: there is no such directory, expected the directory of a PEFT adapter")
        mend = f"; give {directory.parent}" if exists(directory.parent / _CONFIG) else ""
        raise InputError(f"{directory}: this is a file, expected the directory of a PEFT adapter{mend}")
    if exists(directory / _CONFIG):
        return
    found = f"{directory}: there is no {_CONFIG}, expected a PEFT adapter"
    snapshots = sorted(path.parent for path in directory.glob(f"snapshots/*/{_CONFIG}"))
    if snapshots:
        raise InputError(f"{found}; this is the hub's cache of one, give {snapshots[-1]}")
    inside = sorted(path.parent for path in directory.glob(f"*/{_CONFIG}"))
    checkpoints = [path for path in inside if re.fullmatch(r"checkpoint-\d+", path.name)]
    if checkpoints:
        last = max(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        raise InputError(f"{found}; this is a training's output and its last checkpoint is {last}, give that")
    if len(inside) == 1:
        raise InputError(f"{found}; PEFT saved the adapter under its name, give {inside[0]}")
    if inside:
        names = ", ".join(path.name for path in inside[:5])
        raise InputError(f"{found}; it holds {len(inside)} adapters under their names ({names}), give one of them")
    if exists(directory / "config.json"):
        raise InputError(f"{found}; this is a whole model, give it as BASE")
    raise InputError(f"{found}; get it too")


def _others(directory: Path) -> str:
    found = sorted(n for n in names_in(directory) if n.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf")))
    return f"; {', '.join(found[:3])} is no name that PEFT reads, save the adapter with PEFT" if found else ""


@dataclass
class _Parts:
    """The tensors of one LoRA."""

    kinds: set[bool] = field(default_factory=set)
    tensors: dict[str, SourceTensor] = field(default_factory=dict)


def _sort_tensors(adapter: Adapter, tensors: Mapping[str, SourceTensor]) -> None:
    parts: dict[str, _Parts] = {}
    names: set[str] = set()
    for key, tensor in tensors.items():
        name = key
        while name.startswith(_PREFIX):
            name = name.removeprefix(_PREFIX)
        name = canonical_name(name)
        found = _part(name)
        if found is not None:
            module, part, given, embedding = found
            names |= {given} if given else set()
            entry = parts.setdefault(module, _Parts())
            entry.kinds |= {embedding} if part in "AB" else set()
            if part in entry.tensors:
                adapter.refuse(
                    f"holds {module}'s {part} twice ({entry.tensors[part].name} and {key})", "save one adapter per file"
                )
            entry.tensors[part] = tensor
        elif match := _WHOLE.fullmatch(name):
            form = match["own"] or (match["wrapped"] or "").split(".")[0]
            whole = f"{match['module']}{match['rest'] or ''}.{match['kind']}"
            forms = adapter.whole.setdefault(whole, {})
            if forms.setdefault(form, tensor) is not tensor:
                adapter.refuse(f"holds {whole} twice ({forms[form].name} and {key})", "save one adapter per file")
        else:
            adapter.unmatched.append(key)
    if len(names) > 1:
        adapter.refuse(f"holds {len(names)} adapters ({', '.join(sorted(names)[:5])})", "save one adapter per file")
    for module, entry in parts.items():
        if "delta" in entry.tensors:
            adapter.tokens[f"{module}.weight"] = entry.tensors.pop("delta")
        if entry.tensors:
            adapter.pairs[f"{module}.weight"] = _make_pair(adapter, module, entry)


def _part(name: str) -> tuple[str, str, str | None, bool] | None:
    """(module, "A", "B", "B.bias", "magnitude" or "delta", the adapter's name, whether of an embedding)."""
    if match := _LORA.fullmatch(name):
        part = match["side"] if match["kind"] == "weight" else f"{match['side']}.bias"
        return match["module"], part, match["name"], False
    if match := _LORA_EMBEDDING.fullmatch(name):
        return match["module"], match["side"], match["name"], True
    for part, expression in (("magnitude", _MAGNITUDE), ("delta", _DELTA)):
        if match := expression.fullmatch(name):
            return match["module"], part, match["name"], False
    return None


def _make_pair(adapter: Adapter, module: str, entry: _Parts) -> Pair:
    """The LoRA of one module. Raises InputError where the file contradicts the config or is not whole."""
    settings, parts = adapter.settings, entry.tensors
    if "A" not in parts or "B" not in parts or len(entry.kinds) > 1:
        adapter.refuse(f"{module} has only one of lora_A and lora_B", "get the file again")
    a, b = parts["A"], parts["B"]
    rank = settings.rank_of(module)
    # Where it is tied to that of embed_tokens, lm_head's LoRA has the rank of that and the scale of its own.
    tied = module == HEAD_MODULE and settings.ensure_tying
    if (
        len(a.shape) != 2
        or b.shape[1:] != a.shape[:1]
        or a.shape[0] not in (rank, settings.rank_of(EMBED_MODULE) * tied)
    ):
        refuse_rank(adapter, module, a, b)
    for part, key, wanted, name in (
        ("magnitude", "use_dora", settings.dora, "lora_magnitude_vector"),
        ("B.bias", "lora_bias", settings.lora_bias, "lora_B.bias"),
    ):
        if (part in parts) != wanted:
            adapter.refuse(
                f"{module} has {'no' if wanted else 'a'} {name} but {_CONFIG} says {key} {str(wanted).lower()}; the "
                "two files are not of one adapter",
                "get both again",
            )
    if "A.bias" in parts:
        adapter.refuse(f"{module} has a bias in lora_A, which no version of PEFT writes", "get the file again")
    embedding = True in entry.kinds
    pair = Pair(a, b, settings.scale_of(module, rank), embedding, parts.get("magnitude"), parts.get("B.bias"))
    sizes = {"magnitude": pair.shape[1 if embedding else 0], "B.bias": pair.shape[0]}
    for part, size in sizes.items():
        if part in parts and parts[part].shape != (size,):
            adapter.refuse(f"{parts[part].name} has shape {list(parts[part].shape)}, expected [{size}]", "get it again")
    return pair


def refuse_rank(adapter: Adapter, module: str, a: SourceTensor, b: SourceTensor) -> NoReturn:
    """Refuses matrices of another rank than the config's."""
    adapter.refuse(
        f"{module} has LoRA matrices A {list(a.shape)} and B {list(b.shape)} but {_CONFIG} says rank "
        f"{adapter.settings.rank_of(module)}; the two files are not of one adapter",
        "get both again",
    )


def _any(tensor: SourceTensor) -> bool:
    return any(tensor.read(row, row + 1024).any() for row in range(0, tensor.shape[0], 1024))
