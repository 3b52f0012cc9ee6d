# SPDX-License-Identifier: Apache-2.0
"""An exported tokenizer says and does what the file's does: end tokens, prompts of the chat template, added tokens."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import sentencepiece
from cnllama.convert.gguf.tokenizer import tokenizer_metadata
from gguf_files import TURNS

from cnllama.sentencepiece_model import with_dummy_prefix
from cnllama.templates import TEMPLATES, encode_chat
from cnllama.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
MARKERS = ("<|im_start|>", "<|im_end|>")
EXTRA = ("<|eom|>", "<|stop|>", "<|halt|>")


class Exported:
    """The metadata that the export of a model with these settings writes, and a stand-in for llama.cpp reading them."""

    def __init__(self, model: bytes, template: str, eos: list[int], **settings: Any) -> None:
        size = models.piece_count(model)
        names = settings.pop("added", {})
        flags = {name: list(said) for name, said in names.items()}
        self.settings = {
            "add_dummy_prefix": True, "legacy": True, "added_tokens": {name: size + i for i, name in enumerate(names)},
            "token_flags": flags,
        } | settings  # fmt: skip
        rows = max([size, *(i + 1 for i in self.settings["added_tokens"].values())])
        described: Any = SimpleNamespace(
            path=Path("x.cnl"), vocab_size=rows, tokenizer_model=model, tokenizer=self.settings, template=template,
            generation={"eos_token_ids": eos, "bos_token_id": 1},
        )  # fmt: skip
        self.model, self.template = model, TEMPLATES[template]
        self.tokenizer = Tokenizer(model, self.settings)
        self.warnings: list[str] = []
        written = tokenizer_metadata(described, self.warnings)
        self.values = {key.removeprefix(PREFIX): value for key, value in written.items()}

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def ends(self) -> set[int]:
        """The tokens that end an answer in llama.cpp."""
        return {self[f"{key}_token_id"] for key in ("eos", "eot", "eom")} - {None}

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Renders the chat template and cuts the text as llama.cpp does (llama-vocab.cpp, tokenize)."""
        sandbox = pytest.importorskip("jinja2.sandbox", reason="jinja2 is not installed")
        names = self["tokens"]
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        text = environment.from_string(self["tokenizer.chat_template"]).render(
            messages=messages,
            bos_token=names[self["bos_token_id"]],
            eos_token=names[self["eos_token_id"]],
            add_generation_prompt=True,
        )
        return self.cut(text, special=True)

    def cut(self, text: str, special: bool) -> list[int]:
        parts: list[str | int] = [text]
        found = (3, 4) if special else (4,)
        kinds = [
            (name, i)
            for i, (name, kind) in enumerate(zip(self["tokens"], self["token_type"], strict=True))
            if kind in found
        ]
        for name, i in sorted(kinds, key=lambda item: -len(item[0])):
            parts = [
                piece for part in parts for piece in (_between(part, name, i) if isinstance(part, str) else [part])
            ]
        plain = sentencepiece.SentencePieceProcessor(model_proto=with_dummy_prefix(self.model, False))
        ids: list[int] = []
        after_token = True
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += plain.encode(" " * (after_token and self["add_space_prefix"]) + part)
            after_token = isinstance(part, int)
        return ids


def _between(text: str, name: str, i: int) -> list[str | int]:
    parts: list[str | int] = []
    for piece in text.split(name):
        parts += [piece, i]
    return [part for part in parts[:-1] if part != ""]


@pytest.fixture(autouse=True)
def _plain_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata as Python's values: how they are stored has tests of its own."""
    for kind in ("boolean", "float32s", "int32s", "text", "texts", "uint32"):
        monkeypatch.setattr(f"cnllama.convert.gguf.tokenizer.{kind}", lambda value: value)


def control(*names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(names, ("special",))


@pytest.fixture(scope="module")
def size(tokenizer_model: bytes) -> int:
    return models.piece_count(tokenizer_model)


@pytest.mark.parametrize("template", ["alpaca", "alpaca-2", "chatml", "raw"])
def test_every_end_token_has_its_key_or_a_warning(tokenizer_model: bytes, size: int, template: str) -> None:
    names = control(*MARKERS, *EXTRA)
    stop = {size + 1} if template == "chatml" else set()
    for count in range(1, 5):
        for chosen in itertools.permutations([2, size + 1, size + 2, size + 3], count):
            exported = Exported(tokenizer_model, template, list(chosen), added=names)
            wanted = {*chosen, *stop}
            assert exported.ends() <= wanted
            assert len(exported.ends()) == min(3, len(wanted))
            left = wanted - exported.ends()
            assert exported["eos_token_id"] == (2 if 2 in chosen else next(iter(chosen)))
            room = [w for w in exported.warnings if w.startswith("a GGUF file has room for three end tokens: ")]
            assert len(room) == bool(left)
            assert all(f"'{i} {exported.tokenizer.piece(i)}'" in room[0] for i in left)
            assert not stop or stop <= exported.ends()


@pytest.mark.parametrize("template", ["alpaca", "alpaca-2", "chatml"])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_prompts_are_the_same_whatever_ends_an_answer(
    tokenizer_model: bytes, size: int, template: str, legacy: bool, markers: bool, own: bool
) -> None:
    """own: the tokenizer's end token is SentencePiece's own; else one that a JSON file names."""
    names = control(*MARKERS, *EXTRA) if markers else control(*EXTRA)
    last = size + len(names) - 1
    settings = {} if own else {"eos_token_id": last, "bos_token_id": last - 1}
    for eos in ([2], [last], [2, last], [last, 2], [last - 1, last, 2], [1]):
        exported = Exported(tokenizer_model, template, eos, added=names, legacy=legacy, **settings)
        for turns in (TURNS, TURNS[1:2], TURNS[:2], TURNS[1:]):
            ours = encode_chat(TEMPLATES[template], exported.tokenizer, turns)
            theirs = exported.prompt(turns)
            if legacy or not any("a token, which this tokenizer does not" in w for w in exported.warnings):
                assert theirs == ours
            else:  # and then only where a text follows a token inside the prompt
                assert (theirs == ours) == (len(turns) < 3)


def test_the_start_of_a_text_is_given_up_for_the_chat(tokenizer_model: bytes) -> None:
    """ChatML with legacy false: llama.cpp can have the prompts right or plain texts, and says which."""
    exported = Exported(tokenizer_model, "chatml", [2], added=control(*MARKERS), legacy=False)
    assert exported["add_space_prefix"] is False
    assert any("text without it begins with another token" in w for w in exported.warnings)
    assert exported.cut("hello", False) != exported.tokenizer.encode("hello")
    exported = Exported(tokenizer_model, "chatml", [2], legacy=False)  # its markers are text in this vocabulary
    assert exported["add_space_prefix"] is True
    assert exported.warnings == []
    exported = Exported(tokenizer_model, "alpaca", [2], legacy=False, added=control("[PAD]"))
    assert (exported["add_space_prefix"], exported.warnings) == (True, [])


def test_user_defined_pieces_are_said(size: int) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(models.sample_lines()), model_writer=written, model_type="bpe", vocab_size=900,
        hard_vocab_limit=False, byte_fallback=True, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=["<sep>", "词", "<|im_end|>", "<x>", "<y>"],
    )  # fmt: skip
    model = written.getvalue()
    special = sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id("<|im_end|>")
    exported = Exported(model, "alpaca", [2])
    (warning,) = exported.warnings
    assert "user-defined pieces, '<sep>', '词', '<|im_end|>' and 2 more" in warning
    assert exported.cut("a词b", False) != exported.tokenizer.encode("a词b")
    exported = Exported(
        model, "alpaca", [2], added_tokens={"<|im_end|>": special}, token_flags={"<|im_end|>": ["special"]}
    )
    assert exported["token_type"][special] == 3
    assert "'<|im_end|>'" not in exported.warnings[0]


@pytest.mark.parametrize(
    ("added", "legacy", "words"),
    [
        ({"区块链": ()}, True, None),
        ({"区块链": ()}, False, "puts a space before text that follows a token"),
        ({"区块链": ("rstrip",)}, True, "lstrip, rstrip and single_word, which '区块链' have"),
        ({"区块链": ("single_word",)}, True, "single_word"),
        ({"<|im_end|>": ("special", "lstrip")}, True, "lstrip"),
        ({"大模型": (), "模型库": ()}, True, None),  # as long: the first counts in both
        ({"大模型": (), "模型仓库": ()}, True, "as '大模型' and '模型仓库' can"),
        ({"区块链": (), "区块": (), "块链": ()}, True, None),
        ({"<|im_start|>": ("special",), "<|im_end|>": ("special",)}, True, None),
    ],
)
def test_added_tokens_that_llama_cpp_reads_otherwise_are_said(
    tokenizer_model: bytes, added: dict[str, tuple[str, ...]], legacy: bool, words: str | None
) -> None:
    exported = Exported(tokenizer_model, "alpaca", [2], added=added, legacy=legacy)
    assert [w for w in exported.warnings if words is None or words not in w] == []
    assert len(exported.warnings) == (words is not None)
    text = "我们学习区块链 hello大模型仓库，大的 模"
    same = exported.cut(text, False) == exported.tokenizer.encode(text)
    assert same or words is not None


def test_words_are_user_defined_and_control_tokens_are_not(tokenizer_model: bytes, size: int) -> None:
    exported = Exported(tokenizer_model, "raw", [2], added={"<tool>": (), "词语": ("special",), "[PAD]": ("special",)})
    assert exported["token_type"][size:] == [4, 3, 3]
    assert exported["padding_token_id"] == size + 2
