# SPDX-License-Identifier: Apache-2.0
"""Recipes: lists make variants, a killed run goes on, and what is wrong in a file is said before anything runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import adapt_data
import models
import pytest

pytest.importorskip("transformers", reason="recipes need the training libraries")
pytest.importorskip("peft", reason="recipes need the training libraries")

from test_adapt_pipeline import ROOT, free_port, inside

from cnllama.adapt.recipe_file import expand, read_recipe
from cnllama.errors import InputError

SWEEP = """
[variables]
steps = 6

[[stage]]
name = "tokenizer"
do = "tokenizer train"
files = ["${data}/zh.txt"]
vocab_size = 400
hard_vocab_limit = false

[[stage]]
name = "base"
do = "adapt create"
tokenizer = "${tokenizer}"
hidden_size = 32
intermediate_size = 64
layers = 1
heads = 2

[[stage]]
name = "trained"
do = "adapt pretrain"
model = "${base}"
data = ["${data}/zh.txt"]
eval = ["${data}/zh_eval.txt"]
block_size = 32
batch_size = 4
rank = [2, 4]
max_steps = "${steps}"
log_every = 1
save_every = 2

[[stage]]
name = "merged"
do = "adapt merge"
base = "${base}"
lora = ["${trained}"]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapt_data.write_data(tmp_path_factory.mktemp("data"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_list_makes_variants_of_the_stage_and_of_what_follows(data: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "sweep.toml", SWEEP)
    out = tmp_path / "out"
    inside("adapt", "run", recipe, "--data", data, "--out", out)
    stages = sorted(path.parent.name for path in out.glob("*/stage.json"))
    assert stages == ["base", "merged@rank=2", "merged@rank=4", "tokenizer", "trained@rank=2", "trained@rank=4"]
    rows = json.loads((out / "summary.json").read_text())
    assert [row["trained.rank"] for row in rows] == [2, 4]
    lora = 2 * (4 * 2 * 32 + 3 * (32 + 64))
    assert rows[1]["trained_parameters"] - rows[0]["trained_parameters"] == lora
    assert all(row["held_out_loss"] < row["held_out_loss_before"] for row in rows)
    assert (out / "comparison-trained.png").read_bytes()[:4] == b"\x89PNG"
    config = json.loads((out / "trained@rank=4" / "adapter_config.json").read_text())
    assert config["r"] == 4


def test_killed_recipe_goes_on_where_it_was(data: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "sweep.toml", SWEEP.replace("[2, 4]", "2").replace("steps = 6", "steps = 40"))
    whole, out = tmp_path / "whole", tmp_path / "out"
    inside("adapt", "run", recipe, "--data", data, "--out", whole)
    words = ["-m", "cnllama", "adapt", "run", str(recipe), "--data", str(data), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    log, deadline = out / "trained" / "log.jsonl", time.monotonic() + 120
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "base" / "stage.json").exists()
    assert not (out / "trained" / "stage.json").exists()
    made = (out / "base" / "stage.json").stat().st_mtime_ns
    inside("adapt", "run", recipe, "--data", data, "--out", out)
    assert (out / "base" / "stage.json").stat().st_mtime_ns == made, "a finished stage is left alone"
    name = "merged/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_recipe_runs_under_torchrun(data: Path, tmp_path: Path) -> None:
    """Two processes train; what one process can do, the first does while the other waits."""
    recipe = write(tmp_path / "sweep.toml", SWEEP.replace("[2, 4]", "2"))
    out = tmp_path / "out"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    words = ["-m", "cnllama", "adapt", "run", str(recipe), "--data", str(data), "--out", str(out)]
    result = subprocess.run(
        [sys.executable, *launch, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((out / "summary.json").read_text())
    assert [row["tokens"] for row in rows] == [6 * 2 * 4 * 32]
    assert (out / "merged" / "stage.json").exists()


def test_stage_is_run_again_when_asked(data: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.toml", SWEEP[: SWEEP.index('[[stage]]\nname = "trained"')])
    out = tmp_path / "out"
    inside("adapt", "run", recipe, "--data", data, "--out", out)
    tokenizer, base = ((out / name / "stage.json").stat().st_mtime_ns for name in ("tokenizer", "base"))
    inside("adapt", "run", recipe, "--data", data, "--out", out, "--redo", "base")
    assert (out / "tokenizer" / "stage.json").stat().st_mtime_ns == tokenizer
    assert (out / "base" / "stage.json").stat().st_mtime_ns > base
    assert "no such stage" in inside("adapt", "run", recipe, "--data", data, "--out", out, "--redo", "x", expect=2)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('name = "base"', 'name = "tokenizer"', "the name is 'tokenizer'"),
        ('name = "base"', 'name = "a b"', "the name is 'a b'"),
        ('do = "adapt create"', 'do = "adapt build"', "expected one of adapt create"),
        ('do = "adapt create"', 'do = "rm"', "do is 'rm'"),
        ('do = "adapt create"', 'do = "script"', "has no file"),
        ("hidden_size", "hiden_size", "no option 'hiden_size'"),
        ("${base}", "${bse}", "${bse} stands for nothing"),
        ("[variables]", "[variable]", "has 'variable'"),
        ("steps = 6", "steps = ", "is not valid TOML"),
        ("hidden_size = 32", "hidden_size = 33", "do not divide"),
        ("hidden_size = 32", 'hidden_size = "wide"', "'wide' is no integer"),
    ],
)
def test_wrong_recipe_is_one_sentence(data: Path, tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in SWEEP
    recipe = write(tmp_path / "r.toml", SWEEP.replace(old, new, 1))
    message = inside("adapt", "run", recipe, "--data", data, "--out", tmp_path / "out", expect=2)
    assert sentence in message
    assert "Traceback" not in message


def test_missing_data_and_file_are_named(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.toml", SWEEP)
    with pytest.raises(InputError, match="give --data DIR"):
        read_recipe(recipe, None)
    with pytest.raises(InputError, match=r"nowhere\.toml"):
        read_recipe(tmp_path / "nowhere.toml", None)
    with pytest.raises(InputError, match="expected NAME=VALUE"):
        read_recipe(recipe, tmp_path, ["stepz=3"])


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_recipes_of_the_repository_are_sound(name: str, tmp_path: Path) -> None:
    """Every stage, option and reference is known; nothing is run."""
    path = ROOT / "recipes" / f"{name}.toml"
    tasks = expand(read_recipe(path, tmp_path), tmp_path / "out")
    assert [task.stage.name for task in tasks][-1] == "packed"
    assert not [word for task in tasks for word in task.words if "${" in word]


def test_demo_recipe_has_the_hundred_couplets(shared_data: Path, tmp_path: Path) -> None:
    """Of tests/demo_couplets.tsv: all are in the data that recipes/demo_data.py makes, where the list says."""
    script = ROOT / "recipes" / "demo_data.py"
    words = ["--poems", shared_data / "corpus/poems.jsonl", "--more", ROOT / "recipes/demo_poems.jsonl"]
    words += ["--couplets", ROOT / "tests/demo_couplets.tsv", "-o", tmp_path / "made"]
    subprocess.run([sys.executable, str(script), *map(str, words)], check=True, capture_output=True)
    rows = [line.split("\t") for line in (ROOT / "tests/demo_couplets.tsv").read_text().splitlines()[1:]]
    assert len(rows) == len({row[0] for row in rows}) == 100
    corpus, own = (
        re.sub("[。！？；、：]", "，", path.read_text())
        for path in (shared_data / "corpus/poems.jsonl", ROOT / "recipes/demo_poems.jsonl")
    )
    for upper, lower, title, author, place in rows:
        text = {"corpus": corpus, "recipes": own}[place]
        at = text.find(upper + "，" + lower)
        line = text[text.rfind("\n", 0, at) + 1 : text.find("\n", at)]
        assert at >= 0, upper
        assert title in line
        assert author in line
    drills = (tmp_path / "made/couplet_drills.jsonl").read_text().splitlines()
    assert len(drills) == 400
    answers = {record["instruction"]: record["output"] for record in map(json.loads, drills)}
    assert answers["请写出“床前明月光”的下一句。"] == "疑是地上霜。"


def test_models_can_be_made_of_any_tokenizer(tmp_path: Path, tokenizer_model: bytes) -> None:
    (tmp_path / "t").mkdir()
    models.write_tokenizer(tmp_path / "t", tokenizer_model)
    inside("adapt", "create", tmp_path / "t", "-o", tmp_path / "m", "--hidden-size", 64, "--heads", 2, "--layers", 1)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["vocab_size"] == models.piece_count(tokenizer_model)
