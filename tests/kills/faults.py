# SPDX-License-Identifier: Apache-2.0
"""Faults put back on purpose into the writers: a kill at some change of the disk must show each of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cnllama import files
from cnllama.adapt import merge, tokenizer_merge
from cnllama.files import Output

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Fault:
    """case: the command that shows it, earlier: over an earlier result. put: changes the product. shown: what is said.

    errors: an error shows it, not a kill.
    """

    case: str
    put: Callable[[Patch], None]
    shown: str
    earlier: bool = False
    errors: bool = False


def _final_name_at_once(patch: Patch) -> None:
    patch.setattr(files, "temporary_name", lambda target, kind: target)


def _renamed_before_it_is_written(patch: Patch) -> None:
    create, move = Output._create, files.move

    def early(self: Output) -> tuple[int, Path]:
        fd, temporary = create(self)
        move(temporary, self._target)
        return fd, self._target

    patch.setattr(Output, "_create", early)
    patch.setattr(files, "move", lambda source, target: source == target or move(source, target))


def _written_in_place(patch: Patch) -> None:
    """As open(path, "w") does."""

    def truncated(self: Output) -> tuple[int, Path]:
        files._operation("create", self._target)
        return os.open(self._target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), self._target

    patch.setattr(Output, "_create", truncated)


def _old_file_goes_first(patch: Patch) -> None:
    move = files.move

    def after_removal(source: Path, target: Path) -> None:
        if target.is_file():
            files.remove_file(target)
        move(source, target)

    patch.setattr(files, "move", after_removal)


def _old_model_goes_first(patch: Patch) -> None:
    write = tokenizer_merge.write_tokenizer_files

    def after_removal(directory: Path, model: bytes) -> None:
        files.remove_file(directory / "tokenizer.model")
        write(directory, model)

    patch.setattr(tokenizer_merge, "write_tokenizer_files", after_removal)


def _everything_like_a_temporary_file_goes(patch: Patch) -> None:
    loose = re.compile(r"(?s)\..+\.part")
    patch.setattr(files, "_MARK", loose)
    patch.setattr(
        files, "temporaries", lambda target, kind: [p for p in target.parent.iterdir() if loose.fullmatch(p.name)]
    )


def _leftovers_stay(patch: Patch) -> None:
    patch.setattr(files, "remove_leftover", lambda path: False)


def _recorded_after_the_rename(patch: Patch) -> None:
    move, tell = files.move, files._tell

    def late(source: Path, target: Path) -> None:
        status = os.lstat(source)
        patch.setattr(files, "_tell", lambda *_: None)
        move(source, target)
        patch.setattr(files, "_tell", tell)
        tell(target, status)

    patch.setattr(files, "move", late)


def _complete_before_it_is(patch: Patch) -> None:
    """config.json, which says that a checkpoint is whole, comes before the weights."""
    weights, small = merge._write_weights, merge._write_small_files
    given: list[tuple[Any, ...]] = []
    patch.setattr(merge, "_write_weights", lambda *args: given.append(args))
    patch.setattr(merge, "_write_small_files", lambda *args: (small(*args), weights(*given.pop())))


def _errors_leave_the_temporary_file(patch: Patch) -> None:
    def only_close(self: Output) -> None:
        os.close(self._fd)
        self._committed = True

    patch.setattr(Output, "discard", only_close)


FAULTS = {
    "the temporary name is the final name": Fault("export", _final_name_at_once, "is half"),
    "renamed before it is written": Fault("export", _renamed_before_it_is_written, "is half", earlier=True),
    "written in place": Fault("tokenizer-merge", _written_in_place, "is half", earlier=True),
    "the old file goes before the new one stands": Fault("export", _old_file_goes_first, "is lost", earlier=True),
    "the old tokenizer.model goes first": Fault(
        "tokenizer-merge", _old_model_goes_first, "model is lost", earlier=True
    ),
    "files that look like ours are cleaned up": Fault("export", _everything_like_a_temporary_file_goes, "is lost"),
    "leftovers stay": Fault("export", _leftovers_stay, "was left behind"),
    "a file is recorded after it has its name": Fault("resize", _recorded_after_the_rename, "again it ended with 2"),
    "what says complete comes first": Fault("merge", _complete_before_it_is, "model.safetensors differs"),
    "errors leave the temporary file": Fault("export", _errors_leave_the_temporary_file, "by an error", errors=True),
}
