# SPDX-License-Identifier: Apache-2.0
"""PyTorch for the time of a calibration: its threads, and what its errors mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .base import CalibrationError


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """`count` threads within the block; 0 leaves PyTorch's own choice. Raises CalibrationError for a full GPU."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise CalibrationError("the GPU has too little free memory to calibrate this model; use --device cpu") from None
    finally:
        torch.set_num_threads(before)
