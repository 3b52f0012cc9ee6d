# SPDX-License-Identifier: Apache-2.0
"""Runs a conversion and prints its peak memory and time: `python bench/convert_memory.py BASE -o FILE [options]`.

All arguments go to `python -m cnllama.convert`. Two peaks are printed: the resident set, as the kernel counts it
(mapped pages of the shards included), and the anonymous part of it, sampled, which no memory pressure can drop.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.05
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Usage:
    """What one finished process took. Sizes in bytes, times in seconds."""

    status: int
    seconds: float
    cpu_seconds: float
    peak_resident: int
    peak_anonymous: int


def anonymous_bytes(pid: int) -> int:
    """The anonymous resident bytes of a process now; 0 when it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(fields.get("RssAnon", "0 kB").split()[0]) * 1024


def measure(command: list[str]) -> Usage:
    """Runs a command to its end with this process's streams."""
    begin = time.perf_counter()
    process = subprocess.Popen(command)
    anonymous = 0
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            anonymous = max(anonymous, anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return Usage(
        status=process.returncode,
        seconds=time.perf_counter() - begin,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_resident=usage.ru_maxrss * 1024,
        peak_anonymous=anonymous,
    )


def directory_bytes(path: Path) -> int:
    """Bytes of the weight files in a checkpoint directory."""
    return sum(file.stat().st_size for ending in ("*.safetensors", "*.bin") for file in path.glob(ending))


def output_of(arguments: list[str]) -> Path | None:
    """The value of -o / --output among the converter's arguments."""
    for index, argument in enumerate(arguments):
        if argument in ("-o", "--output") and index + 1 < len(arguments):
            return Path(arguments[index + 1])
        if argument.startswith("--output="):
            return Path(argument.split("=", 1)[1])
    return None


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    command = [sys.executable, "-m", "cnllama.convert", *arguments]
    print("+", " ".join(command), flush=True)
    usage = measure(command)
    if usage.status != 0:
        print(f"the conversion ended with status {usage.status}", file=sys.stderr)
        return 1

    read = sum(directory_bytes(Path(argument)) for argument in arguments if Path(argument).is_dir())
    output = output_of(arguments)
    print(f"time            {usage.seconds:8.1f} s   ({usage.cpu_seconds:.1f} s of processor time)")
    print(f"peak resident   {usage.peak_resident / MIB:8.0f} MiB")
    print(f"peak anonymous  {usage.peak_anonymous / MIB:8.0f} MiB (sampled every {SAMPLE_SECONDS * 1000:.0f} ms)")
    print(f"read            {read / GIB:8.2f} GiB of weights, {read / usage.seconds / MIB:.0f} MiB/s")
    if output is not None and output.is_file():
        print(f"written         {output.stat().st_size / GIB:8.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
