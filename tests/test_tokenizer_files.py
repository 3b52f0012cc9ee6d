# SPDX-License-Identifier: Apache-2.0
"""What the JSON files say about a tokenizer: each fact that stands in two files is compared before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import sentencepiece
from cnllama.convert.generation import tokenizer_notices
from cnllama.convert.tokenizers import read_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folder import ADDED, CONFIG, LLAMA, SPECIAL, TEXTS, WHOLE, Folder, entry, theirs

from cnllama.errors import InputError
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


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("where", ["decoder", "added", "added and special", "whole"])
def test_ids_are_those_of_transformers(folder: Folder, size: int, legacy: bool | None, where: str) -> None:
    config = {k: v for k, v in (LLAMA | {"legacy": legacy}).items() if v is not None}
    tokens = [entry("区块链"), entry("大模型", rstrip=where == "decoder"), entry("<|im_end|>", True)]
    by_id = {str(size + i): token for i, token in enumerate(tokens)}
    by_text = {token["content"]: size + i for i, token in enumerate(tokens)}
    folder.write(config=config)
    if where == "decoder":
        folder.write(config=config | {"added_tokens_decoder": by_id})
    elif where == "whole":
        folder.write(config=config | {"added_tokens_decoder": by_id})
        theirs(folder).save_pretrained(folder.path)
        config = json.loads((folder.path / CONFIG).read_text())
        config = {k: v for k, v in config.items() if k != "added_tokens_decoder"}
        folder.write(config=config | ({} if legacy is None else {"legacy": legacy}))
    else:
        folder.write(added=by_text)
        if where == "added and special":
            folder.write(special={"additional_special_tokens": ["<|im_end|>"]})
    files = folder.read()
    ours = Tokenizer(files.model, files.settings())
    judge = theirs(folder)
    for text in TEXTS:
        assert ours.encode(text, bos=True, special=True) == judge(text).input_ids, text
    assert ours.added_tokens == by_text
    typed = ours.encode("x<|im_end|>y")
    assert size + 2 not in typed
    assert size in ours.encode("学习区块链")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"added": {"[PAD]": -1}}, "added token '[PAD]' has id -1"),
        ({"added": {"[PAD]": 1.5}}, "has id 1.5"),
        ({"added": {"[PAD]": True}}, "has id True"),
        ({"added": {"[PAD]": "7"}}, "has id '7'"),
        ({"added": {"[PAD]": None}}, "has id None"),
        ({"added": {"": 5000}}, "added token '' has id 5000"),
        ({"added": {"a\ud800": 5000}}, "half a surrogate pair"),
        ({"added": {"x" * 2000: 5000}}, "at most 1,000 characters"),
        ({"config": {"added_tokens_decoder": {"5000": entry("x" * 2000)}}}, "at most 1,000 characters"),
        ({"special": {"eos_token": "x" * 2000}}, "at most 1,000 characters"),
        ({"config": {"additional_special_tokens": ["<a>", "x" * 2000]}}, "at most 1,000 characters"),
        ({"added": {"[PAD]": 5000, "<|im_end|>": 5000}}, "gives the id 5000 to '[PAD]' and to '<|im_end|>'"),
        ({"added": {"[PAD]": 5}}, "these files belong to different tokenizers"),
        ({"added": {"的": 5000}}, "but it is the piece"),
        ({"added": {"[PAD]": 5000}, "config": {"added_tokens_decoder": {"5001": "[PAD]"}}}, "has id|gives the token"),
        ({"config": {"added_tokens_decoder": ["x"]}}, "added_tokens_decoder is"),
        ({"config": {"added_tokens_decoder": {"five": entry("x")}}}, "has id 'five'"),
        ({"config": {"added_tokens_decoder": {"-1": entry("x")}}}, "has id '-1'"),
        ({"config": {"added_tokens_decoder": {"\u0665": entry("x")}}}, "has id"),
        ({"config": {"added_tokens_decoder": {"9" * 5000: entry("x")}}}, "has id '9999"),
        ({"config": {"added_tokens_decoder": {"5000": 7}}}, "expected a text or an object"),
        ({"config": {"added_tokens_decoder": {"5000": {"content": 7}}}}, "expected a text or an object"),
        ({"config": {"added_tokens_decoder": {"5000": entry("x") | {"lstrip": "yes"}}}}, "its lstrip is 'yes'"),
        ({"config": {"bos_token": 5}}, "its bos_token is 5"),
        ({"config": {"eos_token": ["</s>"]}}, "its eos_token is ['</s>']"),
        ({"config": {"additional_special_tokens": [1]}}, "its additional_special_tokens is 1"),
        ({"special": {"pad_token": {"content": None}}}, "its pad_token is"),
        ({"whole": {"added_tokens": {"x": 1}}}, "added_tokens is a JSON dict"),
        ({"whole": {"added_tokens": [{"content": "x"}]}}, "has id None"),
        ({"whole": {"added_tokens": ["x"]}}, "has id None"),
        ({"whole": {"model": {"vocab": 5}}}, "its vocabulary is a JSON int"),
        ({"whole": {"model": {"vocab": {"x": "y"}}}}, "its vocabulary gives 'x' the id 'y'"),
        ({"whole": {"model": {"vocab": [["<unk>", 0], [5, 0]]}}}, "its vocabulary gives 5 the id 1"),
    ],
)
def test_what_no_tokenizer_says_is_refused(folder: Folder, files: dict[str, Any], words: str) -> None:
    import re

    for name, value in files.items():
        if name == "added" and any("\ud800" in text for text in value):
            (folder.path / ADDED).write_text(json.dumps(value), encoding="ascii")
        else:
            folder.write(**{name: value})
    assert re.search(words if "|gives" in words else re.escape(words), folder.refusal())


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4)
    | st.sampled_from(["<s>", "</s>", "[PAD]", "的", 2, 900, 901, 10**300, "\ud800", "Metaspace", "always", "Prepend"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3) | st.sampled_from(
        ["content", "id", "special", "lstrip", "vocab", "type", "single", "normalizers", "processors", "900", "1",
         "prepend_scheme", "SpecialToken"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = {
    "config": ["added_tokens_decoder", "bos_token", "eos_token", "legacy", "chat_template", "add_bos_token",
               "extra_special_tokens", "additional_special_tokens", "add_prefix_space"],
    "added": ["[PAD]", "<s>", "的", "词语"],
    "special": ["bos_token", "pad_token", "additional_special_tokens", "extra_special_tokens"],
    "whole": ["added_tokens", "model", "normalizer", "pre_tokenizer", "post_processor"],
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_json_is_read_or_refused_in_one_sentence(
    tokenizer_model: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.getbasetemp() / "any json"
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(tokenizer_model)
    for name, file in (("config", CONFIG), ("added", ADDED), ("special", SPECIAL), ("whole", WHOLE)):
        value = data.draw(st.dictionaries(st.sampled_from(KEYS[name]), ANYTHING, max_size=3))
        (directory / file).write_text(json.dumps(value), encoding="ascii")
    try:
        files = read_tokenizer(directory, None)
        assert files is not None
        stored, _ = files.place(905)
        json.dumps(stored.settings([2]))
        tokenizer_notices(stored, "chatml", asked=False)
        Tokenizer(stored.model, stored.settings()).encode("的[PAD]词语", special=True)
        said = ""
    except InputError as error:
        said = str(error)
    assert "\n" not in said


def test_the_file_that_transformers_reads_names_an_id(folder: Folder, size: int) -> None:
    """added_tokens.json is read only where tokenizer_config.json lists no tokens."""
    folder.write(added={"[PAD]": size}, config={"added_tokens_decoder": {str(size): entry("<|im_end|>", True)}})
    files = folder.read()
    assert files.added == {"<|im_end|>": size}
    assert theirs(folder).get_added_vocab()["<|im_end|>"] == size
    assert [n for n in files.notices if f"calls the id {size} '[PAD]'" in n and "the second counts" in n]


def test_the_later_directory_names_an_id(folder: Folder, later: Folder, size: int) -> None:
    folder.write(added={"[PAD]": size, "甲乙": size + 1})
    later.write(added={"<|im_end|>": size, "甲乙": size + 2})
    files = later.read(folder.read())
    assert files.added == {"<|im_end|>": size, "甲乙": size + 2}
    assert any(f"the id {size} is '<|im_end|>' here, '[PAD]' before it" in n for n in files.notices)
    assert any(f"the token '甲乙' has the id {size + 2} here, {size + 1} before it" in n for n in files.notices)
    assert len(set(files.settings()["added_tokens"].values())) == 2


def test_ids_with_gaps_stay(folder: Folder, size: int) -> None:
    """transformers 4 kept them, and the rows are trained by id."""
    folder.write(added={"区块链": size + 2, "大模型": size + 5})
    files = folder.read()
    assert files.size == size + 6
    assert Tokenizer(files.model, files.settings()).encode("大模型")[-1] == size + 5
    notices = tokenizer_notices(files, "raw", asked=True)
    assert any(f"4 ids before the last added token have no text, the first is {size}" in n for n in notices)


def test_words_and_control_tokens(folder: Folder, size: int) -> None:
    """A flag says it, a role does, a template does, and where nothing does a marker's name."""
    folder.write(
        config={
            "added_tokens_decoder": {
                str(size): entry("<tool>"),
                str(size + 1): entry("<|im_end|>"),
                "2": entry("</s>", True),
            },
            "pad_token": "补",
        },
        added={"<x>": size + 2, "词语": size + 3, "补": size + 4, "完毕": size + 5},
    )
    flags = folder.read().settings(ends=[size + 5])["token_flags"]
    special = {text for text, said in flags.items() if "special" in said}
    assert special == {"<|im_end|>", "<x>", "补", "完毕"}
    assert set(flags) == {"<tool>", "<|im_end|>", "<x>", "词语", "补", "完毕"}


def test_pieces_that_are_added_tokens_too(folder: Folder, tokenizer_model: bytes) -> None:
    piece = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model).id_to_piece(400)
    folder.write(
        config={
            "added_tokens_decoder": {
                "400": entry(piece),
                "1": entry("<s>", True),
                "2": entry("</s>", True, rstrip=True),
            }
        }
    )
    settings = folder.read().settings()
    assert settings["added_tokens"] == {piece: 400, "</s>": 2}
    assert settings["token_flags"]["</s>"] == ["special", "rstrip"]


@pytest.mark.parametrize(
    ("config", "role", "expected"),
    [
        ({}, "eos_token", 2),
        ({"eos_token": "</s>"}, "eos_token", 2),
        ({"eos_token": {"content": "<|im_end|>"}}, "eos_token", "added"),
        ({"eos_token": "<nope>"}, "eos_token", 2),
        ({"eos_token": ""}, "eos_token", 2),
        ({"bos_token": "<|im_end|>"}, "bos_token", "added"),
        ({"unk_token": None}, "unk_token", 0),
        ({}, "pad_token", None),
        ({"pad_token": "<|im_end|>"}, "pad_token", "added"),
    ],
)
def test_who_has_a_role(folder: Folder, size: int, config: dict[str, Any], role: str, expected: Any) -> None:
    folder.write(config=config, added={"<|im_end|>": size})
    found = folder.read()
    expected = size if expected == "added" else expected
    assert found.role_id(role) == expected
    settings = found.settings()
    assert settings.get(f"{role}_id") == (size if expected == size and role != "pad_token" else None)


@pytest.mark.parametrize("decoder", [True, False])
def test_two_files_that_give_a_role_to_two_tokens(folder: Folder, decoder: bool) -> None:
    """transformers reads special_tokens_map.json only where tokenizer_config.json lists no tokens."""
    config = {**LLAMA, "eos_token": "<s>"} | ({"added_tokens_decoder": {"1": entry("<s>", True)}} if decoder else {})
    files = folder.write(config=config, special={"eos_token": {"content": "</s>"}, "bos_token": "<s>"}).read()
    assert files.role_id("eos_token") == theirs(folder).eos_token_id == (1 if decoder else 2)
    (notice,) = files.notices
    assert "eos_token is '</s>' in special_tokens_map.json and '<s>' in tokenizer_config.json" in notice


def test_a_checkpoint_without_bos(folder: Folder) -> None:
    assert folder.write(config={"bos_token": None, "add_bos_token": True}).read().settings()["add_bos"] is False
    assert theirs(folder)("x").input_ids == theirs(folder)("x", add_special_tokens=False).input_ids


@pytest.mark.parametrize("key", ["legacy", "add_prefix_space", "add_bos_token", "add_eos_token"])
def test_a_habit_of_another_type_is_said_and_ignored(folder: Folder, key: str) -> None:
    plain = folder.read().settings()
    files = folder.write(config={key: "false"}).read()
    assert files.settings() == plain
    assert any(f"{key} is 'false', expected true or false: ignored" in notice for notice in files.notices)


def test_an_end_token_after_every_text_is_said(folder: Folder) -> None:
    assert any("add_eos_token is true" in n for n in folder.write(config={"add_eos_token": True}).read().notices)


# --- templates


def test_a_chat_template_of_the_checkpoint_is_named(folder: Folder, later: Folder) -> None:
    for where in ("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja"):
        path = later.path / where
        path.parent.mkdir(exist_ok=True)
        path.write_text("{{ messages }}")
        files = later.read(folder.read())
        assert files.chat_template == path
        (notice,) = tokenizer_notices(files, "raw", asked=False)[:1]
        assert str(path) in notice
        assert "template 'raw' is used, --template NAME chooses alpaca, alpaca-2, chatml" in notice
        path.unlink()
    assert later.write(config={"chat_template": "{{ x }}"}).read(folder.read()).chat_template == later.path / CONFIG
    files = later.write(config={"chat_template": [{"name": "default", "template": "x"}]}).read(folder.read())
    assert tokenizer_notices(files, "chatml", asked=True) == [
        n for n in tokenizer_notices(files, "chatml", True) if "legacy" in n
    ]


def test_what_legacy_would_change_is_said_where_no_file_tells(folder: Folder, size: int) -> None:
    said = {
        (legacy, template, word): any("legacy" in n for n in tokenizer_notices(files, template, asked=True))
        for legacy in (None, True, False)
        for word in (False, True)
        for files in [
            folder.write(
                config={} if legacy is None else {"legacy": legacy}, added={"词语" if word else "[PAD]": size}
            ).read()
        ]
        for template in ("raw", "alpaca", "alpaca-2", "chatml")
    }
    assert {key for key, value in said.items() if value} == {
        (None, template, word) for template in ("raw", "alpaca", "alpaca-2", "chatml") for word in (False, True)
        if word or template == "alpaca-2"
    }  # fmt: skip
