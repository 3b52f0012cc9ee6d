# SPDX-License-Identifier: Apache-2.0
"""llama.cpp through the low-level interface of llama-cpp-python: every file with and without its repack."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cnllama import bench
from cnllama.eval.gguf_header import GGUF, read_gguf
from peers.base import Engine as Base
from peers.base import Skipped, Spec, lacks, version_of

BATCH, UBATCH = 2048, 512  # llama.cpp's own defaults
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
AVX2 = "llama.cpp-avx2"
PAD = 256  # positions to which llama.cpp rounds a sequence's cache


def plan(args: Any) -> Iterator[Spec | Skipped]:
    """Two rows for each --gguf, and two more with --llama-avx2."""
    if not args.gguf:
        yield Skipped("llama.cpp", "no GGUF was given (--gguf FILE; `cnllama export FILE.cnl --to gguf` makes one)")
        return
    missing = lacks(args.llama_python, "llama_cpp")
    if missing:
        yield Skipped("llama.cpp", missing)
    files = [read_gguf(path) for path in args.gguf]
    for file in files:
        label = file.type_name if [f.type_name for f in files].count(file.type_name) == 1 else file.path.stem
        if not missing:
            yield from _rows(args, file, f"llama.cpp-{label}", args.llama_python)
        if args.llama_avx2 and Path(args.llama_avx2).is_dir():
            libraries = {"LLAMA_CPP_LIB_PATH": os.path.abspath(args.llama_avx2)}
            yield from _rows(args, file, f"{AVX2}-{label}", args.llama_python, libraries)
        elif args.llama_avx2:
            yield from _rows(args, file, f"{AVX2}-{label}", args.llama_avx2)


def _rows(args: Any, file: GGUF, name: str, python: str, env: dict[str, str] | None = None) -> Iterator[Spec]:
    for repack in (True, False):
        yield Spec(
            name + ("-repack" if repack else "-plain"),
            "llamacpp",
            {
                "model": str(file.path),
                "threads": args.threads,
                "repack": repack,
                "flash_attention": args.flash_attention,
            },
            file_bytes=file.size,
            weights=file.step_bytes,
            kv=file.kv_bytes,
            mapped=file.path,
            private=file.size if repack else 0,
            python=python,
            env=env or {},
            against="cnllama-avx2" if name.startswith(AVX2) else "cnllama",
        )


class Engine(Base):
    """A model and a context; the context is made anew by every prepare."""

    def open(self, options: Mapping[str, Any]) -> dict[str, Any]:
        api = self._api = _load()
        self._options = dict(options)
        self._context: Any = None
        self._batches: list[Any] = []
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = options["repack"]
        self._model = api.llama_model_load_from_file(os.fsencode(options["model"]), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {options['model']}")
        self._vocab = api.llama_model_get_vocab(self._model)
        self.vocab_size = api.llama_vocab_n_tokens(self._vocab)
        return {
            "version": version_of("llama-cpp-python"),
            "settings": f"use_extra_bufts {options['repack']}, flash attention {options['flash_attention']}, "
            f"n_batch {BATCH}, n_ubatch {UBATCH}, fp16 cache",
            "system": api.llama_print_system_info().decode().strip(),
        }

    def prepare(self, context: int, room: int, batch: int) -> None:
        self.release()
        api = self._api
        params = api.llama_context_default_params()
        params.n_ctx = -(-(context + room) // PAD) * PAD * batch
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH, UBATCH, batch
        params.n_threads = params.n_threads_batch = self._options["threads"]
        params.flash_attn_type = FLASH_ATTENTION[self._options["flash_attention"]]
        params.no_perf = True
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise MemoryError(f"llama.cpp refuses a context of {params.n_ctx} positions")
        self._memory = api.llama_get_memory(self._context)
        self._start = context
        self._prompt, self._steps = _Batch(api, BATCH), _Batch(api, batch)
        self._batches = [self._prompt, self._steps]
        self._lengths = np.zeros(batch, np.int32)
        for sequence in range(batch if context else 0):
            self._append(sequence, bench.token_ids(context, self.vocab_size))

    def prefill(self, ids: np.ndarray) -> None:
        self._append(0, ids)

    def step(self, ids: np.ndarray) -> None:
        count = len(ids)
        self._steps.fill(ids, self._lengths, np.arange(count), np.ones(count, np.int8))
        self._decode(self._steps)
        self._lengths += 1

    def rewind(self) -> None:
        for sequence in range(len(self._lengths)):
            self._api.llama_memory_seq_rm(self._memory, sequence, self._start, -1)
        self._lengths[:] = self._start

    def release(self) -> None:
        for batch in self._batches:
            batch.free()
        self._batches = []
        if self._context:
            self._api.llama_free(self._context)
            self._context = None

    def count_tokens(self, text: str) -> int | None:
        data = text.encode()
        tokens = (self._api.llama_token * (len(data) + 8))()
        return int(self._api.llama_tokenize(self._vocab, data, len(data), tokens, len(tokens), False, False))

    def logits(self) -> np.ndarray | None:
        found = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(found, (self.vocab_size,)).copy()

    def _append(self, sequence: int, ids: np.ndarray) -> None:
        for begin in range(0, len(ids), BATCH):
            part = ids[begin : begin + BATCH]
            wanted = np.zeros(len(part), np.int8)
            wanted[-1] = begin + len(part) == len(ids)
            positions = np.arange(len(part), dtype=np.int32) + self._lengths[sequence]
            self._prompt.fill(part, positions, np.full(len(part), sequence), wanted)
            self._decode(self._prompt)
            self._lengths[sequence] += len(part)

    def _decode(self, batch: _Batch) -> None:
        status = self._api.llama_decode(self._context, batch.native)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self._api.llama_synchronize(self._context)


class _Batch:
    """A llama_batch whose arrays are written through NumPy."""

    def __init__(self, api: ModuleType, capacity: int) -> None:
        self._api = api
        self.native = api.llama_batch_init(capacity, 0, 1)
        view = np.ctypeslib.as_array
        self._tokens, self._positions = view(self.native.token, (capacity,)), view(self.native.pos, (capacity,))
        self._logits = view(self.native.logits, (capacity,))
        view(self.native.n_seq_id, (capacity,))[:] = 1
        self._sequences = [view(self.native.seq_id[i], (1,)) for i in range(capacity)]
        self._written = np.full(capacity, -1)

    def fill(self, ids: np.ndarray, positions: np.ndarray, sequences: np.ndarray, logits: np.ndarray) -> None:
        count = len(ids)
        self.native.n_tokens = count
        self._tokens[:count], self._positions[:count], self._logits[:count] = ids, positions, logits
        for i in np.flatnonzero(self._written[:count] != sequences):  # one at a time, but hardly ever
            self._sequences[i][0] = self._written[i] = sequences[i]

    def free(self) -> None:
        self._api.llama_batch_free(self.native)


def _load() -> ModuleType:
    """The low-level interface, quiet."""
    try:
        import llama_cpp.llama_cpp as api
    except ImportError as error:
        raise ImportError(f"llama-cpp-python is not installed ({error})") from error
    api.llama_log_set(_SILENT, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _SILENT(level: int, text: bytes, data: int) -> None:  # noqa: N802
    """What llama.cpp logs, dropped."""


def quantize(source: Path, target: Path, threads: int) -> None:
    """Writes `source` again as Q4_K_M, under a temporary name first. Raises RuntimeError."""
    api = _load()
    params = api.llama_model_quantize_default_params()
    params.ftype = api.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.nthread = threads
    params.allow_requantize = True
    part = target.with_name(target.name + ".part")
    try:
        status = api.llama_model_quantize(os.fsencode(source), os.fsencode(part), ctypes.byref(params))
        if status != 0:
            raise RuntimeError(f"llama_model_quantize returned {status} for {source}")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    import sys

    quantize(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
