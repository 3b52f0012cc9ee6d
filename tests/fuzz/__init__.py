# SPDX-License-Identifier: Apache-2.0
"""Fuzzers of everything that cnllama reads: `python tests/fuzz --help`.

A target (targets/) makes sound files once, damages them in ways that a seed and a number alone decide, and gives them
to the product in this process. An input may be accepted or refused in one sentence; whatever else happens is a finding:
an exception, a sentence that blames us, 5 s, 1 GB, a crash, a terminal's control characters, a wrong answer.

    python tests/fuzz --iterations 20000 --jobs 2                  # what CI runs, with the commit as the seed
    python tests/fuzz --seed S --iterations 1000000 --state FILE --summary docs/measurements/fuzz.json
                                                                   # killed at any moment, the same command goes on
    python tests/fuzz ... --state FILE-1 --part 1/2                # one of two that share the work
    python tests/fuzz ... --state FILE-1 --with-state FILE-2 --part 1/2 --summary FILE
    python tests/fuzz ... --keep DIR && python tests/fuzz --replay DIR/TARGET-NUMBER
    python tests/fuzz --faults --summary docs/measurements/fuzz-faults.json

The last puts faults into the product on purpose (faults.py) and says after how many inputs each is found.
"""
