# SPDX-License-Identifier: Apache-2.0
"""The quantizers by name. Those that calibrate need PyTorch, which is imported when one of them is opened."""

from __future__ import annotations

import importlib.util

from cnllama.errors import InputError

from .base import Quantizer
from .calibration import Calibration

CALIBRATED = ("gptq", "awq")
AUTO = "auto"  # choice.py
QUANTIZERS = (AUTO, "rtn", *CALIBRATED)
DEVICES = ("cpu", "cuda")


def check_quantizer(name: str, device: str = "cpu") -> None:
    """Raises InputError for an unknown quantizer or device, and for what this machine lacks to run it."""
    if name not in QUANTIZERS:
        raise InputError(f"--quantizer {name!r:.40} is unknown, expected one of {', '.join(QUANTIZERS)}")
    if device not in DEVICES:
        raise InputError(f"--device {device!r:.40} is unknown, expected one of {', '.join(DEVICES)}")
    if name not in CALIBRATED and device == "cpu":
        return
    if importlib.util.find_spec("torch") is None:
        raise InputError(f"--quantizer {name} needs torch, which is not installed; run: pip install 'cnllama[convert]'")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("--device cuda: PyTorch finds no GPU here; leave it out to calibrate on the CPU")


def open_quantizer(name: str, calibration: Calibration, device: str = "cpu") -> Quantizer:
    """A quantizer of CALIBRATED that check_quantizer accepts."""
    if name == "gptq":
        from .gptq import Gptq

        return Gptq(calibration.samples, device)
    from .awq import Awq

    return Awq(calibration.samples, device)
