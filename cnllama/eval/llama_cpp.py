# SPDX-License-Identifier: Apache-2.0
"""llama.cpp on the same tokens, through llama-cpp-python: its own quantizer, its logits, its speed."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from cnllama.errors import CnllamaError, InputError
from cnllama.eval.gguf_header import read_gguf
from cnllama.eval.models import FloatArray, Item, Progress, Rows
from cnllama.files import Output
from cnllama.space import check_space

DEFAULT_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "Q3_K_M", "Q2_K")
_FILE_PREFIX, _TENSOR_PREFIX = "LLAMA_FTYPE_MOSTLY_", "GGML_TYPE_"
_NEEDS_IMATRIX = ("IQ1_", "IQ2_", "Q2_K_S")
_BATCH = 512
_ERROR = 4  # of its levels
_OUTER = ("token_embd.weight", "output.weight")


def load() -> ModuleType:
    """The low-level interface of llama-cpp-python, quiet. Raises InputError when it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise InputError("--gguf needs llama-cpp-python, which is not installed; run: pip install 'cnllama[bench]'")
    api = importlib.import_module("llama_cpp.llama_cpp")
    api.llama_log_set(_LOG, ctypes.c_void_p(0))
    api.llama_backend_init()
    return api


def package_version() -> str:
    """Of llama-cpp-python, which decides what quantize() writes."""
    return version("llama-cpp-python")


# The last errors that llama.cpp logged; nothing is printed.
_errors: deque[str] = deque(maxlen=3)


def _log(level: int, text: bytes, data: object) -> None:
    if level == _ERROR:
        _errors.append(text.decode("utf-8", "replace").strip())


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_log)


def _failed(path: Path, what: str) -> CnllamaError:
    said = "; ".join(filter(None, _errors)) or "it gives no reason"
    return CnllamaError(f"{path}: llama.cpp {what} ({said:.300})")


def file_types() -> list[str]:
    """Names of the quantizations that need no importance matrix, such as Q4_K_M."""
    names = [name.removeprefix(_FILE_PREFIX) for name in dir(load()) if name.startswith(_FILE_PREFIX)]
    return [name for name in names if not name.startswith(_NEEDS_IMATRIX)]


def tensor_types() -> list[str]:
    """Names of the types of one tensor, such as Q6_K."""
    return [name.removeprefix(_TENSOR_PREFIX) for name in dir(load()) if name.startswith(_TENSOR_PREFIX)]


def quantize(source: Path, target: Path, kind: str, outer: str | None = None, threads: int = 0) -> None:
    """Writes a GGUF again as `kind`, one of file_types(), without an importance matrix.

    outer: the type of embeddings and output, one of tensor_types(), instead of llama.cpp's own choice. Raises
    CnllamaError when llama.cpp refuses or the disk is full.
    """
    api = load()
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, _FILE_PREFIX + kind)
    params.nthread = threads
    if outer is not None:
        params.output_tensor_type = params.token_embedding_type = getattr(api, _TENSOR_PREFIX + outer)
    check_space(target, source.stat().st_size)
    with Output(target) as output:
        status = api.llama_model_quantize(os.fsencode(source), os.fsencode(output.temporary), ctypes.byref(params))
        if status != 0:
            raise _failed(source, f"cannot quantize it to {kind}")
        output.commit()


def weigh(path: Path) -> dict[str, Any]:
    """{"bytes", "bits_per_weight", "layer_bits_per_weight", "types"} of a GGUF.

    Bits of all tensors, and of the layers' matrices alone. types: {name of a type: number of matrices that have it},
    which shows where rows that are no multiple of 256 got a larger type.
    """
    api, file = load(), read_gguf(path)
    names = {getattr(api, _TENSOR_PREFIX + name): name for name in tensor_types()}
    matrices = [name for name in file.tensors if "norm" not in name and name.endswith(".weight")]
    layers = [name for name in matrices if name.startswith("blk.")]
    kinds = Counter(names.get(file.kinds[name][0], str(file.kinds[name][0])) for name in matrices)

    def bits(chosen: Sequence[str]) -> float:
        values = sum(file.kinds[name][1] for name in chosen)
        if not values or _OUTER[0] not in file.kinds:
            raise InputError(f"{path}: the GGUF holds no LLaMA's weights; export it again")
        return 8 * sum(file.tensors[name] for name in chosen) / values

    outer = {name: names.get(file.kinds[name][0]) for name in _OUTER if name in file.kinds}
    return {
        "bytes": file.size,
        "bits_per_weight": bits(list(file.tensors)),
        "layer_bits_per_weight": bits(layers),
        "types": dict(kinds.most_common()),
        "embeddings": outer[_OUTER[0]],
        "output": outer.get(_OUTER[1], outer[_OUTER[0]]),
    }


class LlamaCpp:
    """A GGUF in llama.cpp: a Scorer (models.py), and a Runner of one sequence (bench.py).

    threads 0: the default of cpu_info(). The cache is fp16, everything else as llama.cpp sets it. Raises CnllamaError
    for a file that it refuses.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        from cnllama import _core

        self._api: Any = load()
        self._path = path
        self.threads = threads or int(_core.cpu_info()["default_threads"])
        self._context: Any = None
        self._batch: Any = None
        self._start = self._length = 0
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._api.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise _failed(path, "cannot load it")
        self.vocab_size: int = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()
        self._api.llama_model_free(self._model)

    def rows(self, items: Sequence[Item], progress: Progress | None = None) -> Iterator[Rows]:
        """See Scorer: one item after the other, each from an empty cache."""
        self.prepare(0, max((len(item.ids) for item in items), default=1), 1)
        for number, item in enumerate(items):
            self.rewind()
            for at in range(0, len(item.ids), _BATCH):
                ids = np.asarray(item.ids[at : at + _BATCH], np.int32)
                first = min(len(ids), max(0, item.begin - at))
                logits = self._decode(ids, first)
                if len(logits):
                    yield Rows(number, at + first, logits)
                if progress:
                    progress(len(ids))

    def prepare(self, context: int, room: int, batch: int) -> None:
        """See Runner; batch is 1."""
        self._release()
        params = self._api.llama_context_default_params()
        params.n_ctx = -(-(context + room) // 256) * 256
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = self.threads
        params.no_perf = True
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise _failed(self._path, f"refuses a context of {params.n_ctx} positions")
        self._memory = self._api.llama_get_memory(self._context)
        self._batch = self._api.llama_batch_init(_BATCH, 0, 1)
        view = np.ctypeslib.as_array
        self._tokens, self._positions = view(self._batch.token, (_BATCH,)), view(self._batch.pos, (_BATCH,))
        self._wanted = view(self._batch.logits, (_BATCH,))
        view(self._batch.n_seq_id, (_BATCH,))[:] = 1
        for i in range(_BATCH):
            self._batch.seq_id[i][0] = 0
        self._start = self._length = 0
        if context:
            from cnllama.bench import token_ids

            self.prefill(token_ids(context, self.vocab_size))
        self._start = self._length

    def prefill(self, ids: npt.NDArray[np.int32]) -> None:
        """See Runner."""
        for at in range(0, len(ids), _BATCH):
            part = ids[at : at + _BATCH]
            self._decode(part, len(part) - (at + len(part) == len(ids)))

    def step(self, ids: npt.NDArray[np.int32]) -> None:
        """See Runner."""
        self._decode(ids, 0)

    def settle(self) -> None:
        """See Runner: there is nothing."""

    def rewind(self) -> None:
        """See Runner."""
        self._api.llama_memory_seq_rm(self._memory, 0, self._start, -1)
        self._length = self._start

    def _decode(self, ids: npt.NDArray[np.int32], first: int) -> FloatArray:
        """Appends at most _BATCH tokens; a copy of the logits [n, vocab_size] after those from `first` on."""
        count = len(ids)
        self._batch.n_tokens = count
        self._tokens[:count] = ids
        self._positions[:count] = np.arange(self._length, self._length + count)
        self._wanted[:count] = np.arange(count) >= first
        status = self._api.llama_decode(self._context, self._batch)
        if status != 0:
            raise _failed(self._path, f"failed on {count} tokens")
        self._length += count
        shape = (count - first, self.vocab_size)
        if not shape[0]:
            self._api.llama_synchronize(self._context)
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), shape).copy()

    def _release(self) -> None:
        if self._context:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
            self._context = None
