# SPDX-License-Identifier: Apache-2.0
"""The one writer: whole files or none, nobody else's files, modes kept; and readers that neither hang nor never end."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from killing import killed_everywhere

from cnllama import files
from cnllama.container import read_json
from cnllama.errors import CnllamaError, InputError
from cnllama.files import Output, append, copy_file, write_file, write_json
from cnllama.mapped import WatchedFile
from cnllama.paths import open_regular, read_bytes

LEFTOVER = ".o.cnl.cnllama-12-0123abcd.part"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        ".o.cnl.2024-backup.part", ".o.cnl.2024.part", ".o.cnl.12.part", ".o.cnl.part", "o.cnl.part",
        ".o.cnl.cnllama-12.part", ".o.cnl.cnllama-12-0123abcde.part", ".o.cnl.cnllama-12-0123ABCD.part",
        ".o.cnl.cnllama-x-0123abcd.part", LEFTOVER + ".bak", "my" + LEFTOVER, LEFTOVER[:-1], LEFTOVER + "\n",
        ".p.cnl.cnllama-12-0123abcd.part", ".o.cnl.old.cnllama-12-0123abcd.part", ".o.cnl.gptq", ".o.cnl.rtn",
    ],
)  # fmt: skip
def test_files_of_the_user_are_never_taken_for_leftovers(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    write_file(tmp_path / "o.cnl", b"new")
    assert names(tmp_path) == sorted([name, "o.cnl"])
    assert (tmp_path / name).read_text() == "mine"


@given(st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=40))
def test_only_names_of_the_exact_form_are_temporary(name: str) -> None:
    assert not files.is_temporary(name)
    made = files.temporary_name(Path("/somewhere") / name, "part").name
    assert files.is_temporary(made)
    for other in (made + "x", made[:-1], made.replace(".cnllama-", "-"), made.upper()):
        assert not files.is_temporary(other)


def make_directory_there(path: Path) -> None:
    path.mkdir()
    (path / "photo.jpg").write_text("mine")


@pytest.mark.parametrize(
    "make", [make_directory_there, os.mkfifo, lambda path: path.symlink_to("/etc/passwd")], ids=["dir", "pipe", "link"]
)
def test_what_is_no_file_stays_under_a_name_of_ours(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / LEFTOVER)
    write_file(tmp_path / "o.cnl", b"new")
    assert names(tmp_path) == sorted([LEFTOVER, "o.cnl"])


def test_leftover_is_removed_when_its_process_is_gone(tmp_path: Path) -> None:
    (tmp_path / LEFTOVER).write_bytes(b"half")
    with open(tmp_path / LEFTOVER, "rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        write_file(tmp_path / "o.cnl", b"new")
        assert names(tmp_path) == sorted([LEFTOVER, "o.cnl"])
    write_file(tmp_path / "o.cnl", b"newer")
    assert names(tmp_path) == ["o.cnl"]


def test_lock_of_a_file_that_lost_its_name_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking a leftover, its name goes to a living file."""
    path = tmp_path / LEFTOVER
    path.write_bytes(b"half")
    lock = files.try_lock

    def late(fd: int, wait: bool = False) -> bool | None:
        path.unlink()
        path.write_bytes(b"living")
        return lock(fd, wait)

    monkeypatch.setattr(files, "try_lock", late)
    assert not files.remove_leftover(path)
    assert path.read_bytes() == b"living"


@pytest.mark.parametrize("holding", [False, True], ids=["cleaned before the lock", "cleaner still holds the lock"])
def test_writer_that_meets_a_cleaner_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holding: bool
) -> None:
    """Another process takes the new temporary file for a leftover between the opening and the lock."""
    lock, held = files.try_lock, []

    def late(fd: int, wait: bool = False) -> bool | None:
        monkeypatch.setattr(files, "try_lock", lock)
        (path,) = tmp_path.iterdir()
        if holding:
            held.append(open(path, "rb"))  # noqa: SIM115
            fcntl.flock(held[0], fcntl.LOCK_EX)
            os.unlink(path)
        else:
            assert files.remove_leftover(path)
        return lock(fd, wait)

    monkeypatch.setattr(files, "try_lock", late)
    write_file(tmp_path / "o.cnl", b"whole")
    assert (tmp_path / "o.cnl").read_bytes() == b"whole"
    assert names(tmp_path) == ["o.cnl"]
    for file in held:
        file.close()


def test_many_writers_of_one_name_all_succeed(tmp_path: Path) -> None:
    """Four processes write one name again and again, each cleaning up before it does: none fails, and it is whole."""
    children = []
    for writer in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(60):
                    write_file(tmp_path / "o.cnl", bytes([writer]) * 5000)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert len(set((tmp_path / "o.cnl").read_bytes())) == 1
    assert names(tmp_path) == ["o.cnl"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664, 0o755, 0o200])
def test_replaced_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "o"
    path.write_bytes(b"old")
    path.chmod(mode)
    with Output(path) as output:
        assert stat.S_IMODE(output.temporary.stat().st_mode) == 0o600, "nobody reads it before it is there"
        output.write(b"new", 0)
        output.commit()
    assert stat.S_IMODE(path.stat().st_mode) == mode
    (tmp_path / "made").write_bytes(b"whole")
    files.move(tmp_path / "made", path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0, 0o666)])
def test_new_file_has_the_mode_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_file(tmp_path / "o", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "o").stat().st_mode) == mode


def test_mode_and_owner_are_those_at_the_end(tmp_path: Path) -> None:
    """The file appears, or goes, while the new one is written."""
    path = tmp_path / "o"
    with Output(path) as output:
        path.write_bytes(b"old")
        path.chmod(0o600)
        output.commit()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with Output(path) as output:
        path.unlink()
        output.commit()
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "o"
    path.write_bytes(b"old")
    os.chown(path, 12345, 54321)
    path.chmod(0o640)
    write_file(path, b"new")
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, 54321, 0o640)


def test_links_are_written_through(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    real = tmp_path / "there" / "real"
    real.write_bytes(b"old")
    real.chmod(0o600)
    (tmp_path / "second").symlink_to(real)
    (tmp_path / "first").symlink_to("second")
    write_file(tmp_path / "first", b"new")
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    (tmp_path / "dangling").symlink_to(tmp_path / "there" / "fresh")
    write_file(tmp_path / "dangling", b"new")
    assert (tmp_path / "there" / "fresh").read_bytes() == b"new"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="too many symbolic links"):
        write_file(tmp_path / "loop", b"new")
    assert (tmp_path / "loop").is_symlink()


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)  # of the working directory: a socket's name is short


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


SPECIAL = {"pipe": os.mkfifo, "socket": make_socket, "device": make_device, "directory": Path.mkdir}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_neither_read_nor_written(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x"
    SPECIAL[kind](path)
    readers: list[Callable[[], object]] = [
        lambda: read_json(path), lambda: WatchedFile(path), lambda: open_regular(path), lambda: read_bytes(path, 9),
        lambda: copy_file(path, tmp_path / "y"), lambda: write_file(path, b"new"),
    ]  # fmt: skip
    for use in readers:
        with pytest.raises(InputError, match="directory" if kind == "directory" else "this is no regular file"):
            use()
    assert names(tmp_path) == ["x"]


def test_small_files_have_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"x" * 10)
    assert read_bytes(path, 10) == b"x" * 10
    with pytest.raises(InputError, match=r"config\.json: 10 bytes is too long .* at most 9"):
        read_bytes(path, 9)
    os.truncate(path, 1 << 40)  # a sparse file: nobody reads it to its end
    with pytest.raises(InputError, match="1,099,511,627,776 bytes is too long"):
        read_json(path)


def test_long_names_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "字" * 85):
        write_file(tmp_path / name, b"new")
        (tmp_path / files.temporary_name(tmp_path / name, "part").name).write_bytes(b"half")
        write_file(tmp_path / name, b"newer")
        assert (tmp_path / name).read_bytes() == b"newer"
    assert len(names(tmp_path)) == 2


def test_write_protected_file_is_not_replaced(ordinary_user: Path) -> None:
    path = ordinary_user / "o"
    path.write_bytes(b"kept")
    path.chmod(0o400)
    with pytest.raises(InputError, match="write-protected"):
        write_file(path, b"new")
    assert path.read_bytes() == b"kept"


def test_temporary_file_that_is_taken_away_is_one_sentence(tmp_path: Path) -> None:
    with Output(tmp_path / "o") as output:
        output.temporary.unlink()
        output.temporary.write_bytes(b"something else")
        with pytest.raises(CnllamaError, match="was removed or replaced"):
            output.commit()
    assert names(tmp_path) == [output.temporary.name], "what lies there now is not ours"


def write_large(path: Path) -> None:
    with Output(path) as output:
        output.write(b"a" * 5000, 0)
        output.write(b"b" * 5000, 5000)
        output.commit()


@pytest.mark.parametrize("old", [None, b"old"])
def test_kill_between_any_two_changes_leaves_the_old_file_or_the_new(tmp_path: Path, old: bytes | None) -> None:
    path, source = tmp_path / "out" / "o", tmp_path / "source"
    source.write_bytes(b"copied" * 1000)
    path.parent.mkdir()
    for work, new in (
        (lambda: write_large(path), b"a" * 5000 + b"b" * 5000),
        (lambda: copy_file(source, path), source.read_bytes()),
        (lambda: write_json(path, {"值": 1}), '{\n  "值": 1\n}\n'.encode()),
    ):
        points = 0
        if old is not None:
            path.write_bytes(old)
            path.chmod(0o600)
        for _ in killed_everywhere(work):
            points += 1
            found = path.read_bytes() if path.exists() else None
            assert found in (old, new)
            assert {name for name in names(path.parent) if not files.is_temporary(name)} <= {"o"}
            if found is not None and old is not None:
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
            if found != old:
                path.unlink()
                if old is not None:
                    path.write_bytes(old)
                    path.chmod(0o600)
        assert points >= 4
        assert path.read_bytes() == new, "the last child came to its end"
        assert names(path.parent) == ["o"], "and removed what the ones before it left"
        path.unlink()


def test_file_that_grows(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"one\n")
    append(path, b"two\n")
    assert path.read_bytes() == b"one\ntwo\n"
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="this is a directory"):
        append(path, b"three\n")


def test_directories_are_made_and_removed(tmp_path: Path) -> None:
    assert files.make_directory(tmp_path / "a" / "b") == [tmp_path / "a", tmp_path / "a" / "b"]
    assert files.make_directory(tmp_path / "a" / "b") == []
    assert not files.remove_directory(tmp_path / "a"), "it is not empty"
    write_file(tmp_path / "a" / "file", b"")
    with pytest.raises(InputError, match="this is a file, not a directory"):
        files.make_directory(tmp_path / "a" / "file" / "c")


def test_file_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files, "_operation", lambda kind, path: done.append(kind))
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(f"fsync {stat.S_ISDIR(os.fstat(fd).st_mode)}"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write_file(tmp_path / "o", b"new")
    assert done == ["create", "write", "fsync", "fsync False", "rename", "replace", "fsync True"]
