# SPDX-License-Identifier: Apache-2.0
"""Stages in every type, with and without autocast, on one and two processes: a step of each against the reference.

These are the diagonals of the matrix; `python tests/adapt_matrix.py` runs and prints all of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="training needs transformers")
pytest.importorskip("peft", reason="training needs peft")

import adapt_matrix
import torch
from adapt_matrix import Cell, some_cells
from test_adapt_pipeline import inside

from cnllama.errors import InputError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapt_matrix.write_place(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def two(place: Path) -> list[Cell]:
    """The cells of two processes, trained by one torchrun."""
    cells = some_cells(2)
    adapt_matrix.launch(place, [cell.words(place) for cell in cells])
    return cells


@pytest.mark.parametrize("cell", some_cells(1), ids=str)
def test_a_step_is_that_of_the_reference(place: Path, cell: Cell) -> None:
    adapt_matrix.inside(cell.words(place))
    assert adapt_matrix.wrong(place, cell) is None


@pytest.mark.parametrize("number", range(len(some_cells(2))), ids=[str(cell) for cell in some_cells(2)])
def test_a_step_of_two_processes_is_that_of_the_reference(place: Path, two: list[Cell], number: int) -> None:
    assert adapt_matrix.wrong(place, two[number]) is None


def test_the_default_of_a_gpu_is_one_of_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """--dtype auto keeps frozen weights in bfloat16 where a GPU has it, and multiplies in it: here bfloat16 --bf16."""
    from cnllama.adapt.precision import choose_precision

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    default = choose_precision("auto", False, False, "cuda")
    assert default == choose_precision("bfloat16", True, False, "cpu")
    assert any((cell.dtype, cell.bf16) == ("bfloat16", True) for cell in some_cells(1))
    full = choose_precision("auto", False, True, "cuda")
    assert full.frozen == full.products == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an old card")
    old = choose_precision("auto", False, False, "cuda")
    assert old.frozen == old.products == torch.float32
    for options in (("bfloat16", False), ("auto", True)):
        with pytest.raises(InputError, match=r"an old card has no bfloat16; use|leave --bf16 out"):
            choose_precision(*options, False, "cuda")


def test_new_rows_only_after_an_adapter_saves_the_old_rows_as_they_were(place: Path) -> None:
    """The old rows are those of base and adapter together, in float32, though they are kept in bfloat16 meanwhile."""
    first = Cell("stage 2", "float32", False, "plain")
    if not (place / first.name).exists():
        adapt_matrix.inside(first.words(place))
    second = Cell("stage 2", "bfloat16", True, "new rows").words(place)
    out = place / "after"
    second[second.index("-o") + 1] = str(out)
    adapt_matrix.inside([*second, "--adapter", str(place / first.name), "--save-every", "1"])
    before, after = adapt_matrix.saved(place / first.name), adapt_matrix.saved(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = adapt_matrix.OLD_ROWS
        assert torch.equal(after[name][:old], before[name][:old])
        moved = (after[name][old:] - before[name][old:]).abs()
        assert 0 < float(moved.max()) < 1.01 * adapt_matrix.LR * (1 + 0.01 * float(before[name].abs().max()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_that_full_training_has_no_use_for_are_refused(place: Path, dtype: str) -> None:
    words = Cell("full", "float32", False, "plain").words(place)
    words[words.index("--dtype") + 1] = dtype
    words[words.index("-o") + 1] = str(place / "refused")
    assert "--full trains every weight in float32; use --bf16" in inside(*words, expect=2)
