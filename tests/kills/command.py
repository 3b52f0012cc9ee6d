# SPDX-License-Identifier: Apache-2.0
"""The command line of the kills."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fuzz.command import commit
from fuzz.state import read_state

from kills.by_chance import ByChance
from kills.cases import CASES, Case, make_inputs
from kills.children import warm_up
from kills.points import ERRORS, Workshop, fail_at, kill_at

_IN_ALL = 300
_EVERY = "every change of the disk"
Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when all that was asked for was done and nothing was wrong."""
    args = _parse(argv)
    facts = {"mode": _EVERY if args.every else "random", "seed": args.seed, "kills": args.kills}
    done = _State(args.state, facts)
    folder = Path(tempfile.mkdtemp(prefix="kills-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        warm_up()
        shop = Workshop(make_inputs(folder / "inputs"), folder / "place")
        for name in args.case:
            for earlier in (False, True):
                _end_runs(shop, CASES[name], earlier, done, facts)
    finally:
        shutil.rmtree(folder)
    result = _summary(facts, done.records)
    if args.summary:
        args.summary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{result['runs']} runs were ended, {len(result['wrong'])} broke the promise")
    return int(bool(result["wrong"]))


def _end_runs(shop: Workshop, case: Case, earlier: bool, done: _State, facts: Record) -> None:
    begun, count = time.monotonic(), 0
    for record in (_every if facts["mode"] == _EVERY else _by_chance)(shop, case, earlier, done, facts):
        count += 1
        for line in record["wrong"]:
            print(f"  {case.name} {record['what']} {record['number']}: {line}", flush=True)
    where = ", over an earlier result" if earlier else ""
    print(f"{case.name}{where}: {count} in {time.monotonic() - begun:.0f} s", flush=True)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kills", description="Ends commands while they write; runs them again.")
    add = parser.add_argument
    add("--case", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    add("--kills", type=int, default=_IN_ALL, metavar="N", help=f"kill -9 at random moments (default {_IN_ALL})")
    add("--every", action="store_true", help="instead: a kill and all errors at every change of the disk")
    add("--seed", default=commit() or "0", metavar="TEXT", help="decides the moments (default: the commit)")
    add("--state", type=Path, metavar="FILE", help="where to keep what was done; the same command goes on there")
    add("--summary", type=Path, metavar="FILE", help="write counts and findings as JSON")
    return parser.parse_args(argv)


class _State:
    """What was done so far, as JSON lines; a run that was ended itself goes on after them."""

    def __init__(self, path: Path | None, facts: Record) -> None:
        self._path = path
        found = read_state(path) if path and path.exists() else []
        if found and found[0] != facts:
            raise SystemExit(f"{path}: this is the state of another run, {found[0]}; this one is {facts}")
        self.records = found[1:]
        self._known = {_key(record) for record in self.records}
        if not found:
            self._append(facts)

    def has(self, record: Record) -> bool:
        """Whether a record of the same case, place and number is kept."""
        return _key(record) in self._known

    def add(self, record: Record) -> Record:
        """Keeps it."""
        self._append(record)
        self.records.append(record)
        self._known.add(_key(record))
        return record

    def _append(self, record: Record) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _key(record: Record) -> tuple[Any, ...]:
    return record["case"], record["earlier"], record["what"], record["number"]


def _by_chance(shop: Workshop, case: Case, earlier: bool, done: _State, facts: Record) -> Iterator[Record]:
    """Half of the kills of a case meet an earlier result, where that is overwritten."""
    count = -(-facts["kills"] * case.kills // _IN_ALL)
    split = 0 if case.refuses else count // 2
    numbers = range(split) if earlier else range(split, count)
    keys = [{"case": case.name, "earlier": earlier, "what": "kill -9", "number": number} for number in numbers]
    missing = [key for key in keys if not done.has(key)]
    if not missing:
        return
    known = shop.know(case, earlier)
    chance = ByChance(shop, case, known, facts["seed"])
    for key in missing:
        met = chance.kill(key["number"])
        met["wrong"] += chance.wrong
        yield done.add(key | met)


def _every(shop: Workshop, case: Case, earlier: bool, done: _State, facts: Record) -> Iterator[Record]:
    """A kill before every change of the disk, and all errors at it."""
    known = shop.know(case, earlier)
    for number, change in enumerate(known.changes):
        codes = [code for code, kinds in ERRORS.items() if change.kind in kinds]
        for what in ("kill", *(errno.errorcode[code] for code in codes)):
            key = {"case": case.name, "earlier": earlier, "what": what, "number": number}
            if done.has(key):
                continue
            if what == "kill":
                wrong = kill_at(shop, case, known, number)
            else:
                wrong = fail_at(shop, case, known, number, getattr(errno, what))
            yield done.add(key | {"wrong": wrong})


def _summary(facts: Record, records: Sequence[Record]) -> Record:
    """Counts by case, and every run in which the promise was broken."""
    cases: dict[str, Record] = {}
    for name in CASES:
        of_case = [record for record in records if record["case"] == name]
        if not of_case:
            continue
        cases[name] = {"ended": dict(Counter(record["what"] for record in of_case))}
        if "seconds" in of_case[0]:
            cases[name] |= {
                "of_a_new_python": sum(record["new"] for record in of_case),
                "over_an_earlier_result": sum(record["earlier"] for record in of_case),
                "before_the_first_change": sum(not record["changed"] for record in of_case),
                "after_the_last": sum(record["complete"] for record in of_case),
                "with_temporary_files": sum(record["temporary_files"] > 0 for record in of_case),
            }
    wrong = [record for record in records if record["wrong"]]
    return facts | {"commit": commit(), "runs": len(records), "cases": cases, "wrong": wrong}
