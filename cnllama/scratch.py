# SPDX-License-Identifier: Apache-2.0
"""Temporary directories beside the file that will come of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cnllama import files
from cnllama.errors import CnllamaError, InputError
from cnllama.ownership import OwnedDirectory
from cnllama.paths import real_path

_TRIES = 3


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A directory beside `target` for files that are not final yet, removed at the end with what was made in it.

    Only what goes through files.py may be made there. A killed process leaves at most the directory, which the next
    scratch for the same target removes.
    """
    real = real_path(target)
    for leftover in files.temporaries(real, "scratch"):
        with suppress(CnllamaError), OwnedDirectory(leftover, "scratch") as own:  # a living process has it locked
            own.delete()
    with ExitStack() as stack:
        own = _open_new(stack, real)
        try:
            yield own.path
        finally:
            with suppress(InputError):  # what somebody else put there stays
                own.delete()


def _open_new(stack: ExitStack, target: Path) -> OwnedDirectory:
    """A new directory; another, should a process that tidies up have taken it for a leftover before it was locked."""
    for _ in range(_TRIES):
        with suppress(CnllamaError):
            return stack.enter_context(OwnedDirectory(files.temporary_name(target, "scratch"), "scratch"))
    return stack.enter_context(OwnedDirectory(files.temporary_name(target, "scratch"), "scratch"))
