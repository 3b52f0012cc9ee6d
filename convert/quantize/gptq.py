# SPDX-License-Identifier: Apache-2.0
"""GPTQ: each column's rounding error is made up for by the columns that are still to come (Frantar et al. 2022,
arXiv 2210.17323, algorithm 1). One layer at a time, its inputs from the layers that have been quantized before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cnllama import _core
from cnllama.config import FINAL_NORM, LM_HEAD
from cnllama.verify import Statistics

from .base import ByteArray, CalibrationError, Piece, cannot_quantize, chunks
from .llama import ATTENTION, Linear, swiglu
from .walk import Calibrated, Walk, gram_of, output_error, rounded_to_nearest, spread_rows

DAMPING = 0.01  # of the mean of H's diagonal: percdamp of the paper's code
_RETRIES = 8
BLOCK = 128  # columns whose updates of the later ones are done at once
CHUNK_VALUES = 1 << 25  # rows are independent: so much of a matrix is worked on at a time
_JUDGED_ROWS = 128
_ROUNDER = 1.5 * 2**23  # added to a small float32 and taken off again: its nearest integer, ties to even


@dataclass(frozen=True)
class Grid:
    """The integers of a scheme: w = scale * (q - zero) for q - zero of low .. high, plus min where asymmetric."""

    scheme: str
    group: int
    low: int
    high: int
    zero: int

    @classmethod
    def of(cls, scheme: str) -> Grid:
        """Of a name in _core.schemes()."""
        facts = _core.schemes()[scheme]
        bits = facts["bits"]
        if facts["asymmetric"]:
            return cls(scheme, facts["group"], 0, (1 << bits) - 1, 0)
        half = 1 << (bits - 1)
        return cls(scheme, facts["group"], 1 - half if bits == 8 else -half, half - 1, half)

    def fit(self, weight: torch.Tensor, importance: torch.Tensor, threads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scales, mins) float32 [rows] of one group [rows, up to group columns]. importance: [columns], of the
        squared errors.
        """
        short = self.group - weight.shape[1]
        if short:  # columns that weigh nothing complete the last group
            weight = torch.cat((weight, weight[:, -1:].expand(-1, short)), dim=1)
            importance = torch.cat((importance, importance.new_zeros(short)))
        scales, mins = _core.fit_groups(
            np.ascontiguousarray(weight.cpu().numpy()),
            self.scheme,
            threads,
            importance=np.ascontiguousarray(importance.cpu().numpy()),
        )
        return tuple(torch.from_numpy(v[:, 0].astype(np.float32)).to(weight.device) for v in (scales, mins))


def inverse_factor(h: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """U, upper triangular, of H^-1 = U^T U. h: float32 [cols, cols]; it is damped in place, a little more with every
    attempt that is not positive definite.

    A column that no input reached gets the mean of the diagonal: it is rounded without making up for anything. Raises
    CalibrationError when no damping helps.
    """
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    diagonal[dead] = mean
    damp = damping * mean
    for _ in range(_RETRIES):
        diagonal += damp
        # Backwards, H = R R^T with R upper, so U = R^-1: one factorization and no inverse of H.
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not int(failed):
            upper = lower.flip(0, 1)
            del lower
            _invert_upper(upper)
            if bool(torch.isfinite(upper.diagonal()).all()):
                return upper
        damp *= 4
    raise CalibrationError("the Hessian of a matrix has no Cholesky factor; calibrate with more text (--calibrate)")


def _invert_upper(r: torch.Tensor) -> None:
    """The inverse of an upper triangular matrix in its place, by halves: [[A, B], [0, C]] has -A^-1 B C^-1 for B."""
    half = len(r) // 2
    if len(r) <= BLOCK:
        r.copy_(torch.linalg.solve_triangular(r, torch.eye(len(r), device=r.device), upper=True))
        return
    a, b, c = r[:half, :half], r[:half, half:], r[half:, half:]
    _invert_upper(a)
    _invert_upper(c)
    b.copy_(-(a @ b) @ c)


def solve(
    weight: torch.Tensor, upper: torch.Tensor, grid: Grid, threads: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes weight, float32 [rows, cols], in place: afterwards it holds what the packed rows decode to.

    upper: of inverse_factor. Returns (q uint8 [rows, cols] as stored, scales, mins float32 [rows, groups]). The scales
    of a group are fitted when its first column is reached, to the weights as the columns before left them; a squared
    error in column j costs 1 / U[j, j]^2.
    """
    rows, cols = weight.shape
    q = torch.empty(rows, cols, dtype=torch.uint8)
    scales = torch.zeros(rows, -(-cols // grid.group))
    mins = torch.zeros_like(scales)
    cost = upper.diagonal().square().reciprocal()
    for begin in range(0, cols, BLOCK):
        end = min(begin + BLOCK, cols)
        block = weight[:, begin:end].t().contiguous()  # a column's values side by side
        errors, integers = torch.empty_like(block), torch.empty_like(block)
        for i in range(end - begin):
            column = begin + i
            if column % grid.group == 0:
                first, last = i, min(i + grid.group, end - begin)
                block[first:last].addmm_(upper[begin:column, column : begin + last].t(), errors[:first], alpha=-1)
                scale, minimum = grid.fit(block[first:last].t(), cost[column : begin + last], threads)
                scales[:, column // grid.group], mins[:, column // grid.group] = scale.cpu(), minimum.cpu()
                inverse = torch.where(scale == 0, 0, 1 / scale)
            block[i] -= upper[begin + first : column, column] @ errors[first:i]
            steps = ((block[i] - minimum) * inverse).clamp_(grid.low, grid.high)
            integers[i] = steps.add_(_ROUNDER).sub_(_ROUNDER)
            decoded = integers[i] * scale + minimum  # the product is exact, so this is the engine's multiply-add
            errors[i] = (block[i] - decoded) / upper[column, column]
            block[i] = decoded
        weight[:, end:].addmm_(errors.t(), upper[begin:end, end:], alpha=-1)
        weight[:, begin:end] = block.t()
        q[:, begin:end] = (integers.t() + grid.zero).to(torch.uint8).cpu()
    return q, scales, mins


class Gptq(Calibrated):
    """`solve` for every matrix, in the order in which the layer runs them."""

    name = "gptq"

    def _layer(self, walk: Walk, prefix: str) -> Iterator[Piece]:
        yield from self._attention(walk, prefix)
        yield from self._mlp(walk, prefix)

    def _end(self, walk: Walk) -> Iterator[Piece]:
        yield from walk.as_they_are([FINAL_NORM])
        if LM_HEAD in walk.work.tensors:
            norm = walk.vector(FINAL_NORM)
            yield from self._matrices(walk, ["lm_head"], walk.normed(norm))

    def _attention(self, walk: Walk, prefix: str) -> Iterator[Piece]:
        norm = walk.vector(f"{prefix}input_layernorm.weight")
        yield from walk.as_they_are([f"{prefix}input_layernorm.weight"])
        stems = [f"{prefix}self_attn.{name}" for name in ATTENTION]
        layer: dict[str, Linear] = {}
        yield from self._matrices(walk, stems[:3], walk.normed(norm), layer)
        mixed = [walk.attention(x, layer).bfloat16() for x in walk.normed(norm)]
        layer.clear()
        yield from self._matrices(walk, stems[3:], mixed, layer)
        walk.add(mixed, layer["o_proj"])
        yield from walk.as_they_are(f"{stem}.bias" for stem in stems)

    def _mlp(self, walk: Walk, prefix: str) -> Iterator[Piece]:
        norm = walk.vector(f"{prefix}post_attention_layernorm.weight")
        yield from walk.as_they_are([f"{prefix}post_attention_layernorm.weight"])
        stems = [f"{prefix}mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        layer: dict[str, Linear] = {}
        yield from self._matrices(walk, stems[:2], walk.normed(norm), layer)
        gated = [swiglu(x, layer).bfloat16() for x in walk.normed(norm)]
        layer.clear()
        yield from self._matrices(walk, stems[2:], gated, layer)
        walk.add(gated, layer["down_proj"])
        yield from walk.as_they_are(f"{stem}.bias" for stem in stems)

    def _matrices(
        self, walk: Walk, stems: Sequence[str], inputs: Iterable[torch.Tensor], layer: dict[str, Linear] | None = None
    ) -> Iterator[Piece]:
        """Quantizes the matrices that read these inputs; `layer` gets what they decode to, by their short names."""
        cols = walk.work.table[f"{stems[0]}.weight"][2]
        h = gram_of(inputs, cols, walk.device).finish()
        upper = inverse_factor(h)
        for stem in stems:
            decoded: list[torch.Tensor] = []
            yield from _matrix(walk, f"{stem}.weight", h, upper, decoded if layer is not None else None)
            if layer is not None:
                weight = decoded[0] if len(decoded) == 1 else torch.cat(decoded)
                layer[stem.rsplit(".", 1)[-1]] = walk.linear(stem, weight)


def _matrix(
    walk: Walk, name: str, h: torch.Tensor, upper: torch.Tensor, decoded: list[torch.Tensor] | None
) -> Iterator[Piece]:
    work, statistics = walk.work, Statistics()
    tensor, grid = work.tensors[name], Grid.of(work.table[name][0])
    rounded_error = error = total = 0.0
    for values in chunks(tensor, statistics, CHUNK_VALUES):
        original = torch.from_numpy(values).to(walk.device)
        weight = original.clone()
        try:
            q, scales, mins = solve(weight, upper, grid, work.threads)
            judged = spread_rows(original, _JUDGED_ROWS)
            rounded_error += output_error(rounded_to_nearest(judged, grid.scheme, work.threads) - judged, h)
        except ValueError as problem:
            raise cannot_quantize(tensor, problem) from None
        error += output_error(spread_rows(weight, _JUDGED_ROWS) - judged, h)
        total += output_error(judged, h)
        squared_error = float((weight - original).square_().sum(dtype=torch.float64))
        if decoded is not None:
            decoded.append(weight)
        yield Piece(name, packed(q, scales, mins, grid.scheme, work.threads), statistics, values.size, squared_error)
    tensor.release()
    before, after = ((part / total) ** 0.5 if total else 0.0 for part in (rounded_error, error))
    work.say(f"{name}: {grid.scheme}, error of the output {before:.3%} rounded to nearest, {after:.3%} by gptq")


def packed(q: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, scheme: str, threads: int) -> ByteArray:
    """The panels of what `solve` returns."""
    halves = [np.ascontiguousarray(v.numpy().astype(np.float16)) for v in (scales, mins)]
    return _core.pack(q.numpy(), halves[0], halves[1], scheme, threads)
