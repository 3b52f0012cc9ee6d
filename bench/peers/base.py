# SPDX-License-Identifier: Apache-2.0
"""What the modules of this folder share: the row of an engine as the parent sees it, and the engine in its worker."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnllama import bench
from cnllama.errors import InputError
from cnllama.resident import resident_memory

OVERHEAD = 512 << 20  # bytes of a process besides weights and cache: interpreter, libraries, buffers


@dataclass(frozen=True)
class Spec:
    """A row of the tables. Sizes in bytes.

    options: what Engine.open gets. mapped: the file that is mapped, so that engines share it in memory; private: what
    this engine holds alone, without cache and OVERHEAD; kv: of one position. weights: that one decoding step reads.
    against: the row of this project that it is compared with.
    """

    name: str
    module: str
    options: dict[str, Any]
    file_bytes: int
    weights: int
    kv: int
    mapped: Path | None = None
    private: int = 0
    against: str = "cnllama"
    python: str = sys.executable
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A row that is not there, and why."""

    name: str
    reason: str


class Engine(ABC):
    """One model in one worker: a bench.Runner that also opens, describes itself and cleans up."""

    vocab_size: int

    @abstractmethod
    def open(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Loads the model. Returns {"version", "settings"} and what else the engine wants to say."""

    @abstractmethod
    def prepare(self, context: int, room: int, batch: int) -> None: ...

    @abstractmethod
    def prefill(self, ids: np.ndarray) -> None: ...

    @abstractmethod
    def step(self, ids: np.ndarray) -> None: ...

    @abstractmethod
    def rewind(self) -> None: ...

    def settle(self) -> None:  # noqa: B027
        """Does now what the engine would do once, in its first steps: for most of them nothing."""

    @abstractmethod
    def release(self) -> None:
        """Frees the cache, keeps the weights."""

    def count_tokens(self, text: str) -> int | None:
        """Tokens of a text without begin token; None when this engine has no tokenizer."""
        return None

    def logits(self) -> np.ndarray | None:
        """float32 [vocab_size] of the last token that ran; None when the engine does not give them."""
        return None

    def resident_memory(self, model: Path) -> dict[str, int] | None:
        return resident_memory(model)

    def fill(self, context: int, room: int, batch: int) -> None:
        bench.fill(self, context, room, batch)

    def time_prefill(self, tokens: int, min_seconds: float) -> float:
        return bench.time_prefill(self, tokens, min_seconds)

    def time_decode(self, steps: int, batch: int, min_seconds: float) -> float:
        return bench.time_decode(self, steps, batch, min_seconds)


def version_of(package: str) -> str:
    """The installed version of a distribution. Raises ImportError, which names it, when it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{package} is not installed") from None


def lacks(python: str, *modules: str) -> str | None:
    """Why these modules cannot be imported by an interpreter: one sentence, or None when they are there."""
    if python != sys.executable:
        return None  # its worker will say
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def directory_bytes(directory: Path, *endings: str) -> int:
    """Bytes of the files in a directory that have one of the endings."""
    return sum(file.stat().st_size for file in directory.iterdir() if file.name.endswith(endings))


def read_config(directory: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON object beside a model. Raises InputError that names the file."""
    path = directory / name
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the directory that holds {name}") from error
    except ValueError as error:
        raise InputError(f"{path}: this is no JSON ({error}); get the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: it holds {value!r:.40}, expected a JSON object")
    return value


def kv_values(config: Mapping[str, Any], path: Path) -> int:
    """Numbers that one position of the cache holds, from a Hugging Face configuration."""
    try:
        heads = int(config["num_attention_heads"])
        size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        return 2 * int(config["num_hidden_layers"]) * int(config.get("num_key_value_heads") or heads) * size
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path}: config.json does not describe a LLaMA ({error!r}); give its directory") from error


def check_directory(path: Path, option: str) -> Path:
    """The path, if it is a directory. Raises InputError."""
    if not path.is_dir():
        raise InputError(f"{option} {os.fspath(path)}: there is no such directory; give one that holds a model")
    return path
