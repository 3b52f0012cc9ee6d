# SPDX-License-Identifier: Apache-2.0
"""The parent's end of a worker."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.base import Spec

WORKER = Path(__file__).with_name("worker.py")


class PeerError(Exception):
    """An engine could not do what was asked; the message is one sentence."""


class Client:
    """A worker process: started at once, idle until asked."""

    def __init__(self, spec: Spec, threads: int) -> None:
        self.spec = spec
        # What the libraries' own pools read before anything else can tell them.
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | spec.env
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.started = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                [spec.python, str(WORKER), spec.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=env,
                start_new_session=True,
            )
        except OSError as error:
            raise PeerError(f"{spec.python} cannot be started: {error.strerror}") from error

    def call(self, op: str, **arguments: Any) -> Any:
        """The answer to one request. Raises PeerError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise PeerError(self._death())
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"][1])
        return answer["ok"]

    def close(self) -> None:
        """Ends the process and waits for it."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def kill(self) -> None:
        """Ends it at once, in the middle of whatever it does."""
        self._process.kill()
        self.close()

    def _death(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"its process ended with {how}" + (f": {said:.200}" if said else "")
