# SPDX-License-Identifier: Apache-2.0
"""Whatever is given as a path, the answer is sound or one sentence; nothing asks a disk beside cnllama/paths.py."""

from __future__ import annotations

import ast
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cnllama import contents, files, paths
from cnllama.cli.main import main
from cnllama.container import SafetensorsFile, read_json
from cnllama.errors import CnllamaError, InputError, printable
from cnllama.eval.gguf_header import read_gguf
from cnllama.eval.inputs import check_text_file
from cnllama.format import open_cnl
from cnllama.ownership import OwnedDirectory
from cnllama.signatures import what_the_file_is
from cnllama.space import free_bytes
from cnllama.textio import read_text_file

ROOT = Path(__file__).resolve().parent.parent
# Methods that take some errors for "no" and raise others, depending on the version of Python.
PROBES = {"exists", "is_dir", "is_file", "samefile", "resolve"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").write_bytes(b"x")
    (folder / "directory").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nothing")
    os.mkfifo(folder / "pipe")
    return folder


def test_nothing_asks_a_disk_by_other_means() -> None:
    found = []
    for file in [*ROOT.glob("cnllama/**/*.py"), *ROOT.glob("convert/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            entry = any(keyword.arg == "follow_symlinks" for keyword in node.keywords)  # of os.scandir
            real = ast.unparse(node.func) == "os.path.realpath" and file.name != "paths.py"
            if (node.func.attr in PROBES and not entry) or real:
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not found


READERS: dict[str, Callable[[Path], Any]] = {
    "status": paths.status,
    "exists": paths.exists,
    "is_dir": paths.is_dir,
    "is_file": paths.is_file,
    "is_link": paths.is_link,
    "is_own_dir": paths.is_own_dir,
    "real_path": paths.real_path,
    "names_in": paths.names_in,
    "same_file": lambda path: paths.same_file(path, path),
    "open_regular": lambda path: paths.open_regular(path).close(),
    "read_bytes": lambda path: paths.read_bytes(path, 100),
    "check_place": files.check_place,
    "read_text_file": read_text_file,
    "check_text_file": lambda path: check_text_file(path, "a text"),
    "read_json": read_json,
    "read_gguf": read_gguf,
    "what_the_file_is": what_the_file_is,
    "safetensors": SafetensorsFile,
    "open_cnl": open_cnl,
    "contents": contents.contents,
    "free_bytes": free_bytes,
    "owned": lambda path: OwnedDirectory(path, "x").read(),
}

NAMES = st.one_of(
    st.text(st.characters(), max_size=30),
    st.sampled_from(["file", "directory", "loop", "gone", "pipe", "file/x", "loop/x", "gone/x", "", ".", "/"]),
    st.builds(lambda c, n: c * n, st.sampled_from(["x", "中", "a/"]), st.sampled_from([100, 300, 5000])),
)


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@example("a\0b")
@example("\ud800")
@example("\udcff")
@example("loop")
@example("x" * 300)
@given(NAMES)
def test_every_reader_answers_or_says_one_sentence(place: Path, reader: str, name: str) -> None:
    path = place / name
    if not str(path).startswith(str(place)):
        return
    try:
        READERS[reader](path)
    except CnllamaError as error:
        text = str(error)
        assert printable(text) == text
        assert len(text) < 1600
        assert printable(str(path))[:300] in text


def test_what_is_there_and_what_is_not(place: Path) -> None:
    asked = ("file", "directory", "gone", "nothing", "file/x", "pipe")
    found = {n: (paths.exists(place / n), paths.is_dir(place / n), paths.is_file(place / n)) for n in asked}
    assert found == {
        "file": (True, False, True),
        "directory": (True, True, False),
        "gone": (False, False, False),
        "nothing": (False, False, False),
        "file/x": (False, False, False),
        "pipe": (True, False, False),
    }
    assert paths.same_file(place / "file", place / "directory" / ".." / "file")
    assert not paths.same_file(place / "file", place / "nothing")


@pytest.mark.parametrize("ask", [paths.exists, paths.is_dir, paths.is_file])
def test_what_cannot_be_told_is_refused_and_never_no(
    ask: Callable[[Path], bool], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, said in (("loop", "symbolic links"), ("x" * 300, "too long"), ("a\0b", "NUL"), ("\ud800", "utf-8")):
        with pytest.raises(InputError, match=said):
            ask(place / name)

    def refuse(path: Any, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(InputError, match="no permission"):
        ask(Path("closed/x"))


BAD = {
    "loop": "loop",
    "long": "x" * 300,
    "longer": "y/" * 4000,
    "NUL": "a\0b",
    "half": "\ud800",
    "none": "",
    "lines": "a\nb",
}
LINES = {
    "info": ["info"],
    "run": ["run", "-p", "a"],
    "file": ["run", "-m", "{cnl}", "-f"],
    "verify": ["verify", "{cnl}", "--against"],
    "plan": ["plan"],
    "export": ["export", "{cnl}", "-o"],
    "convert": ["convert", "-o", "new.cnl"],
    "lora": ["convert", "{llama}", "-o", "new.cnl", "--lora"],
    "tokenizer": ["convert", "{llama}", "-o", "new.cnl", "--tokenizer"],
    "output": ["convert", "{llama}", "-o"],
    "ppl": ["eval", "ppl", "{cnl}"],
    "ceval": ["eval", "ceval", "{cnl}", "--data"],
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("line", LINES)
def test_every_command_says_one_sentence(
    line: str,
    bad: str,
    tiny_cnl: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if (line, bad) in {("output", "lines"), ("export", "lines")}:
        pytest.skip("a file may be called that")
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    words = [word.format(cnl=tiny_cnl, llama=tiny_llama) for word in LINES[line]]
    assert main([*words, BAD[bad]]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("cnllama: ")
    assert said.isprintable()
    assert "[Errno" not in said
    assert "bug" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop"]


def test_a_pipe_that_something_writes_into_is_read_and_another_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="nothing writes into this pipe"):
        read_text_file(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY)
    text = "春天来了。" * 20_000

    def write() -> None:
        with os.fdopen(writer, "wb") as file:
            file.write(text.encode())

    thread = threading.Thread(target=write)
    thread.start()
    assert read_text_file(pipe) == text
    thread.join()
    os.close(reader)  # not before: without a reader the writer would end with an error


def test_what_has_no_end_is_refused() -> None:
    with pytest.raises(InputError, match="more than 1 MiB"):
        read_text_file("/dev/zero", 1 << 20)
