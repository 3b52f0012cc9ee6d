# SPDX-License-Identifier: Apache-2.0
"""A few hundred damaged files, each opened and run. CI runs thousands under AddressSanitizer."""

import subprocess
import sys
from pathlib import Path

import fuzz_cnl


def test_damaged_files_are_refused_or_run(tiny_cnl: Path) -> None:
    """In a process of its own: a crash must fail the test, not end the run."""
    done = subprocess.run(
        [sys.executable, fuzz_cnl.__file__, str(tiny_cnl), "--iterations", "400", "--seed", "1"],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert "400 mutants" in done.stdout
    for outcome in ("header_values refused", "header_values ran", "scales ran", "length refused", "tokenizer"):
        assert outcome in done.stdout, f"no mutant with {outcome!r}: the fuzzer does not reach what it is for"


def test_a_mutant_depends_on_seed_and_number_alone(tiny_cnl: Path) -> None:
    data = tiny_cnl.read_bytes()
    first = [fuzz_cnl.mutant(fuzz_cnl.Base(data), 5, number) for number in range(30)]
    base = fuzz_cnl.Base(data)
    assert [fuzz_cnl.mutant(base, 5, number) for number in reversed(range(30))][::-1] == first
    assert fuzz_cnl.mutant(base, 6, 0) != first[0]
    assert all(mutated != data for _, mutated in first[:5])


def test_a_repaired_header_is_accepted(tiny_cnl: Path, tmp_path: Path) -> None:
    """Otherwise every structural mutant would be refused for its hash alone."""
    base = fuzz_cnl.Base(tiny_cnl.read_bytes())
    file = tmp_path / "same.cnl"
    file.write_bytes(fuzz_cnl.with_header(fuzz_cnl.dump(base.header), base.body))
    assert fuzz_cnl.exercise(file, 0) == "ran"
