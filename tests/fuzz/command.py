# SPDX-License-Identifier: Apache-2.0
"""The command line of the fuzzers."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzz import state
from fuzz.case import clear
from fuzz.engine import mutant_of
from fuzz.faults import FAULTS
from fuzz.targets import TARGETS
from fuzz.workers import Workplace, find_faults, in_child, replay, run_slices

FAULT_LIMIT = 20_000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, replays or checks the fuzzers. Returns 0 when nothing was found and all that was asked for was run."""
    args = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what lies in memory is removed
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        place = Workplace(folder, args.seed)
        if args.replay:
            return _replay(place, args.replay)
        return _faults(place, args) if args.faults is not None else _run(place, args)
    finally:
        clear(folder)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzz", description="Gives damaged inputs of every kind to cnllama.")
    add = parser.add_argument
    add("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    add("--iterations", type=int, default=20_000, metavar="N", help="inputs in all (default 20000)")
    add("--seconds", type=float, default=1e9, metavar="S", help="fail when they take longer")
    add("--seed", default=commit() or "0", metavar="TEXT", help="decides the inputs (default: the commit)")
    add("--jobs", type=int, default=1, metavar="N", help="processes at a time")
    add("--part", default="1/1", metavar="K/N", help="only every Nth slice, from the Kth on: to share the work")
    add("--state", type=Path, metavar="FILE", help="where to keep what was done; the same command goes on there")
    add("--keep", type=Path, metavar="DIR", help="write an input for every fault that was found, for --replay")
    add("--summary", type=Path, metavar="FILE", help="write counts and findings as JSON")
    add(
        "--with-state",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="count other parts' states in the summary",
    )
    add("--replay", type=Path, metavar="DIR", help="run one kept input again")
    add("--faults", nargs="*", metavar="NAME", help="put faults back and say after how many inputs each is found")
    args = parser.parse_args(argv)
    args.part = tuple(map(int, args.part.split("/")))
    return args


def commit(*options: str) -> str:
    """The commit of this tree, "" outside of a repository. options: "--dirty" marks a changed one."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", *options]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _run(place: Workplace, args: argparse.Namespace) -> int:
    names = [name for name in TARGETS if name in args.target]
    facts = {"seed": args.seed, "iterations": args.iterations, "fuzzers": names}
    version = commit("--dirty")
    kept = state.State(args.state, facts)
    parts = kept.missing(state.plan(names, args.iterations, args.part))
    place.prepare(names)
    start = time.monotonic()
    for part in run_slices(place, parts, args.jobs, start + args.seconds):
        part.version = version
        kept.add(part)
        if args.state:
            print(f"{part.target} {part.begin:,} to {part.end:,}: {_shown(part.counts)}", flush=True)
    done = list(kept.done.values())
    for other in args.with_state:
        done += state.State(other, facts).done.values()
    result = state.summary(facts, done)
    if args.summary:
        args.summary.write_text(json.dumps(result, indent=1) + "\n", encoding="ascii")
    if args.keep:
        _keep(place, args.keep, result["findings"])
    return _report(result, time.monotonic() - start, len(kept.missing(parts)))


def _report(result: dict[str, Any], seconds: float, missing: int) -> int:
    for found in result["findings"]:
        print(f"\n{found['target']} {found['number']} ({found['times']} times) {found['key']}\n  {found['text'][:500]}")
        print("".join(f"  < {step}\n" for step in found["steps"]), end="")
    print()
    for name, entry in result["targets"].items():
        rate = f"{entry['inputs_per_cpu_s']:>5} a CPU second"
        print(f"{name:<11} {entry['inputs']:>9,} inputs, {rate}: {_shown(entry['outcomes'])}")
    faults = len(result["findings"])
    print(f"{result['inputs']:,} inputs of seed {result['seed'][:12]} in {seconds:.0f} s: {faults} faults")
    if missing:
        print(f"{missing} slices were not run in time", file=sys.stderr)
    return int(bool(faults or missing))


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


def _keep(place: Workplace, folder: Path, findings: Sequence[dict[str, Any]]) -> None:
    def write() -> None:
        for finding in findings:
            target = TARGETS[finding["target"]](place.seeds(finding["target"]))
            case = mutant_of(target, place.seed, finding["number"])
            case.keep(folder / f"{finding['target']}-{finding['number']}", {"seed": place.seed, **finding})

    if in_child(write):
        raise SystemExit(f"{folder}: the inputs could not be written")


def _replay(place: Workplace, folder: Path) -> int:
    facts = json.loads((folder / "case.json").read_text(encoding="ascii"))
    place.prepare([facts["target"]])
    case, outcome = replay(place, folder)
    print("\n".join(case.steps))
    print(f"{outcome.kind} {outcome.where}\n{outcome.text}\n{outcome.trace}".encode("utf-8", "replace").decode())
    return int(outcome.is_finding)


def _faults(place: Workplace, args: argparse.Namespace) -> int:
    chosen = args.faults or [name for name, fault in FAULTS.items() if fault.target in args.target]
    place.prepare(sorted({FAULTS[name].target for name in chosen}))
    rows: list[dict[str, Any]] = []
    for name, count, key in find_faults(place, chosen, FAULT_LIMIT, args.jobs):
        rows.append({"fault": name, "found": bool(key), "after_inputs": count, "as": key})
        how = f"after {count:,} inputs: {key[:80]}" if key else f"NOT FOUND in {count:,} inputs"
        print(f"{name:<56} {how}", flush=True)
    if args.summary:
        text = json.dumps({"seed": place.seed, "commit": commit(), "faults_put_back": rows}, indent=1)
        args.summary.write_text(text + "\n", encoding="ascii")
    return int(not all(row["found"] for row in rows))
