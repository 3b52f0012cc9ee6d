# SPDX-License-Identifier: Apache-2.0
"""Bytes become the right text, or a refusal, or a warning; never other characters."""

import os
import random
import warnings
from collections import Counter
from pathlib import Path

import models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnllama.encodings import UndecodableError, decode, locale_encoding
from cnllama.errors import InputError
from cnllama.textio import decode_argument, decode_text, read_text_file

ENGLISH = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune (1813) wants a wife."
)
LINES = [*models.sample_lines(), ENGLISH, f"{ENGLISH} 意思是：有钱的单身汉总要娶位太太。"]
ENCODINGS = ("utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "big5")
LONG = 24  # bytes: what is said of all texts from there on is only measured for shorter ones

texts = st.builds(
    lambda line, begin, length: LINES[line][begin : begin + length],
    st.integers(0, len(LINES) - 1),
    st.integers(0, 30),
    st.integers(1, 60),
)


def outcome(data: bytes, text: str) -> str:
    """right, refused, warned or WRONG; what stands in the text without a gap is right."""
    try:
        found = decode(data)
    except UndecodableError:
        return "refused"
    return "right" if found.text in text else "warned" if found.doubt else "WRONG"


@settings(max_examples=1500, deadline=None)
@given(texts, st.sampled_from(ENCODINGS), st.integers(0, 200), st.booleans())
def test_a_text_cut_anywhere_is_right_or_refused(text: str, encoding: str, cut: int, front: bool) -> None:
    data = text.encode(encoding, "ignore")
    text = data.decode(encoding)
    data = data[cut:] if front else data[: len(data) - cut]
    if len(data) >= LONG:
        assert outcome(data, text) in ("right", "refused"), data


@settings(max_examples=500, deadline=None)
@given(texts, st.sampled_from(("utf-8", "utf-8-sig", "utf-16", "utf-32")))
def test_a_whole_text_whose_encoding_is_certain_is_read(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)).text == text


def test_short_texts_are_read_wrong_as_rarely_as_measured() -> None:
    chance = random.Random(1)
    found: dict[str, Counter[str]] = {encoding: Counter() for encoding in ENCODINGS}
    for encoding, counts in found.items():
        while counts.total() < 3000:
            line = chance.choice(LINES[:-2])
            begin = chance.randrange(len(line))
            text = line[begin : begin + chance.randrange(2, 8)].encode(encoding, "ignore").decode(encoding)
            if not text.isascii():
                counts[outcome(text.encode(encoding), text)] += 1
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert found[encoding]["right"] == 3000
    for encoding in ("gbk", "gb18030"):
        assert found[encoding]["right"] > 3000 * 0.75, found[encoding]
        assert found[encoding]["WRONG"] < 3000 * 0.005, found[encoding]
    assert found["utf-32-be"]["refused"] == 3000
    assert found["big5"]["WRONG"] < 3000 * 0.005, found["big5"]
    assert found["utf-16-le"]["WRONG"] + found["utf-16-be"]["WRONG"] < 6000 * 0.05, found


@pytest.mark.parametrize("length", [1, 2, 4, 12])
def test_english_is_never_taken_for_another_encoding(length: int) -> None:
    for begin in range(len(ENGLISH) - length):
        text = ENGLISH[begin : begin + length]
        assert decode(text.encode()) == (text, "utf-8", "")


@pytest.mark.parametrize(
    "text", ["Привет, мир", "naïve café", "ελληνικά", "日本語です", "한국어", "𠮷野家", "🙂", "\t\n"]
)
def test_other_languages_in_utf8(text: str) -> None:
    assert decode(text.encode()) == (text, "utf-8", "")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("写一首关于春天的诗".encode()[:-1], "byte 24: it was cut off"),
        ("春".encode()[:2], "byte 0: it was cut off"),
        ("春天".encode()[1:], "neither valid UTF-8"),
        ("春天来了".encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
        ("abc".encode("utf-16-be"), "NUL at byte 0, which no text has: if it is UTF-16BE"),
        ("春天".encode("utf-32-le"), "iconv -f UTF-32LE"),
        ("春天來了，萬物復甦".encode("big5"), "iconv -f BIG5"),
        ("élève à Noël".encode("latin-1"), "save it as UTF-8"),
        ("春天".encode("utf-16")[:-1], "byte 4 is not valid utf-16-le, which its byte-order mark says"),
        ("春天".encode("utf-32")[:-1], "not valid utf-32-le"),
        ("一".encode() + b"\0", "NUL at byte 3"),
        (b"\xff\xff\xff", "byte 0 is neither"),
        ("天空".encode("gbk")[:-1], "cut off|neither"),
    ],
)
def test_refusals_name_the_place_and_the_mend(data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=f"^x.txt: .*({words})"):
        decode_text(data, "x.txt")


def test_a_text_in_doubt_is_read_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"x: read as GB18030, which is not certain \(春\)"):
        assert decode_text("春".encode("gbk"), "x") == "春"
    with pytest.warns(UserWarning, match="x: read as UTF-8, but it may be GBK"):
        assert decode_text("校".encode("gbk"), "x") == "У"  # a Cyrillic letter in UTF-8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_text("写一首诗\r\n".encode("gbk"), "x") == "写一首诗\n"


@pytest.mark.parametrize(
    ("environment", "encoding"),
    [
        ({"LANG": "zh_CN.GBK"}, "gb18030"),
        ({"LANG": "zh_CN.GB18030"}, "gb18030"),
        ({"LANG": "zh_CN.GBK", "LC_CTYPE": "C.UTF-8"}, "gb18030"),  # so Python sets it where zh_CN.GBK is missing
        ({"LANG": "zh_CN.GBK", "LC_ALL": "C"}, ""),
        ({"LANG": "zh_CN.UTF-8"}, ""),
        ({"LANG": "zh_CN.nonsense@x"}, ""),
        ({}, ""),
    ],
)
def test_the_locale_decides_what_could_be_either(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], encoding: str
) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert locale_encoding() == encoding
    if encoding:
        for text in ("校", "春", "魑魅魍魉", "天空"):
            assert decode_text(text.encode("gbk"), "x") == text
        for text in ("好", "中国", "写一首诗"):
            assert decode_text(text.encode(), "x") == text


def test_arguments_and_files(tmp_path: Path) -> None:
    assert decode_argument("好") == "好"
    assert decode_argument(os.fsdecode("好的".encode("gbk"))) == "好的"
    file = tmp_path / "prompt.txt"
    file.write_bytes("一\n\n".encode())
    assert read_text_file(file) == "一\n"
    with pytest.raises(InputError, match="directory"):
        read_text_file(tmp_path)
