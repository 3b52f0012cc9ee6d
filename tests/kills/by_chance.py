# SPDX-License-Identifier: Apache-2.0
"""kill -9 from outside at a random moment of a command, in a process group of its own.

Every fourth command is a new Python, killed at any moment from its start on. The others are children of this process,
in which everything is imported: they are killed between the first and the last change of the disk that was seen.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from kills.cases import Case
from kills.children import Ended, Forked, nothing
from kills.points import Known, Workshop
from kills.promise import temporary_files, tree

_TRIES = 20
_TICK = 0.001
_SECONDS = 300
_NEW = 4


class Pace(NamedTuple):
    """Seconds from the start of a command to its first change of the disk, to its last and to its end."""

    first: float
    last: float
    end: float


def measure(shop: Workshop, case: Case, known: Known, new: bool) -> tuple[Pace, list[str]]:
    """Runs the command once; also what differs from the first run. new: as a new Python."""
    shop.reset(known)
    begun = time.monotonic()
    with _Process(case, shop, new) as process:
        changes = list(process.changes(begun + _SECONDS))
        ended = process.finish()
    end = time.monotonic() - begun
    found = [] if ended.code == known.code else [f"it ended with {ended.code}: {ended.words[-500:]}"]
    found += known.promise.broken_in_the_end(shop.work)
    return Pace(min(changes, default=begun) - begun, max(changes, default=begun) - begun, end), found


class ByChance:
    """Random kills of a case. seed: decides the moments. wrong: with runs that nobody ended."""

    def __init__(self, shop: Workshop, case: Case, known: Known, seed: str) -> None:
        self._shop, self._case, self._known, self._seed = shop, case, known, seed
        self._paces: dict[bool, Pace] = {}
        self.wrong: list[str] = []

    def pace(self, new: bool) -> Pace:
        """How fast it is here; measured when it is first asked for."""
        if new not in self._paces:
            self._paces[new], wrong = measure(self._shop, self._case, self._known, new)
            self.wrong += wrong
        return self._paces[new]

    def kill(self, number: int) -> dict[str, Any]:
        """A kill, tried until it comes before the end, and the same command again. What was met, and what is wrong."""
        new = number % _NEW == 0
        drawn = random.Random(f"{self._seed} {self._case.name} {number}")
        seconds = next(filter(None, (self._kill_once(new, drawn.random()) for _ in range(_TRIES))))
        now, promise, work = tree(self._shop.work), self._known.promise, self._shop.work
        half, found = temporary_files(work), promise.broken_by(work)
        with _Process(self._case, self._shop, new) as process:
            again = process.finish()
        if again.code != self._known.code:
            found.append(f"again it ended with {again.code}: {again.words[-500:]}")
        return {
            "new": new,
            "seconds": round(seconds, 3),
            "changed": now != promise.before or bool(half),
            "complete": promise.is_whole(now) and not half,
            "temporary_files": len(half),
            "wrong": found + promise.broken_in_the_end(work),
        }

    def _kill_once(self, new: bool, part: float) -> float | None:
        """After how many seconds it was killed; None when it had ended."""
        pace = self.pace(new)
        self._shop.reset(self._known)
        begun = time.monotonic()
        with _Process(self._case, self._shop, new) as process:
            if new:
                process.wait_until(begun + part * pace.end)
            else:
                next(process.changes(begun + _SECONDS), None)
                time.sleep(part * (pace.last - pace.first))
            return time.monotonic() - begun if process.kill() else None


class _Process:
    """The command line in a process group of its own; none of the group is left at the end."""

    def __init__(self, case: Case, shop: Workshop, new: bool) -> None:
        self._root = shop.work
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        words = case.words(shop.inputs, shop.work)
        self._process: subprocess.Popen[bytes] | Forked
        if not new:
            self._process = Forked(words, self._errors.fileno(), nothing)
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cnllama", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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
            with suppress(ProcessLookupError):  # a child that has no group of its own yet, or an end just now
                os.killpg(self._process.pid, signal.SIGKILL)
            os.kill(self._process.pid, signal.SIGKILL)
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
