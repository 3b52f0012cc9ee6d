# SPDX-License-Identifier: Apache-2.0
"""The .cnl file: what is written is read, every damaged or hostile header is refused, half files never appear."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnllama import _core
from cnllama.config import check_config, expected_tensors
from cnllama.container import parse_json
from cnllama.errors import InputError, from_os_error
from cnllama.format import header_hash, open_cnl, stored_bytes

Header = dict[str, Any]
EMBED = "model.embed_tokens.weight"
EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def cnl(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    from cnllama.convert.pack import convert

    path = tmp_path_factory.mktemp("format") / "model.cnl"
    convert(tiny_llama, [], path)
    return path


def read(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, header: Header, body: bytes, room: int | None = None) -> Path:
    """A file with this header, its hash made right, so that only the fault under test is left."""
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["header_sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    size = room if room is not None else -(-(len(text) + 8) // 64) * 64 - 8
    text += b" " * (size - len(text))
    digest = header_hash(text)
    text = text.replace(b'"header_sha256":"' + b"0" * 64, b'"header_sha256":"' + digest.encode())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def metadata(key: str, change: Callable[[Any], Any]) -> Callable[[Header], None]:
    """An edit of a JSON value of the metadata."""

    def edit(header: Header) -> None:
        value = json.loads(header["__metadata__"][key])
        replaced = change(value)
        header["__metadata__"][key] = json.dumps(value if replaced is None else replaced)

    return edit


def config(**values: Any) -> Callable[[Header], None]:
    return metadata("config", lambda c: c.update(values))


def entry(name: str, **values: Any) -> Callable[[Header], None]:
    return lambda header: header[name].update(values)


def shift(name: str, begin: int, end: int) -> Callable[[Header], None]:
    def edit(header: Header) -> None:
        offsets = header[name]["data_offsets"]
        offsets[0] += begin
        offsets[1] += end

    return edit


def rename(name: str, other: str) -> Callable[[Header], None]:
    def edit(header: Header) -> None:
        header[other] = header.pop(name)
        metadata("tensors", lambda t: t.update({other: t.pop(name)}))(header)

    return edit


def row(name: str, *value: Any) -> Callable[[Header], None]:
    return metadata("tensors", lambda t: t.update({name: list(value)}))


def swap_entries(header: Header) -> None:
    a, b = "model.layers.0.self_attn.k_proj.weight", EMBED
    header[a], header[b] = header[b], header[a]


def text(key: str, value: str) -> Callable[[Header], None]:
    return lambda header: header["__metadata__"].update({key: value})


MUTATIONS: dict[str, tuple[Callable[[Header], Any], str]] = {
    "no metadata": (lambda h: h.pop("__metadata__"), "no .cnl"),
    "metadata is a list": (lambda h: h.update(__metadata__=["a"]), "no map of strings"),
    "metadata holds a number": (lambda h: h["__metadata__"].update(x=1), "no map of strings"),
    "other format": (text("format", "gguf"), "no .cnl"),
    "newer version": (text("version", "2"), "update cnllama"),
    "missing key": (lambda h: h["__metadata__"].pop("parity"), "lacks parity"),
    "value is no JSON": (text("config", "{"), "not valid JSON"),
    "value is a list": (text("config", "[]"), "no JSON object"),
    "value nests deeply": (text("source", "[" * 200_000), "nested too deeply"),
    "value repeats a key": (text("source", '{"a":1,"a":2}'), "occurs twice"),
    "value is NaN": (text("generation", '{"temperature":NaN}'), "not valid JSON"),
    "value is a huge integer": (text("generation", '{"top_k":' + "9" * 5000 + "}"), "not valid JSON"),
    "name with a line break": (lambda h: h.update({"a\nb": EMPTY}), "a tensor is called"),
    "entry is a list": (lambda h: h.update({EMBED: [1]}), "no object"),
    "dtype unknown": (entry(EMBED, dtype="Q4"), "dtype 'Q4'"),
    "dtype is null": (entry(EMBED, dtype=None), "dtype None"),
    "dtype of another size": (entry(EMBED, dtype="F32"), "its shape asks for"),
    "dtype of the same size": (entry(EMBED, dtype="I8"), "is stored as I8"),
    "shape is a string": (entry(EMBED, shape="big"), "expected a short list"),
    "shape is negative": (entry(EMBED, shape=[-1, 64]), "expected a short list"),
    "shape is a float": (entry(EMBED, shape=[1.5, 64]), "expected a short list"),
    "shape is a bool": (entry(EMBED, shape=[True, 64]), "expected a short list"),
    "shape is huge": (entry(EMBED, shape=[1 << 61, 1 << 61]), "its shape asks for"),
    "shape is past 64 bits": (entry(EMBED, shape=[1 << 80]), "expected a short list"),
    "shape has many dimensions": (entry(EMBED, shape=[1] * 9), "expected a short list"),
    "shape is transposed": (lambda h: h[EMBED]["shape"].reverse(), "is stored as U8"),
    "offsets missing": (lambda h: h[EMBED].pop("data_offsets"), "data_offsets None"),
    "offsets negative": (entry(EMBED, data_offsets=[-64, 64]), "expected two positions"),
    "offsets reversed": (lambda h: h[EMBED]["data_offsets"].reverse(), "claims bytes"),
    "offsets outside": (shift(EMBED, 1 << 40, 1 << 40), "claims bytes"),
    "offsets past 64 bits": (entry(EMBED, data_offsets=[1 << 70, 1 << 71]), "expected two positions"),
    "offsets overlap": (shift(Q0, -64, -64), "overlaps another"),
    "offsets leave a hole": (lambda h: h.pop(Q0), "has a hole before it"),
    "offsets end early": (lambda h: h.pop("tokenizer.model"), "the tensors end at byte"),
    "size shorter than shape": (shift(EMBED, 0, -64), "its shape asks for"),
    "two tensors exchanged": (swap_entries, "is stored as"),
    "tensor only in the header": (lambda h: h.update(extra=EMPTY), "not both"),
    "tensor only in the table": (row("extra", "f32", 16, 1), "not both"),
    "tensor renamed": (rename(Q0, "model.layers.0.self_attn.q_norm.weight"), f"{Q0!r} is missing"),
    "tensor of a layer too many": (
        rename("model.layers.2.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        "is missing",
    ),
    "scheme unknown": (row(Q0, "q3", 96, 96), "scheme 'q3'"),
    "scheme is a number": (row(Q0, 4, 96, 96), "expected [scheme, rows, columns]"),
    "scheme of another size": (row(Q0, "q8-s64", 96, 96), "is stored as"),
    "scheme raw for a matrix": (row(Q0, "raw", 96, 96), "is stored as"),
    "rows zero": (row(Q0, "q4-a64", 0, 96), "expected positive integers"),
    "rows negative": (row(Q0, "q4-a64", -96, 96), "expected positive integers"),
    "rows huge": (row(Q0, "q4-a64", 1 << 62, 1 << 62), "expected positive integers"),
    "rows at the limit": (row(Q0, "q4-a64", 1 << 30, 1 << 30), "is stored as"),
    "rows float": (row(Q0, "q4-a64", 96.0, 96), "expected positive integers"),
    "rows within the padding": (row(Q0, "q4-a64", 95, 96), "95 x 96 and the config asks for 96 x 96"),
    "heads do not divide": (config(num_attention_heads=4, num_key_value_heads=3), "not a multiple of"),
    "heads zero": (config(num_attention_heads=0), "expected an integer from 1"),
    "layers negative": (config(num_hidden_layers=-1), "expected an integer from 1"),
    "layers a million": (config(num_hidden_layers=1_000_000), "expected an integer from 1"),
    "hidden huge": (config(hidden_size=1 << 63), "expected an integer from 1"),
    "hidden a string": (config(hidden_size="96"), "expected an integer from 1"),
    "hidden a bool": (config(hidden_size=True), "expected an integer from 1"),
    "hidden of another size": (config(hidden_size=128), "and the config asks for"),
    "head_dim odd": (config(head_dim=31), "expected an even number"),
    "too many columns of heads": (config(num_attention_heads=1024, head_dim=1024), "columns"),
    "vocabulary larger than the rows": (config(vocab_size=100_000), "and the config asks for"),
    "vocabulary smaller than the tokenizer": (config(vocab_size=10), "and the config asks for"),
    "eps zero": (config(rms_norm_eps=0), "rms_norm_eps"),
    "eps infinite": (
        lambda h: text("config", h["__metadata__"]["config"].replace("1e-05", "1e999").replace("1e-06", "1e999"))(h),
        "1e999 is larger than any number",
    ),
    "theta a string": (config(rope_theta="big"), "rope_theta"),
    "theta negative": (config(rope_theta=-1), "rope_theta"),
    "context zero": (config(max_position_embeddings=0), "max_position_embeddings"),
    "tied is a number": (config(tie_word_embeddings=1), "tie_word_embeddings"),
    "tied with an lm_head": (config(tie_word_embeddings=True), "belongs to no LLaMA"),
    "config lacks a key": (metadata("config", lambda c: c.pop("head_dim") and None), "lacks head_dim"),
    "rope is a list": (config(rope_scaling=[1]), "expected an object or null"),
    "rope unknown": (config(rope_scaling={"rope_type": "longrope"}), "expected one of"),
    "rope lacks its factor": (config(rope_scaling={"rope_type": "linear"}), "lacks factor"),
    "rope factor zero": (config(rope_scaling={"rope_type": "linear", "factor": 0}), "factor"),
    "rope with a stranger": (config(rope_scaling={"rope_type": "linear", "factor": 2, "x": 1}), "unknown"),
    "template unknown": (text("template", "vicuna"), "expected one of"),
    "eos no list": (metadata("generation", lambda g: g.update(eos_token_ids=2)), "end tokens"),
    "eos outside": (metadata("generation", lambda g: g.update(eos_token_ids=[1 << 40])), "end tokens"),
    "bos outside": (metadata("generation", lambda g: g.update(bos_token_id=-1)), "bos_token_id"),
    "tokenizer of another type": (metadata("tokenizer", lambda t: t.update(type="bpe")), "type 'bpe'"),
    "tokenizer pieces too many": (metadata("tokenizer", lambda t: t.update(pieces=1 << 20)), "pieces"),
    "tokenizer flag a string": (metadata("tokenizer", lambda t: t.update(add_bos="yes")), "add_bos"),
    "added tokens a list": (metadata("tokenizer", lambda t: t.update(added_tokens=["x"])), "added tokens"),
    "added token outside": (metadata("tokenizer", lambda t: t.update(added_tokens={"x": 1 << 20})), "added tokens"),
    "added token no text": (
        metadata("tokenizer", lambda t: t.update(added_tokens={"\ud800": 5})),
        "half a surrogate pair",
    ),
    "added tokens share an id": (metadata("tokenizer", lambda t: t.update(added_tokens={"x": 5, "y": 5})), "share"),
    "tokenizer hash wrong": (metadata("tokenizer", lambda t: t.update(sha256="0" * 64)), "does not match its hash"),
    "tokenizer length wrong": (
        lambda h: row("tokenizer.model", "raw", json.loads(h["__metadata__"]["tensors"])["tokenizer.model"][1] - 1, 1)(
            h
        ),
        "does not match its hash",
    ),
    "content hash missing": (metadata("fingerprint", lambda f: f.pop("content_sha256") and None), "content_sha256"),
    "fingerprint lacks a tensor": (metadata("fingerprint", lambda f: f["tensors"].pop(Q0) and None), "exactly"),
    "fingerprint holds a string": (metadata("fingerprint", lambda f: f["tensors"][Q0].update(rms="x")), "no number"),
}


def assert_refused(cnl: Path, broken: Path, edit: Callable[[Header], None], expected: str) -> None:
    """The file with an edited header is refused in one sentence that names it and has these words."""
    header, body = read(cnl)
    edit(header)
    write(broken, header, body)
    with pytest.raises(InputError) as caught:
        open_cnl(broken)
    assert expected in str(caught.value)
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MUTATIONS)
def test_hostile_header_is_refused(cnl: Path, tmp_path: Path, name: str) -> None:
    assert_refused(cnl, tmp_path / "broken.cnl", *MUTATIONS[name])


def test_the_unedited_header_is_accepted(cnl: Path, tmp_path: Path) -> None:
    header, body = read(cnl)
    assert open_cnl(write(tmp_path / "same.cnl", header, body)).config["hidden_size"] == 96


def test_header_without_its_hash_made_right_is_refused(cnl: Path, tmp_path: Path) -> None:
    data = cnl.read_bytes()
    broken = tmp_path / "broken.cnl"
    broken.write_bytes(data.replace(b'"template":"raw"', b'"template":"raW"'))
    with pytest.raises(InputError, match="does not match its own hash"):
        open_cnl(broken)


def test_data_off_the_64_byte_boundary_are_refused(cnl: Path, tmp_path: Path) -> None:
    header, body = read(cnl)
    room = struct.unpack("<Q", cnl.read_bytes()[:8])[0] + 4
    with pytest.raises(InputError, match="no multiple of 64"):
        open_cnl(write(tmp_path / "broken.cnl", header, body, room))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"abc", "too few"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"\xff" * 100, "starts no safetensors header"),
        (struct.pack("<Q", 1 << 62) + b"{" + bytes(100), "starts no safetensors header"),
        (struct.pack("<Q", 500) + b"{}" + bytes(100), "ends after"),
        (struct.pack("<Q", 2) + b"{}", "no .cnl"),
        (struct.pack("<Q", 4) + b"{}}}", "not valid JSON"),
        (struct.pack("<Q", 4) + b"{\xff\xff}", "is not UTF-8"),
    ],
    ids=["empty", "short", "gguf", "zip", "noise", "huge header", "cut header", "no metadata", "no json", "no utf-8"],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, expected: str) -> None:
    path = tmp_path / "x.cnl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=expected):
        open_cnl(path)


def test_truncated_anywhere_is_refused(cnl: Path, tmp_path: Path) -> None:
    data = cnl.read_bytes()
    cut = tmp_path / "cut.cnl"
    for size in [7, 8, 100, *range(1000, len(data), len(data) // 17), len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(InputError):
            open_cnl(cut)
    cut.write_bytes(data + b"\0")
    with pytest.raises(InputError, match="the tensors end at byte"):
        open_cnl(cut)


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_cnl(tmp_path / "absent.cnl")
    with pytest.raises(InputError, match="directory"):
        open_cnl(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="this is no regular file"):
        open_cnl(tmp_path / "pipe")
    denied = from_os_error(tmp_path, PermissionError(errno.EACCES, "Permission denied"))
    assert isinstance(denied, InputError)
    assert "no permission" in str(denied)


def test_safetensors_lists_the_tensors(cnl: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    file = open_cnl(cnl)
    with safetensors.safe_open(cnl, framework="numpy") as opened:
        assert set(opened.keys()) == set(file.tensors)
        assert opened.metadata()["format"] == "cnl"
        for name, tensor in file.tensors.items():
            assert opened.get_tensor(name).tobytes() == tensor.data.tobytes(), name


def test_file_is_as_documented(cnl: Path) -> None:
    file = open_cnl(cnl)
    data = cnl.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = read(cnl)
    assert (8 + length) % 64 == 0
    assert file.fingerprint["content_sha256"] == hashlib.sha256(body).hexdigest()
    digest = header["__metadata__"]["header_sha256"].encode()
    assert hashlib.sha256(data[8 : 8 + length].replace(digest, b"0" * 64)).hexdigest().encode() == digest
    assert [name for name, e in expected_tensors(file.config) if not e.optional] == list(file.tensors)[:-1]
    assert all(tensor.data.ctypes.data % 64 == 0 for tensor in file.tensors.values())
    assert not any(tensor.data.flags.writeable for tensor in file.tensors.values())
    assert "tokenizer.model" not in file.engine_tensors()


def test_engine_takes_the_tensors(cnl: Path) -> None:
    file = open_cnl(cnl)
    engine = _core.Engine(file.config, file.engine_tensors(), threads=1, context=64)
    assert engine.vocab_size == file.vocab_size


def test_stored_bytes_are_multiples_of_64() -> None:
    for scheme in _core.schemes():
        for rows, cols in [(1, 1), (33, 70), (16, 256), (5, 1000)]:
            assert stored_bytes(scheme, rows, cols) % 64 == 0
    assert stored_bytes("f32", 17, 1) == 128
    assert stored_bytes("raw", 65, 1) == 128


def test_reader_written_from_the_documentation(cnl: Path) -> None:
    """docs/format.md alone is enough to read a weight."""
    header, body = read(cnl)
    values = {key: json.loads(header["__metadata__"][key]) for key in ("config", "tensors")}
    for name, (scheme, rows, cols) in values["tensors"].items():
        if scheme in ("f32", "raw") or "layers.1" in name:
            continue
        begin, end = header[name]["data_offsets"]
        data = np.frombuffer(body[begin:end], np.uint8)
        expected = _core.dequantize(data, scheme, rows, cols)
        group, bits, asymmetric = {"q4-a64": (64, 4, True), "q8-s64": (64, 8, False)}[scheme]
        random = np.random.default_rng(1)
        for r, c in zip(random.integers(rows, size=50), random.integers(cols, size=50), strict=True):
            assert documented_value(data, int(r), int(c), cols, group, bits, asymmetric) == expected[r, c], name


def documented_value(
    data: np.ndarray, r: int, c: int, cols: int, group: int, bits: int, asymmetric: bool
) -> np.float32:
    padded = -(-cols // group) * group

    def head(span: int) -> int:
        return -(-(span // group * 16 * 2 * (2 if asymmetric else 1)) // 64) * 64

    def superblock(span: int) -> int:
        return head(span) + span // 32 * 64 * bits

    panel = padded // 256 * superblock(256) + (superblock(padded % 256) if padded % 256 else 0)
    at = r // 16 * panel + c // 256 * superblock(256)
    span = min(256, padded - c // 256 * 256)
    lane, k = r % 16, c % 256
    scale_at = at + (k // group * 16 + lane) * 2
    scale = data[scale_at : scale_at + 2].view(np.float16)[0].astype(np.float32)
    j = k % 32
    half = j % 16 if bits == 4 else j
    byte = int(data[at + head(span) + k // 32 * 64 * bits + half // 4 * 64 + lane * 4 + half % 4])
    q = byte >> (4 if j >= 16 else 0) & 15 if bits == 4 else byte
    if not asymmetric:
        return scale * np.float32(q - (1 << (bits - 1)))
    min_at = scale_at + span // group * 32
    return np.float32(np.float64(scale) * q + np.float64(data[min_at : min_at + 2].view(np.float16)[0]))


def test_json_is_strict() -> None:
    assert parse_json('{"a": [1, 2.5, null]}', "x") == {"a": [1, 2.5, None]}
    for bad in ("{'a': 1}", '{"a": 1, "a": 2}', "[NaN]", "[-Infinity]", "", "[1] 2", "[" * 100_000):
        with pytest.raises(InputError, match="file is"):
            parse_json(bad, "file")


def test_config_check_keeps_known_keys_only(cnl: Path) -> None:
    good = open_cnl(cnl).config
    assert check_config(good | {"unknown": 1}, "x") == good
    with pytest.raises(InputError, match="expected an object"):
        check_config([good], "x")


def test_messages_quote_no_control_characters() -> None:
    error = InputError("a\x1b[31mb\x1ec\ud800 中文😀\nb", ["table", "of\nthree"])
    assert str(error) == "a\\x1b[31mb\\x1ec\\ud800 中文😀\\nb"
    assert error.details == ["table", "of\\nthree"]
