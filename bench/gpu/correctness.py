# SPDX-License-Identifier: Apache-2.0
"""The tests as a stage of run.py: a verdict for every test function, which is about one for every kernel.

A test that ends the process, or loses the device for all that follow it, is blamed alone: the rest runs again without
it.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from journal import Journal, StageFailedError, StageSkippedError

# Bit for bit against the CPU's, and the CPU's against float64.
FILES = ("test_cuda_ops.py", "test_cuda_engine.py", "test_cuda_device.py", "test_ops.py")
LOST = "it is lost to this process"
RESTARTS = 5

_RESULT = re.compile(r"^tests/\S+\.py::(\w+)(?:\[.*\])? (PASSED|FAILED|ERROR|SKIPPED)\b")
_BEGUN = re.compile(r"^tests/\S+\.py::(\w+)")
_REASON = re.compile(r"^(?:FAILED|ERROR) tests/\S+\.py::(\w+)(?:\[.*\])? - (.*)$")


@dataclass
class Verdict:
    """Of a test function: how many of its cases did what, and why the first one failed."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    reason: str = ""


def verdicts(text: str) -> tuple[dict[str, Verdict], str]:
    """(what `pytest -v -rfE` says of every function, the one that was running when it ended, if any)."""
    found: dict[str, Verdict] = {}
    running = ""
    for line in text.splitlines():
        if result := _RESULT.match(line):
            verdict, how = found.setdefault(result.group(1), Verdict()), result.group(2)
            verdict.passed += how == "PASSED"
            verdict.failed += how in ("FAILED", "ERROR")
            verdict.skipped += how == "SKIPPED"
            running = ""
        elif begun := _BEGUN.match(line):
            running = begun.group(1)
        elif (reason := _REASON.match(line)) and reason.group(1) in found:
            found[reason.group(1)].reason = found[reason.group(1)].reason or reason.group(2)
    return found, running


def culprit(found: dict[str, Verdict], running: str) -> str:
    """The function after which nothing can be believed; empty when all can."""
    return next((name for name, verdict in found.items() if LOST in verdict.reason), running)


def run_file(journal: Journal, name: str, end: float, match: str) -> dict[str, Verdict]:
    """The verdicts of one file; those of what could not run any more are missing. end: of time.monotonic()."""
    known: dict[str, Verdict] = {}
    for _ in range(RESTARTS):
        limit = end - time.monotonic()
        command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
        command += ["-o", "addopts="]  # which are strict about plugins that this machine may not have
        command += [f"tests/{name}", *(f"--deselect=tests/{name}::{function}" for function in known)]
        # Wide enough that reasons are not cut.
        ran = journal.run([*command, "-k", match] if match else command, limit, COLUMNS="400")
        found, running = verdicts(ran.text)
        blamed = culprit(found, running)
        for function, verdict in found.items():
            if function == blamed:
                break
            known[function] = verdict
        if blamed:
            known[blamed] = found.get(blamed, Verdict())
            known[blamed].failed += blamed == running
            known[blamed].reason = known[blamed].reason or ran.reason(limit).splitlines()[0]
        elif ran.code not in (0, 1, 5):  # 5: nothing was left, or matched
            known["(the file)"] = Verdict(failed=1, reason=ran.reason(limit))
        if not blamed or ran.code is None:
            break
    return known


def lines(tests: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Of the table: how many are right, and those that are not."""
    failed = {name: verdict for name, verdict in tests.items() if verdict["failed"]}
    right = sum(verdict["passed"] > 0 and not verdict["failed"] for verdict in tests.values())
    cases = sum(verdict["passed"] for verdict in tests.values())
    yield f"correct   {right} of {right + len(failed)} ({cases} cases)"
    for name, verdict in failed.items():
        yield f"WRONG     {name}: {verdict['failed']} of {verdict['failed'] + verdict['passed']}: {verdict['reason']}"


def run(journal: Journal, limit: float, match: str = "") -> dict[str, Any]:
    """Raises StageFailedError when a test fails, with all verdicts, and StageSkippedError without pytest."""
    try:
        import pytest  # noqa: F401
    except ImportError as error:
        raise StageSkippedError("no pytest") from error
    end = time.monotonic() + limit
    tests: dict[str, dict[str, Any]] = {}
    for name in FILES:
        if end - time.monotonic() < 2:
            tests[name] = asdict(Verdict(failed=1, reason="no time left"))
            continue
        for function, verdict in run_file(journal, name, end, match).items():
            tests[f"{name}::{function}"] = asdict(verdict)
    failed = [name for name, verdict in tests.items() if verdict["failed"]]
    if failed:
        raise StageFailedError(f"{len(failed)} of {len(tests)}: {', '.join(failed)}", {"tests": tests})
    if not any(verdict["passed"] for verdict in tests.values()):
        raise StageFailedError("no test ran", {"tests": tests})
    return {"tests": tests}
