# SPDX-License-Identifier: Apache-2.0
"""What holds whenever a command ends: no half file, no lost file, and the same bytes when it is run again.

A file is whole when it is as it was before, or as it is at some moment of a run that nobody kills. Times in logs, and
the list of times in a directory's record, are left out of the comparison; nothing else is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from cnllama import files
from cnllama.errors import InputError
from cnllama.ownership import RECORD, OwnedDirectory

Tree = dict[str, str]  # relative name -> hash of contents and mode; "" for a directory
_TIMES = re.compile(rb'"(seconds|peak_memory|\w+_runtime|\w+_per_second)": [0-9.e+-]+')
_OF_TIMES = re.compile(rb'"(trainer_state\.json|log\.jsonl|training_args\.bin)": [0-9]+')  # sizes of files with times
_SCRATCH = re.compile(r"\..+\.cnllama-[0-9]+-[0-9a-f]{8}\.scratch")


def tree(root: Path) -> Tree:
    """Everything under `root` that has its final name."""
    return dict(_entries(root, ""))


def temporary_files(root: Path) -> list[str]:
    """Everything under `root` that only a running command should see."""
    found = (path.relative_to(root).as_posix() for path in root.rglob("*"))
    return sorted(name for name in found if _is_temporary(name.rpartition("/")[2]))


def _is_temporary(name: str) -> bool:
    return files.is_temporary(name) or name == OwnedDirectory.SCRATCH or _SCRATCH.fullmatch(name) is not None


def _entries(root: Path, within: str) -> Iterator[tuple[str, str]]:
    for entry in os.scandir(root / within):
        name = f"{within}/{entry.name}" if within else entry.name
        if _is_temporary(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield name, ""
            yield from _entries(root, name)
        else:
            yield name, content(Path(entry.path))


def content(path: Path) -> str:
    """What is compared of a file."""
    data = path.read_bytes()
    if path.name == RECORD:
        data = _of_record(data)
    elif path.name.startswith("comparison-"):  # a plot of times, too
        data = data[:8] + data[-12:]
    elif path.suffix in (".json", ".jsonl"):
        data = _OF_TIMES.sub(rb'"\1": 0', _TIMES.sub(rb'"\1": 0', data))
    return f"{hashlib.sha256(data).hexdigest()[:16]} {stat.S_IMODE(path.stat().st_mode):o}"


def _of_record(data: bytes) -> bytes:
    """A record without the times of its files, sorted: a run that goes on writes them in another order."""
    try:
        record = json.loads(data)
        record["files"] = {name: known if known == "log" else "" for name, known in record["files"].items()}
        record["directories"].sort()
        return json.dumps(record, sort_keys=True).encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        return b"half: " + data


def _is_sound(path: Path) -> bool:
    try:
        OwnedDirectory(path.parent, "").read()
    except InputError:
        return False
    return True


class Promise:
    """before: the tree that the command found. passing: name -> contents at any moment of a run that nobody ends.

    whole: the tree that such a run leaves. discarded: names that it was told to remove, such as --restart does.
    """

    def __init__(
        self, before: Tree, passing: Mapping[str, set[str]], whole: Tree, discarded: Collection[str] = ()
    ) -> None:
        self.before, self._passing, self._whole, self._discarded = before, passing, whole, discarded

    def is_whole(self, now: Tree) -> bool:
        """Whether this is what a run that nobody ends leaves."""
        return now == self._whole

    def broken_by(self, root: Path, killed: bool = True) -> list[str]:
        """Sentences on what is half or lost under `root`, where a run was ended.

        killed: directories have a record of what lies in them at that moment; after an error some tidying has followed.
        """
        now, found = tree(root), []
        for name, held in now.items():
            if not killed and name.rpartition("/")[2] == RECORD and _is_sound(root / name):
                continue
            if held not in self._passing.get(name, set()) | {self.before.get(name)}:
                found.append(f"{name} is half, or nobody's: {held}")
        for name, held in self.before.items():
            if name not in now and name not in self._discarded:
                found.append(f"{name} is lost")
            elif now.get(name, held) != held and name not in self._passing:
                found.append(f"{name} was overwritten")
        return found

    def broken_in_the_end(self, root: Path, more: bool = False) -> list[str]:
        """Sentences on what differs from a run that nobody ends. more: other files may be there, too."""
        now = tree(root)
        names = sorted(n for n in self._whole if not n.endswith(RECORD)) if more else sorted({*now, *self._whole})
        found = [f"{name} differs from that of a run that was not ended" for name in names
                 if now.get(name, "?") != self._whole.get(name, "?")]  # fmt: skip
        return found + [f"{name} was left behind" for name in ([] if more else temporary_files(root))]
