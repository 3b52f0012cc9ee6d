# SPDX-License-Identifier: Apache-2.0
"""Activation-aware scaling: columns that meet large inputs are made larger before they are rounded, and what comes
before the matrix smaller by the same factor (after Lin et al. 2023, arXiv 2306.00978).

The factors go into neighbours, so the file holds a plain LLaMA that computes the same function in exact arithmetic:

    q, k, v      input_layernorm                gate, up    post_attention_layernorm
    o            rows of v (without GQA)        down        rows of up
    lm_head      model.norm

Statistics in the fingerprint are of the tensors with the factors in them: they differ from the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cnllama import _core
from cnllama.config import FINAL_NORM, LM_HEAD
from cnllama.verify import Statistics

from .base import Piece, Work, chunks, quantize
from .llama import ATTENTION, MLP, Linear, swiglu
from .walk import Calibrated, Gram, Walk, gram_of, output_error, rounded_to_nearest, spread_rows

ALPHAS = tuple(i / 20 for i in range(21))
_JUDGED_ROWS = 256


@dataclass(frozen=True)
class Scaling:
    """factor: float32 [cols], what the columns are multiplied by. importance: [cols], of their squared errors then.

    error and rounded_error: of the output, with the factors and without, relative.
    """

    factor: torch.Tensor
    importance: torch.Tensor
    alpha: float
    error: float
    rounded_error: float


def search(weights: Sequence[torch.Tensor], schemes: Sequence[str], gram: Gram, threads: int = 0) -> Scaling:
    """The exponent alpha of factor = (mean |x|)^alpha that leaves the least error of the output of these matrices.

    They read the same inputs. weights: float32 [rows, cols] each, of which some rows are enough.
    """
    magnitude, h = gram.magnitude(), gram.finish()
    diagonal = h.diagonal().clone()
    floor = float(magnitude.mean()) * 1e-4
    magnitude = magnitude.clamp(min=floor) if floor > 0 else torch.ones_like(magnitude)
    judged = [spread_rows(weight, _JUDGED_ROWS) for weight in weights]
    share = [len(weight) / len(rows) for weight, rows in zip(weights, judged, strict=True)]
    total = sum(s * output_error(rows, h) for s, rows in zip(share, judged, strict=True))

    def error_of(factor: torch.Tensor, importance: torch.Tensor | None) -> float:
        error = 0.0
        for s, rows, scheme in zip(share, judged, schemes, strict=True):
            decoded = rounded_to_nearest(rows * factor, scheme, threads, importance)
            error += s * output_error(decoded / factor - rows, h)
        return (error / total) ** 0.5 if total else 0.0

    best: Scaling | None = None
    rounded_error = error_of(torch.ones_like(magnitude), None)
    for alpha in ALPHAS:
        factor = magnitude**alpha
        factor = factor / (factor.max() * factor.min()).sqrt()
        importance = diagonal / factor.square()
        error = error_of(factor, importance)
        if best is None or error < best.error:
            best = Scaling(factor, importance, alpha, error, rounded_error)
    assert best is not None
    return best


class Awq(Calibrated):
    """The search over ALPHAS, the factors folded into the neighbours, and rounding by importance."""

    name = "awq"

    def _layer(self, walk: Walk, prefix: str) -> Iterator[Piece]:
        return _Layer(walk, prefix).pieces()

    def _end(self, walk: Walk) -> Iterator[Piece]:
        return _head(walk) if LM_HEAD in walk.work.tensors else walk.as_they_are([FINAL_NORM])


class _Layer:
    """A layer's tensors in float32, scaled in place, then packed and run."""

    def __init__(self, walk: Walk, prefix: str) -> None:
        self._walk, self._prefix = walk, prefix
        self._norms = [self._read(f"{part}_layernorm.weight") for part in ("input", "post_attention")]
        self._stems = {name: f"self_attn.{name}" for name in ATTENTION} | {name: f"mlp.{name}" for name in MLP}
        self._layer = {
            name: walk.linear(prefix + stem, self._read(f"{stem}.weight")) for name, stem in self._stems.items()
        }

    def pieces(self) -> Iterator[Piece]:
        """In the order of the file."""
        importance = self._scale()
        for norm, part, names in (self._norms[0], "input", ATTENTION), (self._norms[1], "post_attention", MLP):
            yield self._vector(f"{part}_layernorm.weight", norm)
            for name in names:
                yield self._matrix(name, importance[name])
            for name in names:
                bias = self._layer[name].bias
                if bias is not None:
                    yield self._vector(f"{self._stems[name]}.bias", bias)
        for h in self._walk.hidden:
            self._run(h, None)

    def _scale(self) -> dict[str, torch.Tensor]:
        """Finds the factors and puts them into the weights; the importance of every matrix's columns."""
        walk, layer = self._walk, self._layer
        grams = {
            name: Gram(layer[name].weight.shape[1], walk.device)
            for name in ("q_proj", "o_proj", "gate_proj", "down_proj")
        }
        for h in walk.hidden:
            self._run(h.clone(), grams)
        attention, mlp = self._norms
        grouped = walk.work.config["num_attention_heads"] != walk.work.config["num_key_value_heads"]
        importance: dict[str, torch.Tensor] = {}
        for names, source in (
            (("q_proj", "k_proj", "v_proj"), attention),
            (("o_proj",), None if grouped else layer["v_proj"]),
            (("gate_proj", "up_proj"), mlp),
            (("down_proj",), layer["up_proj"]),
        ):
            gram = grams.pop(names[0])
            schemes = [walk.work.table[self._name(name)][0] for name in names]
            if source is None:
                importance |= dict.fromkeys(names, gram.finish().diagonal().clone())
                continue
            found = search([layer[name].weight for name in names], schemes, gram, walk.work.threads)
            for name in names:
                layer[name].weight.mul_(found.factor)
            for vector in (source,) if isinstance(source, torch.Tensor) else (source.weight.t(), source.bias):
                if vector is not None:
                    vector.div_(found.factor)
            importance |= dict.fromkeys(names, found.importance)
            _tell(walk.work, f"{self._prefix}{'/'.join(names)}", found)
        return importance

    def _run(self, h: torch.Tensor, grams: dict[str, Gram] | None) -> None:
        """Adds what the layer gives to h [batch, length, hidden]; `grams` get the inputs of its matrices."""
        walk, layer = self._walk, self._layer

        def seen(name: str, x: torch.Tensor) -> torch.Tensor:
            if grams is not None:
                grams[name].add(x)
            return x

        (x,) = walk.normed(self._norms[0], [h])
        h += layer["o_proj"](seen("o_proj", walk.attention(seen("q_proj", x), layer)))
        (x,) = walk.normed(self._norms[1], [h])
        h += layer["down_proj"](seen("down_proj", swiglu(seen("gate_proj", x), layer)))

    def _name(self, name: str) -> str:
        return f"{self._prefix}{self._stems[name]}.weight"

    def _read(self, suffix: str) -> torch.Tensor:
        tensor = self._walk.work.tensors[self._prefix + suffix]
        parts = [torch.from_numpy(values) for values in chunks(tensor, Statistics())]
        tensor.release()
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self._walk.device)

    def _vector(self, suffix: str, values: torch.Tensor) -> Piece:
        return _vector(self._prefix + suffix, values)

    def _matrix(self, name: str, importance: torch.Tensor) -> Piece:
        work, linear, full = self._walk.work, self._layer[name], self._name(name)
        piece, decoded = _matrix(work, full, linear.weight, importance)
        self._layer[name] = Linear(decoded, linear.bias)
        return piece


def _head(walk: Walk) -> Iterator[Piece]:
    """The last norm and lm_head, a few rows at a time: their number is the vocabulary's."""
    work, tensor = walk.work, walk.work.tensors[LM_HEAD]
    scheme, rows, cols = work.table[LM_HEAD]
    norm = walk.vector(FINAL_NORM)
    assert norm is not None
    gram = gram_of(walk.normed(norm), cols, walk.device)
    step = max(1, rows // _JUDGED_ROWS)
    judged = np.concatenate([tensor.read(row, row + 1) for row in range(0, rows, step)])
    found = search([torch.from_numpy(judged).to(walk.device)], [scheme], gram, work.threads)
    _tell(work, "lm_head", found)
    yield _vector(FINAL_NORM, norm / found.factor)
    statistics, factor = Statistics(), found.factor.cpu().numpy()
    importance = np.ascontiguousarray(found.importance.cpu().numpy())
    for values in chunks(tensor, Statistics()):
        scaled = values * factor
        statistics.add(scaled)
        data, error = quantize(tensor, scaled, scheme, work.threads, importance)
        yield Piece(LM_HEAD, data, statistics, scaled.size, error)
    tensor.release()


def _vector(name: str, values: torch.Tensor) -> Piece:
    data, statistics = values.cpu().numpy(), Statistics()
    statistics.add(data)
    return Piece(name, data.tobytes(), statistics, data.size)


def _matrix(work: Work, name: str, weight: torch.Tensor, importance: torch.Tensor) -> tuple[Piece, torch.Tensor]:
    """(the packed matrix, what it decodes to)."""
    tensor, scheme, statistics = work.tensors[name], work.table[name][0], Statistics()
    values = np.ascontiguousarray(weight.cpu().numpy())
    statistics.add(values)
    weights = np.ascontiguousarray(importance.cpu().numpy())
    data, error = quantize(tensor, values, scheme, work.threads, weights)
    decoded = torch.from_numpy(_core.dequantize(data, scheme, *values.shape)).to(weight.device)
    return Piece(name, data, statistics, values.size, error), decoded


def _tell(work: Work, what: str, found: Scaling) -> None:
    work.say(
        f"{what}: error of the output {found.rounded_error:.3%} rounded to nearest, {found.error:.3%} scaled by "
        f"(mean |x|)^{found.alpha:g}"
    )
