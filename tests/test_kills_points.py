# SPDX-License-Identifier: Apache-2.0
"""A kill between any two changes of the disk: no half file, no lost file, and the same bytes after the same command.

The larger commands are ended at a part of their changes, one of each kind that points.py's chosen() tells apart where
there is room; `python tests/kills --every` ends all of them at every change, and with every error.
"""

from __future__ import annotations

import pytest
from kills.cases import CASES
from kills.points import Workshop, chosen, kill_at

# Changes of the disk before which a test ends a command, where not all of them: those that take long.
MOST = {
    "tokenizer-train": 18, "create": 24, "pretrain": 20, "pretrain-full": 14, "sft": 10, "pretrain-restart": 16,
    "convert": 16, "convert-gptq": 16, "recipe": 10, "recipe-redo": 10,
}  # fmt: skip
OVER = [name for name, case in CASES.items() if not case.refuses]


@pytest.mark.parametrize("name", CASES)
def test_kill_among_files_of_other_people(workshop: Workshop, name: str) -> None:
    kill_everywhere(workshop, name, earlier=False)


@pytest.mark.parametrize("name", OVER)
def test_kill_over_an_earlier_result(workshop: Workshop, name: str) -> None:
    kill_everywhere(workshop, name, earlier=True)


def kill_everywhere(workshop: Workshop, name: str, earlier: bool) -> None:
    case = CASES[name]
    known = workshop.know(case, earlier)
    assert known.code == 0
    assert len(known.changes) >= 5
    for number in chosen(known.changes, MOST.get(name, 40)):
        assert not kill_at(workshop, case, known, number), (number, known.changes[number])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refuses])
def test_earlier_result_of_other_options_is_refused_before_anything_changes(workshop: Workshop, name: str) -> None:
    known = workshop.know(CASES[name], earlier=True)
    assert known.code == 2
    assert known.changes == []
    assert known.promise.is_whole(known.promise.before)
