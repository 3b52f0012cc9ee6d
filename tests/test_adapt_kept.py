# SPDX-License-Identifier: Apache-2.0
"""Kept results: given back, or gone on with, only where all that decides them is the same; else refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapt_data
import models
import numpy as np
import pytest

pytest.importorskip("transformers", reason="training needs transformers")
pytest.importorskip("peft", reason="training needs peft")

from safetensors.numpy import load_file, save_file
from test_adapt_pipeline import inside

from cnllama.adapt.kept import difference

TRAIN = ("--block-size", 256, "--batch-size", 2, "--max-steps", 2, "--eval-every", 0, "--save-every", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapt_data.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A place with everything of a run in it: base, adapters of one name, data, held-out data, the result `out`."""
    place = tmp_path_factory.mktemp("finished")
    adapt_data.small_base(place / "base", data)
    for name in ("sft.jsonl", "sft_eval.jsonl"):
        shutil.copy(data / name, place / name)
    (place / "sft.jsonl").write_text("".join((place / "sft.jsonl").read_text().splitlines(keepends=True)[:40]))
    for seed, name in enumerate(("A", "B"), 1):
        inside("adapt", "sft", place / "base", "-o", place / name / "stage1", "--data", place / "sft.jsonl", *TRAIN,
               "--seed", seed)  # fmt: skip
    train(place)
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy to change, with the times that the record knows."""
    return shutil.copytree(finished, tmp_path / "place", copy_function=shutil.copy2)


def train(place: Path, *more: object, expect: int = 0, **paths: Path) -> str:
    where = {"base": place / "base", "adapter": place / "A/stage1", "data": place / "sft.jsonl"} | paths
    held_out = paths.get("held_out", place / "sft_eval.jsonl")
    words = ["adapt", "sft", where["base"], "-o", place / "out", "--adapter", where["adapter"]]
    return inside(*words, "--data", where["data"], "--eval", held_out, *TRAIN, *more, expect=expect)


def outputs(place: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (place / "out").iterdir()}


def test_same_run_is_given_back(place: Path) -> None:
    before = outputs(place)
    train(place)
    assert outputs(place) == before


def test_places_and_names_do_not_count(place: Path) -> None:
    """Everything moved: what is in the files decides."""
    for name in ("base", "A", "sft.jsonl", "sft_eval.jsonl"):
        (place / name).rename(place / f"moved-{name}")
    before = outputs(place)
    train(
        place,
        base=place / "moved-base",
        adapter=place / "moved-A" / "stage1",
        data=place / "moved-sft.jsonl",
        held_out=place / "moved-sft_eval.jsonl",
    )
    assert outputs(place) == before


def edit_answers(path: Path) -> None:
    """Other answers, in the same numbers of records, characters and tokens: those of two records change places."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["output"], records[1]["output"] = records[1]["output"], records[0]["output"]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def edit_weight(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "norm" not in name)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[3] += np.float32(0.5)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path) -> None:
    changes = {"lora_dropout": 0.5} if path.name == "adapter_config.json" else {"rms_norm_eps": 1e-4, "bos_token_id": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CHANGES: dict[str, Callable[[Path], None]] = {
    "sft.jsonl": edit_answers,
    "sft_eval.jsonl": edit_answers,
    "base/model.safetensors": edit_weight,
    "base/config.json": edit_json,
    "base/generation_config.json": edit_json,
    "base/tokenizer_config.json": edit_json,
    "A/stage1/adapter_model.safetensors": edit_weight,
    "A/stage1/adapter_config.json": edit_json,
    "A/stage1/tokenizer_config.json": edit_json,
}


@pytest.mark.parametrize("file", CHANGES)
def test_other_contents_are_refused_by_name(place: Path, file: str) -> None:
    CHANGES[file](place / file)
    before = outputs(place)
    message = train(place, expect=2)
    assert "had other contents in" in message
    assert Path(file).name in message
    assert "--restart" in message
    assert outputs(place) == before


def test_adapter_of_the_same_name_is_another(place: Path) -> None:
    message = train(place, adapter=place / "B" / "stage1", expect=2)
    assert f"had other contents in adapters {place / 'B' / 'stage1'} adapter_model.safetensors" in message


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--template", "chatml"), "options template 'alpaca', this one has 'chatml'"),
        (("--pack",), "options pack False, this one has True"),
        (("--seed", 5), "settings seed 0, this one has 5"),
        (("--warmup", 0.5), "settings warmup 0.05, this one has 0.5"),
        (("--dtype", "bfloat16"), "settings dtype 'float32', this one has 'bfloat16'"),
        (("--rank", 4), "trained rank 8, this one has 4"),
        (("--targets", "q_proj"), "trained targets"),
        (("--max-steps", 3), "settings max_steps 2, this one has 3"),
    ],
)
def test_other_options_are_refused_by_name(place: Path, more: tuple[object, ...], sentence: str) -> None:
    assert sentence in train(place, *more, expect=2)


def test_other_numbers_of_files_are_refused_by_name(place: Path) -> None:
    more = (place / "sft.jsonl", place / "sft_eval.jsonl")
    words = ["adapt", "sft", place / "base", "-o", place / "out", "--adapter", place / "A/stage1", "--data", *more]
    message = inside(*words, "--eval", place / "sft_eval.jsonl", *TRAIN, expect=2)
    assert "had 1 data, this one has 2" in message
    message = train(place, "--adapter", place / "B/stage1", expect=2)
    assert "had 1 adapters, this one has 2" in message
    message = train(place, data=Path(f"{place / 'sft.jsonl'}:3"), expect=2)
    assert "sft.jsonl repeat 1.0, this one has 3.0" in message


def test_stopped_run_is_gone_on_with_only_for_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(place / "out")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cnllama.adapt.train._finish", interrupt)
        train(place, expect=130)
    assert (place / "out" / "checkpoint-2").exists()
    kept = (place / "sft.jsonl").read_bytes()
    edit_answers(place / "sft.jsonl")
    assert "had other contents in data" in train(place, expect=2)
    (place / "sft.jsonl").write_bytes(kept)
    train(place)
    assert (place / "out" / "result.json").exists()


def test_finished_result_that_was_changed_is_not_given_back(place: Path) -> None:
    (place / "out" / "tokenizer.model").unlink()
    assert "tokenizer.model: was changed or removed" in train(place, expect=2)


def test_result_of_an_older_version_is_refused(place: Path) -> None:
    run = place / "out" / "run.json"
    run.write_text(json.dumps({"label": "sft", "data": {"files": [[40, 970, 1.0]]}}))
    (place / "out" / ".cnllama.json").unlink()
    message = train(place, expect=2)
    assert "cnllama did not write this" in message
    shutil.rmtree(place / "out")
    (place / "out").mkdir()
    run.write_text("{}")
    assert "move it away, or choose another --output" in train(place, expect=2)


def test_merge_resize_and_create_know_their_inputs(place: Path) -> None:
    merge = ("adapt", "merge", place / "base", "-o", place / "merged", "--lora")
    create = ("adapt", "create", place / "tokenizer", "-o", place / "new", "--hidden-size", 32, "--heads", 2)
    (place / "tokenizer").mkdir()
    shutil.copy(place / "base" / "tokenizer.model", place / "tokenizer")
    for words, folder in (((*merge, place / "A/stage1"), "merged"), (create, "new")):
        inside(*words)
        before = {path.name: path.stat().st_mtime_ns for path in (place / folder).iterdir()}
        inside(*words)
        assert {path.name: path.stat().st_mtime_ns for path in (place / folder).iterdir()} == before
    assert "other contents in adapters" in inside(*merge, place / "B/stage1", expect=2)
    assert "had 1 adapters, this one has 2" in inside(*merge, place / "A/stage1", place / "B/stage1", expect=2)
    edit_weight(place / "base" / "model.safetensors")
    assert "other contents in base" in inside(*merge, place / "A/stage1", expect=2)
    assert "options seed 0, this one has 1" in inside(*create, "--seed", 1, expect=2)
    (place / "tokenizer" / "tokenizer.model").write_bytes(models.train_tokenizer(models.sample_lines(), 900))
    assert "other contents in tokenizer" in inside(*create, expect=2)


@pytest.mark.parametrize(
    ("before", "now", "sentence"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1}, {"a": True}, "had a 1, this one has True"),
        ({"a": 1}, {"a": 1.0}, "had a 1, this one has 1.0"),
        ({}, {"a": 1}, "had no a, this one has"),
        ({"a": 1}, {}, "had a, this one has none"),
        ({"a": [1, 2]}, {"a": [2, 1]}, "had a [1, 2], this one has [2, 1]"),
        ({"a": {"name": "x", "contents": {"": "0" * 64}}}, {"a": {"name": "y", "contents": {"": "0" * 64}}}, None),
        ({"a": {"name": "x", "contents": {"": "0" * 64}}}, {"a": {"name": "y", "contents": {"": "1" * 64}}},
         "had other contents in a y"),
        ({"a": "text"}, {"a": {"b": 1}}, "had a 'text', this one has {'b': 1}"),
        ({"a": [{"name": "x"}]}, {"a": []}, "had 1 a, this one has 0"),
        ({"a": None}, {"a": []}, "had a None, this one has []"),
    ],
)  # fmt: skip
def test_differences_are_named(before: Any, now: Any, sentence: str | None) -> None:
    assert difference(before, now) == sentence
