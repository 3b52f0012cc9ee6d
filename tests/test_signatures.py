# SPDX-License-Identifier: Apache-2.0
"""Files that are not what their names promise: recognised by their first bytes, wherever they are opened."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
from cnllama.convert.pack import make_plan
from hf_reference import refusal
from hypothesis import given
from hypothesis import strategies as st

from cnllama.container import SafetensorsFile, read_json
from cnllama.signatures import HEAD, what_it_is, what_the_file_is

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 9876543210\n"


def archive(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as file:
            file.writestr("a", "b")
    else:
        with tarfile.open(fileobj=stream, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a"))
    return stream.getvalue()


CONTENTS: dict[str, tuple[bytes, str]] = {
    "pointer": (POINTER, "a Git LFS pointer, which stands for a file of 9,876,543,210 bytes (sha256 abababababab...)"),
    "old pointer": (b"version http://git-media.io/v/2\n", ""),
    "pointer of an extension": (
        POINTER.replace(b"\noid", b"\next-0-x sha256:" + b"cd" * 32 + b"\noid"),
        "9,876,543,210 bytes",
    ),
    "cut pointer": (POINTER[:60], "a Git LFS pointer"),
    "html": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "an HTML page"),
    "xml": (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "json": (b'{"error":"Repository not found"}', 'a JSON text ({"error":"Repository not found"})'),
    "text": (b"Invalid username or password.", "a text (Invalid username or password.)"),
    "chinese": ("文件不存在，请重新登录".encode(), "a text (文件不存在，请重新登录)"),
    "escape": (b"\x1b[31mred" + b"x" * 20, ""),
    "pickle": (pickle.dumps({"a": 1}), "a pickle"),
    "zip": (archive("zip"), "a zip archive"),
    "tar": (archive("tar"), "a tar archive"),
    "gzip": (gzip.compress(b"x" * 100), "a gzip archive"),
    "zstd": (b"\x28\xb5\x2f\xfd" + b"\x01" * 50, "a zstd archive"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(50), "a GGUF file"),
    "ggml": (b"tjgg\x03\x00\x00\x00" + bytes(50), "a GGML file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image"),
    "pdf": (b"%PDF-1.7\n" + bytes(50), "a PDF document"),
    "zeros": (bytes(5000), "nothing but zeros"),
}  # fmt: skip
PLACES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "config.json", "tokenizer.model")
TORCH = ("pickle", "zip")  # what a .bin may begin with
TEXTS = ("json", "text", "chinese", "old pointer", "escape")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", CONTENTS)
def test_first_bytes_are_recognised_wherever_a_file_is_opened(small_base: Path, place: str, kind: str) -> None:
    if place.endswith(".bin"):
        pytest.importorskip("torch")
    content, what = CONTENTS[kind]
    if place not in ("config.json", "tokenizer.model"):
        (small_base / "model.safetensors").unlink()
    (small_base / place).write_bytes(content)
    sentence = refusal(small_base)
    assert str(small_base / place) in sentence
    expected_text = place.endswith(".json") and kind in TEXTS
    if not expected_text and not (place.endswith(".bin") and kind in TORCH):
        assert what in sentence
        assert "; " in sentence.removeprefix(str(small_base)), "a mend"


def test_a_safetensors_file_under_another_name(small_base: Path) -> None:
    pytest.importorskip("torch")
    (small_base / "model.safetensors").rename(small_base / "pytorch_model.bin")
    assert "this is a safetensors file; its name should end with .safetensors" in refusal(small_base)
    (small_base / "pytorch_model.bin").rename(small_base / "model.safetensors")
    make_plan(small_base)


@given(
    st.one_of(st.binary(max_size=600), st.sampled_from([c for c, _ in CONTENTS.values()]).map(lambda b: b + b"\x00"))
)
def test_no_bytes_are_too_odd(head: bytes) -> None:
    for text in (False, True):
        found = what_it_is(head[:HEAD], text)
        assert found is None or str(found).isprintable()


def test_what_is_sound_is_not_mistaken(small_base: Path) -> None:
    assert SafetensorsFile(small_base / "model.safetensors").entries
    assert read_json(small_base / "config.json")
    for text in ('{"a": 1}', "[1]", '"BZh"', "  {}", "12"):
        assert what_it_is(text.encode(), text=True) is None


@pytest.mark.parametrize("place", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.model"])
def test_a_pipe_is_not_waited_for(small_base: Path, place: str) -> None:
    if place == "pytorch_model.bin":
        (small_base / "model.safetensors").unlink()
    (small_base / place).unlink(missing_ok=True)
    os.mkfifo(small_base / place)
    assert "this is no regular file" in refusal(small_base)
    assert what_the_file_is(small_base / place) is None
