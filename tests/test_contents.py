# SPDX-License-Identifier: Apache-2.0
"""Hashes of contents: always right, remembered for large files, never beside the user's, whatever the cache holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnllama import contents
from cnllama.contents import cache_directory, content_key, deciding_files, file_sha256
from cnllama.errors import InputError

LARGE = contents._SMALL + 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's file, in a place of its own; files count as old from the first moment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "_YOUNG_NS", -1)
    return tmp_path / "cache" / "cnllama" / "hashes"


def large(path: Path, fill: bytes = b"a") -> Path:
    path.write_bytes(fill * LARGE)
    return path


def right(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bytes_read(path: Path) -> int:
    """How many pieces were read: one call for a remembered file."""
    calls: list[int] = []
    assert file_sha256(path, calls.append) == right(path)
    assert sum(calls) == path.stat().st_size
    return len(calls)


def test_large_file_is_read_once(tmp_path: Path, cache: Path) -> None:
    path = large(tmp_path / "weights")
    assert bytes_read(path) == 2
    assert bytes_read(path) == 1
    moved = path.rename(tmp_path / "elsewhere")
    os.utime(moved)  # a rename alone changes the inode's time
    assert bytes_read(moved) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "elsewhere"]


def change_in_place(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"b")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_it(path: Path) -> None:
    before = path.stat()
    large(path.with_name("new"), b"b").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_with_another(path: Path) -> None:
    other = large(path.with_name("other"), b"b")
    file_sha256(other)
    path.rename(path.with_name("third"))
    other.rename(path)


@pytest.mark.parametrize("change", [change_in_place, replace_it, swap_with_another])
def test_other_contents_of_the_same_size_and_time_are_noticed(
    tmp_path: Path, cache: Path, change: Callable[[Path], None]
) -> None:
    path = large(tmp_path / "weights")
    before = file_sha256(path)
    assert file_sha256(path) == before
    change(path)
    assert file_sha256(path) == right(path) != before


def test_file_that_may_change_within_the_tick_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = large(tmp_path / "weights")
    for _ in range(2):
        assert bytes_read(path) == 2
    assert not (tmp_path / "cache").exists()


def test_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path, cache: Path) -> None:
    path = large(tmp_path / "weights")
    file_sha256(path, lambda _: change_in_place(path))
    assert bytes_read(path) == 2


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_cache_is_as_good_as_none(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut, extended, with bytes changed, or of another kind altogether: hashes are right, and the cache works again."""
    place = tmp_path_factory.mktemp("damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.setattr(contents, "_YOUNG_NS", -1)
        patch.setattr(contents, "_SMALL", 1)
        path = place / "weights"
        path.write_bytes(b"weights")
        file_sha256(path)
        cache = place / "cache" / "cnllama" / "hashes"
        good = cache.read_bytes()
        at = data.draw(st.integers(0, len(good) - 1))
        kind = data.draw(st.sampled_from(["cut", "changed", "other"]))
        if kind == "cut":
            cache.write_bytes(good[:at])
        elif kind == "changed":
            cache.write_bytes(good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :])
        else:
            cache.write_bytes(data.draw(st.binary(max_size=300)))
        assert bytes_read(path) >= 1
        assert bytes_read(path) == 1


def test_values_of_wrong_types_in_a_whole_cache_are_passed_over(tmp_path: Path, cache: Path) -> None:
    path = large(tmp_path / "weights")
    sha = "0" * 64
    for row in (
        '{"a": 1}',
        f'[[1, 2, 3, 4, 5, "{sha}"], 7, [true, 2, 3, 4, 5, "{sha}"], [1, 2, 3, 4, 5, "x"]]',
        "[[]]",
    ):
        data = row.encode()
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
        assert file_sha256(path) == right(path)


def make_file(place: Path) -> None:
    place.write_text("in the way")


def make_pipe(place: Path) -> None:
    (place / "cnllama").mkdir(parents=True)
    os.mkfifo(place / "cnllama" / "hashes")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [make_file, make_pipe])
def test_it_works_without_a_cache(tmp_path: Path, cache: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "cache")
    for _ in range(2):
        assert bytes_read(large(tmp_path / "weights")) == 2


def test_place_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "cnllama"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # by the XDG rules this counts as none
    assert cache_directory() == tmp_path / ".cache" / "cnllama"
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    assert cache_directory() is None, "a home that is not there is not made"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "cnllama"


def test_cache_keeps_the_newest(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_SMALL", 1)
    monkeypatch.setattr(contents, "_ENTRIES", 4)
    paths = [tmp_path / f"file{i}" for i in range(7)]
    for i, path in enumerate(paths):
        path.write_bytes(b"data %d" % i)
        file_sha256(path)
    assert [bytes_read(path) for path in paths[3:]] == [1] * 4
    assert len(contents._cache._read()) == 4


def test_many_processes_share_the_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_SMALL", 1)
    for i in range(12):
        (tmp_path / f"file{i}").write_bytes(b"data %d" % i)
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(5):
                    for i in range(12):
                        path = tmp_path / f"file{i}"
                        assert file_sha256(path) == right(path)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert contents._cache._read(), "the file is whole"
    assert [path.name for path in cache.parent.iterdir()] == ["hashes"]


def test_what_decides_of_a_directory(tmp_path: Path) -> None:
    model = {
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors", "odd name.safetensors",
        "model.safetensors.index.json", "tokenizer.model", "added_tokens.json", "pytorch_model.bin",
        "adapter_config.json", "chat_template.jinja",
    }  # fmt: skip
    aside = {"log.jsonl", "run.json", "result.json", "loss.png", "training_args.bin", "optimizer.bin", "README.md"}
    for name in model | aside:
        (tmp_path / name).write_text(name)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "config.json").write_text("{}")
    assert set(deciding_files(tmp_path)) == model
    before = content_key([tmp_path])
    (tmp_path / "log.jsonl").write_text("later")
    assert content_key([tmp_path]) == before
    (tmp_path / "added_tokens.json").write_text("later")
    assert content_key([tmp_path]) != before


def test_key_of_files_and_data_directories(tmp_path: Path) -> None:
    a, b, data = tmp_path / "a", tmp_path / "b", tmp_path / "data"
    a.write_text("1")
    b.write_text("2")
    (data / "dev").mkdir(parents=True)
    (data / "dev" / "law.csv").write_text("x")
    keys = [content_key(paths) for paths in ([a], [b], [a, b], [b, a], [data], [a, a])]
    assert len(set(keys)) == len(keys)
    assert content_key([a.rename(tmp_path / "moved")]) == keys[0]
    (data / "dev" / "law.csv").write_text("y")
    assert content_key([data]) != keys[4]
    with pytest.raises(InputError, match="no such file"):
        content_key([tmp_path / "nowhere"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        content_key([tmp_path / "pipe"])
