# SPDX-License-Identifier: Apache-2.0
"""Time and memory that one input may take."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 5.0
SECOND_CHANCE = 12  # times as long may an input wait, on a machine that is busy, for its SECONDS of processor time
MEMORY = 1 << 30
FILE_SIZE = 1 << 28  # no input asks for a larger output
_SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")  # it takes address space for itself, and ends without


class HangError(BaseException):
    """The input took longer than it may. No Exception: the product must not take it for one of its own."""


_armed = False


def _ring(number: int, frame: FrameType | None) -> None:
    if _armed:
        raise HangError


def prepare() -> None:
    """Once in a process that runs inputs."""
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, _ring)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, hard))


@contextmanager
def limited(times: int = 1) -> Iterator[None]:
    """Raises HangError in the block after `times` SECONDS, and after SECONDS of processor time; allocating over MEMORY
    bytes fails in it.
    """
    global _armed  # noqa: PLW0603
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if not _SANITIZED:
        resource.setrlimit(resource.RLIMIT_AS, (_virtual_bytes() + MEMORY, hard))
    _armed = True
    for timer, seconds in ((signal.ITIMER_REAL, times * SECONDS), (signal.ITIMER_PROF, SECONDS)):
        signal.setitimer(timer, seconds, 1.0)  # again and again: a callback may swallow the first
    try:
        yield
    finally:
        _armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
