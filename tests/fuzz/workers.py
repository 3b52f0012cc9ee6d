# SPDX-License-Identifier: Apache-2.0
"""Slices of inputs, each run in a forked process: a crash costs one input, and is itself a finding."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import mmap
import os
import re
import signal
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz import engine, limits
from fuzz.case import Case, clear
from fuzz.engine import ACCEPTED, REFUSED, Outcome, judge, mutant_of
from fuzz.faults import FAULTS, put_back
from fuzz.targets import TARGETS

CODES = (ACCEPTED, REFUSED, *engine.FINDINGS)
# After this much more than an input may take, whatever holds the interpreter is killed from outside.
_PATIENCE = 15.0
_HEAD = struct.Struct("<qd")  # number of the input that runs, when it began
_OWN_FAULT = 3
_REPORT = 8000  # characters of what a crash printed
_STDERR = os.dup(2)  # `quiet` closes the other one
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass
class Finding:
    """What happened at one input, as JSON values."""

    target: str
    number: int
    kind: str
    key: str
    text: str
    steps: list[str]
    trace: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


@dataclass
class Slice:
    """Inputs begin .. end of a target, and, when they have run, what came of them."""

    target: str
    begin: int
    end: int
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0  # of processor time
    version: str = ""  # the commit that ran them


class Workplace:
    """Where inputs of a seed are made and run: a folder, best in memory, with the seeds of every target."""

    def __init__(self, folder: Path, seed: str) -> None:
        self.folder, self.seed = folder, seed

    def seeds(self, target: str) -> Path:
        """The folder of a target's sound files."""
        return self.folder / "seeds" / target

    def prepare(self, names: Sequence[str]) -> None:
        """Imports what the targets need; makes their seeds in another process, for threads do not survive a fork."""
        for name in names:
            for module in TARGETS[name].needs:
                importlib.import_module(module)
            if not self.seeds(name).exists():
                status = in_child(lambda name=name: TARGETS[name].make_seeds(_made(self.seeds(name))))
                if status:
                    raise SystemExit(f"the seeds of {name} cannot be made (status {status})")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def in_child(work: Callable[[], object]) -> int:
    """Runs a function in a forked process; its exit code, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(_fork(work), 0)[1])


def _fork(work: Callable[[], object]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody is left to read the results
        work()
    except BaseException:
        os.write(_STDERR, traceback.format_exc(limit=-12, chain=False)[-3000:].encode("utf-8", "replace"))
        os._exit(_OWN_FAULT)
    os._exit(0)


def _kill(child: int) -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class Running:
    """A slice on its way. `poll` until it says that it is done."""

    def __init__(self, place: Workplace, part: Slice, fault: str | None = None, first_only: bool = False) -> None:
        self.part, self._place, self._fault, self._first_only = part, place, fault, first_only
        self._shared = mmap.mmap(-1, _HEAD.size + part.end - part.begin)
        self._folder = place.folder / f"run-{os.getpid()}-{part.target}-{part.begin}"
        clear(self._folder)
        self._folder.mkdir()
        self._start(part.begin)

    def poll(self) -> bool:
        """Whether all inputs have run. Raises RuntimeError when the fuzzer itself failed."""
        child, status, usage = os.wait4(self._child, os.WNOHANG)
        number, began = _HEAD.unpack_from(self._shared)
        if not child:
            if began and time.monotonic() - began > (1 + limits.SECOND_CHANCE) * limits.SECONDS + _PATIENCE:
                self.kill()
                return self._lost(number, "hang", "the interpreter was held")
            return False
        self.part.seconds += usage.ru_utime + usage.ru_stime
        code = os.waitstatus_to_exitcode(status)
        if code == _OWN_FAULT:
            raise RuntimeError(f"the fuzzer failed at input {number} of {self.part.target}")
        if code:
            name = signal.Signals(-code).name if code < 0 else f"exit {code}"
            return self._lost(number, "crash", name)
        return self._finish()

    def kill(self) -> None:
        """Ends the process of the slice, if it runs."""
        _kill(self._child)

    def wait(self) -> Slice:
        """Waits for the end; the slice."""
        while not self.poll():
            time.sleep(0.02)
        return self.part

    def _start(self, begin: int) -> None:
        _HEAD.pack_into(self._shared, 0, begin, 0.0)
        self._child = _fork(lambda: self._work(begin))

    def _lost(self, number: int, kind: str, how: str) -> bool:
        trace = _read(self._folder / "native.txt")[:_REPORT]
        frames = [engine._short(file, line) for file, line in _FRAME.findall(trace)]  # the innermost comes first
        said = re.search(r"SUMMARY: (.{,200})|(runtime error: .{,200})", trace)
        where = said[0] if said else next(filter(None, frames), "")
        self._mark(number, kind)
        outcome = Outcome(kind, how, f"{how} {where}".strip(), trace)
        if in_child(lambda: self._write_lost(number, outcome)):
            raise RuntimeError(f"the fuzzer failed at input {number} of {self.part.target}")
        if number + 1 < self.part.end and not self._first_only:
            self._start(number + 1)
            return False
        return self._finish()

    def _write_lost(self, number: int, outcome: Outcome) -> None:
        target = TARGETS[self.part.target](self._place.seeds(self.part.target))
        steps = mutant_of(target, self._place.seed, number).steps
        with (self._folder / "findings").open("a", encoding="ascii") as file:
            file.write(json.dumps(_finding(self.part.target, number, outcome, steps).to_dict()) + "\n")

    def _mark(self, number: int, kind: str) -> None:
        self._shared[_HEAD.size + number - self.part.begin] = 1 + CODES.index(kind)

    def _finish(self) -> bool:
        codes = self._shared[_HEAD.size :]
        self.part.counts = Counter(CODES[code - 1] for code in codes if code)
        lines = _read(self._folder / "findings").splitlines()
        self.part.findings = [Finding(**json.loads(line)) for line in lines]
        clear(self._folder)
        return True

    def _work(self, begin: int) -> None:
        """In the child: runs inputs until the end, or until the first finding."""
        native = (self._folder / "native.txt").open("a+b", buffering=0)
        limits.prepare()
        quiet(native.fileno())
        sandbox(self._folder)
        part, target = self.part, TARGETS[self.part.target](self._place.seeds(self.part.target))
        with put_back(self._fault), (self._folder / "findings").open("a", encoding="ascii") as findings:
            for number in range(begin, part.end):
                _HEAD.pack_into(self._shared, 0, number, time.monotonic())
                native.truncate(0)
                case = mutant_of(target, self._place.seed, number)
                outcome = judge(target, case, self._folder / "case")
                if not outcome.is_finding and os.fstat(native.fileno()).st_size:
                    outcome = _heard(native.fileno()) or outcome
                if outcome.is_finding:
                    record = _finding(part.target, number, outcome, case.steps)
                    findings.write(json.dumps(record.to_dict()) + "\n")
                    findings.flush()
                self._mark(number, outcome.kind)
                if outcome.is_finding and self._first_only:
                    return


def _finding(target: str, number: int, outcome: Outcome, steps: list[str]) -> Finding:
    return Finding(target, number, outcome.kind, outcome.key, outcome.text, steps, outcome.trace)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def quiet(native: int) -> None:
    """What native code prints goes into the file `native`, sanitizers and the traces of crashes included."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(native, 2)
    faulthandler.enable(native)


def _heard(native: int) -> Outcome | None:
    """A finding when native code printed what no terminal should see."""
    text = os.pread(native, _REPORT, 0).decode("utf-8", "replace").replace("\n", " ")
    bad = next((i for i, c in enumerate(text) if not c.isprintable()), None)
    return None if bad is None else Outcome("printed", f"{text[max(0, bad - 80) : bad + 20]!r}", "by native code")


def sandbox(folder: Path) -> None:
    """The current directory, the caches and the temporary files of what runs from here on lie in `folder`."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    os.chdir(home)
    for variable in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
        os.environ[variable] = str(home)


def run_slices(place: Workplace, parts: Sequence[Slice], jobs: int, end: float) -> Iterator[Slice]:
    """Runs slices, `jobs` at a time; gives those that were whole before the time `end` (time.monotonic)."""
    waiting, running = list(reversed(parts)), list[Running]()
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < jobs:
                running.append(Running(place, waiting.pop()))
            done = [one for one in running if one.poll()]
            running = [one for one in running if one not in done]
            yield from (one.part for one in done)
            if not done:
                time.sleep(0.02)
    finally:
        for one in running:
            one.kill()


def find_faults(place: Workplace, names: Sequence[str], limit: int, jobs: int) -> Iterator[tuple[str, int, str]]:
    """(fault, inputs that were run, how it showed; "" when it was not found) of every fault, `jobs` at a time."""
    waiting, running = list(reversed(names)), dict[int, str]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                running[_fork(lambda name=name: _write_found(place, name, limit))] = name
            child, status = os.wait()
            name = running.pop(child)
            if status:
                raise RuntimeError(f"the fuzzer failed at the fault {name}")
            count, key = json.loads(_found_file(place, name).read_text(encoding="ascii"))
            yield name, count, key
    finally:
        for child in running:
            _kill(child)


def _found_file(place: Workplace, name: str) -> Path:
    return place.folder / f"fault-{list(FAULTS).index(name)}.json"


def _write_found(place: Workplace, name: str, limit: int) -> None:
    _found_file(place, name).write_text(json.dumps(found_after(place, name, limit)), encoding="ascii")


def found_after(place: Workplace, name: str, limit: int) -> tuple[int, str]:
    """(inputs that were run, key of the first finding that is gone without the fault, "" for none)."""
    target = FAULTS[name].target
    number = 0
    while number < limit:
        part = Running(place, Slice(target, number, limit), fault=name, first_only=True).wait()
        if not part.findings:
            break
        finding = part.findings[-1]
        number = finding.number + 1
        sound = Running(place, Slice(target, finding.number, number)).wait()
        if not sound.findings:
            return number, finding.key
    return limit, ""


def replay(place: Workplace, folder: Path) -> tuple[Case, Outcome]:
    """Runs a kept input again, in this process."""
    case, facts = Case.read(folder)
    target = TARGETS[facts["target"]](place.seeds(facts["target"]))
    limits.prepare()
    work = place.folder / "replay"
    work.mkdir(exist_ok=True)
    sandbox(work)
    return case, judge(target, case, work / "case")
