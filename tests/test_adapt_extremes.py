# SPDX-License-Identifier: Apache-2.0
"""The outermost values of every option of training: they mean what they say, or are refused before the work."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("transformers", reason="training needs transformers")
pytest.importorskip("peft", reason="training needs peft")

import adapt_matrix  # noqa: E402
from test_adapt_pipeline import inside  # noqa: E402

HUGE = 10**18
# What training does with a value: "trains"; or the end of its sentence, with which it is refused before anything is
# trained ("refused") or stops when the numbers go bad ("diverges").
VALUES: list[tuple[str, object, str, str]] = [
    ("--lr", 1e-30, "trains", ""),
    ("--lr", 1e30, "diverges", "lower --lr"),
    ("--lr", 0, "refused", "--lr is 0"),
    ("--lr", -1e-4, "refused", "--lr is -0.0001"),
    ("--lr", "inf", "refused", "no finite number"),
    ("--block-size", 1, "refused", "--block-size is 1"),
    ("--block-size", 2, "trains", ""),
    ("--block-size", HUGE, "refused", "--block-size is"),
    ("--block-size", 2**31 - 1, "refused", "training needs about"),
    ("--batch-size", 0, "refused", "--batch-size is 0"),
    ("--batch-size", 3000, "trains", ""),
    ("--batch-size", 2**31 - 1, "refused", "training needs about"),
    ("--grad-accum", 0, "refused", "--grad-accum is 0"),
    ("--grad-accum", 10, "trains", ""),
    ("--grad-accum", 2**31 - 1, "refused", "sequences; give more data or a smaller --grad-accum"),
    ("--epochs", 0, "refused", "--epochs is 0"),
    ("--epochs", 1e-9, "trains", ""),
    ("--epochs", 1e9, "refused", "--epochs is 1e+09"),
    ("--epochs", "nan", "refused", "no finite number"),
    ("--max-steps", -1, "refused", "--max-steps is -1"),
    ("--max-steps", HUGE, "refused", "--max-steps is"),
    ("--warmup", 0, "trains", ""),
    ("--warmup", 0.999999, "trains", ""),
    ("--warmup", 1, "refused", "--warmup is 1"),
    ("--weight-decay", 0, "trains", ""),
    ("--weight-decay", -1, "refused", "--weight-decay is -1"),
    ("--weight-decay", 1e60, "diverges", "expected a finite number"),
    ("--beta2", 0, "trains", ""),
    ("--beta2", 0.9999999, "trains", ""),
    ("--beta2", 1, "refused", "--beta2 is 1"),
    ("--max-grad-norm", 0, "trains", ""),
    ("--max-grad-norm", 1e-30, "trains", ""),
    ("--max-grad-norm", 1e300, "trains", ""),
    ("--max-grad-norm", -1, "refused", "--max-grad-norm is -1"),
    ("--seed", 0, "trains", ""),
    ("--seed", 2**31 - 1, "trains", ""),
    ("--seed", 2**62, "refused", "--seed is"),
    ("--seed", -1, "refused", "--seed is -1"),
    ("--save-every", 1, "trains", ""),
    ("--save-every", 2**31 - 1, "trains", ""),
    ("--save-every", -1, "refused", "--save-every is -1"),
    ("--eval-every", 1, "trains", ""),
    ("--eval-every", 2**31 - 1, "trains", ""),
    ("--log-every", 0, "refused", "--log-every is 0"),
    ("--log-every", 2**31 - 1, "trains", ""),
    ("--keep", 0, "refused", "--keep is 0"),
    ("--keep", 2**31 - 1, "trains", ""),
    ("--rank", 1, "trains", ""),
    ("--rank", 64, "trains", ""),
    ("--rank", 0, "refused", "--rank is 0"),
    ("--rank", HUGE, "refused", "--rank is"),
    ("--alpha", 0, "refused", "--alpha is 0"),
    ("--alpha", -3, "trains", ""),
    ("--alpha", 1e60, "diverges", "expected a finite number"),
    ("--alpha", "inf", "refused", "no finite number"),
    ("--dropout", 0, "trains", ""),
    ("--dropout", 1, "refused", "--dropout is 1"),
    ("--train-new-rows-only", 0, "refused", "--train-new-rows-only 0"),
    ("--train-new-rows-only", -5, "refused", "--train-new-rows-only -5"),
    ("--train-new-rows-only", 339, "trains", ""),
    ("--train-new-rows-only", 340, "refused", "--train-new-rows-only 340"),
    ("--data", "{text}:1e-9", "refused", "tokens in all, fewer than one block"),
    ("--data", "{text}:1000", "trains", ""),
    ("--data", "{text}:1e6", "refused", "its repeat is 1e+06"),
    ("--targets", "q_proj", "trains", ""),
    ("--targets", "all", "refused", "--targets has all"),
    ("--schedule", "constant", "trains", ""),
    ("--schedule", "linear", "trains", ""),
]
NO_NUMBERS = {
    "--help",
    "--output",
    "--eval",
    "--adapter",
    "--optimizer",
    "--deepspeed",
    "--cache",
    "--document",
    "--out",
}
NO_NUMBERS |= {"--dtype", "--stage", "--full", "--bf16", "--compile", "--gradient-checkpointing", "--restart"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = adapt_matrix.write_place(tmp_path_factory.mktemp("extremes"))
    lines = (place / "data/zh.txt").read_text().split("\n\n")
    (place / "text.txt").write_text("\n\n".join(lines[:12]) + "\n")
    (place / "held.txt").write_text("\n\n".join(lines[12:15]) + "\n")
    return place


@pytest.mark.parametrize(("option", "value", "outcome", "sentence"), VALUES, ids=lambda v: f"{v}"[:20])
def test_a_value_means_what_it_says_or_is_refused(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    value: object,
    outcome: str,
    sentence: str,
) -> None:
    monkeypatch.setattr("cnllama.adapt.train.loss_curve", lambda *_: None)
    value = str(value).replace("{text}", str(place / "text.txt"))
    given = {"--data": place / "text.txt", "--eval": place / "held.txt", "--block-size": 32, "--max-steps": 2}
    given |= {"--lr": 1e-3, "--save-every": 0, "--eval-every": 0, "--cache": place / "tokens", "--warmup": 0}
    if option == "--epochs":
        del given["--max-steps"]
    words = [word for pair in (given | {option: value}).items() for word in pair]
    written = inside(
        "adapt",
        "pretrain",
        place / "base",
        "-o",
        tmp_path,
        *words,
        expect={"trains": 0, "refused": 2, "diverges": 1}[outcome],
    )
    assert sentence in written
    assert "bug of cnllama" not in written
    assert (tmp_path / "result.json").exists() == (outcome == "trains")
    assert not (outcome == "refused" and (tmp_path / "log.jsonl").exists()), "it was at work"
    if outcome == "trains":
        result = json.loads((tmp_path / "result.json").read_text())
        assert math.isfinite(result["held_out_loss"])
        assert all(bool(tensor.isfinite().all()) for tensor in adapt_matrix.saved(tmp_path).values())


def test_a_whole_checkpoint_that_is_not_finite_is_no_result(place: Path, tmp_path: Path) -> None:
    words = ["--data", place / "text.txt", "--block-size", 32, "--max-steps", 1, "--lr", 1e30, "--weight-decay", 1e30]
    written = inside("adapt", "pretrain", place / "base", "-o", tmp_path, "--full", *words, expect=1)
    assert "holds NaN or infinity" in written
    assert not (tmp_path / "model.safetensors").exists()


def test_every_option_with_a_number_is_tried() -> None:
    from cnllama.adapt.pretrain import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {action.option_strings[-1] for action in parser._actions if action.option_strings}
    assert options - NO_NUMBERS == {option for option, *_ in VALUES}
