# SPDX-License-Identifier: Apache-2.0
"""PyTorch for the time of a calibration: its threads, and what its errors mean."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .base import CalibrationError


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """At most `count` threads within the block; 0 leaves PyTorch's own choice. Raises CalibrationError for a full GPU.

    More threads than processors gain nothing, and a thread that cannot be started ends the process: OpenMP's does.
    """
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(min(count, os.cpu_count() or 1))
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise CalibrationError("the GPU has too little free memory to calibrate this model; use --device cpu") from None
    finally:
        torch.set_num_threads(before)
