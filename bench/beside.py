# SPDX-License-Identifier: Apache-2.0
"""Decoding beside a program that prints as llama.cpp's llama-bench does, by turns.

    python bench/beside.py MODEL.cnl MODEL.gguf LLAMA_BENCH [--options "-rtr 1"] [--json FILE]

Each round: some steps of this engine, its weights settled; the other program in a process of its own; a read loop over
anonymous large pages before, between and after. Prints medians, and the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cnllama import _core, bench
from cnllama.bench import LLMRunner

STEPS = 32


def other_speed(program: Path, gguf: Path, threads: int, options: str) -> float:
    """Tokens a second of the other program's decoding."""
    command = [program, "-m", gguf, "-t", str(threads), "-p", "0", "-n", str(STEPS), "-r", "1", "-o", "json"]
    done = subprocess.run([*command, *shlex.split(options)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout)[0]["avg_ts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("program", type=Path)
    parser.add_argument("--options", default="")
    parser.add_argument("--threads", type=int, default=_core.cpu_info()["default_threads"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runner = LLMRunner(args.model, threads=args.threads)
    bench.fill(runner, 0, STEPS, 1)
    step = bench.work_of(runner.llm).step_bytes(0, STEPS, 1)
    rows = []
    for _ in range(args.rounds):
        before = bench.read_limit(args.threads)
        own = STEPS / bench.time_decode(runner, STEPS, 1, 0.0)
        limit = (before + bench.read_limit(args.threads)) / 2
        other = other_speed(args.program, args.gguf, args.threads, args.options)
        rows.append({"cnllama": own, "other": other, "read_bytes_per_s": limit, "share": own * step / limit})
        print(
            f"loop {limit / 1e9:.1f} GB/s: cnllama {own:.1f} tok/s, {own * step / limit:.0%}; other {other:.1f}",
            flush=True,
        )
    own, other, share = (statistics.median(row[name] for row in rows) for name in ("cnllama", "other", "share"))
    ratio = statistics.median(row["cnllama"] / row["other"] for row in rows)
    print(f"medians of {args.rounds} rounds: cnllama {own:.1f} tok/s, {share:.0%} of the loop; other {other:.1f} tok/s")
    print(f"cnllama is {ratio:.2f}x {args.program.name} {args.options}".rstrip())
    if args.json:
        result = {"cpu": _core.cpu_info()["model"], "threads": args.threads, "options": args.options, "rounds": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
