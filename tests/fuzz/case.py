# SPDX-License-Identifier: Apache-2.0
"""One input of a fuzzer: files in a folder and how they are given to the product; kept on disk, it can be replayed."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPECIAL = ("fifo", "socket", "zero device", "null device", "directory", "dangling link", "endless link", "empty")
CASE_FILE = "case.json"


@dataclass(frozen=True)
class Special:
    """Something that is no regular file, or an empty one, where a file belongs. kind: one of SPECIAL."""

    kind: str

    def make(self, path: Path) -> None:
        """Puts it at `path`."""
        if self.kind == "fifo":
            os.mkfifo(path)
        elif self.kind == "socket":
            os.mknod(path, stat.S_IFSOCK | stat.S_IRUSR)
        elif self.kind == "directory":
            path.mkdir()
        elif self.kind == "empty":
            path.touch()
        else:
            targets = {"zero device": "/dev/zero", "null device": "/dev/null", "dangling link": "nowhere"}
            path.symlink_to(targets.get(self.kind, path.name))


Content = bytes | Special | None


@dataclass
class Case:
    """variant: the folder of sound files that it begins with. files: what is put over them, None removes a file.

    call: how the product is called, as JSON. steps: what was done to the sound files, for people.
    """

    variant: str
    files: dict[str, Content] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)

    def put(self, seeds: Path, folder: Path, copied: bool = False) -> None:
        """Makes `folder` hold this input and nothing else. copied: its sound files may be written into."""
        clear(folder)
        if copied:
            shutil.copytree(seeds / self.variant, folder)
        else:
            folder.mkdir()
            _link(seeds / self.variant, folder)
        for name, content in self.files.items():
            path = folder / name
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.exists():
                clear(path)
            if isinstance(content, Special):
                path.parent.mkdir(parents=True, exist_ok=True)
                content.make(path)
            elif content is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def keep(self, folder: Path, facts: dict[str, Any]) -> None:
        """Writes the changed files and case.json, which `read` reads."""
        (folder / "files").mkdir(parents=True, exist_ok=True)
        described: dict[str, str] = {}
        for number, (name, content) in enumerate(self.files.items()):
            if isinstance(content, Special):
                described[name] = f"special {content.kind}"
            elif content is None:
                described[name] = "removed"
            else:
                described[name] = f"file {number}"
                (folder / "files" / str(number)).write_bytes(content)
        about = {"variant": self.variant, "call": self.call, "steps": self.steps, "files": described}
        text = json.dumps(facts | about, indent=1)  # ASCII: names and steps may hold anything
        (folder / CASE_FILE).write_text(text + "\n", encoding="ascii")

    @classmethod
    def read(cls, folder: Path) -> tuple[Case, dict[str, Any]]:
        """What `keep` wrote: (the input, the facts)."""
        facts = json.loads((folder / CASE_FILE).read_text(encoding="ascii"))
        case = cls(facts["variant"], {}, facts["call"], facts["steps"])
        for name, how in facts["files"].items():
            kind, _, rest = how.partition(" ")
            if kind == "special":
                case.files[name] = Special(rest)
            else:
                case.files[name] = None if kind == "removed" else (folder / "files" / rest).read_bytes()
        return case, facts


def _link(source: Path, target: Path) -> None:
    """A copy of a tree whose files are hard links: the mutants replace files, they never write into them."""
    for entry in os.scandir(source):
        if entry.is_dir():
            (target / entry.name).mkdir()
            _link(Path(entry.path), target / entry.name)
        else:
            os.link(entry.path, target / entry.name)


def clear(folder: Path) -> None:
    """Removes a folder with all that is in it, also what the product made unreadable."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except PermissionError:
        for path, _, _ in os.walk(folder):
            os.chmod(path, stat.S_IRWXU)
        shutil.rmtree(folder)
