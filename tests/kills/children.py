# SPDX-License-Identifier: Apache-2.0
"""A command line in a forked child, which spares the imports; something happens before a chosen change of the disk."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnllama import files

Operation = Callable[[str, Path], None]
KILLED = -signal.SIGKILL
_SECONDS = 120
_WRITERS = ("files.py", "ownership.py", "container.py", "children.py")


@dataclass(frozen=True)
class Ended:
    """code: the exit code, or minus the signal. words: what was written to stderr."""

    code: int
    words: str


@dataclass(frozen=True)
class Change:
    """kind and path: what files._operation is told; numbers in names are left out. place: which code asked for it."""

    kind: str
    path: str
    place: str


class Forked:
    """The command line in a child with this hook; used like subprocess.Popen. errors: its stderr."""

    def __init__(
        self, words: Sequence[str], errors: int, operation: Operation, at_end: Callable[[], None] = lambda: None
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _be_the_child(words, operation, at_end, errors)

    def poll(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """At its end. A child ends itself after some time."""
        code = self._wait(0)
        assert code is not None
        return code

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode


def run(words: Sequence[str], operation: Operation, at_end: Callable[[], None] = lambda: None) -> Ended:
    """Runs the command line with this hook in a child."""
    with tempfile.TemporaryFile() as errors:
        code = Forked(words, errors.fileno(), operation, at_end).wait()
        errors.seek(0)
        return Ended(code, errors.read().decode("utf-8", "replace"))


def _be_the_child(words: Sequence[str], operation: Operation, at_end: Callable[[], None], errors: int) -> None:
    code = 99
    try:
        os.setsid()  # a group of its own, with the processes that it starts
        signal.alarm(_SECONDS)
        null = os.open(os.devnull, os.O_RDWR)
        for fd, given in ((0, null), (1, null), (2, errors)):
            os.dup2(given, fd)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.fsync = lambda _: None  # what survives a kill does not depend on it, and it takes most of the time
        files._operation = lambda kind, path: operation(kind, Path(path))
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())  # its own is shared with this process and with the children that are killed
        from cnllama.cli.main import main

        code = main(words)
        files._operation = lambda kind, path: None
        at_end()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm_up() -> None:
    """Imports what the commands import, for its children; libraries compute in one thread, as forks want it."""
    import torch

    ours = ("create", "merge", "pretrain", "recipe", "resize", "sft", "tokenizer_train")
    others = ("transformers.trainer", "peft", "matplotlib.figure", "cnllama.convert.pack")
    for module in (*(f"cnllama.adapt.{name}" for name in ours), *others):
        importlib.import_module(module)
    torch.set_num_threads(1)


def nothing(kind: str, path: Path) -> None:
    """The hook of a run that nobody ends."""


def before_number(number: int, act: Operation) -> Operation:
    """A hook that calls `act` before change `number`, counted from 0."""
    left = number

    def operation(kind: str, path: Path) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            act(kind, path)

    return operation


def kill(kind: str, path: Path) -> None:
    """Ends this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def place() -> str:
    """The functions of cnllama that lead to the change that is about to be made, without the writers'."""
    names = []
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if re.search(r"/(cnllama|convert)/", file) and not file.endswith(_WRITERS):
            names.append(f"{os.path.basename(file)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(names[:3])


def pattern(path: Path, root: Path) -> str:
    """The name of a file without what differs from run to run and from file to file."""
    name = re.sub(r"\.cnllama-[0-9]+-[0-9a-f]{8}\.", ".cnllama-*.", os.path.relpath(path, root))
    return re.sub(r"[0-9]+", "#", name)


def record(words: Sequence[str], root: Path, seen: Callable[[], Any]) -> tuple[Ended, list[Change], Any]:
    """Runs to the end; returns how it went, all changes, and what the last call of `seen` returned.

    `seen` is called before every change and after the last.
    """
    with tempfile.NamedTemporaryFile() as file:
        found: list[tuple[str, str, str]] = []

        def operation(kind: str, path: Path) -> None:
            seen()
            found.append((kind, pattern(path, root), place()))

        def write() -> None:
            Path(file.name).write_text(json.dumps([found, seen()]))

        ended = run(words, operation, write)
        if ended.code < 0 or not os.path.getsize(file.name):
            raise AssertionError(f"{words}: ended with {ended.code}: {ended.words[-3000:]}")
        changes, last = json.loads(Path(file.name).read_text())
        return ended, [Change(*change) for change in changes], last
