# SPDX-License-Identifier: Apache-2.0
"""Training, merging and recipes among files of other people: refused by name or left alone, and rerun after a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapt_data
import pytest
from killing import killed_everywhere

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("transformers", reason="training needs transformers")
pytest.importorskip("peft", reason="training needs peft")

from test_adapt_pipeline import inside  # noqa: E402

TRAIN = ("--block-size", 48, "--batch-size", 2, "--max-steps", 3, "--eval-every", 0, "--save-every", 1, "--keep", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapt_data.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return adapt_data.small_base(tmp_path_factory.mktemp("base"), data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train(base, data, out)
    return out


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "out", copy_function=shutil.copy2)


def train(base: Path, data: Path, out: Path, *more: object, expect: int = 0) -> str:
    words = ["adapt", "pretrain", base, "-o", out, "--data", data / "zh.txt", "--cache", data / "tokens", *TRAIN]
    return inside(*words, *more, expect=expect)


def snapshot(path: Path) -> dict[str, Any]:
    return {
        p.relative_to(path).as_posix(): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in path.rglob("*")
    }


def add_file(out: Path) -> str:
    (out / "photo.jpg").write_bytes(b"mine")
    return "photo.jpg"


def add_tree(out: Path) -> str:
    (out / "models" / "deep").mkdir(parents=True)
    (out / "models" / "deep" / "model.safetensors").write_bytes(b"mine")
    return "models"


def add_link(out: Path) -> str:
    (out / "link").symlink_to(out.parent)
    return "link"


def edit(out: Path) -> str:
    with (out / "adapter_config.json").open("a") as file:
        file.write("\n")
    return "adapter_config.json"


def write_notes(out: Path) -> str:
    with (out / "log.jsonl").open("a") as file:
        file.write("this run went well\n")
    return "log.jsonl"


def lose_the_record(out: Path) -> str:
    (out / ".cnllama.json").unlink()
    return "run.json"


@pytest.mark.parametrize("change", [add_file, add_tree, add_link, edit, write_notes, lose_the_record])
def test_restart_removes_only_what_a_run_wrote(
    base: Path, data: Path, finished: Path, change: Callable[[Path], str]
) -> None:
    name = change(finished)
    before = snapshot(finished)
    message = train(base, data, finished, "--restart", expect=2)
    assert f"{finished / name}" in message
    assert "cnllama did not write this" in message
    assert snapshot(finished) == before


def test_restart_begins_again_where_all_is_ours(base: Path, data: Path, finished: Path) -> None:
    train(base, data, finished, "--restart", "--rank", 4)
    assert json.loads((finished / "adapter_config.json").read_text())["r"] == 4
    before = snapshot(finished)
    assert "had trained rank 4, this one has 5" in train(base, data, finished, "--rank", 5, expect=2)
    message = train(base, data / "nothing", finished, "--restart", expect=2)
    assert "zh.txt: there is no such file" in message
    assert snapshot(finished) == before, "what cannot be begun again is not removed"


@pytest.mark.parametrize(
    "name",
    ["run.json", "log.jsonl", "loss.png", "result.json", "bad_batch.json", "adapter_config.json", "tokenizer.model",
     "adapter_model.safetensors"],
)  # fmt: skip
def test_files_of_a_name_that_training_needs_are_refused_at_once(
    base: Path, data: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnllama.adapt.stage.described", lambda _: pytest.fail("it was at work"))
    (tmp_path / name).write_bytes(b"mine")
    assert f"{tmp_path / name}: cnllama did not write this" in train(base, data, tmp_path, expect=2)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"mine"


def test_files_that_training_does_not_need_stay(base: Path, data: Path, tmp_path: Path) -> None:
    """Also a directory called like a checkpoint: it is not gone on from, not replaced and not removed."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-99" / "complete.json").write_text('{"step": 99, "files": {}}')
    train(base, data, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint-99" / "complete.json").exists()
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 3


def test_checkpoint_with_something_foreign_in_it_stays(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cnllama.adapt.checkpoints import Checkpoints

    save = Checkpoints.on_save

    def and_a_photo(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        save(self, args, state, control, **more)
        if state.global_step == 1:
            (tmp_path / "checkpoint-1" / "photo.jpg").write_text("mine")

    monkeypatch.setattr(Checkpoints, "on_save", and_a_photo)
    message = train(base, data, tmp_path)
    assert "a checkpoint stays" in message
    assert (tmp_path / "checkpoint-1" / "photo.jpg").read_text() == "mine"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("verb", ["merge", "create", "resize"])
def test_directories_that_are_filled_whole_hold_nothing_else(
    base: Path, trained: Path, tmp_path: Path, verb: str
) -> None:
    out = tmp_path / "out"
    words = {
        "merge": [base, "--lora", trained], "create": [base, "--hidden-size", 32, "--heads", 2, "--layers", 1],
        "resize": [base, base, "--pad-to-multiple", 1000],
    }[verb]  # fmt: skip
    out.mkdir()
    (out / "README.md").write_text("mine")
    before = snapshot(tmp_path)
    assert "README.md: cnllama did not write this" in inside("adapt", verb, *words, "-o", out, expect=2)
    assert snapshot(tmp_path) == before
    (out / "README.md").unlink()
    inside("adapt", verb, *words, "-o", out)
    assert (out / "config.json").exists()


def files_of(out: Path) -> dict[str, bytes]:
    """All but times: the record has them, and so do the names of temporary files."""
    return {
        p.relative_to(out).as_posix(): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.name != ".cnllama.json"
    }


def killed_and_rerun(words: list[object], out: Path, step: int) -> Iterator[int]:
    """A child of this process for each change of the disk; after the last one, the result."""

    def work() -> None:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            inside(*words, "-o", out)

    yield from killed_everywhere(work, step=step)


@pytest.mark.parametrize("verb", ["tokenizer merge", "merge", "create", "resize"])
def test_kill_between_any_two_changes_and_the_same_command_again(
    base: Path, trained: Path, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half file under a final name, and in the end the bytes of a run that was never killed."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    words: dict[str, list[object]] = {
        "tokenizer merge": ["tokenizer", "merge", base / "tokenizer.model", base / "tokenizer.model"],
        "merge": ["adapt", "merge", base, "--lora", trained],
        "create": ["adapt", "create", base, "--hidden-size", 32, "--heads", 2, "--layers", 1],
        "resize": ["adapt", "resize", base, base, "--pad-to-multiple", 1000],
    }
    inside(*words[verb], "-o", tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    last = "tokenizer.model" if verb.startswith("tokenizer") else "config.json"
    points = 0
    step = 1 if verb.startswith("tokenizer") else 3
    for number in killed_and_rerun(words[verb], tmp_path / "out", step):
        points += 1
        there = files_of(tmp_path / "out") if (tmp_path / "out").exists() else {}
        final = {name: held for name, held in there.items() if "cnllama-" not in name}
        assert all(whole[name] == held for name, held in final.items()), number
        assert last not in final or set(final) == set(whole), "the last file says that all are there"
    assert points > 15
    assert files_of(tmp_path / "out") == whole
    assert (tmp_path / "out" / ".cnllama.json").exists()


def without_times(held: dict[str, bytes]) -> dict[str, bytes]:
    return {name: re.sub(rb'"seconds": [0-9.]+', b"", data) for name, data in held.items()}


@pytest.mark.parametrize("mode", [(), ("--full",)], ids=["adapter", "full"])
def test_killed_training_ends_with_the_same_bytes(
    base: Path, data: Path, tmp_path: Path, mode: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at every 37th change of the disk, gone on with each time: all files are those of a run without kills."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    words: list[object] = ["adapt", "pretrain", base, "--data", data / "zh.txt", "--cache", data / "tokens", *TRAIN]
    words += ["--eval", data / "zh_eval.txt", "--max-steps", 7, "--log-every", 3, "--grad-accum", 2, *mode]
    inside(*words, "-o", tmp_path / "whole")
    points = list(killed_and_rerun(words, tmp_path / "out", 37))
    assert len(points) > 2
    assert without_times(files_of(tmp_path / "out")) == without_times(files_of(tmp_path / "whole"))


def test_half_result_of_other_files_is_begun_anew(
    base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge into many shards was killed; into one, nothing of them stays."""
    words = ["adapt", "merge", base, "--lora", trained, "-o", tmp_path / "out"]

    def merge_many() -> None:
        monkeypatch.setattr("cnllama.adapt.merge._SHARD_BYTES", 50_000)
        inside(*words)

    at = next(n for n in killed_everywhere(merge_many, step=40) if n == 40)
    assert at == 40
    assert list((tmp_path / "out").glob("model-*-of-*.safetensors"))
    inside(*words)
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_checkpoint_that_lost_a_file_is_removed_and_made_again(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cnllama.adapt.train._finish", interrupt)
        train(base, data, tmp_path, "--keep", 2, expect=130)
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    assert "going on from step 2 of 3" in train(base, data, tmp_path, "--keep", 2)
    assert not list(tmp_path.glob("checkpoint-*"))
