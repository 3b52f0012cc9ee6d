# SPDX-License-Identifier: Apache-2.0
"""Hugging Face weights in: safetensors and PyTorch .bin, whole or sharded, mapped and read a few rows at a time."""

from __future__ import annotations

import ctypes
import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnllama.container import SafetensorsFile, read_json
from cnllama.errors import InputError
from cnllama.mapped import WatchedFile

FloatArray = npt.NDArray[np.float32]
_WHOLE = ("model.safetensors", "pytorch_model.bin")


class SourceTensor(ABC):
    """A stored tensor: its file, shape and dtype are known, its values are read on demand."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def read(self, begin: int = 0, end: int | None = None) -> FloatArray:
        """A float32 copy of rows begin .. end (all by default). Raises InputError for a dtype that holds no weights."""

    @abstractmethod
    def release(self) -> None:
        """Drops the mapped pages of the tensor from memory."""

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def _refuse_dtype(self) -> InputError:
        return InputError(
            f"{self.file}: tensor {self.name} has dtype {self.dtype}, expected F16, BF16 or F32; "
            "give the unquantized checkpoint"
        )


class _MappedTensor(SourceTensor):
    def __init__(self, source: SafetensorsFile, name: str) -> None:
        self._source, self._entry = source, source.entries[name]
        self.file, self.name = source.path, name
        self.shape, self.dtype = self._entry.shape, self._entry.dtype

    def read(self, begin: int = 0, end: int | None = None) -> FloatArray:
        data = self._source.view(self.name)
        if self.dtype == "F32":
            values = data.view(np.float32).reshape(self.shape)[begin:end].copy()
        elif self.dtype == "F16":
            values = data.view(np.float16).reshape(self.shape)[begin:end].astype(np.float32)
        elif self.dtype == "BF16":
            values = _from_bfloat16(data.view(np.uint16).reshape(self.shape)[begin:end])
        else:
            raise self._refuse_dtype()
        self._source.check_unchanged()
        return values

    def release(self) -> None:
        self._source.release(self._entry.begin, self._entry.end)


class _TorchTensor(SourceTensor):
    def __init__(self, file: Path, name: str, tensor: Any, mapped: WatchedFile | None) -> None:
        self.file, self.name, self._tensor, self._mapped = file, name, tensor.detach(), mapped
        self.shape = tuple(tensor.shape)
        names = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
        kind = str(tensor.dtype).removeprefix("torch.")
        self.dtype = names.get(kind, kind)

    def read(self, begin: int = 0, end: int | None = None) -> FloatArray:
        import torch

        rows = self._tensor[begin:end].contiguous()
        if self.dtype == "BF16":
            values = _from_bfloat16(rows.view(torch.int16).numpy().view(np.uint16))
        elif self.dtype in ("F16", "F32"):
            values = rows.numpy().astype(np.float32)  # always a copy: the map is shared with other readers
        else:
            raise self._refuse_dtype()
        if self._mapped is not None:
            self._mapped.check_unchanged()
        return values

    def release(self) -> None:
        if self._mapped is not None and self._tensor.is_contiguous():
            _drop_pages(self._tensor.data_ptr(), self._tensor.nbytes)


def _from_bfloat16(values: npt.NDArray[np.uint16]) -> FloatArray:
    wide = values.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _drop_pages(address: int, size: int) -> None:
    """madvise(DONTNEED) on a file-backed map that Python's mmap object does not own."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin = address - address % mmap.PAGESIZE
    madvise = ctypes.CDLL(None).madvise
    madvise(ctypes.c_void_p(begin), ctypes.c_size_t(address + size - begin), ctypes.c_int(mmap.MADV_DONTNEED))


def open_weights(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a .safetensors or .bin file. Raises InputError when the file is damaged or is something else."""
    if path.suffix != ".bin":
        source = SafetensorsFile(path)
        return {name: _MappedTensor(source, name) for name in source.entries}
    return _open_torch(path)


def _open_torch(path: Path) -> dict[str, SourceTensor]:
    mapped: WatchedFile | None = WatchedFile(path)
    try:
        import torch
    except ImportError:
        raise InputError(f"{path}: reading PyTorch's .bin needs torch; run: pip install 'cnllama[convert]'") from None
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            mapped = None  # the format of torch before 1.6, which cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path}: PyTorch cannot read it as plain weights ({reason:.120}); the file is damaged or holds code, "
            "get it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: holds no plain table of tensors; save the model's state_dict and try again")
    if not all(isinstance(name, str) and name.isprintable() for name in state):
        raise InputError(f"{path}: holds names of tensors that are no plain text; save the model's state_dict again")
    if any(value.layout != torch.strided or value.device.type != "cpu" for value in state.values()):
        raise InputError(f"{path}: holds sparse or empty (meta) tensors, expected plain ones; save the model again")
    if mapped is not None:
        for begin, end in _joined((s.data_ptr(), s.nbytes()) for s in (t.untyped_storage() for t in state.values())):
            mapped.guard(begin, end - begin)
        mapped.check_unchanged()
    return {name: _TorchTensor(path, name, value, mapped) for name, value in state.items()}


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(begin, end) of (address, bytes), one piece where less than a page lies between: tensors of one mapped file."""
    joined: list[tuple[int, int]] = []
    for begin, size in sorted(set(ranges)):
        if joined and begin < joined[-1][1] + mmap.PAGESIZE:
            joined[-1] = joined[-1][0], max(joined[-1][1], begin + size)
        elif size:
            joined.append((begin, begin + size))
    return joined


def canonical_name(name: str) -> str:
    """The name LlamaForCausalLM uses, also for a checkpoint of the bare LlamaModel."""
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory: its config.json as it is and its tensors by canonical name."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Opens config.json and all weight files. Raises InputError when one is missing or damaged; reads no weights."""
    if not directory.is_dir():
        found = "this is a file" if directory.exists() else "there is no such directory"
        raise InputError(f"{directory}: {found}, expected the directory of a Hugging Face LLaMA")
    if not (directory / "config.json").exists():
        if (directory / "adapter_config.json").exists():
            raise InputError(f"{directory}: this is a LoRA adapter, expected a base model; give it with --lora")
        raise InputError(f"{directory}: there is no config.json, expected the directory of a Hugging Face LLaMA")
    config = read_json(directory / "config.json")
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in _find_tensors(directory).items():
        if not name.endswith("rotary_emb.inv_freq"):  # old transformers stored what follows from the config
            tensors[canonical_name(name)] = tensor
    return Checkpoint(directory, config, tensors)


def _find_tensors(directory: Path) -> dict[str, SourceTensor]:
    for whole in _WHOLE:
        index = directory / f"{whole}.index.json"
        if (directory / whole).exists():
            return open_weights(directory / whole)
        if index.exists():
            return _open_shards(index)
    shards = sorted([*directory.glob("model-*-of-*.safetensors"), *directory.glob("pytorch_model-*-of-*.bin")])
    if shards:
        raise InputError(f"{shards[0]}: a shard without an index; get model.safetensors.index.json (or the .bin's) too")
    if list(directory.glob("consolidated.*.pth")):
        raise InputError(f"{directory}: these are Meta's own .pth files; convert them with transformers first")
    raise InputError(f"{directory}: there are no weights, expected one of {', '.join(_WHOLE)} or their index files")


def _open_shards(index: Path) -> dict[str, SourceTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: there is no weight_map; get the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index}: the file of {name} is {file!r:.80}, expected a name in the same directory")
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (index.parent / file).exists()]
    if missing:
        raise InputError(
            f"{index}: names {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}, which is not there "
            f"({len(missing)} of {len(files)} shards are missing); get the missing files"
        )
    shards = {file: open_weights(index.parent / file) for file in files}
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise InputError(f"{index}: says that {file} holds {name}, which it does not; get both files again")
    return {name: shards[file][name] for name, file in weight_map.items()}
