# SPDX-License-Identifier: Apache-2.0
"""Recipes among files of other people, and stages that are kept only for the same input."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import adapt_data
import pytest

pytest.importorskip("transformers", reason="recipes need the training libraries")
pytest.importorskip("peft", reason="recipes need the training libraries")

from test_adapt_owned import snapshot
from test_adapt_pipeline import inside

RECIPE = """
[[stage]]
name = "made"
do = "script"
file = "${recipe}/make.py"
text = "${data}/zh.txt"

[[stage]]
name = "words"
do = "tokenizer train"
files = ["${made}/lines.txt"]
vocab_size = 400
hard_vocab_limit = false

[[stage]]
name = "base"
do = "adapt create"
tokenizer = "${words}"
hidden_size = 32
intermediate_size = 64
layers = 1
heads = 2

[[stage]]
name = "packed"
do = "convert"
base = "${base}"
quantizer = "rtn"
output = "x.cnl"
"""
SCRIPT = """
import argparse, pathlib
from helper import name
parser = argparse.ArgumentParser()
parser.add_argument("--text", type=pathlib.Path)
parser.add_argument("-o", type=pathlib.Path)
args = parser.parse_args()
(args.o / name()).write_text(args.text.read_text())
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapt_data.write_data(tmp_path_factory.mktemp("data"))


def recipe(place: Path) -> Path:
    place.mkdir(exist_ok=True)
    (place / "helper").mkdir(exist_ok=True)
    (place / "helper" / "__init__.py").write_text("def name():\n    from .deep import NAME\n    return NAME\n")
    (place / "helper" / "deep.py").write_text("NAME = 'lines.txt'\n")
    (place / "make.py").write_text(SCRIPT)
    (place / "r.toml").write_text(RECIPE)
    return place / "r.toml"


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    place = tmp_path_factory.mktemp("recipe")
    shutil.copytree(data, place / "data")
    inside("adapt", "run", recipe(place), "--data", place / "data", "--output", place / "out")
    return place


@pytest.fixture
def run(replayed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(replayed, tmp_path / "place", copy_function=shutil.copy2)


def replay(place: Path, *more: object, expect: int = 0) -> str:
    return inside("adapt", "run", place / "r.toml", "--data", place / "data", "-o", place / "out", *more, expect=expect)


@pytest.mark.parametrize("stage", ["made", "words", "base", "packed"])
def test_stage_directories_of_somebody_else_are_refused_before_anything_runs(
    data: Path, tmp_path: Path, stage: str
) -> None:
    place = tmp_path / "place"
    recipe(place)
    shutil.copytree(data, place / "data")
    (place / "out" / stage).mkdir(parents=True)
    (place / "out" / stage / "photo.jpg").write_text("mine")
    message = replay(place, expect=2)
    assert f"{stage}/photo.jpg: cnllama did not write this" in message
    assert [path.name for path in (place / "out").iterdir()] == [stage]
    assert (place / "out" / stage / "photo.jpg").read_text() == "mine"


@pytest.mark.parametrize("stage", ["made", "base", "packed"])
def test_redo_removes_only_what_the_stage_made(run: Path, stage: str) -> None:
    (run / "out" / "packed" / "photo.jpg").write_text("mine")
    before = snapshot(run / "out")
    assert "packed/photo.jpg: cnllama did not write this" in replay(run, "--redo", stage, expect=2)
    after = snapshot(run / "out")
    assert {n: v for n, v in after.items() if n != ".cnllama.json"} == {
        n: v for n, v in before.items() if n != ".cnllama.json"
    }
    (run / "out" / "packed" / "photo.jpg").unlink()
    made = (run / "out" / "packed" / "x.cnl").stat().st_mtime_ns
    replay(run, "--redo", stage)
    assert (run / "out" / "packed" / "x.cnl").stat().st_mtime_ns > made


def edit_script(place: Path) -> str:
    (place / "make.py").write_text(SCRIPT + "# another\n")
    return "had other contents in files ${recipe}/make.py; run it again with --redo made"


def edit_what_the_script_imports(place: Path) -> str:
    (place / "helper" / "deep.py").write_text("NAME = 'lines.txt'  # another\n")
    return "had other contents in files ${recipe}/make.py (deep.py); run it again with --redo made"


def edit_data(place: Path) -> str:
    text = (place / "data" / "zh.txt").read_text()
    (place / "data" / "zh.txt").write_text(text.replace("春天", "秋天"))
    return "had other contents in files ${data}/zh.txt; run it again with --redo made"


def edit_option(place: Path) -> str:
    (place / "r.toml").write_text(RECIPE.replace("layers = 1", "layers = 2"))
    return "had options layers ['1'], this one has ['2']; run it again with --redo base"


def edit_output(place: Path) -> str:
    with (place / "out" / "made" / "lines.txt").open("a") as file:
        file.write("more\n")
    return "made/lines.txt: was changed after the stage had made it; put it back, or move"


def lose_output(place: Path) -> str:
    (place / "out" / "words" / "tokenizer.model").unlink()
    return "words/tokenizer.model: is gone, which the stage had made; run it again with --redo words"


def replace_stage(place: Path) -> str:
    """The stage was made again by hand from other input, and stands there as finished."""
    shutil.rmtree(place / "out" / "made")
    (place / "data" / "zh.txt").write_text((place / "data" / "en.txt").read_text())
    return "had other contents in inputs made lines.txt; run it again with --redo words"


@pytest.mark.parametrize(
    "change",
    [edit_script, edit_what_the_script_imports, edit_data, edit_option, edit_output, lose_output, replace_stage],
)
def test_finished_stages_are_kept_only_for_the_same_input(run: Path, change: Callable[[Path], str]) -> None:
    replay(run)
    sentence = change(run)
    assert sentence in replay(run, expect=2)


def test_data_may_lie_elsewhere(run: Path) -> None:
    made = {path: path.stat().st_mtime_ns for path in (run / "out").glob("*/stage.json")}
    (run / "data").rename(run / "moved")
    inside("adapt", "run", run / "r.toml", "--data", run / "moved", "-o", run / "out")
    assert {path: path.stat().st_mtime_ns for path in (run / "out").glob("*/stage.json")} == made


def test_killed_script_stage_is_run_again_and_claims_only_its_own(run: Path) -> None:
    """A file that was put there while the stage was unfinished is not taken for the script's."""
    shutil.rmtree(run / "out" / "made")
    (run / "make.py").write_text("raise SystemExit(3)\n" + SCRIPT)
    shutil.rmtree(run / "out" / "words")
    shutil.rmtree(run / "out" / "base")
    shutil.rmtree(run / "out" / "packed")
    assert "script ended with code 3" in replay(run, expect=1)
    (run / "out" / "made").mkdir(exist_ok=True)
    (run / "make.py").write_text("import os, pathlib, sys\npathlib.Path(sys.argv[-1], 'half').touch()\nos._exit(9)\n")
    replay(run, expect=1)
    (run / "out" / "made" / "photo.jpg").write_text("mine")
    (run / "make.py").write_text(SCRIPT)
    replay(run)
    assert "photo.jpg" in replay(run, "--redo", "made", expect=2)
    assert (run / "out" / "made" / "photo.jpg").read_text() == "mine"
