# SPDX-License-Identifier: Apache-2.0
"""What an adapter adds to stored values when they are read: LoRA with or without DoRA, rows of tokens, biases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cnllama.errors import InputError

from .checkpoint import FloatArray, SourceTensor

Read = Callable[[int, int], FloatArray]

_BLOCK_VALUES = 1 << 20
_CANCELLATION = 2.0  # a float32 product has a relative error below 1e-6, unless its parts cancel so far


class Update(ABC):
    """A change of a tensor's values, some rows at a time."""

    def prepare(self, rows: int, before: Read) -> None:  # noqa: B027  most have nothing to prepare
        """Called before the first `apply`. before: reads rows of the tensor, [rows, ...], without this change."""

    @abstractmethod
    def apply(self, values: FloatArray, begin: int) -> None:
        """Changes float32 rows begin ... in place."""

    @abstractmethod
    def sources(self) -> Iterator[SourceTensor]:
        """The stored tensors it reads."""

    def release(self) -> None:
        """Drops what preparing brought into memory."""
        for source in self.sources():
            source.release()


@dataclass(frozen=True)
class Pair:
    """LoRA of a matrix [rows, cols]: delta = scale * B A with A [r, cols] and B [rows, r].

    An embedding's are stored transposed (A [r, vocabulary], B [hidden, r]): delta = scale * (B A)^T.
    magnitude: DoRA's vector, [rows], of an embedding [hidden]; bias: of lora_B, [rows], for the layer's bias.
    """

    a: SourceTensor
    b: SourceTensor
    scale: float
    embedding: bool = False
    magnitude: SourceTensor | None = None
    bias: SourceTensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that the pair fits."""
        rows, cols = self.b.shape[0], self.a.shape[1]
        return (cols, rows) if self.embedding else (rows, cols)

    @property
    def file(self) -> Path:
        """Where it is stored."""
        return self.a.file


@dataclass(frozen=True)
class Tokens:
    """Rows of embed_tokens or lm_head that replace the base's: delta, [number of ids, hidden], holds the new values."""

    ids: tuple[int, ...]
    delta: SourceTensor


@dataclass
class LoraUpdate(Update):
    """W + scale * B A, and with DoRA (arXiv 2402.09353) m (W + scale * B A) / ||W + scale * B A||.

    The norm is of a row; of an embedding, whose weight DoRA sees transposed, of a column.
    """

    pair: Pair
    name: str
    _left: FloatArray | None = field(default=None, repr=False)
    _right: FloatArray | None = field(default=None, repr=False)
    _exact: bool = False
    _factor: FloatArray | None = field(default=None, repr=False)

    def prepare(self, rows: int, before: Read) -> None:
        """Reads the factors, and of an embedding with DoRA the whole matrix for its norms."""
        a, b = self.pair.a.read(), self.pair.b.read()
        embedding = self.pair.embedding
        self._left = np.ascontiguousarray(a.T) if embedding else b
        self._right = np.ascontiguousarray(b.T) if embedding else a
        self._exact = _cancels(self._left, self._right)
        if self.pair.magnitude is not None and embedding:
            squares = np.zeros(self._right.shape[1])
            step = max(1, _BLOCK_VALUES // self._right.shape[1])
            for begin in range(0, rows, step):
                values = before(begin, min(begin + step, rows))
                values += self._delta(begin, begin + len(values))
                squares += np.square(values, dtype=np.float64).sum(0)
            self._factor = self._magnitude_over(np.sqrt(squares), slice(None))

    def apply(self, values: FloatArray, begin: int) -> None:
        """See Update."""
        values += self._delta(begin, begin + len(values))
        if self.pair.magnitude is None:
            return
        if self._factor is not None:
            values *= self._factor
            return
        norms = np.sqrt(np.square(values, dtype=np.float64).sum(1))
        values *= self._magnitude_over(norms, slice(begin, begin + len(values)))[:, None]

    def sources(self) -> Iterator[SourceTensor]:
        """See Update."""
        yield self.pair.a
        yield self.pair.b
        if self.pair.magnitude is not None:
            yield self.pair.magnitude

    def release(self) -> None:
        """See Update."""
        self._left = self._right = self._factor = None
        super().release()

    def _delta(self, begin: int, end: int) -> FloatArray:
        """scale * B A of these rows, with an error below 1e-6 of their norm."""
        assert self._left is not None
        assert self._right is not None
        left, scale = self._left[begin:end], self.pair.scale
        if self._exact:
            return _product(left, self._right, scale)
        delta: FloatArray = left @ self._right
        delta *= np.float32(scale)
        return delta

    def _magnitude_over(self, norms: npt.NDArray[np.float64], part: slice) -> FloatArray:
        assert self.pair.magnitude is not None
        magnitude = self.pair.magnitude.read()[part]
        if not norms.all():
            i = int(np.argmin(norms)) + (part.start or 0)
            raise InputError(
                f"{self.pair.file}: DoRA divides by the norm of {self.name}, which is 0 at "
                f"{'column' if self.pair.embedding else 'row'} {i}, expected another number; the base is not the one "
                "that it was trained on"
            )
        return (magnitude / norms).astype(np.float32)


def _cancels(left: FloatArray, right: FloatArray) -> bool:
    """Whether the rank-one parts of left @ right are larger than their sum, so that float32 would lose digits.

    ||L R||^2 is the sum of (L^T L) * (R R^T), in which the parts' own squares are the diagonal.
    """
    a, b = left.astype(np.float64), right.astype(np.float64)
    products = (a.T @ a) * (b @ b.T)
    return bool(products.sum() * _CANCELLATION**2 < np.trace(products))


def _product(left: FloatArray, right: FloatArray, scale: float) -> FloatArray:
    """scale * left @ right in float64, rounded once."""
    result = np.empty((left.shape[0], right.shape[1]), np.float32)
    wide = right.astype(np.float64)
    step = max(1, _BLOCK_VALUES // right.shape[1])
    for begin in range(0, len(left), step):
        part = left[begin : begin + step].astype(np.float64)
        result[begin : begin + step] = (part * scale) @ wide
    return result


@dataclass
class TokensUpdate(Update):
    """Replaces the rows that trainable_token_indices names."""

    tokens: Tokens

    def apply(self, values: FloatArray, begin: int) -> None:
        """See Update."""
        ids = np.array(self.tokens.ids)
        for i in np.flatnonzero((begin <= ids) & (ids < begin + len(values))):
            values[ids[i] - begin] = self.tokens.delta.read(int(i), int(i) + 1)[0]

    def sources(self) -> Iterator[SourceTensor]:
        """See Update."""
        yield self.tokens.delta


@dataclass
class BiasUpdate(Update):
    """bias + scale * the bias of lora_B."""

    bias: SourceTensor
    scale: float

    def apply(self, values: FloatArray, begin: int) -> None:
        """See Update."""
        values += self.bias.read(begin, begin + len(values)) * np.float32(self.scale)

    def sources(self) -> Iterator[SourceTensor]:
        """See Update."""
        yield self.bias


class Padded(SourceTensor):
    """A tensor with zeros for the rows that `source` lacks; source None: zeros only, as of a layer without a bias."""

    def __init__(self, source: SourceTensor | None, file: Path, name: str, shape: Sequence[int]) -> None:
        self.file, self.name, self.shape, self.dtype = file, name, tuple(shape), "F32"
        self._source = source

    def read(self, begin: int = 0, end: int | None = None) -> FloatArray:
        """See SourceTensor."""
        begin, end, _ = slice(begin, end).indices(self.shape[0])
        values = np.zeros((max(0, end - begin), *self.shape[1:]), np.float32)
        stored = 0 if self._source is None else min(end, self._source.shape[0])
        if self._source is not None and begin < stored:
            values[: stored - begin] = self._source.read(begin, stored)
        return values

    def release(self) -> None:
        """See SourceTensor."""
        if self._source is not None:
            self._source.release()
