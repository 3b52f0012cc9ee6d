# SPDX-License-Identifier: Apache-2.0
"""Hugging Face weights in: safetensors and PyTorch .bin, whole or sharded, mapped and read a few rows at a time."""

from __future__ import annotations

import ctypes
import math
import mmap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cnllama.container import DTYPE_BYTES, SafetensorsFile, read_json
from cnllama.errors import InputError
from cnllama.mapped import WatchedFile
from cnllama.paths import exists, is_dir, is_link, open_regular
from cnllama.signatures import HEAD, what_it_is

from . import diagnosis

FloatArray = npt.NDArray[np.float32]
WHOLE = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
FLOATS = ("F64", "F32", "F16", "BF16")
_BUFFER = "rotary_emb.inv_freq"  # old transformers stored what follows from the config
_CHUNK_ROWS = 1024


class SourceTensor(ABC):
    """A stored tensor: its file, shape and dtype are known, its values are read on demand."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def read(self, begin: int = 0, end: int | None = None) -> FloatArray:
        """A float32 copy of rows begin .. end (all by default); F64 is rounded. Raises InputError for other dtypes.

        A tensor without dimensions is its one value, whatever rows are asked for.
        """

    @abstractmethod
    def release(self) -> None:
        """Drops the mapped pages of the tensor from memory."""

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in its file, of a type that read() knows."""
        return self.size * DTYPE_BYTES.get(self.dtype, 1)

    def check_dtype(self) -> None:
        """Raises InputError for a dtype that read() does not know."""
        if self.dtype not in FLOATS:
            raise InputError(
                f"{self.file}: tensor {self.name} has dtype {self.dtype}, expected one of {', '.join(FLOATS)}; "
                "give the unquantized checkpoint"
            )


class _MappedTensor(SourceTensor):
    def __init__(self, source: SafetensorsFile, name: str) -> None:
        self._source, self._entry = source, source.entries[name]
        self.file, self.name = source.path, name
        self.shape, self.dtype = self._entry.shape, self._entry.dtype

    def read(self, begin: int = 0, end: int | None = None) -> FloatArray:
        self.check_dtype()
        data = self._source.view(self.name)
        if self.dtype == "BF16":
            values = _from_bfloat16(_rows(data.view(np.uint16).reshape(self.shape), begin, end))
        else:
            kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[self.dtype]
            values = _to_float32(_rows(data.view(kind).reshape(self.shape), begin, end))
        self._source.check_unchanged()
        return values

    def release(self) -> None:
        self._source.release(self._entry.begin, self._entry.end)


class _TorchTensor(SourceTensor):
    def __init__(self, file: Path, name: str, tensor: Any, mapped: WatchedFile | None) -> None:
        self.file, self.name, self._tensor, self._mapped = file, name, tensor.detach(), mapped
        self.shape = tuple(tensor.shape)
        names = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
        kind = str(tensor.dtype).removeprefix("torch.")
        self.dtype = names.get(kind, kind)

    def read(self, begin: int = 0, end: int | None = None) -> FloatArray:
        import torch

        self.check_dtype()
        rows = _rows(self._tensor, begin, end).contiguous()
        if self.dtype == "BF16":
            values = _from_bfloat16(rows.view(torch.int16).numpy().view(np.uint16))
        else:
            values = _to_float32(rows.numpy())
        if self._mapped is not None:
            self._mapped.check_unchanged()
        return values

    def release(self) -> None:
        if self._mapped is not None and self._tensor.is_contiguous():
            _drop_pages(self._tensor.data_ptr(), self._tensor.nbytes)


def _rows(values: Any, begin: int, end: int | None) -> Any:
    return values[begin:end] if values.ndim else values


def _to_float32(values: npt.NDArray[Any]) -> FloatArray:
    """Always a copy: a map is shared with other readers."""
    with np.errstate(over="ignore"):  # what is too large becomes infinity, which is refused where it is quantized
        return values.astype(np.float32)


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


class Rows(Protocol):
    """What same_values compares: a SourceTensor, or one with adapters on top."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face stores it."""

    def read(self, begin: int = 0, end: int | None = None) -> FloatArray:
        """float32 rows begin .. end."""

    def release(self) -> None:
        """Drops what reading brought into memory."""


def same_values(a: Rows, b: Rows) -> bool:
    """Whether two tensors have one shape and equal float32 values; reads up to the first rows that differ."""
    if a.shape != b.shape:
        return False
    rows = range(0, a.shape[0], _CHUNK_ROWS)
    equal = all(np.array_equal(a.read(row, row + _CHUNK_ROWS), b.read(row, row + _CHUNK_ROWS)) for row in rows)
    a.release()
    b.release()
    return equal


def open_weights(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a .safetensors or .bin file. Raises InputError when the file is damaged or is something else."""
    if path.suffix != ".bin":
        source = SafetensorsFile(path)
        return {name: _MappedTensor(source, name) for name in source.entries}
    return _open_torch(path)


def _open_torch(path: Path) -> dict[str, SourceTensor]:
    _check_torch_file(path)
    mapped: WatchedFile | None = WatchedFile(path)
    try:
        import torch
    except ImportError:
        raise InputError(f"{path}: reading PyTorch's .bin needs torch; run: pip install 'cnllama[convert]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of odd pickles, which end in a sentence of our own
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                mapped = None  # the format of torch before 1.6, which cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        said = (error.strerror if isinstance(error, OSError) else None) or str(error).strip() or type(error).__name__
        reason = said.splitlines()[0]
        raise InputError(
            f"{path}: PyTorch cannot read it as plain weights ({reason:.120}); the file is damaged or holds code, "
            "get it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: {diagnosis.no_state_dict(state)}")
    if not all(isinstance(name, str) and name.isprintable() for name in state):
        raise InputError(f"{path}: holds names of tensors that are no plain text; save the model's state_dict again")
    if any(value.layout != torch.strided or value.device.type != "cpu" for value in state.values()):
        raise InputError(f"{path}: holds sparse or empty (meta) tensors, expected plain ones; save the model again")
    if mapped is not None:
        for begin, end in _joined((s.data_ptr(), s.nbytes()) for s in (t.untyped_storage() for t in state.values())):
            mapped.guard(begin, end - begin)
        mapped.check_unchanged()
    return {name: _TorchTensor(path, name, value, mapped) for name, value in state.items()}


def _check_torch_file(path: Path) -> None:
    """Raises InputError for what is neither a zip archive nor a pickle, which are all that torch.save writes."""
    with open_regular(path) as file:
        head = file.read(HEAD)
    if not head:
        raise InputError(f"{path}: the file is empty; its download was cut off, get it again")
    contents = None if head.startswith((b"PK\x03\x04", b"\x80")) else what_it_is(head)
    if contents is not None:
        raise InputError(f"{path}: {contents}")


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
    """The name LlamaForCausalLM uses, also for a checkpoint of the bare LlamaModel and for one with `model.` twice."""
    if name.startswith(("model.model.", "model.lm_head.")):
        return name.removeprefix("model.")
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory: its config.json as it is and its tensors by canonical name.

    twice: further copies of a tensor, in another shard or under the other spelling of its name. notices: what the user
    should know of the files. frequencies: of the rotary embedding, which old versions of transformers stored.
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    twice: Mapping[str, Sequence[SourceTensor]] = field(default_factory=dict)
    notices: Sequence[str] = ()
    frequencies: SourceTensor | None = None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises InputError that says what the directory is instead, where that shows."""
    path = directory / "config.json"
    if not is_dir(directory) or not exists(path):
        raise InputError(f"{directory}: {diagnosis.no_checkpoint(directory)}")
    return read_json(path)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Opens config.json and all weight files. Raises InputError when one is missing or damaged; reads no weights."""
    config = read_config(directory)
    tensors: dict[str, SourceTensor] = {}
    twice: dict[str, list[SourceTensor]] = {}
    notices: list[str] = []
    for name, tensor in _find_tensors(directory, notices):
        canonical = canonical_name(name)
        if canonical in tensors:
            twice.setdefault(canonical, []).append(tensor)
        else:
            tensors[canonical] = tensor
    buffers = [tensors.pop(name) for name in list(tensors) if name.endswith(_BUFFER)]
    twice = {name: copies for name, copies in twice.items() if name in tensors}
    return Checkpoint(directory, config, tensors, twice, notices, buffers[0] if buffers else None)


def _find_tensors(directory: Path, notices: list[str]) -> Iterator[tuple[str, SourceTensor]]:
    """(stored name, tensor) of all files that transformers would read, those it takes first in front."""
    distributed = sorted(directory.glob("shard-*-model-*-of-*.safetensors"))
    if distributed:
        raise InputError(
            f"{distributed[0]}: this is a shard of a distributed checkpoint, which transformers reads in place of all "
            "other weights; save the gathered model"
        )
    for whole in WHOLE:
        path, index = directory / whole, directory / f"{whole}.index.json"
        for file in (path, index):
            if is_link(file) and not exists(file):
                raise InputError(
                    f"{file}: this links to {file.readlink()}, which is not there; get the file itself, a hub's cache "
                    "cannot be copied without its blobs"
                )
        if exists(path):
            notices += _unread(directory, {whole})
            yield from open_weights(path).items()
            return
        if exists(index):
            yield from _open_shards(index, notices)
            return
    raise InputError(f"{directory}: {diagnosis.no_weights(directory)}")


def _unread(directory: Path, read: Collection[str]) -> list[str]:
    """What is said of further weights that lie beside those that are read."""
    found = {path.name for ending in ("*.safetensors", "pytorch_model*.bin") for path in directory.glob(ending)}
    left = sorted(found - set(read) - {"adapter_model.safetensors"})
    if not left:
        return []
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return [f"{directory}: {min(read)} is read and {', '.join(left[:3])}{more} beside it not, as in transformers"]


def _open_shards(index: Path, notices: list[str]) -> Iterator[tuple[str, SourceTensor]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: there is no weight_map; get the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index}: the file of {name:.80} is {file!r:.80}, expected a name in the same directory")
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not exists(index.parent / file)]
    if missing:
        raise InputError(
            f"{index}: names {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}, which is not "
            f"there ({len(missing)} of {len(files)} shards are missing); get the missing files"
        )
    notices += _unread(index.parent, files)
    shards = {file: open_weights(index.parent / file) for file in files}
    for name, file in weight_map.items():
        if name not in shards[file] and not name.endswith(_BUFFER):
            raise InputError(f"{index}: says that {file} holds {name:.80}, which it does not; get both files again")
    unnamed = [name for tensors in shards.values() for name in tensors if name not in weight_map]
    unnamed = [name for name in unnamed if not name.endswith(_BUFFER)]
    if unnamed:
        notices.append(f"{index}: does not name {unnamed[0]}, which a shard holds; it is read, as in transformers")
    for name, file in weight_map.items():
        if name in shards[file]:
            yield name, shards[file].pop(name)
    for tensors in shards.values():
        yield from tensors.items()
