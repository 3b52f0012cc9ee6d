# SPDX-License-Identifier: Apache-2.0
"""This project, measured by the code of `cnllama bench`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnllama import bench
from cnllama.resident import resident_memory
from peers.base import Engine as Base
from peers.base import Skipped, Spec


def plan(args: Any) -> Iterator[Spec | Skipped]:
    """Always one row; a second one with --avx2."""
    from cnllama import _core
    from cnllama.config import EMBEDDING, LM_HEAD
    from cnllama.format import open_cnl
    from cnllama.plan import kv_bytes_per_token

    file = open_cnl(args.model)
    tensors = file.engine_tensors()
    unread = {EMBEDDING} if LM_HEAD in tensors else set()
    sizes = {
        "file_bytes": file.size,
        "weights": sum(entry[0].nbytes for name, entry in tensors.items() if name not in unread),
        "kv": kv_bytes_per_token(file.config, args.kv),
        "mapped": file.path,
    }
    options = {"model": str(file.path), "threads": args.threads, "kv_type": args.kv}
    yield Spec("cnllama", "cnl", options, **sizes)
    if args.avx2:
        name = "cnllama-avx2"
        if "avx2" in _core.isas():
            yield Spec(name, "cnl", options, **sizes, env={"CNLLAMA_ISA": "avx2"})
        else:
            yield Skipped(name, "this machine has no AVX2")


class Engine(Base):
    """The LLMRunner of `cnllama bench`."""

    def open(self, options: Mapping[str, Any]) -> dict[str, Any]:
        from importlib.metadata import version

        from cnllama import _core

        self._runner = bench.LLMRunner(options["model"], threads=options["threads"], kv_type=options["kv_type"])
        self.vocab_size = self._runner.vocab_size
        return {
            "version": version("cnllama"),
            "settings": f"{_core.isa()}, {options['kv_type']} cache",
            "scheme": self._runner.llm.file.quantization.get("scheme"),
        }

    def prepare(self, context: int, room: int, batch: int) -> None:
        self._runner.prepare(context, room, batch)

    def prefill(self, ids: np.ndarray) -> None:
        self._runner.prefill(ids)

    def step(self, ids: np.ndarray) -> None:
        self._runner.step(ids)

    def rewind(self) -> None:
        self._runner.rewind()

    def settle(self) -> None:
        self._runner.settle()

    def resident_memory(self, model: Path) -> dict[str, int] | None:
        return resident_memory(model, self._runner.llm.file)

    def release(self) -> None:
        self._runner.close()

    def count_tokens(self, text: str) -> int | None:
        return len(self._runner.llm.tokenize(text))

    def logits(self) -> np.ndarray | None:
        return self._runner.logits[0]
