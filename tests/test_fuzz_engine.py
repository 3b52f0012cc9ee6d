# SPDX-License-Identifier: Apache-2.0
"""The fuzzers' own judgement: crashes, hangs, memory and sentences are told apart, and none ends the run."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from pathlib import Path
from typing import ClassVar

import pytest
from fuzz import engine, limits, workers
from fuzz.case import Case
from fuzz.engine import FindingError, Target, fault_of_sentence
from fuzz.faults import FAULTS
from fuzz.targets import TARGETS
from fuzz.workers import Running, Slice, Workplace
from test_fuzz import fuzz

from cnllama.errors import CnllamaError, InputError

# What an input does -> what it must be called.
DEEDS = {
    "accept": "accepted",
    "refuse": "refused",
    "refuse without a name": "message",
    "refuse in two lines": "message",
    "refuse at length": "message",
    "a system error in a sentence": "message",
    "raise": "exception",
    "sleep": "hang",
    "hold the interpreter": "hang",
    "allocate": "memory",
    "crash": "crash",
    "abort": "crash",
    "end": "crash",
    "print an escape natively": "printed",
    "say something wrong": "wrong",
}


class Deeds(Target):
    """Does what it is told to, instead of calling the product."""

    name: ClassVar[str] = "deeds"

    @staticmethod
    def make_seeds(folder: Path) -> None:
        (folder / "all").mkdir()

    def mutant(self, rng: random.Random) -> Case:
        return Case("all", {}, {"do": rng.choice(list(DEEDS))}, ["a step"])

    def run(self, case: Case, folder: Path) -> str:
        deed = case.call["do"]
        sentences = {
            "refuse": f"{folder}: it is bad",
            "refuse without a name": "it is bad",
            "refuse in two lines": f"{folder}: it\nis bad",
            "refuse at length": f"{folder}: {'bad ' * 1000}",
            "a system error in a sentence": f"[Errno 2] No such file: '{folder}'",
        }
        if deed in sentences:
            error = InputError()
            error.args = (sentences[deed],)  # as it would be if the class did not make it one short line
            raise error
        if deed == "raise":
            raise KeyError(deed)
        if deed == "say something wrong":
            raise FindingError("wrong", deed)
        if deed == "sleep":
            try:
                time.sleep(60)
            except Exception as error:  # as the product does, in places
                raise CnllamaError(str(folder)) from error
        elif deed == "hold the interpreter":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            ctypes.PyDLL(None).sleep(60)
        elif deed == "allocate":
            bytearray(2 << 30)
        elif deed == "crash":
            ctypes.string_at(0)
        elif deed == "abort":
            os.abort()
        elif deed == "end":
            os._exit(1)
        elif deed == "print an escape natively":
            os.write(2, b"\x1b[2J")
        return "done"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.setitem(TARGETS, "deeds", Deeds)
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    monkeypatch.setattr(workers, "_PATIENCE", 0.5)
    made = Workplace(tmp_path / "place", "1")
    made.prepare(["deeds"])
    return made


def test_whatever_an_input_does_is_judged_and_the_run_goes_on(place: Workplace) -> None:
    target = Deeds(place.seeds("deeds"))
    deeds = [engine.mutant_of(target, "1", number).call["do"] for number in range(60)]
    assert set(deeds) == set(DEEDS)
    part = Running(place, Slice("deeds", 0, 60)).wait()
    assert sum(part.counts.values()) == 60
    found = {finding.number: finding.kind for finding in part.findings}
    for number, deed in enumerate(deeds):
        assert found.get(number, DEEDS[deed]) == DEEDS[deed], f"{deed} was judged {found.get(number)}"
    expected = [number for number, deed in enumerate(deeds) if DEEDS[deed] in engine.FINDINGS]
    assert sorted(found) == expected, [deeds[i] for i in expected if i not in found]
    assert all(finding.steps == ["a step"] for finding in part.findings)
    keys = {finding.key for finding in part.findings if finding.kind == "crash"}
    assert keys == {"crash SIGSEGV", "crash SIGABRT", "crash exit 1"}


def test_the_first_finding_ends_a_run_that_looks_for_one(place: Workplace) -> None:
    part = Running(place, Slice("deeds", 0, 60), first_only=True).wait()
    assert len(part.findings) == 1
    assert part.findings[0].number == sum(part.counts.values()) - 1


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x.cnl: it is bad; make it again", ""),
        ("x.cnl: it does not fit\nvocabulary sizes found:\n  base  3", ""),
        ("", "an empty sentence"),
        ("x.cnl: a key\nof two lines", "more than one line"),
        ("x.cnl: \x1b[2J", "control characters"),
        ("x.cnl: \u202egnp", "control characters"),
        ("x.cnl: [Errno 36] File name too long", "a system error as it came"),
        ("x.cnl: " + "9" * 5000, "a sentence of thousands of characters"),
        ("it is bad", "no file is named"),
    ],
)
def test_sentences(text: str, fault: str) -> None:
    assert fault_of_sentence(text, ["x.cnl"]) == fault


def test_every_fuzzer_has_three_faults_to_find() -> None:
    for name in TARGETS:
        assert sum(fault.target == name for fault in FAULTS.values()) >= 3, name


def test_faults_put_back_are_found() -> None:
    """The ones that take a moment; CI puts all of them back."""
    chosen = [
        "cnl: the header's hash is not compared",
        "checkpoint: JSON without end or sense",
        "adapter: pairs of any shape",
        "pickle: sparse and empty tensors",
        "gguf: tensors beyond the file",
        "text: JSON without end",
        "args: the usage instead of one sentence",
    ]
    assert {FAULTS[name].target for name in chosen} == set(TARGETS)
    done = fuzz("--seed", 1, "--faults", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(" after ") == len(chosen)
