# SPDX-License-Identifier: Apache-2.0
"""Files of strangers as input of evaluations: any bytes, any kind of file, any size end in a result or one sentence."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eval_data
import pytest
from eval_data import evaluate, refusal
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cnllama.eval import inputs
from cnllama.eval.benchmarks import BENCHMARKS
from cnllama.eval.gguf_header import read_gguf
from cnllama.eval.questions import LETTERS, read_subjects
from cnllama.eval.texts import read_text, windows
from cnllama.tokenizer import Tokenizer

CEVAL = BENCHMARKS["ceval"]
MANY = settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ODD_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400, "5e-324", "9" * 5000]


# --- questions


def read(data: Path, **changes: Any) -> Callable[[], object]:
    given: dict[str, Any] = {"split": "val", "shots": 0} | changes
    return lambda: read_subjects(CEVAL, data, **given)


@given(
    rows=st.lists(st.lists(TEXT | st.sampled_from([*"ABCD", "1", "E"]), min_size=6, max_size=9), max_size=6),
    header=st.sampled_from(
        [
            ["id", "question", *LETTERS, "answer"],
            ["question", *LETTERS, "answer"],
            ["id", "question", "A", "A", "C", "D", "answer"],
            ["\ufeffid", " question ", *LETTERS, "answer", ""],
            [],
        ]
    ),
    form=st.sampled_from(["\n", "\r\n", "\r"]),
    start=st.sampled_from([b"", b"\xef\xbb\xbf", b"\n\n", b"\x00"]),
    damage=st.binary(max_size=3),
    as_pandas=st.booleans(),
)
@MANY
def test_any_table(
    tmp_path: Path, rows: list[list[str]], header: list[str], form: str, start: bytes, damage: bytes, as_pandas: bool
) -> None:
    out = io.StringIO()
    csv.writer(out, lineterminator=form).writerows([header, *rows])
    path = CEVAL.path(tmp_path, "val", "law")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(start + out.getvalue().encode("utf-8", "surrogatepass") + damage)
    said = refusal(read(tmp_path, as_pandas=as_pandas))
    assert not said or said.startswith(f"{path}:")


@given(data=st.binary(max_size=300))
@example(b"id,question,A,B,C,D,answer\n0," + b"x" * 200_000 + b",a,b,c,d,A\n")
@example("id,question,A,B,C,D,answer\n0,问,甲,乙,丙,丁,A\n".encode("utf-16"))
@example("id,question,A,B,C,D,answer\n0,问,甲,乙,丙,丁,A\n".encode("gb18030"))
@example(b"id,question,A,B,C,D,answer\n0,\xed\xa0\x80,a,b,c,d,A\n")
@MANY
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = CEVAL.path(tmp_path, "val", "law")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    said = refusal(read(tmp_path))
    assert said.startswith(f"{path}:"), said


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "this is no regular file, expected a CSV file of questions"),
        (lambda path: path.mkdir(), "this is a directory, expected a CSV file of questions"),
        (lambda path: path.symlink_to("/dev/zero"), "this is no regular file"),
        (lambda path: path.symlink_to(path.name), "too many symbolic links"),
        (lambda path: path.write_bytes(b"PAR1\x15\x04"), "this is a Parquet file"),
        (lambda path: path.write_bytes(b"PK\x03\x04 "), "this is a zip archive"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid x"), "a pointer of Git LFS"),
        (lambda path: path.write_text("<!DOCTYPE html>"), "this is a web page"),
        (lambda path: path.write_bytes(b""), "the columns are ''"),
        (lambda path: path.open("wb").truncate(1 << 40), "1,099,511,627,776 bytes and at most 67,108,864 are read"),
    ],
)
def test_what_is_no_table(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    path = CEVAL.path(tmp_path, "val", "law")
    path.parent.mkdir()
    make(path)
    began = time.monotonic()
    said = refusal(read(tmp_path, only=("law",)))
    assert words in said
    assert str(path) in said
    assert time.monotonic() - began < 5


def test_a_directory_that_cannot_be_looked_into(tmp_path: Path) -> None:
    assert "the name is too long" in refusal(read(tmp_path / ("x" * 300)))
    (tmp_path / "loop").symlink_to("loop")
    assert "loop" in refusal(read(tmp_path / "loop"))


# --- texts


@given(
    values=st.lists(
        st.one_of(
            TEXT.map(lambda t: json.dumps({"text": t})),
            st.sampled_from([f'{{"text": {n}}}' for n in ODD_NUMBERS]),
            st.sampled_from(
                ['{"text": "\\ud800"}', '{"text": ["a", "\\udfff"]}', '{"text": [[]]}', "[" * 100_000, "null", "7",
                 '{"text": null, "title": "a", "dynasty": 1, "author": {}, "paragraphs": []}', '{"text": ""}', "{"]
            ),
        ),
        max_size=4,
    ),
    suffix=st.sampled_from([".jsonl", ".json", ".JSONL"]),
    end=st.sampled_from(["\n", "\r\n", ""]),
    start=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)  # fmt: skip
@MANY
def test_any_records(tmp_path: Path, values: list[str], suffix: str, end: str, start: bytes) -> None:
    path = tmp_path / f"t{suffix}"
    joined = end.join(values) if suffix.lower() == ".jsonl" else "[" + ",".join(values) + "]"
    path.write_bytes(start + joined.encode("utf-8"))
    documents: list[str] = []
    said = refusal(lambda: documents.extend(read_text(path)[0].documents))
    assert bool(said) != bool(documents)
    for document in documents:
        document.encode("utf-8")


@given(data=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".jsonl", ".json", ".csv", ""]))
@MANY
def test_any_bytes_as_text(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_bytes(data)
    documents: list[str] = []
    said = refusal(lambda: documents.extend(read_text(path, split=True)[0].documents))
    assert bool(said) != bool(documents)
    tokenizer = Tokenizer(eval_data.letter_tokenizer(), {"add_bos": False})
    assert sum(window.characters for window in windows(tokenizer, documents, 8, 4)) <= sum(map(len, documents))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_what_is_no_text(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"t{suffix}"
    os.mkfifo(path)
    assert "this is no regular file, expected a text" in refusal(lambda: read_text(path))
    path.unlink()
    path.mkdir()
    assert "this is a directory, expected a text" in refusal(lambda: read_text(path))
    path.rmdir()
    path.write_bytes(b"PAR1")
    assert "this is a Parquet file, expected a text" in refusal(lambda: read_text(path))
    path.write_bytes(b"x" * 1000)
    monkeypatch.setattr(inputs, "MAX_BYTES", 999)
    assert "1,000 bytes and at most 999 are read: take a part of it" in refusal(lambda: read_text(path))


# --- headers of GGUF files

KINDS = "BbHhIif?"


def text_of(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def header(pairs: list[bytes], tensors: list[bytes], **lies: int) -> bytes:
    counts = {"version": 3, "tensor_count": len(tensors), "pair_count": len(pairs)} | lies
    return b"GGUF" + struct.pack("<IQQ", *counts.values()) + b"".join(pairs + tensors)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text_of(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: list[int], kind: int, offset: int, dimensions: int | None = None) -> bytes:
    given = len(shape) if dimensions is None else dimensions
    return text_of(name) + struct.pack(f"<I{len(shape)}QIQ", given, *shape, kind, offset)


NAMES = ["general.alignment", "general.file_type", "llama.block_count", "llama.attention.head_count", "llama.x", ""]
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 31, 32, 1 << 20, (1 << 63) - 1, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1)
)
VALUES = st.one_of(
    st.tuples(st.just(10), NUMBERS.map(lambda n: struct.pack("<Q", n))),
    st.tuples(st.just(11), st.integers(-(1 << 63), (1 << 63) - 1).map(lambda n: struct.pack("<q", n))),
    st.tuples(st.sampled_from([6]), st.floats(width=32).map(lambda x: struct.pack("<f", x))),
    st.tuples(st.just(12), st.floats().map(lambda x: struct.pack("<d", x))),
    st.tuples(st.just(7), st.sampled_from([b"\0", b"\1", b"\2"])),
    st.tuples(st.just(8), TEXT.map(text_of)),
    st.tuples(st.just(9), st.tuples(st.integers(0, 13), NUMBERS).map(lambda t: struct.pack("<IQ", *t) + b"\1" * 40)),
    st.tuples(st.integers(0, 14), st.binary(max_size=8)),
)
PAIRS = st.tuples(st.sampled_from(NAMES), VALUES).map(lambda t: pair(t[0], *t[1]))
TENSORS = st.builds(
    tensor, st.sampled_from(["token_embd.weight", "blk.0.x.weight", "output.weight", ""]),
    st.lists(NUMBERS, max_size=4), st.integers(0, 40), NUMBERS, st.none() | st.integers(0, (1 << 32) - 1),
)  # fmt: skip


def every_figure(path: Path) -> None:
    """What anything asks of a header."""
    found = read_gguf(path)
    assert found.step_bytes >= 0
    assert isinstance(found.type_name, str)
    assert 0 <= found.kv_bytes < 1 << 62
    assert sum(found.tensors.values()) <= found.size


@given(
    pairs=st.lists(PAIRS, max_size=5),
    tensors=st.lists(TENSORS, max_size=4),
    counts=st.dictionaries(
        st.sampled_from(["version", "tensor_count", "pair_count"]), st.integers(0, (1 << 32) - 1), max_size=1
    ),
    tail=st.binary(max_size=60),
    cut=st.integers(0, 400),
)
@MANY
def test_any_gguf_header(
    tmp_path: Path, pairs: list[bytes], tensors: list[bytes], counts: dict[str, int], tail: bytes, cut: int
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes((header(pairs, tensors, **counts) + tail)[: cut or None])
    said = refusal(lambda: every_figure(path))
    assert not said or said.startswith(f"{path}: ")


LLAMA = [
    pair("llama.block_count", 4, struct.pack("<I", 2)),
    pair("llama.attention.head_count", 4, struct.pack("<I", 4)),
    pair("llama.embedding_length", 4, struct.pack("<I", 64)),
]


def test_a_plain_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    data = header([*LLAMA, pair("general.alignment", 4, struct.pack("<I", 64))], [tensor("a", [4, 2], 0, 0)])
    path.write_bytes(data + bytes(-len(data) % 64) + bytes(32))
    found = read_gguf(path)
    assert (found.tensors, found.kinds, found.kv_bytes) == ({"a": 32}, {"a": (0, 8)}, 4 * 2 * 4 * 16)


@given(st.lists(st.integers(0, 6), max_size=6), st.integers(0, 8))
@MANY
def test_tensors_take_no_byte_twice(tmp_path: Path, places: list[int], length: int) -> None:
    path = tmp_path / "x.gguf"
    data = header(LLAMA, [tensor(f"t{i}", [8], 0, 32 * place) for i, place in enumerate(places)])
    path.write_bytes(data + bytes(-len(data) % 32) + bytes(32 * length))
    said = refusal(lambda: every_figure(path))
    assert bool(said) == (len(set(places)) < len(places) or max(places, default=0) > length)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ([pair("general.alignment", 4, struct.pack("<I", 0))], "alignment is 0"),
        ([pair("general.alignment", 4, struct.pack("<I", 48))], "alignment is 48"),
        ([pair("general.alignment", 6, struct.pack("<f", float("nan")))], "alignment is nan"),
        ([pair("general.alignment", 8, text_of("x"))], "alignment is 'x'"),
        ([pair("llama.block_count", 4, struct.pack("<I", 2))], "'llama.block_count' occurs twice"),
        ([pair("a", 9, struct.pack("<IQ", 9, 1))], "an array of arrays"),
        ([pair("a", 9, struct.pack("<IQ", 8, 1 << 60))], "array of 1,152,921,504,606,846,976 values"),
        ([pair("a", 13, b"")], "type 13"),
    ],
)
def test_what_is_wrong_with_a_header(tmp_path: Path, change: list[bytes], words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(header([*LLAMA, *change], []))
    assert words in refusal(lambda: every_figure(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, 2.5])
@pytest.mark.parametrize("key", ["llama.block_count", "llama.attention.head_count", "llama.embedding_length"])
def test_numbers_that_describe_no_model(tmp_path: Path, key: str, value: float) -> None:
    path = tmp_path / "x.gguf"
    pairs = [data for data in LLAMA if key.encode() not in data]
    path.write_bytes(header([*pairs, pair(key, 12, struct.pack("<d", value))], []))
    assert f"{key} is {value!r}" in refusal(lambda: read_gguf(path).kv_bytes)


def test_endless_headers_end(tmp_path: Path) -> None:
    """Files of holes, as large as a file can be: counts and lengths that the size would allow."""
    path = tmp_path / "x.gguf"
    hole = 1 << 42
    for start in (
        struct.pack("<IQQ", 3, 1 << 26, 1 << 26),
        struct.pack("<IQQ", 3, 1 << 16, 0),
        struct.pack("<IQQ", 3, 0, 1) + pair("a", 9, struct.pack("<IQ", 8, 1 << 26)),
        struct.pack("<IQQ", 3, 0, 1) + pair("a", 9, struct.pack("<IQ", 12, 1 << 40)),
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 40),
    ):
        path.write_bytes(b"GGUF" + start)
        os.truncate(path, hole)
        began = time.monotonic()
        assert refusal(lambda: every_figure(path)).startswith(f"{path}: ")
        assert time.monotonic() - began < 5
    path.unlink()
    os.mkfifo(path)
    assert "this is no regular file" in refusal(lambda: read_gguf(path))


# --- options


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shots", "-1"), "--shots is -1"),
        (("--shots", "9" * 30), "no integer of 64 bits"),
        (("--subject", "lau"), "no subject 'lau'"),
        (("--subject", "law\n\x1b[2J"), "no subject"),
        (("--penalty", "nan"), "--penalty: 'nan' is no finite number"),
        (("--penalty", "inf"), "--penalty: 'inf' is no finite number"),
        (("--generate", "--max-tokens", "0"), "--max-tokens is 0"),
        (("--generate", "--max-tokens", "-5"), "--max-tokens is -5"),
        (("--generate", "--max-tokens", "9" * 18), "the context is"),
        (("--generate", "--temp", "nan"), "'nan' is no finite number"),
        (("--generate", "--seed", "-1"), "seed is -1"),
        (("--generate", "--seed", "9" * 30), "no integer of 64 bits"),
        (("--generate", "--sequences", "9" * 18), "number of sequences is 9"),
        (("--temp", "1"), "--temp belongs to --generate"),
        (("--max-tokens", "9"), "--max-tokens belongs to --generate"),
        (("--sequences", "2"), "--sequences belongs to --generate"),
        (("--ctx", "0"), "there is room for 0"),
        (("--ctx", "-7"), "there is room for -7"),
        (("--kv", "int2"), "the cache type is 'int2'"),
    ],
)
def test_options_out_of_range(tiny_cnl: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    eval_data.write_ceval(tmp_path, "val", "law", eval_data.rows(2))
    eval_data.write_ceval(tmp_path, "dev", "law", eval_data.rows(5, 50))
    alone = () if "--subject" in words else ("--subject", "law")
    done = evaluate("ceval", tiny_cnl, "--data", tmp_path, "--letters", "colon", *alone, *words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.replace("\n", " ")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize("penalty", ["5e-324", "1.7976931348623157e308", "1"])
def test_the_smallest_and_the_largest_penalty(tiny_cnl: Path, tmp_path: Path, penalty: str) -> None:
    eval_data.write_ceval(tmp_path, "val", "law", eval_data.rows(2))
    done = evaluate("ceval", tiny_cnl, "--data", tmp_path, "--letters", "colon", "--penalty", penalty)
    assert done.returncode == 0, done.stderr
