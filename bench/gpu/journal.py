# SPDX-License-Identifier: Apache-2.0
"""What bench/gpu/run.py writes as it goes, and how it runs programs: within a time, and with all that they start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 12  # of a program that failed, for the reason


class StageSkippedError(Exception):
    """A stage that cannot run here, with the reason."""


class StageFailedError(Exception):
    """A stage that went wrong, with what it found until then."""

    def __init__(self, reason: str, found: dict[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.found = found or {}


@dataclass(frozen=True)
class Ran:
    """What became of a program: its exit code, None when its time was up, and what it printed."""

    code: int | None
    text: str

    def reason(self, limit: float) -> str:
        """Why it failed."""
        if self.code is None:
            return f"took more than {limit:.0f} s"
        ended = f"ended with {self.code}" if self.code >= 0 else f"was ended by {signal.Signals(-self.code).name}"
        lines = [line for line in self.text.splitlines() if line.strip()][-LAST_LINES:]
        return "\n".join([f"{ended}:", *lines]) if lines else ended


class Journal:
    """gpu.log and gpu.json in a folder, written as results come."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.results: dict[str, Any] = {"environment": {}, "stages": {}}
        self._path = folder / "gpu.log"
        self._path.unlink(missing_ok=True)
        self._log = self._path.open("a", encoding="utf-8")

    def note(self, text: str) -> None:
        """Into the log only."""
        print(text, file=self._log, flush=True)

    def say(self, text: str) -> None:
        """Into the log and onto the screen."""
        print(text, flush=True)
        self.note(text)

    def save(self) -> None:
        """Writes gpu.json."""
        temporary = self.folder / "gpu.json.tmp"
        temporary.write_text(json.dumps(self.results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / "gpu.json")

    def run(self, command: list[str], limit: float, **variables: str) -> Ran:
        """Runs a program at the root of the tree; what it prints goes into the log as it comes. What it started ends
        with it when its time is up.
        """
        self.note("+ " + " ".join(command))
        begin = self._path.stat().st_size
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log.fileno(),
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(timeout=max(1.0, limit))
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        with self._path.open("rb") as log:
            log.seek(begin)
            return Ran(code, log.read().decode("utf-8", errors="replace"))

    def check(self, command: list[str], limit: float, **variables: str) -> str:
        """The same; what it printed. Raises StageFailedError when it fails or takes too long."""
        ran = self.run(command, limit, **variables)
        if ran.code != 0:
            raise StageFailedError(ran.reason(limit))
        return ran.text


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or where toolkits are."""
    roots = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    folders = [os.environ.get("PATH", ""), *(f"{root}/bin" for root in roots if root), "/usr/local/cuda/bin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def output_of(*command: str) -> str:
    """What a program prints; empty where it is not there or fails."""
    program = find_tool(command[0])
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *command[1:]], check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
