# SPDX-License-Identifier: Apache-2.0
"""A kill between any two changes of the disk: no half file, no lost file, and the same bytes after the same command.

Here larger commands are ended at some of their changes, of different kinds (points.py, chosen); `python tests/kills
--every` ends all of them at every change, and with every error.
"""

from __future__ import annotations

import re
import resource
import signal

import pytest
from kills.cases import CASES
from kills.children import before_number
from kills.points import Workshop, chosen, kill_at, wrong_again

from cnllama.ownership import OwnedDirectory

# Changes of the disk before which a test ends a command; fewer of those that take long.
MOST = {
    "tokenizer-train": 10, "create": 14, "pretrain": 9, "pretrain-full": 6, "sft": 3, "pretrain-restart": 5,
    "convert": 10, "convert-gptq": 8, "export": 10, "recipe": 3, "recipe-redo": 3,
}  # fmt: skip
FRESH = [name for name, case in CASES.items() if not case.discards]
OVER = [name for name, case in CASES.items() if not case.refuses]


@pytest.mark.parametrize("name", FRESH)
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
    for number in chosen(known.changes, MOST.get(name, 20)):
        assert not kill_at(workshop, case, known, number), (number, known.changes[number])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refuses])
def test_earlier_result_of_other_options_is_refused_before_anything_changes(workshop: Workshop, name: str) -> None:
    known = workshop.know(CASES[name], earlier=True)
    assert known.code == 2
    assert known.changes == []
    assert known.promise.is_whole(known.promise.before)


@pytest.mark.parametrize(
    ("name", "sizes", "half"),
    [
        ("create", (9000, 60_000), r"\.tmp\w{6}"),
        ("pretrain", (9000, 100_000, 400_000), r"optimizer\.pt"),
        ("pretrain-full", (100_000, 400_000), r"\.tmp\w{6}"),
    ],
)
def test_kill_while_a_library_writes(workshop: Workshop, name: str, sizes: tuple[int, ...], half: str) -> None:
    """The system ends the process at a file that grows too large, whoever writes it; half: one that is not ours."""
    case = CASES[name]
    known = workshop.know(case, earlier=False)
    left = set()
    for size in sizes:
        workshop.reset(known)
        ended = workshop.run(case, before_number(0, lambda kind, path, size=size: end_at(size)))
        assert ended.code == -signal.SIGXFSZ, ended.words
        assert not known.promise.broken_by(workshop.work)
        left |= {path.name for path in workshop.work.rglob("*") if OwnedDirectory.SCRATCH in path.parts}
        assert not wrong_again(workshop, case, known)
    assert any(re.fullmatch(half, name) for name in left), left


def end_at(size: int) -> None:
    """From now on the process is ended when it writes a file of more bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
