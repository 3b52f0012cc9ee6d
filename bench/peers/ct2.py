# SPDX-License-Identifier: Apache-2.0
"""CTranslate2 in int8. It offers no single step, so decoding is timed between the tokens that it hands over."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnllama import bench
from cnllama.errors import InputError
from peers.base import Engine as Base
from peers.base import Skipped, Spec, check_directory, directory_bytes, kv_values, lacks, read_config, version_of

NAME = "ctranslate2-int8"


def plan(args: Any) -> Iterator[Spec | Skipped]:
    """One row with --ct2."""
    missing = lacks(args.python, "ctranslate2")
    if args.ct2 is None or missing:
        yield Skipped(NAME, missing or "no converted model was given (--ct2 DIR)")
        return
    directory = check_directory(args.ct2, "--ct2")
    size = directory_bytes(directory, ".bin")
    if not size or not (directory / "vocabulary.json").is_file():
        raise InputError(f"--ct2 {directory}: there is no model.bin with a vocabulary.json; convert to int8 first")
    # Its own config.json does not tell the shape: the checkpoint's does, or the packed model's.
    values = kv_values(read_config(args.hf), args.hf) if args.hf else args.kv_values
    yield Spec(
        NAME,
        "ct2",
        {"model": str(directory), "threads": args.threads},
        file_bytes=size,
        weights=size - args.embedding_values,
        kv=4 * values,
        private=size,
        python=args.python,
    )


class Engine(Base):
    """A Generator. Prompts are token strings; a cache lives only as long as one call."""

    def open(self, options: Mapping[str, Any]) -> dict[str, Any]:
        import ctranslate2

        self._generator = ctranslate2.Generator(
            options["model"], device="cpu", compute_type="int8", inter_threads=1, intra_threads=options["threads"]
        )
        self._pieces = json.loads((Path(options["model"]) / "vocabulary.json").read_bytes())
        self.vocab_size = len(self._pieces)
        settings = f"{self._generator.compute_type}, generate_batch"
        return {"version": version_of("ctranslate2"), "settings": settings}

    def prepare(self, context: int, room: int, batch: int) -> None:
        self._context = context

    def prefill(self, ids: np.ndarray) -> None:
        self._generate([self._strings(ids)], 1, None)

    def step(self, ids: np.ndarray) -> None:
        raise NotImplementedError("generate_batch runs all steps at once: see time_decode")

    def rewind(self) -> None:
        pass

    def release(self) -> None:
        pass

    def fill(self, context: int, room: int, batch: int) -> None:
        self.prepare(context, room, batch)
        self.prefill(bench.token_ids(16, self.vocab_size))

    def time_prefill(self, tokens: int, min_seconds: float) -> float:
        ids = bench.token_ids(tokens, self.vocab_size)
        total, count = 0.0, 0
        while count == 0 or total < min_seconds:
            begin = time.perf_counter()
            self.prefill(ids)
            total, count = total + time.perf_counter() - begin, count + 1
        return total / count

    def time_decode(self, steps: int, batch: int, min_seconds: float) -> float:
        prompt = self._strings(bench.token_ids(max(1, self._context), self.vocab_size))
        total, count = 0.0, 0
        while count == 0 or total < min_seconds:
            stamps: dict[int, float] = {}
            self._generate([prompt] * batch, steps + 1, stamps)
            total, count = total + stamps[steps] - stamps[0], count + 1
        return total / count

    def _generate(self, prompts: list[list[str]], tokens: int, stamps: dict[int, float] | None) -> None:
        def note(result: Any) -> bool:
            stamps[result.step] = time.perf_counter()  # the last sequence of a step counts
            return False

        self._generator.generate_batch(
            prompts,
            min_length=tokens,
            max_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=None if stamps is None else note,
        )

    def _strings(self, ids: np.ndarray) -> list[str]:
        return [self._pieces[i] for i in ids]
