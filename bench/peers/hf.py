# SPDX-License-Identifier: Apache-2.0
"""transformers on a Hugging Face checkpoint, in bfloat16 and in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cnllama import bench
from peers.base import Engine as Base
from peers.base import Skipped, Spec, check_directory, directory_bytes, kv_values, lacks, read_config, version_of

TYPES = {"bf16": ("bfloat16", 2), "fp32": ("float32", 4)}
CHUNK = 512  # tokens of a context filled at once: attention over all of it would need more memory


def plan(args: Any) -> Iterator[Spec | Skipped]:
    """Two rows with --hf."""
    missing = lacks(args.python, "torch", "transformers")
    for short, (dtype, size) in TYPES.items():
        name = f"transformers-{short}"
        if args.hf is None:
            yield Skipped(name, "no checkpoint was given (--hf DIR)")
            continue
        if missing:
            yield Skipped(name, missing)
            continue
        directory = check_directory(args.hf, "--hf")
        config = read_config(directory)
        stored = 4 if (config.get("dtype") or config.get("torch_dtype")) == "float32" else 2
        file_bytes = directory_bytes(directory, ".safetensors", ".bin")
        unread = 0 if config.get("tie_word_embeddings") else config.get("vocab_size", 0) * config.get("hidden_size", 0)
        weights = file_bytes // stored * size
        yield Spec(
            name,
            "hf",
            {"model": str(directory), "threads": args.threads, "dtype": dtype},
            file_bytes=file_bytes,
            weights=weights - unread * size,
            kv=kv_values(config, directory) * size,
            private=weights,
            python=args.python,
        )


class Engine(Base):
    """A causal language model and a DynamicCache."""

    def open(self, options: Mapping[str, Any]) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(options["threads"])
        torch.set_grad_enabled(False)
        self._torch = torch
        dtype = getattr(torch, options["dtype"])
        self._model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype, attn_implementation="sdpa")
        self._model.eval()
        self.vocab_size = self._model.config.vocab_size
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(options["model"])
        except (OSError, ValueError, ImportError):
            self._tokenizer = None  # characters a second are left out then
        self._cache: Any = None
        settings = f"torch {torch.__version__}, {options['dtype']}, sdpa attention"
        return {"version": version_of("transformers"), "settings": settings}

    def prepare(self, context: int, room: int, batch: int) -> None:
        self._start, self._batch = context, batch
        self._new_cache()
        ids = bench.token_ids(context, self.vocab_size)
        for begin in range(0, context, CHUNK):
            self._run(np.tile(ids[begin : begin + CHUNK], (batch, 1)))

    def prefill(self, ids: np.ndarray) -> None:
        self._run(ids[None])

    def step(self, ids: np.ndarray) -> None:
        self._run(ids[:, None])

    def rewind(self) -> None:
        if self._start == 0:
            self._new_cache()
        elif (surplus := self._cache.get_seq_length() - self._start) > 0:
            self._cache.crop(-surplus)  # newer versions take only the number to remove

    def release(self) -> None:
        self._cache = None

    def count_tokens(self, text: str) -> int | None:
        return None if self._tokenizer is None else len(self._tokenizer.encode(text, add_special_tokens=False))

    def logits(self) -> np.ndarray | None:
        return self._last[0, -1].float().numpy()

    def _new_cache(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()

    def _run(self, ids: np.ndarray) -> None:
        tokens = self._torch.from_numpy(np.ascontiguousarray(ids, np.int64))
        self._last = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
