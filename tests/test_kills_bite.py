# SPDX-License-Identifier: Apache-2.0
"""What the kills must notice: faults put back into the writers are found, each by what it does."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from kills import command
from kills.by_chance import ByChance
from kills.cases import CASES
from kills.children import Change
from kills.faults import FAULTS
from kills.points import Workshop, chosen, fail_at, kill_at


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    case = CASES[fault.case]
    known = workshop.know(case, fault.earlier)
    fault.put(monkeypatch)
    numbers = range(len(known.changes))
    for number in sorted(numbers, key=lambda number: (number % 5, number)):  # soon everywhere
        if fault.errors:
            written = known.changes[number].kind == "write"
            found = fail_at(workshop, case, known, number, errno.EIO) if written else []
        else:
            found = kill_at(workshop, case, known, number)
        if any(fault.shown in line for line in found):
            return
    pytest.fail("no kill showed it")


def test_kinds_of_changes_come_first() -> None:
    changes = [Change("write", "a", "x")] * 50 + [Change("rename", "a", "x")] + [Change("write", "b", "x")] * 50
    assert {0, 50, 51, 100} <= set(chosen(changes, 4))
    assert len(chosen(changes, 30)) == 30
    assert chosen(changes, 200) == list(range(101))
    assert len(chosen(changes, 2)) == 2
    assert chosen([], 5) == []


def test_kills_at_random_moments_go_on_where_they_were(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script, on one command: ended after its first record, it makes the others only."""
    monkeypatch.setattr(command, "make_inputs", lambda _: workshop.inputs)
    state, summary = tmp_path / "state", tmp_path / "summary.json"
    words = ["--case", "export", "--kills", "30", "--seed", "1", "--state", str(state), "--summary", str(summary)]
    assert command.main(words) == 0
    lines = state.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    state.write_bytes(lines[0] + lines[1] + lines[2][:20])
    assert command.main(words) == 0
    result = json.loads(summary.read_text())
    assert result["cases"]["export"]["ended"] == {"kill -9": 2}
    assert state.read_bytes().startswith(lines[0] + lines[1])
    with pytest.raises(SystemExit, match="state of another run"):
        command.main([*words[:5], "2", *words[6:]])


@pytest.mark.parametrize("number", [1, 4], ids=["child", "new Python"])
def test_random_kill_finds_a_fault(workshop: Workshop, number: int) -> None:
    """Somebody's file goes: as if the command had removed it."""
    case = CASES["export"]
    known = workshop.know(case, earlier=True)
    chance = ByChance(workshop, case, known, "seed")
    met = chance.kill(number)
    assert chance.wrong == met["wrong"] == []
    assert met["new"] == (number == 4)
    pace = chance.pace(met["new"])
    assert 0 < pace.first <= pace.last <= pace.end
    (known.before / "notes.txt").rename(known.before / "gone")
    try:
        assert "notes.txt is lost" in chance.kill(number)["wrong"]
    finally:
        (known.before / "gone").rename(known.before / "notes.txt")
