# SPDX-License-Identifier: Apache-2.0
"""What a command needs at its end is checked at its beginning: places, room, libraries, files, the first rate."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapt_data
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="training needs transformers")
pytest.importorskip("peft", reason="training needs peft")

from test_adapt_pipeline import inside

from cnllama.adapt.reading import unescaped
from cnllama.adapt.schedule import SCHEDULES, rate, warmup_steps

SMALL = ("--block-size", 48, "--batch-size", 2, "--eval-every", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapt_data.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return adapt_data.small_base(tmp_path_factory.mktemp("base"), data)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "a"
    inside("adapt", "pretrain", base, "-o", out, "--data", data / "zh.txt", *SMALL, "--max-steps", 1)
    return out


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing, training, drawing weights, merging and training a vocabulary are not to be reached."""
    names = (
        "cnllama.adapt.tokenfile._write", "cnllama.adapt.stage.train", "cnllama.adapt.create._write",
        "cnllama.adapt.merge._write_weights", "cnllama.adapt.tokenizer_train._run",
    )  # fmt: skip
    for name in names:
        monkeypatch.setattr(name, lambda *_, name=name, **__: pytest.fail(f"{name} was reached"))


def commands(base: Path, adapter: Path, data: Path, out: Path) -> dict[str, list[object]]:
    return {
        "pretrain": ["adapt", "pretrain", base, "--data", data / "zh.txt", *SMALL, "-o", out],
        "sft": ["adapt", "sft", base, "--data", data / "sft.jsonl", *SMALL, "-o", out],
        "merge": ["adapt", "merge", base, "--lora", adapter, "-o", out],
        "create": ["adapt", "create", base, "-o", out],
        "resize": ["adapt", "resize", base, base, "--pad-to-multiple", 1000, "-o", out],
        "train": ["tokenizer", "train", data / "zh.txt", "--vocab-size", 400, "-o", out],
    }


KINDS = ("pretrain", "sft", "merge", "create", "resize", "train")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("kind", KINDS)
def test_output_that_cannot_be_written(base: Path, adapter: Path, data: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        message = inside(*commands(base, adapter, data, out)[kind], expect=2)
        assert "this is a file" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["pretrain", "merge", "create", "resize"])
def test_room_on_the_disk(
    base: Path, adapter: Path, data: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = commands(base, adapter, data, out)[kind]
    words += ["--cache", tmp_path / "tokens", "--max-steps", 4, "--save-every", 1] if kind == "pretrain" else []
    with monkeypatch.context() as patch:
        patch.setattr("cnllama.space.free_bytes", lambda _: 200_000)
        for name in ("stage.train", "create._write", "merge._write_weights", "resize.copy_file"):
            patch.setattr(f"cnllama.adapt.{name}", lambda *_, **__: pytest.fail("it was at work"))
        message = inside(*words, expect=1)
    assert "will have" in message
    assert "200,000 free" in message
    assert not out.exists()
    inside(*words)


def test_room_for_checkpoints_counts_those_that_are_there(base: Path, data: Path, tmp_path: Path) -> None:
    """keep + 1 checkpoints of adapter and optimizer, and the result; no more than the run will ever have."""
    from transformers import LlamaConfig

    from cnllama.adapt.lora import Trained
    from cnllama.adapt.memory import Shape, plan_memory

    config = LlamaConfig.from_pretrained(base)
    plan = plan_memory(config, Trained(), Shape(2, 48, 4, False, False, "adamw"))
    inside("adapt", "pretrain", base, "-o", tmp_path / "a", "--data", data / "zh.txt", *SMALL, "--max-steps", 1)
    assert plan.saved == pytest.approx((tmp_path / "a" / "adapter_model.safetensors").stat().st_size, rel=0.02)
    whole = plan_memory(config, Trained(mode="full"), Shape(2, 48, 4, False, False, "adamw"))
    assert whole.saved == 4 * whole.total


@pytest.mark.usefixtures("no_work")
def test_matplotlib(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "r.toml").write_text(
        f'[[stage]]\nname = "a"\ndo = "tokenizer train"\nfiles = ["{data}/zh.txt"]\nvocab_size = 400\n'
        f'[[stage]]\nname = "b"\ndo = "adapt pretrain"\nmodel = "{base}"\ndata = ["{data}/zh.txt"]\n'
    )
    report = ["tokenizer", "report", base, base, data / "zh.txt", "--plot", tmp_path / "x.png"]
    for words in (
        ["adapt", "pretrain", base, "--data", data / "zh.txt", "-o", tmp_path / "out"],
        ["adapt", "run", tmp_path / "r.toml", "-o", tmp_path / "out"],
        report,
    ):
        assert "plots need matplotlib" in inside(*words, expect=2)
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


def missing(path: Path) -> Path:
    return path


def a_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def a_directory(path: Path) -> Path:
    path.mkdir()
    return path


def a_link_to_a_device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("make", [missing, a_pipe, a_directory, a_link_to_a_device])
@pytest.mark.parametrize("option", ["--data", "--eval"])
def test_every_data_file_is_looked_at_first(
    base: Path, data: Path, tmp_path: Path, make: Callable[[Path], Path], option: str
) -> None:
    bad = make(tmp_path / "late.jsonl")
    words = ["adapt", "sft", base, "-o", tmp_path / "out", "--data", data / "sft.jsonl", option, bad]
    assert "late.jsonl: " in inside(*words, expect=2)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "tokens").exists()


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_tokenizer_files_are_read_first(base: Path, data: Path, adapter: Path, tmp_path: Path, name: str) -> None:
    broken = shutil.copytree(adapter, tmp_path / "adapter")
    (broken / name).unlink(missing_ok=True)
    os.mkfifo(broken / name)
    words = ["adapt", "pretrain", base, "--adapter", broken, "--data", data / "zh.txt", "-o", tmp_path / "out"]
    assert f"{name}: this is no regular file" in inside(*words, expect=2)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("sft", "--data", "a.txt"), "a text file holds no instructions"),
        (("sft", "--data", "a.jsonl", "--template", "raw"), "does not tell prompt from answer"),
        (("pretrain", "--data", "a.csv"), "the name ends in '.csv'"),
        (("pretrain", "--data", "a.txt:0"), "its repeat is 0"),
        (("pretrain", "--data", "a.txt", "--eval", "b.doc"), "the name ends in '.doc'"),
        (("pretrain", "--data", "a.txt", "--document", "none"), "the template 'none' is not usable"),
        (("pretrain", "--data", "a.txt", "--lr", 0), "--lr is 0"),
        (("sft", "--data", "a.jsonl", "--lr", "nan"), "--lr: 'nan' is no finite number"),
    ],
)
def test_options_are_checked_before_files(tmp_path: Path, words: tuple[object, ...], sentence: str) -> None:
    verb, *more = words
    assert sentence in inside("adapt", verb, tmp_path / "nowhere", "-o", tmp_path / "out", *more, expect=2)


@given(st.integers(1, 400), st.floats(0, 1, exclude_max=True), st.sampled_from(SCHEDULES))
def test_every_step_has_a_rate(total: int, share: float, schedule: str) -> None:
    warmup = warmup_steps(share, total)
    assert 0 <= warmup < total
    rates = [rate(step, total, warmup, schedule) for step in range(1, total + 1)]
    assert all(0 < value <= 1 for value in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup] == 1, "the step after the warm-up has all of it"
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rate(total + 1, total, warmup, schedule) >= 0, "what is logged after the last step"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_the_warm_up_the_schedule_is_that_of_transformers(schedule: str) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40)
    for step in range(1, 41):
        if step > 5:
            assert rate(step, 40, 5, schedule) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("warmup", [0, 0.05, 0.99])
def test_a_run_of_one_step_learns(base: Path, data: Path, tmp_path: Path, warmup: float) -> None:
    from safetensors.numpy import load_file

    words = ["adapt", "pretrain", base, "--data", data / "zh.txt", *SMALL, "--max-steps", 1, "--warmup", warmup]
    inside(*words, "-o", tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(value.any() for name, value in saved.items() if "lora_B" in name)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["steps"] == 1


def test_line_breaks_of_a_template_may_be_typed() -> None:
    assert unescaped("《{title}》\\n{text}\\t") == "《{title}》\n{text}\t"


def test_restart_keeps_the_earlier_run_where_the_new_one_cannot_begin(base: Path, data: Path, tmp_path: Path) -> None:
    words: list[Any] = ["adapt", "pretrain", base, "-o", tmp_path / "out", "--data", data / "zh.txt", *SMALL]
    inside(*words, "--max-steps", 1)
    for more in (
        ["--block-size", 50_000],
        ["--batch-size", 10**6],
        ["--rank", 0],
        ["--eval", tmp_path / "nowhere.txt"],
    ):
        inside(*words, *more, "--restart", expect=2)
        assert (tmp_path / "out" / "result.json").exists()
