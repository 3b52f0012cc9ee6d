# SPDX-License-Identifier: Apache-2.0
"""Added tokens in a text: transformers is the judge of which are found, SentencePiece of what lies between them."""

from __future__ import annotations

import io
import time
from typing import Any

import models
import pytest
import sentencepiece
from cnllama.convert import parity
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cnllama.added_tokens import FLAGS, AddedToken, AddedTokens
from cnllama.errors import InputError
from cnllama.templates import TEMPLATES, encode_chat
from cnllama.tokenizer import Tokenizer

WORDS = [
    "区块链",
    "大模型",
    "hello",
    "ab",
    "abc",
    "bcd",
    "<|im_end|>",
    "<|im",
    "[PAD]",
    "½",
    "é",
    "🙂",
    "a b",
    "  ",
    "_x",
]
TEXT = [
    *WORDS, " ", "\n", "\u3000", "\u200d", "今天天气很好", "区块", " world", "the ", "。", "1", "e\u0301", "龘", "</s>",
    "<s>", "▁",
]  # fmt: skip
PLAIN = {"normalized": False, "special": False, "lstrip": False, "rstrip": False, "single_word": False}

quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
texts = st.lists(st.sampled_from(TEXT), max_size=9).map("".join)
tokens = st.dictionaries(
    st.sampled_from(WORDS), st.lists(st.sampled_from(FLAGS), max_size=3, unique=True), min_size=1, max_size=6
)


def facts(model: bytes, flags: dict[str, list[str]], **more: Any) -> dict[str, Any]:
    """The `tokenizer` settings of a file with these added tokens, which get the ids after the pieces."""
    size = models.piece_count(model)
    return {"added_tokens": {text: size + i for i, text in enumerate(flags)}, "token_flags": flags, **more}


class Model(bytes):
    """A serialized model that a failing test does not print."""

    def __repr__(self) -> str:
        return "Model()"


@pytest.fixture(scope="module")
def model(tokenizer_model: bytes) -> Model:
    return Model(tokenizer_model)


@pytest.fixture(scope="module")
def vocabulary(tokenizer_model: bytes) -> tuple[dict[str, int], list[Any]]:
    from transformers.tokenization_utils_base import generate_merges

    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    found = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    return found, generate_merges(found)


def judge(
    vocabulary: tuple[dict[str, int], list[Any]], flags: dict[str, list[str]], legacy: bool, prefix: bool = True
) -> Any:
    """transformers' tokenizer of the same pieces and tokens."""
    from transformers import AddedToken as Theirs
    from transformers import LlamaTokenizer

    made = LlamaTokenizer(vocab=vocabulary[0], merges=vocabulary[1], legacy=legacy, add_prefix_space=prefix)
    made.add_tokens([Theirs(text, **(PLAIN | dict.fromkeys(said, True))) for text, said in flags.items()])
    return made


@quick
@given(flags=tokens, text=texts, legacy=st.booleans(), prefix=st.booleans(), special=st.booleans())
def test_the_ids_are_those_of_transformers(
    model: Model,
    vocabulary: tuple[dict[str, int], list[Any]],
    flags: dict[str, list[str]],
    text: str,
    legacy: bool,
    prefix: bool,
    special: bool,
) -> None:
    assume(not set(flags) & set(vocabulary[0]))
    ours = Tokenizer(model, facts(model, flags, legacy=legacy, add_dummy_prefix=prefix))
    spans = ours._tokens_in_text.split(text, special)
    # transformers 5 puts no space before a text that begins with one; SentencePiece and transformers 4 do.
    plain = [(span.begin, text[span.begin : span.end]) for span in spans if span.token is None]
    assume(not any(part[0] in " ▁" and prefix and (legacy or begin == 0) for begin, part in plain))
    expected = judge(vocabulary, flags, legacy, prefix)(
        text, add_special_tokens=False, split_special_tokens=not special
    )
    assert ours.encode(text, special=special) == expected.input_ids


@quick
@given(names=st.lists(st.sampled_from(WORDS), min_size=1, max_size=4, unique=True), text=texts)
def test_legacy_cuts_as_transformers_4_did(model: Model, tmp_path_factory: Any, names: list[str], text: str) -> None:
    """Each text between tokens is encoded by SentencePiece on its own, leading spaces and all."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    path = tmp_path_factory.getbasetemp() / "judge.model"
    if not path.exists():
        path.write_bytes(model)
    theirs = SentencePieceBackend(
        vocab_file=str(path), legacy=True, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    theirs.add_tokens(names)
    ours = Tokenizer(model, facts(model, {name: [] for name in names}, legacy=True))
    assert ours.encode(text, special=True) == theirs.convert_tokens_to_ids(theirs.tokenize(text))


@quick
@given(flags=tokens, text=texts, legacy=st.booleans(), prefix=st.booleans())
def test_what_is_encoded_is_decoded(
    model: Model, flags: dict[str, list[str]], text: str, legacy: bool, prefix: bool
) -> None:
    flags = {name: [flag for flag in said if flag not in ("lstrip", "rstrip")] for name, said in flags.items()}
    ours = Tokenizer(model, facts(model, flags, legacy=legacy, add_dummy_prefix=prefix))
    ids = ours.encode(text)
    assert ours.decode(ids) == text.replace("▁", " ")
    stream = ours.stream()
    assert "".join(stream.feed(i) for i in ids) + stream.finish() == text.replace("▁", " ")


@quick
@given(flags=tokens, text=texts, legacy=st.booleans(), prefix=st.booleans())
def test_parity_agrees_with_the_run_time(
    model: Model, flags: dict[str, list[str]], text: str, legacy: bool, prefix: bool
) -> None:
    """The check of a conversion is written apart from the tokenizer; here on texts that no corpus has."""
    settings_ = facts(model, flags, legacy=legacy, add_dummy_prefix=prefix)
    original, ours = parity._Original(model, settings_, "x"), Tokenizer(model, settings_)
    for special in (False, True):
        assert original.encode(text, special) == ours.encode(text, special=special)


@quick
@given(flags=tokens, texts_=st.lists(texts, min_size=1, max_size=4), legacy=st.booleans(), data=st.data())
def test_control_tokens_given_as_ids_are_those_of_their_names(
    model: Model, flags: dict[str, list[str]], texts_: list[str], legacy: bool, data: st.DataObject
) -> None:
    """encode_parts, which templates use, against the one text with the names in it, whose own texts hold none."""
    control = {"<control>": ["special", *data.draw(st.lists(st.sampled_from(["lstrip", "rstrip"]), unique=True))]}
    ours = Tokenizer(model, facts(model, {**flags, **control}, legacy=legacy))
    assume(all(name == name.strip() for name in flags))  # such tokens and the stripping ones take each other's spaces
    special = {"<s>", "</s>", "<unk>", *(name for name, said in flags.items() if "special" in said)}
    assume(not any(name in text for name in special for text in texts_))
    token = ours.added_tokens["<control>"]
    parts: list[str | int] = [part for text in texts_ for part in (text, token)][:-1]
    assert ours.encode_parts(parts) == ours.encode("<control>".join(texts_), special=True)


def test_what_a_user_types_is_never_a_control_token() -> None:
    """Nor where SentencePiece itself would find it: a user-defined piece that the checkpoint calls special."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(models.sample_lines()), model_writer=written, model_type="bpe", vocab_size=900,
        hard_vocab_limit=False, byte_fallback=True, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=["<|im_start|>", "<|im_end|>", "词"],
    )  # fmt: skip
    model = written.getvalue()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {name: processor.piece_to_id(name) for name in ("<|im_start|>", "<|im_end|>", "词")}
    text = "好<|im_end|>\n<|im_start|>词"
    assert set(ids.values()) <= set(processor.encode(text))
    added = {name: ids[name] for name in ("<|im_start|>", "<|im_end|>")}
    ours = Tokenizer(model, {"added_tokens": added, "token_flags": {name: ["special"] for name in added}})
    assert set(ours.encode(text)) & set(ids.values()) == {ids["词"]}
    assert ours.decode(ours.encode(text)) == text
    assert set(ids.values()) <= set(ours.encode(text, special=True))
    chat = encode_chat(TEMPLATES["chatml"], ours, [{"role": "user", "content": text}])
    assert [chat.count(i) for i in added.values()] == [3, 2]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_template_with_tokens_that_strip(model: Model, vocabulary: Any, legacy: bool) -> None:
    """As Phi's: the line break after <|im_end|> is the token's."""
    flags = {"<|im_start|>": ["special"], "<|im_end|>": ["special", "rstrip", "lstrip"]}
    ours = Tokenizer(model, facts(model, flags, legacy=legacy, add_bos=False))
    ids = encode_chat(
        TEMPLATES["chatml"], ours, [{"role": "system", "content": "x "}, {"role": "user", "content": "今天 "}]
    )
    text = "<|im_start|>system\nx <|im_end|>\n<|im_start|>user\n今天 <|im_end|>\n<|im_start|>assistant\n"
    assert ids == judge(vocabulary, flags, legacy)(text, add_special_tokens=False).input_ids


def test_many_tokens_and_long_texts_take_linear_time() -> None:
    many = AddedTokens(AddedToken(f"<|extra_{i}|>", i, special=False) for i in range(10_000))
    nested = AddedTokens(AddedToken("a" * i + "b", i, special=False) for i in range(1, 1000))
    stripping = AddedTokens([AddedToken("x", 0, special=False, lstrip=True, rstrip=True)])
    for table, unit in (
        (many, "<"), (many, "<|"), (many, "<|extra_"), (many, "<|extra_77|>"), (nested, "a"), (stripping, " "),
        (stripping, " x"),
    ):  # fmt: skip
        seconds = []
        for size in (20_000, 200_000):
            text = unit * (size // len(unit))
            begin = time.process_time()
            assert table.split(text, True)[-1].end == len(text)
            seconds.append(time.process_time() - begin)
        assert seconds[1] < 40 * seconds[0] + 0.5, unit


def test_texts_without_added_tokens_take_the_old_road(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer whose added tokens are all control tokens does not search what a user types."""
    ours = Tokenizer(model, facts(model, {"[PAD]": ["special"]}))
    monkeypatch.setattr(AddedTokens, "split", lambda *_: pytest.fail("searched"))
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    for line in models.sample_lines()[:50]:
        assert ours.encode(line) == library.encode(line)


def test_a_file_without_flags_means_what_it_meant(model: Model) -> None:
    """Files of before: their added tokens are control tokens in a prompt; those not named like markers are shown."""
    size = models.piece_count(model)
    old = Tokenizer(model, {"added_tokens": {"[PAD]": size, "作者": size + 1}})
    assert max(old.encode("作者[PAD]")) < size
    assert old.encode("作者[PAD]", special=True) == [size + 1, size]
    assert old.decode([size, size + 1]) == "作者"
    assert old.legacy
    new = Tokenizer(model, facts(model, {"作者": ["special"], "<tool>": []}))
    assert new.decode([size, size + 1]) == "<tool>"
    assert new.encode("<tool>")[-1] == size + 1


def test_names_of_other_ids_for_begin_and_end(model: Model) -> None:
    size = models.piece_count(model)
    flags = {"<|begin|>": ["special"], "<|end|>": ["special"]}
    ours = Tokenizer(model, facts(model, flags, bos_token_id=size, eos_token_id=size + 1))
    assert ours.encode("", bos=True, eos=True) == [size, size + 1]
    messages = [{"role": role, "content": "好"} for role in ("user", "assistant", "user")]
    ids = encode_chat(TEMPLATES["alpaca-2"], ours, messages)
    assert (ids.count(size), ids.count(size + 1), ids.count(1), ids.count(2)) == (2, 1, 0, 0)


def test_lone_surrogates_are_refused_with_added_tokens_too(model: Model) -> None:
    ours = Tokenizer(model, facts(model, {"区块链": []}))
    with pytest.raises(InputError, match="character 4"):
        ours.encode("区块链x\ud800")
