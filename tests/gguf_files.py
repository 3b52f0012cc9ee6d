# SPDX-License-Identifier: Apache-2.0
"""Small models for the tests of the GGUF export, and the files as the gguf package reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import numpy as np
from cnllama.convert.pack import convert

TURNS = [
    {"role": "system", "content": "你是诗人。"},
    {"role": "user", "content": "写一首诗"},
    {"role": "assistant", "content": "春眠不觉晓"},
    {"role": "user", "content": " 再来一句"},
    {"role": "assistant", "content": "处处闻啼鸟\n"},
    {"role": "user", "content": "好"},
]


class Maker:
    """make(scheme, template, {added token: id}, **config) -> a small .cnl; the same call again gives the same file."""

    def __init__(self, folder: Path, tokenizer: bytes) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self._made: dict[str, Path] = {}

    def __call__(
        self, scheme: str, template: str | None = None, added: dict[str, int] | None = None, **config: Any
    ) -> Path:
        key = json.dumps([scheme, template, added, config], sort_keys=True)
        if key not in self._made:
            directory = self._folder / f"base{len(self._made)}"
            models.make_llama(directory, self._tokenizer, **config)
            if added:
                models.write_json(directory / "added_tokens.json", added)
            path = self._folder / f"model{len(self._made)}.cnl"
            convert(directory, [], path, quant=scheme.replace("q8-s64", "q8"), template=template)
            self._made[key] = path
        return self._made[key]


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metadata by key, tensors by name)."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def values(tensor: Any) -> np.ndarray:
    """float32 of a tensor that was read."""
    import gguf

    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
