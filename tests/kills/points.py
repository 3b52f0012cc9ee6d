# SPDX-License-Identifier: Apache-2.0
"""A case in a place of its own: run once to learn what it does, then ended before one change after the other."""

from __future__ import annotations

import errno
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kills import children
from kills.cases import Case
from kills.children import Change, Ended
from kills.promise import Promise, temporary_files, tree

MOST = 60  # points of a command at which a test ends it
_SEED = 20


@dataclass(frozen=True)
class Known:
    """What a run that nobody ends does: its exit code, its changes of the disk, and what must hold."""

    code: int
    changes: list[Change]
    promise: Promise


class Workshop:
    """`folder` holds the inputs and one directory in which every run of a case works, under the same name each time."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        self.inputs, self.work, self._kept = inputs, folder / "work", folder / "before"
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self, case: Case, earlier: str | None = None) -> Known:
        """Fills the place with other people's files and, with these options, an earlier result; then runs to the end."""
        for path in (self.work, self._kept):
            shutil.rmtree(path, ignore_errors=True)
        self.work.mkdir()
        case.put_foreign_files(self.work)
        foreign = set(tree(self.work))
        if earlier is not None:
            ended = children.run(case.words(self.inputs, self.work, earlier), children.nothing)
            assert ended.code == 0, ended.words
        shutil.copytree(self.work, self._kept, copy_function=shutil.copy2)
        before = tree(self.work)
        passing: dict[str, set[str]] = {}
        gone: set[str] = set()

        def look() -> list[Any]:
            now = tree(self.work)
            for name, held in now.items():
                passing.setdefault(name, set()).add(held)
            gone.update(before.keys() - now.keys())
            return [{name: sorted(held) for name, held in passing.items()}, sorted(gone)]

        ended, changes, (seen, left) = children.record(case.words(self.inputs, self.work), self.work, look)
        discarded = set(left) - foreign if case.discards else set()
        promise = Promise(before, {name: set(held) for name, held in seen.items()}, tree(self.work), discarded)
        return Known(ended.code, changes, promise)

    def reset(self) -> None:
        """The place as it was before the command."""
        shutil.rmtree(self.work)
        shutil.copytree(self._kept, self.work, copy_function=shutil.copy2)

    def run(self, case: Case, operation: children.Operation = children.nothing) -> Ended:
        """The command in a child, with this hook."""
        return children.run(case.words(self.inputs, self.work), operation)


def chosen(changes: list[Change], most: int = MOST) -> list[int]:
    """Numbers of changes: all, or when they are more than `most`, the first and the last of each kind of change.

    A kind is what is done, to a file of which name, by which code; to these come others by chance, up to `most`.
    """
    if len(changes) <= most:
        return list(range(len(changes)))
    first = {change: number for number, change in reversed(list(enumerate(changes)))}
    numbers = set(first.values()) | {len(changes) - 1}
    others = [number for number in range(len(changes)) if number not in numbers]
    more = random.Random(_SEED).sample(others, max(0, min(len(others), most - len(numbers))))
    return sorted({*numbers, *more})


def kill_at(shop: Workshop, case: Case, known: Known, number: int) -> list[str]:
    """Ends the command before this change, then runs it again; what is wrong."""
    shop.reset()
    ended = shop.run(case, children.before_number(number, children.kill))
    if ended.code != children.KILLED:
        return [f"it was to be killed and ended with {ended.code}: {ended.words[-500:]}"]
    return known.promise.broken_by(shop.work) + wrong_again(shop, case, known)


def wrong_again(shop: Workshop, case: Case, known: Known) -> list[str]:
    """Runs the command, which nobody ends now; what is wrong."""
    again = shop.run(case)
    if again.code != known.code:
        return [f"again it ended with {again.code} instead of {known.code}: {again.words[-500:]}"]
    return known.promise.broken_in_the_end(shop.work)


# What a system may answer, to which changes; a full disk stays full.
ERRORS = {
    errno.ENOSPC: ("create", "write", "fsync", "mkdir"),
    errno.EIO: ("create", "write", "fsync", "mkdir", "rename", "unlink", "rmdir", "mode"),
    errno.EACCES: ("create", "mkdir", "rename", "unlink", "rmdir", "mode"),
}


def fail_at(shop: Workshop, case: Case, known: Known, number: int, code: int) -> list[str]:
    """Lets this change fail, or from it on all that need room, then runs the command again; what is wrong."""
    shop.reset()
    left = number

    def operation(kind: str, path: Path) -> None:
        nonlocal left
        left -= 1
        if left == -1 or (left < 0 and code == errno.ENOSPC and kind in ERRORS[code]):
            raise OSError(code, os.strerror(code))

    ended = shop.run(case, operation)
    found = known.promise.broken_by(shop.work)
    if ended.code == known.code:  # what failed was not needed
        found += [f"it ended with {ended.code}, but {line}" for line in known.promise.broken_in_the_end(shop.work)]
    elif ended.code not in (1, 2) or not _is_one_sentence(ended.words):
        found.append(f"it ended with {ended.code}: {ended.words[-2000:]}")
    change = known.changes[number]
    kept = temporary_files(shop.work) if change.kind not in ("unlink", "rmdir") else []
    found += [f"{name} was left behind by an error" for name in kept]
    return found + wrong_again(shop, case, known)


def _is_one_sentence(words: str) -> bool:
    """Whether what a command says of its failure is its last line, and nothing else looks like one."""
    lines = words.splitlines()
    failed = [line for line in lines if line.startswith("cnllama: ") and not line.startswith("cnllama: warning")]
    return failed == lines[-1:] and "Traceback" not in words and "is a bug" not in words and "Errno" not in words
