# SPDX-License-Identifier: Apache-2.0
"""A tokenizer.json against the SentencePiece model that it should be: ids, added tokens, spaces, BOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
from cnllama.convert.tokenizers import TokenizerFiles, with_additions
from tokenizer_folder import LLAMA, TEXTS, WHOLE, Folder, entry, theirs

from cnllama.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def size(tokenizer_model: bytes) -> int:
    return models.piece_count(tokenizer_model)


@pytest.fixture
def folder(tmp_path: Path, tokenizer_model: bytes) -> Folder:
    return Folder(tmp_path / "base", tokenizer_model)


@pytest.fixture
def later(tmp_path: Path) -> Folder:
    """A directory that comes after, without a model of its own."""
    return Folder(tmp_path / "later", None)


def whole_of(folder: Folder, tokens: list[str] = ["区块链"], **config: Any) -> dict[str, Any]:  # noqa: B006
    """The tokenizer.json that transformers 5 saves of the directory with these tokens added."""
    folder.write(config=LLAMA | config)
    tokenizer = theirs(folder)
    tokenizer.add_tokens(tokens)
    target = folder.path / "saved"
    tokenizer.save_pretrained(target)
    return dict(json.loads((target / WHOLE).read_text(encoding="utf-8")))


def test_only_a_tokenizer_json_beside_the_model_elsewhere(folder: Folder, later: Folder, size: int) -> None:
    later.write(whole=whole_of(folder), config={"tokenizer_class": "LlamaTokenizer", **LLAMA})
    chosen = folder.read()
    assert chosen.added == {}
    files = with_additions(chosen, [later.path])
    assert files.added["区块链"] == size
    ours, judge = Tokenizer(files.model, files.settings()), theirs(later)
    for text in TEXTS:
        assert ours.encode(text, bos=True, special=True) == judge(text).input_ids


@pytest.mark.parametrize("change", ["another", "missing", "more", "first"])
def test_a_tokenizer_json_of_another_model(folder: Folder, later: Folder, size: int, change: str) -> None:
    whole = whole_of(folder)
    vocabulary = {i: text for text, i in whole["model"]["vocab"].items()}
    assert len(vocabulary) == size
    i = {"another": 700, "missing": size - 1, "more": size + 1, "first": 0}[change]
    old = vocabulary.pop(i, None)
    if change != "missing":
        vocabulary[i] = "anders"
    whole["model"] |= {"vocab": {text: i for i, text in vocabulary.items()}, "merges": []}
    later.write(whole=whole)
    found = later.refusal(folder.read())
    said = None if change == "missing" else "anders"
    assert f"its id {i} is {said!r}, but {old!r} in" in found
    assert "--tokenizer DIR" in found


def test_an_older_tokenizer_json_beside_the_model_is_said(folder: Folder, size: int) -> None:
    """A merged vocabulary whose tokenizer.json still is the base's."""
    whole = whole_of(folder)
    vocabulary = {text: i for text, i in whole["model"]["vocab"].items() if i < size - 50}
    files = folder.write(whole={"model": {"type": "BPE", "vocab": vocabulary}}).read()
    assert any(f"has {size - 50} pieces and tokenizer.model {size}" in notice for notice in files.notices)
    first = next(text for text, i in vocabulary.items() if i == 300)
    del vocabulary[first]
    folder.write(whole={"model": {"vocab": vocabulary | {"anders": 300}}})
    assert f"its id 300 is 'anders', but {first!r}" in folder.refusal()


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_both_kinds_of_vocabulary_are_read(folder: Folder, later: Folder, size: int, kind: str) -> None:
    pieces = [folder.read().text_of(i) for i in range(size)]
    vocabulary: Any = {text: i for i, text in enumerate(pieces)} if kind == "BPE" else [[text, -1.5] for text in pieces]
    later.write(whole={"model": {"type": kind, "vocab": vocabulary}, "added_tokens": [{"id": size} | entry("词语")]})
    assert later.read(folder.read()).added == {"词语": size}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_what_a_tokenizer_json_says_of_spaces_and_bos(
    folder: Folder, later: Folder, legacy: bool, prefix: bool, bos: bool
) -> None:
    """transformers 5 writes these habits nowhere else."""
    later.write(whole=whole_of(folder, legacy=legacy, add_prefix_space=prefix, add_bos_token=bos))
    settings = later.read(TokenizerFiles(folder.path, (folder.path / "tokenizer.model").read_bytes())).settings()
    assert (settings["add_bos"], settings["add_dummy_prefix"]) == (bos, prefix)
    assert not prefix or settings["legacy"] is legacy


def test_normalizers_of_transformers_4(folder: Folder, later: Folder) -> None:
    prepend, replace = (
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "content": "▁", "pattern": {"String": " "}},
    )
    before = folder.read()
    later.write(whole={"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}})
    assert (later.read(before).add_prefix_space, later.read(before).legacy) == (True, True)
    later.write(whole={"normalizer": replace, "pre_tokenizer": None})
    assert later.read(before).add_prefix_space is False


def test_two_files_that_say_whether_bos_is_added(folder: Folder, later: Folder) -> None:
    later.write(whole=whole_of(folder, add_bos_token=True), config={"add_bos_token": False})
    files = later.read(folder.read())
    assert files.add_bos is True
    assert any("says add_bos_token false, tokenizer.json true" in notice for notice in files.notices)


def test_a_conversion_with_the_model_elsewhere(folder: Folder, size: int, tmp_path: Path) -> None:
    """The added token of tokenizer.json has the last row; a tokenizer.json of another model names an id."""
    from cnllama.convert.pack import convert, make_plan

    from cnllama import LLM
    from cnllama.errors import InputError

    base = models.make_llama(tmp_path / "llama", (folder.path / "tokenizer.model").read_bytes(), vocab_size=size + 1)
    whole = whole_of(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (base / name).unlink()
    models.write_json(base / WHOLE, whole)
    convert(base, [], tmp_path / "x.cnl", tokenizer=folder.path)
    with LLM(tmp_path / "x.cnl", ctx=64) as llm:
        assert llm.tokenize("区块链")[-1] == size
    text = next(text for text, i in whole["model"]["vocab"].items() if i == 5)
    whole["model"]["vocab"]["anders"] = whole["model"]["vocab"].pop(text)
    models.write_json(base / WHOLE, whole)
    with pytest.raises(InputError, match=f"its id 5 is 'anders', but {text!r} in"):
        make_plan(base, tokenizer=folder.path)
