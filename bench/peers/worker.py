# SPDX-License-Identifier: Apache-2.0
"""One engine in a process of its own: `worker.py MODULE` reads requests, JSON lines, and answers each with one line.

A request is {"op": name, ...}; the answer {"ok": result} or {"error": [kind, sentence]}, kind being "missing" (the
engine is not installed), "memory" or "failed". Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def serve(name: str) -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print as they like
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(name)
            answer = {"ok": getattr(worker, "do_" + request.pop("op"))(**request)}
        except Exception as error:
            answer = {"error": [_kind(error), f"{type(error).__name__}: {error}".replace("\n", " ")]}
        print(json.dumps(answer), file=answers, flush=True)


def _kind(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "missing"
    return "memory" if isinstance(error, MemoryError) else "failed"


class Worker:
    """The requests that a worker understands: its methods do_*."""

    def __init__(self, name: str) -> None:
        self._engine = importlib.import_module(f"peers.{name}").Engine()

    def do_open(self, options: dict[str, Any], text: str) -> dict[str, Any]:
        """Loads the model; `text_tokens` are those of the text."""
        begin = time.perf_counter()
        facts = self._engine.open(options)
        seconds = time.perf_counter() - begin
        facts["vocab_size"] = int(self._engine.vocab_size)
        return facts | {"load_s": seconds, "text_tokens": self._engine.count_tokens(text)}

    def do_first(self, options: dict[str, Any], tokens: int) -> dict[str, Any]:
        """Loads the model and runs a prompt: seconds of both, in a process that has done nothing else yet."""
        from cnllama import bench

        begin = time.perf_counter()
        self._engine.open(options)
        opened = time.perf_counter()
        self._engine.prepare(0, tokens, 1)
        self._engine.prefill(bench.token_ids(tokens, self._engine.vocab_size))
        return {"load_s": opened - begin, "open_to_first_s": time.perf_counter() - begin}

    def do_logits(self, tokens: int) -> str | None:
        """float32 in base64: after a prompt of so many tokens."""
        from cnllama import bench

        self._engine.prepare(0, tokens, 1)
        self._engine.prefill(bench.token_ids(tokens, self._engine.vocab_size))
        values = self._engine.logits()
        return None if values is None else base64.b64encode(values.astype("<f4").tobytes()).decode()

    def do_memory(self, tokens: int, steps: int, path: str) -> dict[str, int] | None:
        """Bytes held after a prompt and some steps; `path` is the model."""
        self._engine.fill(0, tokens + steps, 1)
        self._engine.time_prefill(tokens, 0.0)
        self._engine.time_decode(steps, 1, 0.0)
        return self._engine.resident_memory(Path(path))

    def do_fill(self, context: int, room: int, batch: int) -> None:
        """A new cache with `context` tokens in each of `batch` sequences."""
        self._engine.fill(context, room, batch)

    def do_prefill(self, tokens: int, min_seconds: float) -> float:
        """Seconds of a prompt."""
        return self._engine.time_prefill(tokens, min_seconds)

    def do_decode(self, steps: int, batch: int, min_seconds: float) -> float:
        """Seconds of `steps` steps."""
        return self._engine.time_decode(steps, batch, min_seconds)

    def do_release(self) -> None:
        """Frees the cache."""
        self._engine.release()


if __name__ == "__main__":
    serve(sys.argv[1])
