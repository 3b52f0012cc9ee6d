# SPDX-License-Identifier: Apache-2.0
"""Tokenizer directories in the making, and transformers' reading of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
from cnllama.convert.tokenizers import TokenizerFiles, read_tokenizer

from cnllama.errors import InputError

CONFIG, ADDED, SPECIAL, WHOLE = (
    "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.json"
)  # fmt: skip
LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "legacy": False,
    "add_bos_token": True,
}


def entry(text: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    """An added token as transformers writes it."""
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": not special, "special": special}
    return {"content": text} | plain | flags


class Folder:
    """A tokenizer directory in the making."""

    def __init__(self, path: Path, model: bytes | None) -> None:
        self.path = path
        path.mkdir()
        if model is not None:
            (path / "tokenizer.model").write_bytes(model)

    def write(self, **files: Any) -> Folder:
        """write(config={...}, added={...}, special={...}, whole={...})"""
        names = {"config": CONFIG, "added": ADDED, "special": SPECIAL, "whole": WHOLE}
        for key, value in files.items():
            models.write_json(self.path / names[key], value)
        return self

    def read(self, before: TokenizerFiles | None = None) -> TokenizerFiles:
        found = read_tokenizer(self.path, before)
        assert found is not None
        return found

    def refusal(self, before: TokenizerFiles | None = None) -> str:
        with pytest.raises(InputError) as caught:
            read_tokenizer(self.path, before)
        assert "\n" not in str(caught.value)
        assert str(self.path) in str(caught.value)
        return str(caught.value)


def theirs(folder: Folder) -> Any:
    from transformers import AutoTokenizer

    models.write_json(folder.path / "config.json", {"model_type": "llama"})
    return AutoTokenizer.from_pretrained(folder.path)


TEXTS = ["我们学习区块链和大模型", "区块链", "大模型hello区块链world", "x<|im_end|>y", "</s>x"]
