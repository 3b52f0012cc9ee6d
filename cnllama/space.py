# SPDX-License-Identifier: Apache-2.0
"""Room on a disk, asked for before the work that fills it."""

from __future__ import annotations

import os
from pathlib import Path

from cnllama.errors import CnllamaError, from_os_error
from cnllama.paths import exists, real_path


def free_bytes(directory: Path) -> int:
    """Bytes an ordinary user may still write in `directory`, or where it would be made."""
    level = real_path(directory)
    while not exists(level) and level.parent != level:
        level = level.parent
    try:
        status = os.statvfs(level)
    except OSError as error:
        raise from_os_error(directory, error) from None
    return status.f_bavail * status.f_frsize


def check_space(path: Path, needed: int, what: str = "the file") -> None:
    """Raises CnllamaError when `needed` bytes cannot fit beside `path`."""
    free = free_bytes(real_path(path).parent)
    if free < needed:
        raise CnllamaError(
            f"{path}: {what} will have {needed:,} bytes but its disk has {free:,} free; free some space or choose "
            "another place"
        )
