# SPDX-License-Identifier: Apache-2.0
"""What a calibration will take: memory by the tensors it holds at once, time by operations and short measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .awq import ALPHAS
from .gptq import BLOCK, CHUNK_VALUES, Grid, solve
from .walk import BATCH_TOKENS

_FLOAT = 4
_FACTORED = 4  # copies of a Gram matrix while its inverse is made
_LIBRARIES = 128 << 20  # what PyTorch's pools and threads take when they work
_SIDE = 768  # of the matrices that are multiplied to measure
_FEW, _MANY = 64, 1024  # rows that are solved to measure

Table = Mapping[str, tuple[str, int, int]]


def calibration_bytes(quantizer: str, table: Table, config: Mapping[str, Any], tokens: int, device: str) -> int:
    """Resident bytes beside the process as it is, PyTorch loaded: the largest of the phases of walk.py."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    states = _FLOAT * tokens * hidden + _LIBRARIES
    if device != "cpu":
        return int(states + 2 * _FLOAT * CHUNK_VALUES)
    batch = _FLOAT * BATCH_TOKENS * (3 * inner + 4 * hidden)
    if quantizer == "awq":
        layer = sum(rows * cols for name, (_, rows, cols) in table.items() if ".layers.0." in name)
        return int(states + batch + _FLOAT * (layer + 3 * hidden**2 + 2 * inner**2 + 4 * hidden * inner))
    kept = 2 * tokens * max(inner, config["num_attention_heads"] * config["head_dim"])  # bfloat16
    phases = [2 * _FLOAT * hidden * inner + batch]
    for _, rows, cols in _matrices(table):
        chunk = min(rows * cols, CHUNK_VALUES)
        phases += [_FLOAT * _FACTORED * cols**2, _FLOAT * (2 * cols**2 + 2 * chunk + chunk // 2 + rows * cols)]
    return int(states + kept + max(phases))


def calibration_seconds(
    quantizer: str, table: Table, tokens: int, device: str, *, threads: int, judged: int = 0
) -> float:
    """By what a product of matrices and GPTQ's loop take on this machine now. judged: tokens that the engine runs."""
    matrices = list(_matrices(table))
    forward = sum(2.0 * tokens * rows * cols for _, rows, cols in matrices)
    grams = sum(1.0 * tokens * cols**2 + cols**3 for _, _, cols in matrices) / 2  # several matrices share an input
    rate = _multiplications(device)
    forward += sum(2.0 * judged * rows * cols for _, rows, cols in matrices)
    if quantizer == "awq":
        searched = sum(len(ALPHAS) * (2.0 * rows * cols * cols) / max(1, rows / 128) for _, rows, cols in matrices)
        return (2 * forward + grams + searched) / rate
    updates = sum(1.0 * rows * cols**2 for _, rows, cols in matrices)
    each, by_row = _solving(next(scheme for scheme, _, _ in matrices), device, threads)
    columns = sum(math.ceil(rows * cols / CHUNK_VALUES) * cols for _, rows, cols in matrices)
    values = sum(rows * cols for _, rows, cols in matrices)
    return (forward + grams + updates) / rate + columns * each + values * by_row


def _matrices(table: Table) -> Iterator[tuple[str, int, int]]:
    return (
        (scheme, rows, cols) for name, (scheme, rows, cols) in table.items() if scheme != "f32" and "embed" not in name
    )


def _multiplications(device: str) -> float:
    """Floating-point operations a second of a matrix product."""
    a = torch.rand(_SIDE, _SIDE, device=device)
    return 2.0 * _SIDE**3 / _shortest(lambda: a @ a, device)


def _solving(scheme: str, device: str, threads: int) -> tuple[float, float]:
    """Seconds of GPTQ's loop for each column, and for each value in it."""
    upper, grid = torch.eye(BLOCK, device=device), Grid.of(scheme)

    def seconds(rows: int) -> float:
        weight = torch.rand(rows, BLOCK, device=device)
        return _shortest(lambda: solve(weight.clone(), upper, grid, threads), device) / BLOCK

    few, many = seconds(_FEW), seconds(_MANY)
    by_row = max(0.0, many - few) / (_MANY - _FEW)
    return max(0.0, few - _FEW * by_row), by_row


def _shortest(work: Callable[[], object], device: str) -> float:
    """Seconds of the second of two runs: the first one loads what it needs."""
    taken = math.inf
    for _ in range(2):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - begin
    return taken
