# SPDX-License-Identifier: Apache-2.0
"""kill -9 at a random moment of the real command, in a process group of its own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from kills.cases import Case
from kills.children import Ended
from kills.points import Known, Workshop
from kills.promise import temporary_files, tree

_TRIES = 20
_TICK = 0.001
_SECONDS = 300
_OF_ALL = 4  # every fourth kill falls into the whole time, the others between the first and the last change seen


class Pace(NamedTuple):
    """Seconds from the start of a command to its first change of the disk, to its last and to its end."""

    first: float
    last: float
    end: float


def measure(shop: Workshop, case: Case, known: Known) -> tuple[Pace, list[str]]:
    """Runs the command once as a process; also what differs from the run in a child of this one."""
    shop.reset(known)
    begun = time.monotonic()
    with _Process(case, shop) as process:
        changes = list(process.changes(begun + _SECONDS))
        ended = process.finish()
    end = time.monotonic() - begun
    found = [] if ended.code == known.code else [f"it ended with {ended.code}: {ended.words[-500:]}"]
    return Pace(changes[0] - begun, changes[-1] - begun, end), found + known.promise.broken_in_the_end(shop.work)


def kill_by_chance(shop: Workshop, case: Case, known: Known, pace: Pace, seed: str, number: int) -> dict[str, Any]:
    """One kill, tried until it comes before the end, and the same command again. What was met, and what is wrong."""
    drawn = random.Random(f"{seed} {case.name} {number}")
    for _ in range(_TRIES):
        shop.reset(known)
        before = tree(shop.work)
        among_changes, part = number % _OF_ALL > 0, drawn.random()
        begun = time.monotonic()
        with _Process(case, shop) as process:
            if among_changes:
                next(process.changes(begun + _SECONDS), None)
                time.sleep(part * (pace.last - pace.first))
            else:
                process.wait_until(begun + part * pace.end)
            seconds = time.monotonic() - begun
            killed = process.kill()
        if killed:
            break
    else:
        raise AssertionError(f"{case.name}: ended {_TRIES} times before it was killed")
    now, half = tree(shop.work), temporary_files(shop.work)
    found = known.promise.broken_by(shop.work)
    with _Process(case, shop) as process:
        again = process.finish()
    if again.code != known.code:
        found.append(f"again it ended with {again.code}: {again.words[-500:]}")
    return {
        "seconds": round(seconds, 3),
        "changed": now != before,
        "complete": known.promise.is_whole(now),
        "temporary_files": len(half),
        "wrong": found + known.promise.broken_in_the_end(shop.work),
    }


class _Process:
    """The command line in a process group of its own; none of the group is left at the end."""

    def __init__(self, case: Case, shop: Workshop) -> None:
        self._root = shop.work
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(shop.work.parent / "cache")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cnllama", *case.words(shop.inputs, shop.work)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._errors.close()

    def changes(self, deadline: float) -> Iterator[float]:
        """The times at which something under the place is seen to have changed, until the process ends."""
        before = _glance(self._root)
        while self._process.poll() is None and time.monotonic() < deadline:
            now = _glance(self._root)
            if now != before:
                yield time.monotonic()
            before = now
            time.sleep(_TICK)

    def wait_until(self, moment: float) -> None:
        """Until then, or the end of the process."""
        while self._process.poll() is None and time.monotonic() < moment:
            time.sleep(_TICK)

    def kill(self) -> bool:
        """kill -9 of the whole group; whether the command was still at work."""
        running = self._process.poll() is None
        if running:
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait() == -signal.SIGKILL and running

    def finish(self) -> Ended:
        """How it ends by itself."""
        code = self._process.wait(_SECONDS)
        self._errors.seek(0)
        return Ended(code, self._errors.read().decode("utf-8", "replace"))


def _glance(root: Path) -> list[tuple[str, int]]:
    """Names and times of change: cheap enough to be asked a thousand times a second."""
    found = []
    for entry in os.scandir(root):
        try:
            found.append((entry.name, entry.stat(follow_symlinks=False).st_mtime_ns))
        except OSError:
            continue
    return sorted(found)
