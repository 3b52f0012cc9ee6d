# SPDX-License-Identifier: Apache-2.0
"""Runs one input and judges what came of it: accepted, refused in one sentence, or a finding."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from cnllama.errors import CnllamaError, printable
from fuzz import limits
from fuzz.case import Case

ACCEPTED, REFUSED = "accepted", "refused"
FINDINGS = ("exception", "bug", "hang", "memory", "crash", "message", "printed", "wrong")
# The second line of a refusal may begin a table; any other second line is a sentence that was broken in two.
TABLES = ("vocabulary sizes found:",)
MAX_SENTENCE = 2000
OWN_CHECK = "does not pass its own check"  # bad input is refused before, by what is wrong with it
_EXIT_CODES = (0, 1, 2)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


class FindingError(Exception):
    """The product accepted or printed what it must not. kind: one of FINDINGS."""

    def __init__(self, kind: str, text: str, where: str = "") -> None:
        super().__init__(text)
        self.kind, self.where = kind, where


@dataclass(frozen=True)
class Outcome:
    """kind: ACCEPTED, REFUSED or one of FINDINGS. where: the line of the product that it came from."""

    kind: str
    text: str = ""
    where: str = ""
    trace: str = ""

    @property
    def is_finding(self) -> bool:
        """Whether something has to be mended."""
        return self.kind in FINDINGS

    @property
    def key(self) -> str:
        """Two findings with one key are one fault."""
        name = self.text.partition(":")[0] if self.kind == "exception" else ""
        return " ".join(filter(None, (self.kind, name, self.where or self.text[:60])))


class Target:
    """A kind of input. `seeds`: a folder with one folder of sound files for each variant, made by `make_seeds`."""

    name: ClassVar[str]
    share: ClassVar[int] = 1  # of the inputs of a run of all targets
    needs: ClassVar[tuple[str, ...]] = ()  # modules that take long to import
    copied: ClassVar[bool] = False  # whether the product may write into the sound files

    def __init__(self, seeds: Path) -> None:
        self.seeds = seeds

    @staticmethod
    def make_seeds(folder: Path) -> None:
        """Writes the sound files."""
        raise NotImplementedError

    def mutant(self, rng: random.Random) -> Case:
        """An input. Depends on the seeds and on `rng` alone."""
        raise NotImplementedError

    def run(self, case: Case, folder: Path) -> str:
        """Gives the input in `folder` to the product; says how far it came. Raises what the product raises."""
        raise NotImplementedError

    def names(self, case: Case, folder: Path) -> tuple[str, ...]:
        """What a refusal may name: one of these must be in its first line. Empty: anything will do."""
        return (str(folder),)


def mutant_of(target: Target, seed: str, number: int) -> Case:
    """Input `number` of a target."""
    return target.mutant(random.Random(f"{seed}-{target.name}-{number}"))


def judge(target: Target, case: Case, folder: Path) -> Outcome:
    """Puts the input into `folder` and runs it. What took too long gets a second chance: the machine may be busy."""
    outcome = _judge_once(target, case, folder)
    return _judge_once(target, case, folder, limits.SECOND_CHANCE) if outcome.kind == "hang" else outcome


def _judge_once(target: Target, case: Case, folder: Path, times: int = 1) -> Outcome:
    case.put(target.seeds, folder, target.copied)
    try:
        with limits.limited(times):
            label = target.run(case, folder)
        return Outcome(ACCEPTED, label)
    except CnllamaError as error:
        if OWN_CHECK in str(error):
            return Outcome("bug", f"{error!s:.600}", place(error.__traceback__), _trace(error))
        fault = fault_of_sentence(str(error), target.names(case, folder))
        if fault:
            return Outcome("message", f"{fault}: {str(error)!r:.600}", place(error.__traceback__), _trace(error))
        return Outcome(REFUSED, str(error))
    except limits.HangError as error:
        return Outcome("hang", f"over {limits.SECONDS:g} s", place(error.__traceback__), _trace(error))
    except MemoryError as error:
        return Outcome("memory", f"over {limits.MEMORY:,} bytes", place(error.__traceback__), _trace(error))
    except FindingError as error:
        return Outcome(error.kind, str(error), error.where, "")
    except Exception as error:
        text = f"{type(error).__name__}: {error!s:.600}"
        return Outcome("exception", text, place(error.__traceback__), _trace(error))


def fault_of_sentence(text: str, names: Sequence[str] = (), longest: int = MAX_SENTENCE) -> str:
    """What is wrong with the text of a refusal, "" when nothing is. names: one of them must be in it."""
    first, *rest = text.split("\n")
    if not first.strip():
        return "an empty sentence"
    if rest and not rest[0].startswith(TABLES):
        return "more than one line"
    if "[Errno " in first:
        return "a system error as it came"
    if not all(line.isprintable() for line in (first, *rest)):
        return "control characters"
    if len(first) > longest:
        return "a sentence of thousands of characters"
    if names and not any(printable(name) in first for name in names):
        return "no file is named"
    return ""


def check_printed(text: str, what: str) -> None:
    """Raises FindingError for characters that would reach the terminal as commands."""
    bad = next((c for c in text if c != "\n" and not c.isprintable()), None)
    if bad is not None:
        at = text.index(bad)
        raise FindingError("printed", f"{what}: {text[max(0, at - 60) : at + 20]!r}", f"{what}")


class _Printed(io.StringIO):
    """A standard stream in memory; its file descriptor, which the product may point elsewhere, is a harmless one."""

    def fileno(self) -> int:
        """Of /dev/null."""
        return _null()


def _null() -> int:
    global _null_fd  # noqa: PLW0603
    if _null_fd < 0:
        _null_fd = os.open(os.devnull, os.O_RDWR)
    return _null_fd


_null_fd = -1


def command(argv: Sequence[str], stdin: bytes = b"") -> tuple[int, str, str]:
    """`cnllama ARGV` in this process: (exit code, stdout, stderr). Raises FindingError for what no user should see."""
    code, out, err = _command(argv, stdin)
    said = err.rpartition("cnllama: ")[2].rstrip("\n") if code else ""
    kind = ""
    if (
        code not in _EXIT_CODES or "--debug" in err or OWN_CHECK in err
    ):  # which an exception that nobody expected offers
        kind, said = "bug", f"rc {code}: {said or err[-300:]}"
    elif said.startswith("out of memory"):
        kind = "memory"
    elif fault := fault_of_sentence(said, longest=MAX_SENTENCE + sum(map(len, argv))) if said else "":
        kind, said = "message", f"{fault}: {said!r:.600}"
    if kind:
        _, _, trace = _command(["--debug", *argv], stdin)
        frames = [_short(file, line) for file, line in _FRAME.findall(trace)]
        raise FindingError(kind, said[:600], next(filter(None, reversed(frames)), argv[0]))
    check_printed(err, f"stderr of {argv[0]}")
    return code, out, err


def _command(argv: Sequence[str], stdin: bytes) -> tuple[int, str, str]:
    from cnllama.cli.main import main

    out, err = _Printed(), _Printed()
    given = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _redirected_stdin(given):
        try:
            code: Any = main(list(argv))
        except SystemExit as end:  # --help; argparse's own errors are to become sentences
            code = -1 if end.code else 0
    return code, out.getvalue(), err.getvalue()


class _redirected_stdin(contextlib._RedirectStream):  # type: ignore[type-arg]
    _stream = "stdin"


def place(trace: TracebackType | None) -> str:
    """The innermost line of the product in a traceback, as convert/pack.py:80; "" without one."""
    frames = traceback.extract_tb(trace)
    found = (_short(frame.filename, str(frame.lineno)) for frame in reversed(frames))
    return next(filter(None, found), "")


def _short(file: str, line: str) -> str:
    import cnllama.convert

    import cnllama

    for name, module in (("convert", cnllama.convert), ("cnllama", cnllama)):
        root = os.path.dirname(os.path.abspath(str(module.__file__)))
        if file.startswith(root + os.sep):
            return f"{name}/{os.path.relpath(file, root)}:{line}"
    return ""


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, chain=False))[-4000:]


def choose(rng: random.Random, table: Iterable[tuple[int, Callable[..., Any]]]) -> Callable[..., Any]:
    """One of the functions, by weight."""
    pairs = list(table)
    return rng.choices([function for _, function in pairs], [weight for weight, _ in pairs])[0]
