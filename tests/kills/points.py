# SPDX-License-Identifier: Apache-2.0
"""A case in a place of its own: run once to learn what it does, then ended before one change after the other."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kills import children
from kills.cases import Case
from kills.children import Change, Ended
from kills.promise import Promise, temporary_files, tree

_SEED = 20


@dataclass(frozen=True)
class Known:
    """What a run that nobody ends does: its exit code, its changes of the disk, and what must hold.

    before: a copy of the place as it was.
    """

    before: Path
    code: int
    changes: list[Change]
    promise: Promise


class Workshop:
    """`folder` gets one directory in which every run works, under the same name each time. inputs: see make_inputs."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        self.inputs, self.work, self._folder = inputs, folder / "work", folder
        self._known: dict[tuple[str, bool], Known] = {}
        self.work.mkdir(parents=True)

    def know(self, case: Case, earlier: bool) -> Known:
        """What the command does among other people's files, over an earlier result where `earlier` says so."""
        key = (case.name, earlier)
        if key not in self._known:
            self._known[key] = self._run_once(case, earlier)
        return self._known[key]

    def _run_once(self, case: Case, earlier: bool) -> Known:
        shutil.rmtree(self.work)
        self.work.mkdir()
        case.put_foreign_files(self.work)
        foreign = set(tree(self.work))
        if earlier:
            ended = children.run(case.words(self.inputs, self.work, case.other), children.nothing)
            assert ended.code == 0, ended.words
        kept = self._folder / f"before-{len(self._known)}"
        shutil.copytree(self.work, kept, copy_function=shutil.copy2)
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
        return Known(kept, ended.code, changes, promise)

    def reset(self, known: Known) -> None:
        """The place as it was before the command."""
        shutil.rmtree(self.work)
        shutil.copytree(known.before, self.work, copy_function=shutil.copy2)

    def run(self, case: Case, operation: children.Operation = children.nothing) -> Ended:
        """The command in a child, with this hook."""
        return children.run(case.words(self.inputs, self.work), operation)


def chosen(changes: Sequence[Change], most: int) -> list[int]:
    """At most so many numbers of changes: of each kind of change the first, and the last change of all.

    A kind is what is done, to a file of which name, by which code. When there are more kinds than `most`, a sample of
    them is taken, always the same; when there are fewer, other changes come to them.
    """
    first = {change: number for number, change in reversed(list(enumerate(changes)))}
    drawn = random.Random(_SEED)
    kinds = sorted(set(first.values()) - {len(changes) - 1})
    others = sorted(set(range(len(changes) - 1)) - set(kinds))
    drawn.shuffle(kinds)
    drawn.shuffle(others)
    return sorted([*kinds, *others][: most - 1] + list(range(len(changes)))[-1:])


def kill_at(shop: Workshop, case: Case, known: Known, number: int) -> list[str]:
    """Ends the command before this change, then runs it again; what is wrong."""
    shop.reset(known)
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


# What a system may answer, to which changes; a full disk stays full. A mode that cannot be changed is no error: file
# systems without modes exist, and the new file is private there.
ERRORS = {
    errno.ENOSPC: ("create", "write", "fsync", "mkdir"),
    errno.EIO: ("create", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"),
    errno.EACCES: ("create", "mkdir", "rename", "unlink", "rmdir"),
}


def fail_at(shop: Workshop, case: Case, known: Known, number: int, code: int) -> list[str]:
    """Lets this change fail, or from it on all that need room, then runs the command again; what is wrong."""
    shop.reset(known)
    left = number

    def operation(kind: str, path: Path) -> None:
        nonlocal left
        left -= 1
        if left == -1 or (left < 0 and code == errno.ENOSPC and kind in ERRORS[code]):
            raise OSError(code, os.strerror(code))

    ended = shop.run(case, operation)
    found = known.promise.broken_by(shop.work, killed=False)
    change = known.changes[number]
    if ended.code == known.code:  # what failed was not needed; what could not be removed stays until the next run
        ours = "warning: " in ended.words or ".cnllama-" in change.path
        said = change.kind in ("unlink", "rmdir") and ours
        wrong = known.promise.broken_in_the_end(shop.work, more=said)
        found += [f"it ended with {ended.code}, but {line}" for line in wrong]
    elif ended.code not in (1, 2) or not _is_one_sentence(ended.words):
        found.append(f"it ended with {ended.code}: {ended.words[-2000:]}")
    kept = temporary_files(shop.work) if change.kind not in ("unlink", "rmdir") else []
    found += [f"{name} was left behind by an error" for name in kept]
    return found + wrong_again(shop, case, known)


def _is_one_sentence(words: str) -> bool:
    """Whether what a command says of its failure is its last line, and nothing else looks like one."""
    lines = words.splitlines()
    failed = [line for line in lines if line.startswith("cnllama: ") and not line.startswith("cnllama: warning")]
    return failed == lines[-1:] and "Traceback" not in words and "is a bug" not in words and "Errno" not in words
