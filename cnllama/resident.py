# SPDX-License-Identifier: Apache-2.0
"""What this process holds in memory, as Linux tells it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cnllama.paths import real_path

if TYPE_CHECKING:
    from cnllama.format import CnlFile

_LARGE = ("AnonHugePages", "FilePmdMapped")  # of 2 MiB


def resident_memory(model: Path, file: CnlFile | None = None) -> dict[str, int] | None:
    """Bytes of this process: {"resident", "peak", "mapped"}, `mapped` being the resident part of the mapped model file,
    with what was moved out of the map where the open `file` is given.

    None where the system does not say.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if file is not None:
        mapped, _ = map_memory(file)
    else:
        name = str(real_path(model))
        mapped = sum(sizes.get("Rss", 0) for place, _, _, sizes in _maps(Path("/proc")) if place == name)
    return {
        "resident": int(fields["VmRSS"].split()[0]) << 10,
        "peak": int(fields["VmHWM"].split()[0]) << 10,
        "mapped": mapped,
    }


def map_memory(file: CnlFile, proc: Path = Path("/proc")) -> tuple[int, int]:
    """Bytes of the map of a file that this process has in memory, and how many of them 2 MiB at a time; 0 where the
    system does not say. Pages that weights were moved to count.
    """
    first, last = file.address, file.address + file.size + os.sysconf("SC_PAGE_SIZE")
    resident = large = 0
    for _, begin, end, sizes in _maps(proc):
        if first <= begin and end <= last:
            resident += sizes.get("Rss", 0)
            large += sum(sizes.get(name, 0) for name in _LARGE)
    return resident, large


def _maps(proc: Path) -> Iterator[tuple[str, int, int, dict[str, int]]]:
    """(path, begin, end, bytes by name) of every map of this process; nothing on other systems."""
    path, begin, end, sizes = "", 0, 0, dict[str, int]()
    try:
        with (proc / "self" / "smaps").open("rb") as file:  # names hold any bytes; of these the system escapes \n only
            for line in file:
                words = line.split(maxsplit=5)
                if not words[0].endswith(b":"):  # the head of a map, not one of its figures
                    yield path, begin, end, sizes
                    begin, end = (int(number, 16) for number in words[0].split(b"-"))
                    path, sizes = os.fsdecode(words[5].rstrip(b"\n")) if len(words) > 5 else "", {}
                elif words[-1] == b"kB":
                    sizes[words[0][:-1].decode("ascii")] = int(words[1]) << 10
    except OSError:
        return
    yield path, begin, end, sizes
