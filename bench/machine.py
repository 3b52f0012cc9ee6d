# SPDX-License-Identifier: Apache-2.0
"""What this machine is and allows: `python bench/machine.py [--threads N] [--rounds N]`.

The read bandwidth of a plain loop over 256 MiB, and the int8 multiply-adds of the best instruction set in registers,
each measured several times in turn. Other work on the machine shows as spread.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from cnllama import _core
from cnllama.bench import peak_limit, read_limit, spread
from cnllama.plan import available_memory

BUSY_LOAD = 0.3  # processes running besides, from which on medians mean less


def describe(threads: int) -> dict[str, Any]:
    """The machine and the software, for the head of a report. Sizes in bytes."""
    info = _core.cpu_info()
    return {
        "cpu": info["model"],
        "cores": info["physical_cores"],
        "isa": _core.isa(),
        "isas": info["isas"],
        "clock_hz": _core.ops.clock_hz(),
        "threads": threads or info["default_threads"],
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available_bytes": available_memory().bytes,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load": os.getloadavg()[0],
    }


def limits(threads: int, rounds: int) -> dict[str, list[float]]:
    """Both limits, `rounds` times in turn: bytes and int8 multiply-adds a second."""
    pairs = [(read_limit(threads), peak_limit(threads)) for _ in range(rounds)]
    return {"read_bytes_per_s": [p[0] for p in pairs], "int8_macs_per_s": [p[1] for p in pairs]}


def commit() -> str | None:
    """The commit this file is at, with `+` when files were changed since; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def lines(machine: dict[str, Any], measured: dict[str, list[float]]) -> list[str]:
    """Markdown for people."""
    read = [value / 1e9 for value in measured["read_bytes_per_s"]]
    peak = [value / 1e9 for value in measured["int8_macs_per_s"]]
    cycles = [value * 1e9 / machine["clock_hz"] / machine["threads"] for value in peak]
    found = [
        f"* {machine['cpu']}, {machine['cores']} cores, {machine['isa']}, about {machine['clock_hz'] / 1e9:.2f} GHz, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; {machine['system']}, Python {machine['python']}",
        f"* {machine['threads']} threads; commit {machine['commit']}; {machine['date']}; "
        f"load before the start {machine['load']:.2f}",
        f"* reads: {spread(read)} GB/s; int8: {spread(peak, 0)} G multiply-adds/s, {spread(cycles)} a cycle and thread",
    ]
    if machine["load"] > BUSY_LOAD:
        found.append("* **the machine was not idle: ratios within a round mean more than rates**")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="default: as the engine chooses")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    machine = describe(args.threads)
    print("\n".join(lines(machine, limits(machine["threads"], max(1, args.rounds)))))


if __name__ == "__main__":
    main()
