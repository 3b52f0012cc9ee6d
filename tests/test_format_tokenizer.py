# SPDX-License-Identifier: Apache-2.0
"""The `tokenizer` metadata of a .cnl: what says nothing a tokenizer can do is refused, in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_format import assert_refused, metadata, read, write

from cnllama.format import open_cnl

MUTATIONS = {
    "added token endless": (
        metadata("tokenizer", lambda t: t.update(added_tokens={"x" * 1001: 5})),
        "more than it may",
    ),
    "legacy a string": (metadata("tokenizer", lambda t: t.update(legacy="no")), "legacy is 'no'"),
    "token flags a list": (metadata("tokenizer", lambda t: t.update(token_flags=["x"])), "token flags are"),
    "token flags of a stranger": (metadata("tokenizer", lambda t: t.update(token_flags={"x": []})), "token flags are"),
    "token flag unknown": (
        metadata("tokenizer", lambda t: t.update(added_tokens={"x": 5}, token_flags={"x": ["bold"]})),
        "expected some of special, lstrip",
    ),
    "token flag a list": (
        metadata("tokenizer", lambda t: t.update(added_tokens={"x": 5}, token_flags={"x": [["special"]]})),
        "expected some of special, lstrip",
    ),
    "tokenizer's eos without a text": (
        metadata("tokenizer", lambda t: t.update(pieces=800, eos_token_id=850)),
        "eos_token_id is 850",
    ),
    "tokenizer's bos a text": (metadata("tokenizer", lambda t: t.update(bos_token_id="1")), "bos_token_id is '1'"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_hostile_settings_are_refused(tiny_cnl: Path, tmp_path: Path, name: str) -> None:
    assert_refused(tiny_cnl, tmp_path / "broken.cnl", *MUTATIONS[name])


def test_settings_of_older_files_are_enough(tiny_cnl: Path, tmp_path: Path) -> None:
    header, body = read(tiny_cnl)
    metadata("tokenizer", lambda t: [t.pop(key) for key in ("token_flags", "legacy")] and None)(header)
    assert "legacy" not in open_cnl(write(tmp_path / "old.cnl", header, body)).tokenizer
