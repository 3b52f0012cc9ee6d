# SPDX-License-Identifier: Apache-2.0
"""The GGUF export's tokenizer and chat template."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from cnllama.convert.gguf.chat_template import to_jinja
from cnllama.convert.gguf.export import export
from cnllama.convert.pack import convert
from gguf_files import TURNS, Maker, read

from cnllama.errors import InputError
from cnllama.format import open_cnl
from cnllama.sentencepiece_model import parse
from cnllama.templates import TEMPLATES, encode_chat
from cnllama.tokenizer import Tokenizer

pytest.importorskip("gguf", reason="the package gguf, which reads the files that are tested, is not installed")

CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "你好，\n 'quotes' \\n {user}"}],
    "system": [{"role": "system", "content": "用中文回答。\n"}, {"role": "user", "content": "1+1=?"}],
    "no system": [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}],
    "three turns": TURNS,
}


def test_vocabulary(make: Maker, tmp_path: Path, tokenizer_model: bytes) -> None:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    pieces = sp.get_piece_size()
    added = {"[PAD]": pieces, "<|im_end|>": pieces + 1, "词语": pieces + 4}
    cnl = make("q4-s32", template="chatml", added=added, vocab_size=pieces + 5)
    export(open_cnl(cnl), tmp_path / "x.gguf")
    metadata, tensors = read(tmp_path / "x.gguf")
    tokens, scores, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert tokens[:pieces] == [sp.id_to_piece(i) for i in range(pieces)]
    np.testing.assert_array_equal(np.float32(scores[:pieces]), np.float32([sp.get_score(i) for i in range(pieces)]))
    assert types[:6] == [2, 3, 3, 6, 6, 6]
    assert types[3:259] == [6] * 256
    assert set(types[259:pieces]) == {1}
    assert tokens[pieces:] == ["[PAD]", "<|im_end|>", f"[UNUSED{pieces + 2}]", f"[UNUSED{pieces + 3}]", "词语"]
    assert types[pieces:] == [3, 3, 5, 5, 4]
    assert len(tokens) == len(set(tokens)) == tensors["token_embd.weight"].shape[1] == pieces + 5
    ids = {key: metadata[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "unknown", "padding", "eot")}
    assert ids == {"bos": 1, "eos": 2, "unknown": 0, "padding": pieces, "eot": pieces + 1}
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert metadata["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize("name", ["llama", "chinese_alpaca2", "chinese_sp_20k"])
def test_sentencepiece_files_are_read_without_protobuf(shared_data: Path, name: str) -> None:
    data = (shared_data / "tokenizers" / f"{name}.model").read_bytes()
    assert_parsed(data)


def test_sentencepiece_settings(tokenizer_model: bytes) -> None:
    assert_parsed(tokenizer_model)
    patched = parse(tokenizer_model + bytes([0x1A, 4, 0x18, 0, 0x20, 1]), "x")
    assert (patched.add_dummy_prefix, patched.remove_extra_spaces) == (False, True)


def assert_parsed(data: bytes) -> None:
    """parse() agrees with protobuf's own reader."""
    pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="protobuf is not installed")
    proto = pb2.ModelProto.FromString(data)
    model = parse(data, "x")
    assert model.pieces == [piece.piece for piece in proto.pieces]
    assert model.scores == [piece.score for piece in proto.pieces]
    assert model.types == [piece.type for piece in proto.pieces]
    assert model.model_type == proto.trainer_spec.model_type
    assert model.space_is_suffix == proto.trainer_spec.treat_whitespace_as_suffix
    assert model.normalizes == bool(proto.normalizer_spec.precompiled_charsmap)
    assert model.add_dummy_prefix == proto.normalizer_spec.add_dummy_prefix
    assert model.remove_extra_spaces == proto.normalizer_spec.remove_extra_whitespaces


def test_damaged_sentencepiece_files_are_refused(tokenizer_model: bytes) -> None:
    rng = random.Random(0)
    refused = []
    for _ in range(400):
        data = bytearray(tokenizer_model[: rng.randrange(len(tokenizer_model))])
        for _ in range(rng.randrange(3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            parse(bytes(data), "x.cnl")
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(message.startswith("x.cnl: the tokenizer is no SentencePiece model (") for message in refused)


def train(**settings: Any) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(models.sample_lines()), model_writer=model, hard_vocab_limit=False, num_threads=1,
        minloglevel=2, character_coverage=0.995, **settings
    )  # fmt: skip
    return model.getvalue()


def exported(tokenizer: bytes, folder: Path) -> list[str]:
    """Warnings of the export of a model with this tokenizer."""
    models.make_llama(folder / "base", tokenizer)
    convert(folder / "base", [], folder / "x.cnl", quant="q4-s32")
    return export(open_cnl(folder / "x.cnl"), folder / "x.gguf").warnings


def test_unigram_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.cnl: its tokenizer is a SentencePiece model of type 1"):
        exported(train(model_type="unigram", vocab_size=1000, byte_fallback=True), tmp_path)
    assert not list(tmp_path.glob("*gguf*"))


def test_suffix_spaces_are_refused(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(train(model_type="bpe", vocab_size=1000, treat_whitespace_as_suffix=True), "x")
    monkeypatch.setattr("cnllama.convert.gguf.tokenizer.parse", lambda data, where: model)
    with pytest.raises(InputError, match="puts spaces at the end of words"):
        export(open_cnl(make("q4-a64")), tmp_path / "x.gguf")


def test_what_llama_cpp_does_otherwise_is_said(tmp_path: Path) -> None:
    warnings = exported(train(model_type="bpe", vocab_size=1000), tmp_path)
    assert [w.split(":")[0] for w in warnings] == [
        "llama.cpp does not normalize text as this tokenizer does",
        "llama.cpp keeps repeated spaces, which this tokenizer removes",
        "the tokenizer has no bytes",
    ]


# --- template


def render(jinja: str, messages: list[dict[str, str]]) -> str:
    sandbox = pytest.importorskip("jinja2.sandbox", reason="jinja2 is not installed")
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(jinja).render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True
    )


@pytest.mark.parametrize("name", ["alpaca", "alpaca-2", "chatml"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("settings", ["plain", "added", "no bos"])
def test_jinja_gives_the_prompt_we_give(tokenizer_model: bytes, name: str, conversation: str, settings: str) -> None:
    pieces = models.piece_count(tokenizer_model)
    facts = {
        "plain": {},
        "added": {"added_tokens": {"<|im_start|>": pieces, "<|im_end|>": pieces + 1}},
        "no bos": {"add_bos": False},
    }[settings]
    tokenizer = Tokenizer(tokenizer_model, facts)
    jinja = to_jinja(TEMPLATES[name], bos=tokenizer.add_bos, eos=True)
    text = render(jinja, CONVERSATIONS[conversation])
    expected = encode_chat(TEMPLATES[name], tokenizer, CONVERSATIONS[conversation])
    assert tokenizer.encode(text, special=True) == expected


def test_raw_has_no_chat_template(make: Maker, tmp_path: Path) -> None:
    assert to_jinja(TEMPLATES["raw"], bos=True, eos=True) is None
    for template in ("raw", "alpaca"):
        report = export(open_cnl(make("q4-s32", template=template)), tmp_path / "x.gguf")
        metadata, _ = read(tmp_path / "x.gguf")
        assert report.chat_template == ("tokenizer.chat_template" in metadata) == (template == "alpaca")


def test_an_added_token_spelt_like_a_piece(make: Maker, tmp_path: Path, tokenizer_model: bytes) -> None:
    pieces = models.piece_count(tokenizer_model)
    file = open_cnl(make("q4-a64", added={"甲": pieces, "乙": pieces + 1}, vocab_size=pieces + 2))
    name = parse(tokenizer_model, "x").pieces[-1]
    file.tokenizer["added_tokens"] = {name: pieces, f"[UNUSED{pieces}]": pieces + 1}
    report = export(file, tmp_path / "x.gguf")
    assert report.warnings == [f"the added token {name!r}, {pieces}, is spelt like a piece: llama.cpp will not know it"]
    metadata, _ = read(tmp_path / "x.gguf")
    assert metadata["tokenizer.ggml.tokens"][pieces:] == [f"[UNUSED{pieces}]_", f"[UNUSED{pieces}]"]
    assert metadata["tokenizer.ggml.token_type"][pieces:] == [5, 3]
