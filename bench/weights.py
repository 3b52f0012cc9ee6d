# SPDX-License-Identifier: Apache-2.0
"""Decoding from the file's map against decoding from large pages, by how the page cache came by the file.

    python bench/weights.py MODEL.cnl [--place DIRECTORY] [--json FILE]

Three states of a copy of the file: as its writer left it, read once by `cat` after it was dropped from the page cache,
and with every second 64 MiB dropped again. In each the model is opened with every --weights and answers for some
seconds as a user's would; what was moved by then is in the last column. Then, all being moved, they decode by turns,
a read loop over anonymous large pages between any two. Shares are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cnllama import LLM, _core, bench
from cnllama.resident import resident_memory
from cnllama.weights import describe

MODES = ("map", "auto")
PIECE = 64 << 20
SETTLED = 3.0  # seconds from opening to the first measured step


def written(source: Path, copy: Path) -> None:
    """Copied by a program and left in the page cache."""
    shutil.copyfile(source, copy)
    with copy.open("r+b") as file:
        os.fsync(file.fileno())


def drop(copy: Path, every: int) -> None:
    """Drops every so-manieth piece from the page cache."""
    with copy.open("rb") as file:
        for begin in range(0, copy.stat().st_size, PIECE * every):
            os.posix_fadvise(file.fileno(), begin, PIECE, os.POSIX_FADV_DONTNEED)


def read(source: Path, copy: Path) -> None:
    """Read by `cat` from the disk."""
    drop(copy, 1)
    with open(os.devnull, "wb") as nothing:
        subprocess.run(["cat", copy], check=True, stdout=nothing)


def evicted(source: Path, copy: Path) -> None:
    """In part dropped, which the first reader of each page brings back."""
    drop(copy, 2)


STATES: dict[str, Callable[[Path, Path], None]] = {"written": written, "read": read, "in part evicted": evicted}


class Open:
    """A model that has answered for SETTLED seconds, ready to be timed."""

    def __init__(self, path: Path, mode: str, threads: int) -> None:
        begin = time.perf_counter()
        self.llm = LLM(path, ctx=512, threads=threads, template="raw", weights=mode)
        stream = self.llm.stream(bench.token_ids(16, self.llm.vocab_size).tolist(), max_tokens=400, ignore_eos=True)
        next(stream)
        self.first = time.perf_counter() - begin
        while time.perf_counter() - begin < SETTLED:
            next(stream, None)
        assert self.llm.weight_memory is not None
        self.after = self.llm.weight_memory.figures()
        stream.close()
        self.llm.weight_memory.settle()
        self.memory = resident_memory(path, self.llm.file)  # with the maps of those that were opened before
        self._sequence = self.llm.engine.open()
        self._ids = bench.token_ids(bench.STEPS, self.llm.vocab_size)

    def seconds(self) -> float:
        """Of one step, on average over some."""
        engine = self.llm.engine
        begin = time.perf_counter()
        for i in range(bench.STEPS):
            engine.step([(self._sequence, self._ids[i : i + 1], False)])
        engine.trim(self._sequence, 0)
        return (time.perf_counter() - begin) / bench.STEPS


def measure(path: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each mode."""
    models = {mode: Open(path, mode, threads) for mode in MODES}
    work = bench.work_of(models["map"].llm)
    reads: dict[str, list[float]] = {mode: [] for mode in MODES}
    shares: dict[str, list[float]] = {mode: [] for mode in MODES}
    before = bench.read_limit(threads)
    for done in range(rounds):
        for mode in MODES[done % 2 :] + MODES[: done % 2]:
            speed = work.step_bytes(0, bench.STEPS, 1) / models[mode].seconds()
            after = bench.read_limit(threads)
            reads[mode].append(speed)
            shares[mode].append(speed / ((before + after) / 2))
            before = after
    rows = []
    others = 0
    for mode, model in models.items():
        others += model.llm.plan.kv_per_token * 64
        memory = model.memory
        rows.append(
            {
                "weights": mode,
                "where": describe(model.after),
                "first_token_s": model.first,
                "bytes_per_s": statistics.median(reads[mode]),
                "share": statistics.median(shares[mode]),
                "share_min": min(shares[mode]),
                "share_max": max(shares[mode]),
                "besides": max(0, memory["resident"] - memory["mapped"] - others) if memory else None,
            }
        )
        others += memory["mapped"] if memory else 0
        model.llm.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--place", type=Path, help="where the copy is made; its file system counts")
    parser.add_argument("--threads", type=int, default=_core.cpu_info()["default_threads"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "cpu": _core.cpu_info()["model"],
        "isa": _core.isa(),
        "threads": args.threads,
        "states": {},
    }
    print("| file | --weights | first token | of the read loop | besides |  |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.place) as place:
        copy = Path(place) / "model.cnl"
        for state, prepare in STATES.items():
            prepare(args.model, copy)
            found["states"][state] = rows = measure(copy, args.threads, args.rounds)
            for row in rows:
                share = f"{row['share']:.0%} ({row['share_min']:.0%}-{row['share_max']:.0%})"
                speed = f"{row['bytes_per_s'] / 1e9:.1f} GB/s, {share}"
                besides = f"{row['besides'] / 2**20:.0f} MiB" if row["besides"] is not None else ""
                cells = (state, row["weights"], f"{row['first_token_s']:.2f} s", speed, besides, row["where"])
                print("| " + " | ".join(cells) + " |", flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
