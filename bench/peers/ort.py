# SPDX-License-Identifier: Apache-2.0
"""onnxruntime-genai on a model directory of its own, as its builder writes it (int4)."""

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
from peers.base import Skipped, Spec, check_directory, directory_bytes, lacks, read_config, version_of

NAME = "onnxruntime-genai-int4"
CONFIG = "genai_config.json"


def plan(args: Any) -> Iterator[Spec | Skipped]:
    """One row with --ort."""
    missing = lacks(args.python, "onnxruntime_genai")
    if args.ort is None or missing:
        yield Skipped(NAME, missing or "no model was given (--ort DIR)")
        return
    directory = check_directory(args.ort, "--ort")
    read_config(directory, CONFIG)
    size = directory_bytes(directory, ".onnx", ".data")
    if not size:
        raise InputError(f"--ort {directory}: there is no .onnx file; build the model with onnxruntime-genai's builder")
    yield Spec(
        NAME,
        "ort",
        {"model": str(directory), "threads": args.threads},
        file_bytes=size,
        weights=max(1, size - 2 * args.embedding_values),  # the builder leaves the embedding in 16 bits
        kv=4 * args.kv_values,
        private=size,
        python=args.python,
    )


class Engine(Base):
    """A Model and, for every cache, a Generator. Decoding takes the most likely tokens."""

    def open(self, options: Mapping[str, Any]) -> dict[str, Any]:
        import onnxruntime_genai as genai

        self._genai = genai
        config = genai.Config(options["model"])
        threads = {"intra_op_num_threads": options["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = genai.Model(config)
        self.vocab_size = read_config(Path(options["model"]), CONFIG)["model"]["vocab_size"]
        self._tokenizer = genai.Tokenizer(self._model)
        return {"version": version_of("onnxruntime-genai"), "settings": "greedy generate_next_token"}

    def prepare(self, context: int, room: int, batch: int) -> None:
        self._context, self._batch, self._length = context, batch, max(1, context) + room + 1
        self._new_generator()
        if context:
            self._append_context()

    def prefill(self, ids: np.ndarray) -> None:
        self._generator.append_tokens(ids[None])

    def step(self, ids: np.ndarray) -> None:
        raise NotImplementedError("it chooses its tokens itself: see time_decode")

    def rewind(self) -> None:
        self._generator.rewind_to(self._context)

    def release(self) -> None:
        self._generator = None

    def fill(self, context: int, room: int, batch: int) -> None:
        self.prepare(context, room, batch)
        self.time_decode(min(room, 2), batch, 0.0)
        self.prepare(context, room, batch)

    def time_decode(self, steps: int, batch: int, min_seconds: float) -> float:
        total, count = 0.0, 0
        while count == 0 or total < min_seconds:
            if batch == 1 and self._context:
                self.rewind()
            else:  # it rewinds several sequences to their beginning only
                self._new_generator()
                self._append_context()
            self._generator.generate_next_token()  # may only choose from logits that are there already
            begin = time.perf_counter()
            for _ in range(steps):
                self._generator.generate_next_token()
            total, count = total + time.perf_counter() - begin, count + 1
        return total / count

    def _new_generator(self) -> None:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(
            max_length=self._length, min_length=self._length, batch_size=self._batch, do_sample=False
        )
        self._generator = self._genai.Generator(self._model, params)

    def _append_context(self) -> None:
        ids = bench.token_ids(max(1, self._context), self.vocab_size)
        self._generator.append_tokens(np.tile(ids, (self._batch, 1)))

    def count_tokens(self, text: str) -> int | None:
        # Its encode may put a begin token before any text: what it makes of nothing does not belong to the text.
        return len(self._tokenizer.encode(text)) - len(self._tokenizer.encode(""))

    def logits(self) -> np.ndarray | None:
        return np.asarray(self._generator.get_logits(), np.float32).reshape(-1, self.vocab_size)[-1]
