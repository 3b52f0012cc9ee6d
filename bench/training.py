# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of training, one installation against another: python bench/training.py OLD_PYTHON NEW_PYTHON.

Each is the interpreter of an environment with cnllama. Runs alternate, the order changes with the round, and the ratio
is that of the medians. Tokens of a run's log, from its second line to its last: loading does not count. The time is the
process's own on the CPU (one thread), so that other work on the machine counts less; that of the clock is beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import adapt_data
import models

CASES = {
    "pretrain, stage 2": ("pretrain", "--block-size", "256", "--batch-size", "4"),
    "pretrain, full": ("pretrain", "--full", "--block-size", "256", "--batch-size", "4"),
    "sft": ("sft", "--block-size", "512", "--batch-size", "8"),
    "sft, packed": ("sft", "--pack", "--block-size", "512", "--batch-size", "2"),
}
# The command line, with the process's CPU time written beside the log at each of its lines.
RUN = """
import json, sys, time
from cnllama.adapt import progress
on_log = progress.JsonLog.on_log
def timed(self, args, state, control, logs=None, **more):
    on_log(self, args, state, control, logs=logs, **more)
    if "loss" in (logs or {}):
        print("LINE", json.dumps([state.num_input_tokens_seen, time.process_time(), time.monotonic()]), flush=True)
progress.JsonLog.on_log = timed
from cnllama.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def write_base(place: Path) -> None:
    """A model of 3 million parameters, so that a step is work."""
    data = adapt_data.write_data(place / "data")
    tokenizer = models.train_tokenizer((data / "zh.txt").read_text().splitlines(), 420)
    config = models.small_config(models.piece_count(tokenizer), hidden_size=256, intermediate_size=704)
    config |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    models.make_llama(place / "base", tokenizer, tensors=models.random_tensors(config), dtype="float32", **config)


def speed(python: str, place: Path, case: str, steps: int, out: str) -> tuple[float, float]:
    """Tokens per second of CPU time and of the clock."""
    verb, *more = CASES[case]
    data = place / "data" / ("zh.txt:9" if verb == "pretrain" else "sft.jsonl")
    words = ["adapt", verb, place / "base", "-o", place / out, "--data", data, *more, "--max-steps", steps]
    words += ["--log-every", 1, "--save-every", 0, "--lr", "1e-4", "--cache", place / f"{out}-tokens"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    result = subprocess.run(
        [python, "-c", RUN, *map(str, words)], capture_output=True, text=True, cwd=place, env=environment, check=False
    )
    if result.returncode:
        raise SystemExit(result.stderr)
    lines = [json.loads(line[5:]) for line in result.stdout.splitlines() if line.startswith("LINE ")]
    tokens, cpu, clock = (last - first for first, last in zip(lines[1], lines[-1], strict=True))
    if verb == "pretrain" or "--pack" in more:  # blocks: what is left free in them is work, too
        size = dict(zip(more[-4::2], more[-3::2], strict=True))
        tokens = (len(lines) - 2) * int(size["--block-size"]) * int(size["--batch-size"])
    return tokens / cpu, tokens / clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", metavar="OLD_PYTHON")
    parser.add_argument("new", metavar="NEW_PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=CASES, action="append", help="all without it")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    print("| training | old, tokens/s | new, tokens/s | ratio | ratio by the clock | rounds |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_base(place)
        for number, case in enumerate(args.case or CASES):
            found: dict[str, list[tuple[float, float]]] = {"old": [], "new": []}
            for turn in range(args.rounds):
                for which in ("old", "new") if turn % 2 else ("new", "old"):
                    out = f"{which}-{number}-{turn}"
                    found[which].append(speed(getattr(args, which), place, case, args.steps, out))
            (old, old_clock), (new, new_clock) = (
                [statistics.median(values) for values in zip(*found[which], strict=True)] for which in ("old", "new")
            )
            ratios = f"{new / old:.3f} | {new_clock / old_clock:.3f}"
            print(f"| {case} | {old:,.0f} | {new:,.0f} | {ratios} | {args.rounds} |", flush=True)


if __name__ == "__main__":
    main()
