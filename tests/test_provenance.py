# SPDX-License-Identifier: Apache-2.0
"""What a file was made from is the model's name, wherever the bytes lie."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from cnllama.convert.pack import convert
from cnllama.convert.provenance import model_name

from cnllama.format import open_cnl

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_the_cache(top: Path, repository: str, model: Path) -> Path:
    """A snapshot as the hub's client lays it out: every file a link to a blob that is named by its hash."""
    folder = top / f"models--{repository.replace('/', '--')}"
    snapshot, blobs = folder / "snapshots" / COMMIT, folder / "blobs"
    for directory in (snapshot, blobs, folder / "refs"):
        directory.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_a_hub_snapshot_is_named_by_its_model(tiny_llama: Path, tmp_path: Path) -> None:
    snapshot = in_the_cache(tmp_path / "hub", "hfl/chinese-alpaca-2-7b", tiny_llama)
    convert(snapshot, [], tmp_path / "x.cnl", tokenizer=snapshot)
    source = open_cnl(tmp_path / "x.cnl").source
    assert source["base"] == source["tokenizer"] == "hfl/chinese-alpaca-2-7b@01234567"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (f"models--owner--name/snapshots/{COMMIT}", "owner/name@01234567"),
        (f"models--name/snapshots/{COMMIT}", "name@01234567"),
        (f"models--owner--name/snapshots/{COMMIT}/sub/folder", "owner/name@01234567/sub/folder"),
        ("models--owner--name/snapshots", "snapshots"),
        ("models--owner--name", "models--owner--name"),
        ("plain", "plain"),
        ("plain/../other", "other"),
    ],
)
def test_names_of_directories(tmp_path: Path, path: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / path).mkdir(parents=True, exist_ok=True)
    assert model_name(tmp_path / path) == expected
    (tmp_path / "link").symlink_to(tmp_path / path)
    assert model_name(tmp_path / "link") == expected
    monkeypatch.chdir(tmp_path / path)
    assert model_name(Path()) == expected
    assert model_name(Path(os.curdir)) == expected


def test_the_root_has_a_name_too() -> None:
    assert model_name(Path("/")) == "/"
