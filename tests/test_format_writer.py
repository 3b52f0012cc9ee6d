# SPDX-License-Identifier: Apache-2.0
"""Writing a .cnl: streamed, padded, renamed when complete; an error leaves nothing, a full disk is one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnllama import _core
from cnllama.container import SafetensorsFile
from cnllama.errors import CnllamaError, InputError
from cnllama.format import CnlWriter, stored_bytes


def small(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, tuple[str, int, int]]]:
    table = {"a": ("f32", 5, 1), "b": ("q8-s64", 33, 70)}
    values: dict[str, Any] = {"template": "raw", "fingerprint": {"tensors": {}}}
    return tmp_path / "out.cnl", values, table


def test_writer_pads_and_renames_at_the_end(tmp_path: Path) -> None:
    path, values, table = small(tmp_path)
    weight = np.random.default_rng(0).standard_normal((33, 70), np.float32)
    packed = _core.quantize(weight, "q8-s64")[0].reshape(-1)
    with CnlWriter(path, values, table) as writer:
        writer.write_padded("a", np.arange(5, dtype=np.float32).tobytes())
        writer.write("b", packed[:1000])
        writer.write("b", packed[1000:])
        assert not path.exists()
        writer.finish({"source": {"名字": "值"}})
    assert [p.name for p in tmp_path.iterdir()] == ["out.cnl"]
    file = SafetensorsFile(path)
    assert file.view("a").view(np.float32).tolist() == [0, 1, 2, 3, 4] + [0] * 11
    assert np.array_equal(file.view("b"), packed)
    assert file.size == writer.size
    assert json.loads(file.metadata["source"]) == {"名字": "值"}


def test_writer_refuses_wrong_order_and_sizes(tmp_path: Path) -> None:
    path, values, table = small(tmp_path)
    with pytest.raises(ValueError, match="where a was due"), CnlWriter(path, values, table) as writer:
        writer.write("b", b"x")
    with pytest.raises(ValueError, match="too many"), CnlWriter(path, values, table) as writer:
        writer.write("a", bytes(65))
    with CnlWriter(path, values, table) as writer:
        writer.write("a", bytes(64))
        with pytest.raises(ValueError, match="a tensor is missing"):
            writer.finish({})
    assert list(tmp_path.iterdir()) == []


def test_exception_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    path, values, table = small(tmp_path)
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), CnlWriter(path, values, table):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out.cnl"]
    assert path.read_text() == "old"


def test_symbolic_link_is_written_through(tmp_path: Path) -> None:
    path, values, table = small(tmp_path)
    (tmp_path / "data").mkdir()
    path.symlink_to(tmp_path / "data" / "real.cnl")
    with CnlWriter(path, values, table) as writer:
        writer.write("a", bytes(64))
        writer.write("b", bytes(stored_bytes(*table["b"])))
        writer.finish({})
    assert path.is_symlink()
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["real.cnl"]
    assert path.stat().st_size == writer.size


def test_leftover_of_a_killed_run_is_removed_but_not_of_a_living_one(tmp_path: Path) -> None:
    path, values, table = small(tmp_path)
    (tmp_path / ".out.cnl.cnllama-1-00000000.part").write_bytes(b"dead")
    with CnlWriter(path, values, table) as first:
        (living,) = tmp_path.iterdir()
        with CnlWriter(path, values, table):
            assert living.exists()
            assert len(list(tmp_path.iterdir())) == 2
        assert list(tmp_path.iterdir()) == [living]
        first.write("a", bytes(64))
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    _, values, table = small(tmp_path)
    with pytest.raises(InputError, match="this is a directory"):
        CnlWriter(tmp_path, values, table)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="this is no regular file"):
        CnlWriter(tmp_path / "pipe", values, table)
    with pytest.raises(InputError, match="no such file or directory"):
        CnlWriter(tmp_path / "absent" / "out.cnl", values, table)
    with pytest.raises(InputError, match="name is too long"):
        CnlWriter(tmp_path / ("x" * 300), values, table)
    with pytest.raises(CnllamaError, match=r"bytes but its disk has .* free"):
        CnlWriter(tmp_path / "out.cnl", values, {"a": ("q8-s64", 1 << 28, 1 << 20)})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_is_one_sentence(tmp_path: Path) -> None:
    path, values, table = small(tmp_path)
    with CnlWriter(path, values, table) as writer:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, writer._output._fd)  # the disk fills up under the open file
        os.close(full)
        with pytest.raises(CnllamaError) as caught:
            writer.write("a", bytes(64))
    assert str(caught.value) == f"{path}: the disk is full; free some space or choose another place"
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
