# SPDX-License-Identifier: Apache-2.0
"""What the stages measure, and where they leave it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SCHEME, HEAD_SCHEME = "q4-a64", "q8-s64"
MODEL_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 55296,
}
SMALL_MODEL = {
    **MODEL_7B,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
}


class Product(NamedTuple):
    """A product of the model; with the epilogue "swiglu" it is of two such matrices."""

    name: str
    scheme: str
    rows: int
    cols: int
    epilogue: str


@dataclass(frozen=True)
class Sizes:
    """What is measured: a 7B model's shapes, or for a dry run some that the emulation gets through."""

    config: dict[str, Any]
    mebibytes: int
    launches: int
    rotated_bytes: int
    few_tokens: tuple[int, ...]
    many_tokens: tuple[int, ...]
    positions: int  # of the cache, in attention and in the longer of two decodes
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    long_batches: tuple[int, ...]
    steps: int
    rounds: int
    layers: int  # of a cache, in attention

    def products(self) -> list[Product]:
        """Of one layer, and of the logits."""
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"]
        return [
            Product("qkv", SCHEME, 3 * hidden, hidden, "store"),
            Product("o", SCHEME, hidden, hidden, "add"),
            Product("gate+up", SCHEME, inner, hidden, "swiglu"),
            Product("down", SCHEME, hidden, inner, "add"),
            Product("lm_head", HEAD_SCHEME, self.config["vocab_size"], hidden, "store"),
        ]


FULL = Sizes(
    MODEL_7B, 2048, 1000, 320 << 20, (1, 8, 16, 32), (512, 2048), 2048, (512, 2048), (1, 8, 32), (1, 8), 64, 7, 16
)
DRY = Sizes(SMALL_MODEL, 1, 20, 1, (1, 9), (70,), 40, (9,), (1, 2), (1,), 2, 2, 2)


class Result:
    """What a stage has found so far: rows of the table, and numbers that later stages read."""

    def __init__(self, target: Path | None, ceilings: dict[str, Any]) -> None:
        self._target = target
        self._ceilings = ceilings
        self.data: dict[str, Any] = {"rows": []}

    def ceiling(self, name: str) -> float | None:
        """A number of the stage `ceilings`, None where it was not found."""
        value = self._ceilings.get(name)
        return float(value) if value else None

    def note(self, name: str, value: Any) -> None:
        """Beside the rows."""
        self.data[name] = value
        self._save()

    def row(self, name: str, value: float, unit: str, scale: float = 1.0, ceiling: float | None = None) -> None:
        """value / scale in `unit`, and its percentage of a ceiling in the unit of value."""
        shown = value / scale
        entry: dict[str, Any] = {"name": name, "value": round(shown, 2 if shown < 1000 else 0), "unit": unit}
        if ceiling:
            entry["percent"] = f"{100 * value / ceiling:.0f} %"
        self._add(entry)

    def gap(self, name: str, reason: object) -> None:
        """A figure that could not be had, and why."""
        text = (str(reason).splitlines() or [type(reason).__name__])[0][:100]
        self._add({"name": name, "value": "-", "unit": "", "percent": text})

    def _add(self, entry: dict[str, Any]) -> None:
        self.data["rows"].append(entry)
        print(f"{entry['name']}: {entry['value']} {entry['unit']} {entry.get('percent', '')}", flush=True)
        self._save()

    def _save(self) -> None:
        if self._target is None:
            return
        temporary = self._target.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._target)
