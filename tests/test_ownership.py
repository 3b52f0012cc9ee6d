# SPDX-License-Identifier: Apache-2.0
"""Directories that cnllama fills: only what it wrote is removed or overwritten, whatever happened in between."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from killing import killed_everywhere

from cnllama import files
from cnllama.errors import CnllamaError, InputError
from cnllama.files import append, write_file, write_json
from cnllama.ownership import RECORD, OwnedDirectory
from cnllama.scratch import scratch_beside

SCRATCH = re.compile(r"part(/(weights|state/.+|state))?")
NAMES = st.sampled_from(["a", "b", "log", "model.safetensors", "part-1", "part-2"])


def open_owned(path: Path, **options: Any) -> OwnedDirectory:
    return OwnedDirectory(path, "test", scratch=SCRATCH, **options)


def tree(path: Path) -> dict[str, bytes | None]:
    """Relative name -> contents of everything, None for directories, without our record."""
    found = {p.relative_to(path).as_posix(): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}
    return {n: data for n, data in found.items() if n != RECORD and not files.is_temporary(n)}


class Interference(RuleBasedStateMachine):
    """We write, grow, publish and remove; somebody else edits, replaces, adds and deletes beside it, in any order.

    What is foreign is never lost, and what is ours can always be removed once nothing foreign is in the way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="owned-"))
        self.out = self.place / "out"
        self.foreign: dict[str, bytes] = {}
        self.count = 0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda _: None)  # most of the time of thousands of small writes

    def teardown(self) -> None:
        self.patch.undo()
        shutil.rmtree(self.place)

    def fresh(self) -> bytes:
        self.count += 1
        return b'{"step": %d}\n' % self.count + bytes(self.count % 7)

    @rule(name=NAMES)
    def we_write(self, name: str) -> None:
        refused = self.refusal(lambda: self.write(name))
        assert not refused or (name in refused and (self.foreign or (self.out / name).is_dir()))

    def write(self, name: str) -> None:
        with open_owned(self.out):
            write_file(self.out / name, self.fresh())

    def refusal(self, work: Callable[[], None]) -> str:
        """The sentence with which work was refused; empty when it was done."""
        try:
            work()
        except InputError as error:
            return str(error)
        return ""

    @rule()
    def we_log(self) -> None:
        assert not self.refusal(self.log) or self.foreign

    def log(self) -> None:
        with open_owned(self.out) as own:
            write_file(self.out / "log", b"")
            own.let_grow("log")
            for step in range(3):
                append(self.out / "log", json.dumps({"step": step}).encode() + b"\n")

    @rule(name=st.sampled_from(["part-1", "part-2"]))
    def we_publish(self, name: str) -> None:
        refused = self.refusal(lambda: self.publish(name))
        assert not refused or name in refused

    def publish(self, name: str) -> None:
        with open_owned(self.out) as own:
            source = own.make_scratch() / "part"
            (source / "state").mkdir(parents=True)
            (source / "weights").write_bytes(self.fresh())
            (source / "state" / "x").write_bytes(self.fresh())
            own.publish(source, name)

    @rule(name=NAMES)
    def we_remove(self, name: str) -> None:
        before = self.without_scratch()
        if self.refusal(lambda: self.remove(name)):
            assert self.without_scratch() == before, "a refusal touches nothing"

    def without_scratch(self) -> dict[str, bytes | None]:
        """The tree without our scratch, which goes with any exception."""
        return {n: data for n, data in tree(self.out).items() if n.split("/")[0] != OwnedDirectory.SCRATCH}

    def remove(self, name: str) -> None:
        with open_owned(self.out) as own:
            own.remove(name)

    @rule()
    def we_clear(self) -> None:
        before = self.without_scratch()
        refused = self.refusal(self.clear)
        in_the_way = {*self.foreign, *(["sub"] if (self.out / "sub").exists() else [])}
        assert bool(refused) == bool(in_the_way)
        assert not refused or any(name.split("/")[0] in refused for name in in_the_way)
        assert self.without_scratch() == before if refused else not tree(self.out)

    def clear(self) -> None:
        with open_owned(self.out) as own:
            own.clear()

    @precondition(lambda self: self.out.exists())
    @rule(name=st.sampled_from(["a", "photo.jpg", "part-1/photo.jpg", "part-3", "log", "sub/photo.jpg"]))
    def somebody_writes(self, name: str) -> None:
        path = self.out / name
        if path.is_dir() or not path.parent.exists() or path.parent.is_file():
            if name.startswith("sub") and not path.parent.exists():
                path.parent.mkdir()
            else:
                return
        data = b"mine " + self.fresh()
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        self.foreign[name] = data

    @precondition(lambda self: self.out.exists())
    @rule(name=NAMES)
    def somebody_edits(self, name: str) -> None:
        path = self.out / name
        if path.is_file():
            data = path.read_bytes() + b"my notes\n"
            path.write_bytes(data)
            self.foreign[name] = data

    @precondition(lambda self: self.out.exists())
    @rule(data=st.data())
    def somebody_deletes(self, data: st.DataObject) -> None:
        there = sorted(name for name, held in tree(self.out).items() if held is not None)
        if there:
            (self.out / data.draw(st.sampled_from(there))).unlink()
            self.foreign = {name: held for name, held in self.foreign.items() if os.path.lexists(self.out / name)}

    @rule()
    def process_leaves_a_temporary_file(self) -> None:
        if self.out.exists():
            (self.out / ".a.cnllama-1-00000000.part").write_bytes(b"half")

    @invariant()
    def nothing_foreign_is_lost(self) -> None:
        for name, data in self.foreign.items():
            assert (self.out / name).read_bytes() == data, name


Interference.TestCase.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
test_foreign_files_survive_anything = Interference.TestCase


def work(out: Path, source: Path) -> None:
    """Everything a run does to its directory, in a new one, in a half one or in a finished one."""
    with OwnedDirectory(out, "test", scratch=SCRATCH) as own:
        own.set_key({"input": 1})
        for name in ("part-1", "part-2"):
            if name in own.directories():
                own.remove(name)
            scratch = own.make_scratch() / "part"
            shutil.copytree(source, scratch)
            own.publish(scratch, name)
        write_file(out / "log", b"")
        own.let_grow("log")
        append(out / "log", b'{"step": 1}\n')
        own.settle("log")
        write_json(out / "result.json", {"a": 1})
        own.remove("part-1")
        own.remove(own.SCRATCH)


def test_kill_at_any_point_leaves_what_can_be_gone_on_with_and_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "state").mkdir(parents=True)
    (source / "weights").write_bytes(b"w" * 100)
    (source / "state" / "x").write_bytes(b"x")
    out.mkdir()
    (out / "photo.jpg").write_bytes(b"mine")
    points = 0
    for _ in killed_everywhere(lambda: work(out, source)):
        points += 1
        copy = shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copy2)
        with open_owned(copy) as own:
            assert own.strangers() == ["photo.jpg"]
            assert (copy / "photo.jpg").read_bytes() == b"mine"
            (copy / "photo.jpg").unlink()
            own.clear()
            assert tree(copy) == {}
        shutil.rmtree(copy)
    assert points > 50
    assert tree(out) == {
        "log": b'{"step": 1}\n', "result.json": b'{\n  "a": 1\n}\n', "part-2": None, "part-2/state": None,
        "part-2/state/x": b"x", "part-2/weights": b"w" * 100, "photo.jpg": b"mine",
    }  # fmt: skip


def test_clearing_can_be_killed_and_removes_the_last_file_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_bytes(b"w")
    work(out, source)
    sizes = []

    def clear() -> None:
        with open_owned(out) as own:
            own.clear()

    for _ in killed_everywhere(clear):
        there = set(tree(out))
        sizes.append(len(there))
        assert "result.json" not in there or len(there) == 4, "what says that it is complete goes first"
    assert sizes == sorted(sizes, reverse=True)
    assert tree(out) == {}


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_tree(path: Path) -> None:
    path.mkdir()
    (path / "photo.jpg").write_text("mine")


def make_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("make", [make_file, make_tree, make_link, os.mkfifo])
@pytest.mark.parametrize("options", [{"names": ["model"]}, {"alone": True}])
def test_what_is_in_the_way_is_refused_before_anything_is_touched(
    tmp_path: Path, make: Callable[[Path], Any], options: dict[str, Any]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    make(out / "model")
    before = os.stat(out).st_mtime_ns
    with pytest.raises(InputError, match="model: cnllama did not write this"), open_owned(out, **options):
        pytest.fail("it was opened")
    assert os.stat(out).st_mtime_ns == before
    assert [path.name for path in out.iterdir()] == ["model"]


def test_link_in_place_of_a_directory_is_not_followed(tmp_path: Path) -> None:
    """A part of ours moved elsewhere with a link to it: what is there is not ours to remove."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "weights").write_bytes(b"w")
    work(out, source)
    shutil.move(out / "part-2", tmp_path / "elsewhere")
    (out / "part-2").symlink_to(tmp_path / "elsewhere")
    with open_owned(out) as own:
        with pytest.raises(InputError, match="part-2"):
            own.clear()
        with pytest.raises(InputError, match="part-2"):
            own.remove("part-2")
    assert (tmp_path / "elsewhere" / "weights").exists()


def test_directory_without_any_result_is_not_left_behind(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "photo.jpg").write_text("mine")
    for out in (tmp_path / "new" / "deep", tmp_path / "there"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["photo.jpg", "there"]


def interrupted(out: Path) -> None:
    with open_owned(out) as own:
        own.set_key({"input": 1})
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "record",
    [
        {}, {"format": "other"}, {"files": []}, {"files": {"../x": [[1, 1]]}}, {"files": {"/etc/passwd": [[1, 1]]}},
        {"files": {"a/../../x": [[1, 1]]}}, {"files": {"": []}}, {"files": {"a\0": []}}, {"files": {"a": 1}},
        {"files": {"a": [1]}}, {"files": {"a": [[1]]}}, {"files": {"a": [[{}, 1]]}},
        {"files": {"a": [[1, "x"]]}}, {"directories": {}}, {"directories": [".."]},
        {"directories": [1]}, {"version": 99},
    ],
)  # fmt: skip
def test_record_of_a_stranger_is_read_with_suspicion(tmp_path: Path, record: dict[str, Any]) -> None:
    sound = {"format": "cnllama-directory", "version": 1, "made_by": "x", "files": {}, "directories": []}
    (tmp_path / RECORD).write_text(json.dumps(sound | record if record else record))
    with pytest.raises(InputError, match="no record of a cnllama directory"), open_owned(tmp_path):
        pytest.fail("it was opened")
    assert (tmp_path / RECORD).exists()


def test_record_that_is_a_pipe_or_damaged_is_one_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RECORD)
    with pytest.raises(InputError, match="no regular file"), open_owned(tmp_path):
        pytest.fail("it was opened")
    (tmp_path / RECORD).unlink()
    (tmp_path / RECORD).write_text('{"format": "cnll')
    with pytest.raises(InputError, match="not valid JSON"), open_owned(tmp_path):
        pytest.fail("it was opened")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with open_owned(tmp_path / "out"):
        with pytest.raises(CnllamaError, match="another cnllama works in this directory"), open_owned(tmp_path / "out"):
            pytest.fail("it was opened twice")
        assert (tmp_path / "out" / RECORD).exists()
    with open_owned(tmp_path / "out") as own:
        own.set_key({"now": "free"})


def test_waiting_for_the_other_process(tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with open_owned(tmp_path / "out"):
            write_file(tmp_path / "out" / "a", b"child")
            os.write(write, b"x")
            while len(list(tmp_path.glob("go"))) == 0:
                pass
        os._exit(0)
    os.read(read, 1)
    (tmp_path / "go").touch()
    with open_owned(tmp_path / "out", wait=True) as own:
        assert own.is_ours("a")
    os.waitpid(child, 0)


def test_program_that_writes_by_itself(tmp_path: Path) -> None:
    """What it made or changed is ours; what was there before and stayed the same is not."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "photo.jpg").write_text("mine")
    (out / "sub").mkdir()
    (out / "sub" / "mine").write_text("mine")
    with open_owned(out) as own:
        before = own.snapshot()
    (out / "made" / "deep").mkdir(parents=True)
    (out / "made" / "deep" / "x").write_text("made")
    (out / "sub" / "also").write_text("made")
    with open_owned(out) as own:
        own.adopt(before)
        assert own.strangers() == ["photo.jpg", "sub"]
        assert {name for name in own.names() if own.is_ours(name)} == {"made/deep/x", "sub/also"}
        with pytest.raises(InputError, match=r"photo\.jpg"):
            own.clear()


def test_scratch_beside_a_file_goes_with_what_was_made_in_it(tmp_path: Path) -> None:
    target = tmp_path / "x.cnl"
    dead = files.temporary_name(target, "scratch")
    with OwnedDirectory(dead, "scratch"):
        write_file(dead / "half", b"1")
    strange = files.temporary_name(target, "scratch")
    make_tree(strange)
    user = tmp_path / ".x.cnl.rtn"
    user.write_text("mine")
    with scratch_beside(target) as first:
        write_file(first / "model", b"1")
        with scratch_beside(target) as second:
            assert first.exists()
            assert first != second
        files.move(first / "model", target)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([user.name, strange.name, "x.cnl"])
    assert (strange / "photo.jpg").exists()


def test_directory_without_permission_is_found_out_at_once(ordinary_user: Path) -> None:
    closed = ordinary_user / "closed"
    closed.mkdir(mode=0o500)
    for out in (closed, closed / "out"):
        with pytest.raises(InputError, match=r"closed.*: no permission"), open_owned(out):
            pytest.fail("it was opened")
    assert list(closed.iterdir()) == []
