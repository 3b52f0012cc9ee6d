# SPDX-License-Identifier: Apache-2.0
"""A written .cnl before it gets its name: opened again, verified, and run for one token with its own defaults.

All of it is read, but its pages are given back on the way: the memory of a conversion stays far below the size of the
model.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cnllama.errors import CnllamaError, InputError
from cnllama.format import CnlFile, open_cnl
from cnllama.llm import LLM
from cnllama.verify import verify

from . import parity

_CONTEXT = 64
_PROMPT = "你好"
_SECONDS = 0.01  # between two releases: what is read in this time is what a step holds


def check_written(name: Path, threads: int = 0) -> Callable[[Path], None]:
    """For CnlWriter.finish: raises CnllamaError when the file that was written for `name` is not what it should be.

    Raises InputError when it is, and its values are such that no token can be computed. threads: of the run, 0 for this
    machine's.
    """

    def check(path: Path) -> None:
        try:
            found = faults(path, threads)
        except _NoNumbersError as error:
            raise InputError(
                f"{name}: was not kept, for the model's first token cannot be computed ({error}); its values are too "
                "large or damaged, get the model's files again"
            ) from None
        if found is not None:
            raise CnllamaError(
                f"{name}: the new file does not pass its own check and was not kept: "
                f"{found.replace(str(path), name.name)}; try again, and if it stays so report this model to cnllama's "
                "authors"
            )

    return check


class _NoNumbersError(Exception):
    """The logits of the first token are not finite; the message says which."""


def faults(path: Path, threads: int = 0) -> str | None:
    """What is wrong with a .cnl, None when it opens, agrees with its hashes and statistics, and gives a token."""
    try:
        wrong = next((check for check in verify(open_cnl(path), parity.check) if not check.passed), None)
        return f"{wrong.name}: {wrong.detail}" if wrong else _run_one_token(path, threads)
    except CnllamaError as error:
        return str(error)


class _AnySize(LLM):
    """A model that may be larger than the free memory: one token reads it once."""

    def _refuse_unless_fits(self) -> None:
        return


def _run_one_token(path: Path, threads: int) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        llm = _AnySize(path, ctx=_CONTEXT, threads=threads)
    with llm, _pages_given_back(llm.file):
        if llm.unusable_defaults:
            return f"its sampling defaults cannot be used: {'; '.join(llm.unusable_defaults.values())}"
        ids = llm.prompt_ids(_PROMPT)[: _CONTEXT // 2]
        try:
            completion = llm.generate(ids, max_tokens=1)[0]
        except CnllamaError as error:
            if isinstance(error.__cause__, ValueError):  # of the sampler; the file itself is as it was written
                raise _NoNumbersError(str(error.__cause__)) from error
            raise
    ended = completion.finish_reason == "stop"
    return None if completion.token_ids or ended else "it gives no token"


@contextmanager
def _pages_given_back(file: CnlFile) -> Iterator[None]:
    """The native code runs all layers in one call: another thread drops the pages that it has read."""
    done = threading.Event()

    def release() -> None:
        while not done.wait(_SECONDS):
            file.release()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
