# SPDX-License-Identifier: Apache-2.0
"""The fuzzers, a few hundred inputs of each kind. CI runs 20,000, and more of packed files under AddressSanitizer."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fuzz import state
from fuzz.case import Case, Special
from fuzz.engine import judge, mutant_of
from fuzz.targets import TARGETS
from fuzz.workers import Workplace

FUZZ = Path(__file__).with_name("fuzz")
QUICK = ("cnl", "checkpoint", "adapter", "gguf")  # whose seeds are made in a moment


def fuzz(*args: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a crash must fail the test, not end the run."""
    return subprocess.run(
        [sys.executable, str(FUZZ), *map(str, args)], capture_output=True, encoding="utf-8", timeout=500, check=False
    )


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What 900 inputs of all targets gave."""
    file = tmp_path_factory.mktemp("fuzz") / "summary.json"
    done = fuzz("--iterations", 900, "--seed", 1, "--summary", file)
    assert file.exists(), done.stdout[-1000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(file.read_text(encoding="ascii"))
    return found


def test_every_target_is_reached(summary: dict[str, Any]) -> None:
    assert summary["inputs"] >= 900
    assert set(summary["targets"]) == set(TARGETS)
    for name, entry in summary["targets"].items():
        assert entry["outcomes"].get("accepted", 0) > 5, f"{name}: {entry['outcomes']}"
        if name != "args":  # whose refusals are exit codes
            assert entry["outcomes"].get("refused", 0) > 5, f"{name}: {entry['outcomes']}"


def test_nothing_is_found(summary: dict[str, Any]) -> None:
    assert not summary["findings"], json.dumps(summary["findings"], indent=1)[:5000]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    made = Workplace(tmp_path_factory.mktemp("workplace"), "5")
    made.prepare(QUICK)
    return made


@pytest.mark.parametrize("name", ["checkpoint", "adapter"])
def test_sound_files_are_accepted(place: Workplace, name: str, tmp_path: Path) -> None:
    """Mutants of a file that is refused as it is would all be refused for the same reason."""
    target = TARGETS[name](place.seeds(name))
    for variant in sorted(path.name for path in place.seeds(name).iterdir()):
        call = target.mutant(random.Random(1)).call | {"how": "plan", "name": {"checkpoint": "base"}.get(name, "lora")}
        case = Case(variant, {}, call | {"tokenizer": variant == "json", "twice": False})
        outcome = judge(target, case, tmp_path / "case")
        assert outcome.kind == "accepted", f"{variant}: {outcome.text}"


@pytest.mark.parametrize("name", QUICK)
def test_a_mutant_depends_on_seed_and_number_alone(place: Workplace, name: str) -> None:
    target = TARGETS[name](place.seeds(name))
    first = [mutant_of(target, "5", number) for number in range(40)]
    again = TARGETS[name](place.seeds(name))
    assert [mutant_of(again, "5", number) for number in reversed(range(40))][::-1] == first
    assert mutant_of(target, "6", 0) != first[0]
    assert sum(bool(case.files) for case in first) > 35


def test_a_kept_input_is_the_same_again(tmp_path: Path) -> None:
    files = {"a\n\udcff": b"\x00\xff", "b/c": Special("fifo"), "d": None}
    case = Case("all", dict(files), {"how": "x", "n": 1}, ["\ud800"])
    case.keep(tmp_path / "kept", {"target": "cnl"})
    assert Case.read(tmp_path / "kept") == (case, json.loads((tmp_path / "kept" / "case.json").read_text()))


def test_slices_are_every_input_once() -> None:
    whole = state.plan(list(TARGETS), 10_000)
    parts = [state.plan(list(TARGETS), 10_000, (k, 3)) for k in (1, 2, 3)]
    spans = sorted((part.target, part.begin, part.end) for part in whole)
    assert sorted((part.target, part.begin, part.end) for group in parts for part in group) == spans
    assert sum(end - begin for _, begin, end in spans) >= 10_000
    for (name, _, end), (other, begin, _) in pairwise(spans):
        assert begin == (end if name == other else 0)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Its summary is that of a run that nobody disturbed."""
    options = ("--target", "gguf", "--iterations", 1500, "--seed", 7)
    command = [sys.executable, FUZZ, *options, "--state", tmp_path / "state"]
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len((tmp_path / "state").read_bytes().splitlines() if (tmp_path / "state").exists() else []) < 4:
        time.sleep(0.01)
        assert running.poll() is None, "it ended before it could be killed"
    running.send_signal(signal.SIGKILL)
    running.wait()
    with (tmp_path / "state").open("ab") as file:
        file.write(b'{"target": "gguf", "begin"')  # as a kill in the middle of a line leaves it
    before = len(state.read_state(tmp_path / "state"))
    fuzz(*options, "--state", tmp_path / "state", "--summary", tmp_path / "killed.json")
    fuzz(*options, "--summary", tmp_path / "whole.json")
    killed, whole = (json.loads((tmp_path / name).read_text()) for name in ("killed.json", "whole.json"))
    assert 4 <= before < len(state.read_state(tmp_path / "state"))
    for result in (killed, whole):
        for entry in result["targets"].values():
            del entry["cpu_seconds"], entry["inputs_per_cpu_s"]
        for finding in result["findings"]:
            del finding["text"], finding["trace"]  # they name folders
    assert killed == whole
    assert whole["inputs"] == 1500
    other = fuzz("--target", "gguf", "--iterations", 1500, "--seed", 8, "--state", tmp_path / "state")
    assert other.returncode == 1
    assert "another run" in other.stderr


def test_mutants_of_json_are_of_every_kind() -> None:
    """Numbers that json.dumps cannot write, keys twice, half surrogates and no JSON at all must come out as meant."""
    from fuzz import mutate_json

    rng = random.Random(1)
    texts = [
        mutate_json.dump(mutate_json.mutate(rng, {"a": 1, "b": {"c": "d", "e": [1, 2.5]}})[0]) for _ in range(2000)
    ]
    for wanted in (b"NaN", b"1e999", b"9" * 5000, b"\\ud800", b"[" * 900, b'"a":1,"a":', b"\\u001b[", b"0x10", b"true"):
        assert any(wanted in text for text in texts), wanted[:20]
    assert not any(b"raw:" in text or b"twin" in text for text in texts)
