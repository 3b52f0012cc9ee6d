# SPDX-License-Identifier: Apache-2.0
"""The tokenizer against the sentencepiece library: ids, text, streams, bytes, added tokens, merged vocabularies."""

import json
import random
from pathlib import Path

import models
import pytest
import sentencepiece

from cnllama.errors import InputError
from cnllama.tokenizer import REPLACEMENT, Tokenizer, split_utf8

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "你好",
    " 你好",
    "  two  leading, two inside",
    "trailing \n\n",
    "人工智能是计算机科学、心理学、哲学等学科融合的交叉学科。",
    "中英 mixed 文本 with 1984 numbers，全角：ＡＢＣ１２３！",
    "emoji 🙂👩‍👩‍👧‍👦🇨🇳 and rare 𪚥 龘 𠮷",
    "tab\there\r\nwindows\0nul",
    "\u3000全角空格\u3000",
    "<s></s><unk>[PAD]<0x0A>",
    "é e\u0301 ﬁ ①",
    "\u2581 looks like a space",
]


def library(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([stream.feed(i) for i in ids]) + stream.finish()


@pytest.fixture(scope="module")
def merged_model() -> bytes:
    """Two small models merged as Chinese-LLaMA's were: every new piece ties at score 0 and outranks the old ones."""
    base = models.train_tokenizer(models.english_lines(), 500)
    return models.merge_tokenizers(base, models.train_tokenizer(models.chinese_lines(), 900))


@pytest.fixture(
    scope="module", params=["trained", "merged", "llama", "chinese-alpaca", "chinese-sp", "chinese-alpaca-2"]
)
def model(request: pytest.FixtureRequest) -> bytes:
    if request.param in ("trained", "merged"):
        return request.getfixturevalue({"trained": "tokenizer_model", "merged": "merged_model"}[request.param])
    folder: Path = request.getfixturevalue("shared_data") / "tokenizers"
    read = {name: (folder / f"{name}.model").read_bytes for name in ("llama", "chinese_sp_20k", "chinese_alpaca2")}
    if request.param == "chinese-alpaca":
        return models.merge_tokenizers(read["llama"](), read["chinese_sp_20k"]())
    return read[{"llama": "llama", "chinese-sp": "chinese_sp_20k"}.get(request.param, "chinese_alpaca2")]()


def test_texts_round_trip_as_in_sentencepiece(model: bytes) -> None:
    ours, theirs = Tokenizer(model), library(model)
    for text in [*TEXTS, *models.sample_lines()[:200]]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids), text
        assert streamed(ours, ids) == theirs.decode(ids), text


def test_random_ids_decode_as_in_sentencepiece(model: bytes) -> None:
    """Random ids, with spaces, control tokens, unknowns and whole characters in bytes far more often than in text."""
    ours, theirs = Tokenizer(model), library(model)
    rng = random.Random(0)
    spaces = [i for i in range(theirs.vocab_size()) if theirs.id_to_piece(i).startswith("▁")]
    first_byte = theirs.piece_to_id("<0x00>")
    has_bytes = theirs.is_byte(first_byte)
    for _ in range(3000):
        ids: list[int] = []
        for _ in range(rng.randrange(1, 9)):
            kind = rng.randrange(6)
            if kind == 0:
                ids.append(rng.choice([theirs.unk_id(), theirs.bos_id(), theirs.eos_id()]))
            elif kind <= 2:
                ids.append(rng.choice(spaces))
            elif kind == 3 and has_bytes:
                ids += [first_byte + b for b in rng.choice(["\n", "é", "龘", "🙂", "  "]).encode()]
            else:
                ids.append(
                    rng.choice([i for i in [rng.randrange(theirs.vocab_size())] if not theirs.is_byte(i)] or [0])
                )
        assert ours.decode(ids) == theirs.decode(ids), ids
        assert streamed(ours, ids) == theirs.decode(ids), ids


def test_stream_shows_only_whole_characters(tokenizer_model: bytes) -> None:
    """龘 and 🙂 are not in the vocabulary: nothing shows until their last byte, and never a replacement character."""
    tokenizer = Tokenizer(tokenizer_model)
    ids = tokenizer.encode("龘🙂x龘")
    assert len(ids) >= 11
    stream = tokenizer.stream()
    pieces = [stream.feed(i) for i in ids]
    assert "".join(pieces) == "龘🙂x龘"
    assert all(piece in ("", "龘", "🙂", "x") for piece in pieces), pieces
    assert REPLACEMENT not in "".join(pieces)


def test_a_character_cut_at_the_end_is_left_out(tokenizer_model: bytes) -> None:
    tokenizer = Tokenizer(tokenizer_model)
    ids = tokenizer.encode("好🙂")
    for cut in (1, 2, 3):
        assert tokenizer.decode(ids[:-cut]) == streamed(tokenizer, ids[:-cut]) == "好"


def test_broken_bytes_in_the_middle_are_replaced_as_in_sentencepiece(tokenizer_model: bytes) -> None:
    ours, theirs = Tokenizer(tokenizer_model), library(tokenizer_model)
    first = theirs.piece_to_id("<0x00>")
    rng = random.Random(1)
    end = theirs.encode("a")[-1]
    for _ in range(2000):
        data = rng.choices(
            [0x41, 0x80, 0xBF, 0xC0, 0xC2, 0xE0, 0xE4, 0xED, 0xA0, 0xF0, 0x90, 0xF4, 0xFF], k=rng.randrange(1, 7)
        )
        ids = [first + b for b in data] + [end]
        assert ours.decode(ids) == theirs.decode(ids), bytes(data)


def test_split_utf8_agrees_with_python_on_valid_text() -> None:
    data = "a¢€𐍈中\U0010ffff\ud7ff\ue000".encode()
    for cut in range(len(data) + 1):
        text, rest = split_utf8(data[:cut])
        assert text.encode() + rest == data[:cut]
        assert REPLACEMENT not in text
        assert len(rest) < 4


def test_leading_space_stays_when_the_ids_continue_a_text(tokenizer_model: bytes) -> None:
    tokenizer = Tokenizer(tokenizer_model)
    ids = tokenizer.encode("the")
    assert tokenizer.decode(ids) == "the"
    stream = tokenizer.stream(continues=True)
    assert "".join(stream.feed(i) for i in ids) == " the"


def test_bos_and_eos(tokenizer_model: bytes) -> None:
    tokenizer = Tokenizer(tokenizer_model)
    plain = tokenizer.encode("你好")
    assert tokenizer.encode("你好", bos=True, eos=True) == [1, *plain, 2]
    assert tokenizer.encode("", bos=True) == [1]
    assert tokenizer.decode([1, *plain, 2]) == "你好"


def test_added_tokens_are_ids_only_when_asked(tokenizer_model: bytes) -> None:
    size = models.piece_count(tokenizer_model)
    added = {"[PAD]": size, "<|im_start|>": size + 1, "<|im_start|>>": size + 2, "作者": size + 3}
    tokenizer = Tokenizer(tokenizer_model, {"added_tokens": added})
    assert tokenizer.size == size + 4
    typed = tokenizer.encode("[PAD]<|im_start|></s>作者")
    assert max(typed) < size
    assert not {1, 2} & set(typed)
    assert tokenizer.decode(typed) == "[PAD]<|im_start|></s>作者"
    parsed = tokenizer.encode("好<|im_start|>></s>[PAD]", special=True)
    assert parsed == [*tokenizer.encode("好"), size + 2, 2, size]
    assert tokenizer.decode(parsed) == "好"
    assert tokenizer.decode([size + 3]) == "作者"
    assert tokenizer.piece(size) == "[PAD]"
    assert tokenizer.special_id("<|im_start|>") == size + 1
    assert tokenizer.special_id("</s>") == 2
    assert tokenizer.special_id("<|im_end|>") is None
    assert tokenizer.special_id("the") is None


def test_ids_without_a_text_are_refused(tokenizer_model: bytes) -> None:
    size = models.piece_count(tokenizer_model)
    tokenizer = Tokenizer(tokenizer_model, {"added_tokens": {"[PAD]": size}})
    assert tokenizer.has(size)
    assert not tokenizer.has(size + 1)
    for bad in (size + 1, -1):
        with pytest.raises(InputError, match=f"{bad}.*0 to {size}"):
            tokenizer.decode([bad])
        with pytest.raises(InputError, match=str(bad)):
            tokenizer.piece(bad)


def test_dummy_prefix_follows_the_settings(tokenizer_model: bytes) -> None:
    with_prefix = Tokenizer(tokenizer_model, {"add_dummy_prefix": True})
    without = Tokenizer(tokenizer_model, {"add_dummy_prefix": False})
    assert with_prefix.encode("the") == library(tokenizer_model).encode("the")
    assert without.encode("the") != with_prefix.encode("the")
    for tokenizer in (with_prefix, without):
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_a_model_that_normalizes(tokenizer_model: bytes, tmp_path: Path) -> None:
    """SentencePiece's default normalization folds spaces and full-width forms; decoding strips all at the start."""
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(models.sample_lines()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(tmp_path / "nfkc"), vocab_size=900, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    model = (tmp_path / "nfkc.model").read_bytes()
    ours, theirs = Tokenizer(model), library(model)
    assert ours.removes_extra_spaces
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == streamed(ours, ids) == theirs.decode(ids)
    space = [i for i in range(theirs.vocab_size()) if theirs.id_to_piece(i) == "▁"]
    for count in (1, 2, 3):
        ids = space * count + theirs.encode("a")
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x0a\x05\x0a\x03abc"])
def test_what_is_no_model_is_one_sentence(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^the tokenizer is no SentencePiece model") as error:
        Tokenizer(data)
    assert "\n" not in str(error.value)


def test_lone_surrogates_are_refused(tokenizer_model: bytes) -> None:
    with pytest.raises(InputError, match="character 1"):
        Tokenizer(tokenizer_model).encode("a\ud800")


def test_the_papers_sentence(shared_data: Path) -> None:
    """35 tokens with LLaMA's vocabulary, 16 with Chinese-LLaMA's."""
    folder = shared_data / "tokenizers"
    base = (folder / "llama.model").read_bytes()
    merged = models.merge_tokenizers(base, (folder / "chinese_sp_20k.model").read_bytes())
    assert models.piece_count(merged) == 49953
    sentence = "人工智能是计算机科学、心理学、哲学等学科融合的交叉学科。"
    assert (len(Tokenizer(base).encode(sentence)), len(Tokenizer(merged).encode(sentence))) == (35, 16)


def test_real_texts_with_the_real_vocabulary(shared_data: Path) -> None:
    folder = shared_data / "tokenizers"
    model = models.merge_tokenizers(
        (folder / "llama.model").read_bytes(), (folder / "chinese_sp_20k.model").read_bytes()
    )
    ours, theirs = Tokenizer(model), library(model)
    lines = (shared_data / "eval" / "zh_prose.txt").read_text(encoding="utf-8").splitlines()[:400]
    lines += (shared_data / "eval" / "en_prose.txt").read_text(encoding="utf-8").splitlines()[:100]
    poems = (shared_data / "eval" / "poems.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    lines += ["\n".join(json.loads(poem)["paragraphs"]) for poem in poems]
    for line in lines:
        ids = ours.encode(line)
        assert ids == theirs.encode(line)
        assert streamed(ours, ids) == theirs.decode(ids) == line
