# SPDX-License-Identifier: Apache-2.0
"""What a run has done so far, as JSON lines: killed at any moment, it goes on with the slices that are missing."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fuzz.engine import FINDINGS
from fuzz.targets import TARGETS
from fuzz.workers import Finding, Slice


def plan(names: Sequence[str], iterations: int, part: tuple[int, int] = (1, 1)) -> list[Slice]:
    """Slices of all targets, so many inputs in all by their shares, in turn. part: (2, 3) is the second of three."""
    total = sum(TARGETS[name].share for name in names)
    size = min(2000, max(50, iterations // 100))
    lists = []
    for name in names:
        count = -(-iterations * TARGETS[name].share // total)
        lists.append([Slice(name, begin, min(begin + size, count)) for begin in range(0, count, size)])
    longest = max(map(len, lists))
    mixed = [
        slices[i * len(slices) // longest] for i in range(longest) for slices in lists if _due(i, len(slices), longest)
    ]
    return mixed[part[0] - 1 :: part[1]]


def _due(i: int, length: int, longest: int) -> bool:
    """Whether a shorter list has its next item at step i of the longest."""
    return i == 0 or i * length // longest != (i - 1) * length // longest


class State:
    """The file of a run. facts: what all of its slices share; another run's file is refused."""

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self._path = path
        self.done: dict[tuple[str, int], Slice] = {}
        records = read_state(path) if path and path.exists() else []
        if records and records[0] != facts:
            raise SystemExit(f"{path}: this is the state of another run, {records[0]}; this one is {facts}")
        for record in records[1:]:
            self._take(record)
        if path and not records:
            self._append(facts)

    def missing(self, parts: Iterable[Slice]) -> list[Slice]:
        """The slices that have still to be run."""
        return [part for part in parts if (part.target, part.begin) not in self.done]

    def add(self, part: Slice) -> None:
        """Keeps a slice that has run."""
        findings = [finding.to_dict() for finding in part.findings]
        record = {"target": part.target, "begin": part.begin, "end": part.end, "counts": dict(part.counts)}
        record |= {"seconds": round(part.seconds, 2), "findings": findings, "commit": part.version}
        self._append(record)
        self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        findings = [Finding(**finding) for finding in record["findings"]]
        span = (record["target"], record["begin"], record["end"])
        part = Slice(*span, Counter(record["counts"]), findings, record["seconds"], record["commit"])
        self.done[part.target, part.begin] = part

    def _append(self, record: dict[str, Any]) -> None:
        if self._path is None:
            return
        with self._path.open("a", encoding="ascii") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_state(path: Path) -> list[dict[str, Any]]:
    """The facts, then the slices; a last line that a kill cut short is left out, and removed."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def summary(facts: dict[str, Any], parts: Iterable[Slice]) -> dict[str, Any]:
    """Inputs by commit, target and outcome, and every fault once with the first input that shows it."""
    parts = sorted(parts, key=lambda part: (list(TARGETS).index(part.target), part.begin))
    targets: dict[str, dict[str, Any]] = {}
    commits: Counter[str] = Counter()
    for part in parts:
        commits[part.version] += sum(part.counts.values())
        entry = targets.setdefault(part.target, {"inputs": 0, "cpu_seconds": 0.0, "outcomes": Counter()})
        entry["inputs"] += sum(part.counts.values())
        entry["cpu_seconds"] += part.seconds
        entry["outcomes"] += part.counts
    for entry in targets.values():
        entry["inputs_per_cpu_s"] = round(entry["inputs"] / max(entry["cpu_seconds"], 1e-9))
        entry["cpu_seconds"] = round(entry["cpu_seconds"], 1)
        entry["outcomes"] = dict(sorted(entry["outcomes"].items()))
    found = distinct(finding for part in parts for finding in part.findings)
    inputs = sum(entry["inputs"] for entry in targets.values())
    kinds = {kind: sum(t["outcomes"].get(kind, 0) for t in targets.values()) for kind in FINDINGS}
    totals = {"inputs": inputs, "inputs_by_commit": dict(commits), "outcomes_to_mend": kinds}
    return facts | totals | {"targets": targets, "findings": found}


def distinct(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Every fault once, shown by the input that was changed least, with how often it was met."""
    best: dict[tuple[str, str], Finding] = {}
    times: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        key = (finding.target, finding.key)
        times[key] += 1
        if key not in best or _simple(finding) < _simple(best[key]):
            best[key] = finding
    return [{"times": times[key], **finding.to_dict()} for key, finding in sorted(best.items())]


def _simple(finding: Finding) -> tuple[int, int, int]:
    return len(finding.steps), sum(map(len, finding.steps)), finding.number
