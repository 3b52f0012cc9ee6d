# SPDX-License-Identifier: Apache-2.0
"""The samples on their way through the model, one layer after the other: each sees what the packed ones before it give.

Only the matrices that are being worked on are in memory, and hidden states: float32 between layers, bfloat16 where the
inputs of a matrix are kept until it has been quantized.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from cnllama import _core
from cnllama.config import EMBEDDING
from cnllama.verify import Statistics

from .base import Piece, Work, chunks, quantize, rounded
from .llama import Attention, Linear, rms_norm
from .threads import torch_threads

BATCH_TOKENS = 2048
_STRIP = 1024  # columns of a Gram matrix computed at a time


class Walk:
    """`hidden`: the residual stream of the samples before the current layer, float32 [batch, length, hidden] each."""

    def __init__(self, work: Work, samples: npt.NDArray[np.int32], device: str) -> None:
        self.work, self.device = work, device
        self.attention = Attention(work.config, samples.shape[1], device)
        self.hidden: list[torch.Tensor] = []
        self._samples = samples

    def embed(self) -> Iterator[Piece]:
        """Packs the embedding and looks the samples up in what was packed."""
        tensor, statistics = self.work.tensors[EMBEDDING], Statistics()
        scheme, _, cols = self.work.table[EMBEDDING]
        states = torch.empty(*self._samples.shape, cols)
        begin = 0
        for values in chunks(tensor, statistics):
            data, error = quantize(tensor, values, scheme, self.work.threads)
            end = begin + len(values)
            found = (self._samples >= begin) & (self._samples < end)
            rows = _core.dequantize(data, scheme, len(values), cols)
            states[torch.from_numpy(found)] = torch.from_numpy(rows[self._samples[found] - begin])
            begin = end
            yield Piece(EMBEDDING, data, statistics, values.size, error)
        tensor.release()
        batch = max(1, BATCH_TOKENS // self._samples.shape[1])
        self.hidden = [part.clone().to(self.device) for part in states.split(batch)]

    def layers(self) -> list[str]:
        """The prefix of every layer's tensors."""
        return [f"model.layers.{i}." for i in range(self.work.config["num_hidden_layers"])]

    def as_they_are(self, names: Iterable[str]) -> Iterator[Piece]:
        """The vectors of these names that the model has."""
        for name in names:
            if name in self.work.tensors:
                yield from rounded(self.work, name)

    def vector(self, name: str) -> torch.Tensor | None:
        """float32 [n]; None where the model has none."""
        if name not in self.work.tensors:
            return None
        return torch.from_numpy(self.work.tensors[name].read()).to(self.device)

    def linear(self, stem: str, weight: torch.Tensor) -> Linear:
        """A matrix with the model's own bias."""
        return Linear(weight, self.vector(f"{stem}.bias"))

    def normed(self, norm: torch.Tensor, hidden: Iterable[torch.Tensor] | None = None) -> Iterator[torch.Tensor]:
        """`hidden`, the residual stream by default, after a norm."""
        eps = self.work.config["rms_norm_eps"]
        return (rms_norm(h, norm, eps) for h in (self.hidden if hidden is None else hidden))

    def add(self, inputs: Sequence[torch.Tensor], linear: Linear) -> None:
        """hidden += linear(inputs)."""
        for hidden, x in zip(self.hidden, inputs, strict=True):
            hidden.add_(linear(x.float()))


class Calibrated(ABC):
    """A quantizer that sees samples on their way.

    samples: int32 [samples, length] token ids. device: "cpu" or "cuda", for the calibration.
    """

    name: str

    def __init__(self, samples: npt.NDArray[np.int32], device: str = "cpu") -> None:
        self._samples, self._device = samples, device

    def pieces(self, work: Work) -> Iterator[Piece]:
        """See Quantizer; a layer at a time. Raises CalibrationError where it cannot be done."""
        with torch_threads(work.threads):
            walk = Walk(work, self._samples, self._device)
            yield from walk.embed()
            for prefix in walk.layers():
                yield from self._layer(walk, prefix)
            yield from self._end(walk)

    @abstractmethod
    def _layer(self, walk: Walk, prefix: str) -> Iterator[Piece]:
        """The tensors of a layer; moves `walk.hidden` behind it."""

    @abstractmethod
    def _end(self, walk: Walk) -> Iterator[Piece]:
        """The final norm and lm_head."""


class Gram:
    """H = 2 / n * sum of x x^T over the n inputs of a matrix, and mean |x| of every column: float32."""

    def __init__(self, size: int, device: str) -> None:
        self._sum = torch.zeros(size, size, device=device)
        self._magnitude = torch.zeros(size, device=device)
        self._count = 0

    def add(self, inputs: torch.Tensor) -> None:
        """inputs: [..., size]."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        for begin in range(0, x.shape[1], _STRIP):  # the upper triangle, with the strips' own squares
            strip = x[:, begin : begin + _STRIP]
            self._sum[begin : begin + _STRIP, begin:].addmm_(strip.t(), x[:, begin:])
        self._magnitude += x.abs().sum(0)
        self._count += len(x)

    def magnitude(self) -> torch.Tensor:
        """[size]."""
        return self._magnitude / max(1, self._count)

    def finish(self) -> torch.Tensor:
        """[size, size], symmetric. The sum is given away: call it once."""
        h, size = self._sum, len(self._magnitude)
        del self._sum
        h *= 2 / max(1, self._count)
        for begin in range(0, size, _STRIP):
            end = min(begin + _STRIP, size)
            h[end:, begin:end] = h[begin:end, end:].t()
        return h


def gram_of(inputs: Iterable[torch.Tensor], size: int, device: str) -> Gram:
    """The Gram matrix of batches [..., size]."""
    gram = Gram(size, device)
    for x in inputs:
        gram.add(x)
    return gram


def output_error(delta: torch.Tensor, h: torch.Tensor) -> float:
    """sum of (delta x)^2 over the inputs that h was made of, times 2 / n: the trace of delta H delta^T."""
    return float((delta @ h).mul_(delta).sum(dtype=torch.float64))


def spread_rows(weight: torch.Tensor, count: int) -> torch.Tensor:
    """About `count` rows, evenly spread: enough to estimate an error by."""
    return weight[:: max(1, len(weight) // count)]


def rounded_to_nearest(
    weight: torch.Tensor, scheme: str, threads: int, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """What `weight` [rows, cols] decodes to when it is packed by Rtn. Raises ValueError for values beyond fp16."""
    values = np.ascontiguousarray(weight.cpu().numpy())
    weights = {} if importance is None else {"importance": np.ascontiguousarray(importance.cpu().numpy())}
    packed = _core.quantize(values, scheme, threads, **weights)[0]
    return torch.from_numpy(_core.dequantize(packed, scheme, *values.shape)).to(weight.device)
