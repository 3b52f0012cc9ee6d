# SPDX-License-Identifier: Apache-2.0
"""Child processes that take Ctrl-C, also where these tests run in the background of a script, which ignores it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import Any


def heeds_interrupts() -> None:
    """For preexec_fn: the child's SIGINT is what a terminal's would be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def python(*args: object, **options: Any) -> subprocess.Popen[bytes]:
    """Python in a child; stdin, stdout and stderr are pipes unless `options` of Popen say otherwise."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, *(argument if isinstance(argument, bytes) else str(argument) for argument in args)]
    return subprocess.Popen(command, **pipes | {"preexec_fn": heeds_interrupts} | options)


def start(*args: object, **options: Any) -> subprocess.Popen[bytes]:
    """The command line in a child."""
    return python("-m", "cnllama", *args, **options)


def wait(process: subprocess.Popen[bytes], keys: bytes | None = None, seconds: float = 60) -> tuple[bytes, bytes]:
    """Everything that the child still writes; it is killed when it takes too long."""
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        return process.communicate(keys)
    finally:
        watchdog.cancel()
