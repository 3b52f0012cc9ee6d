# SPDX-License-Identifier: Apache-2.0
"""Which quantizer `--quantizer auto` is: GPTQ where it is soon done, else rounding."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

PATIENCE = 600.0
"""Seconds that a calibration may be expected to take before rounding is chosen."""

_OPERATIONS = 3  # per weight and token: the forward pass, and the Gram matrices of its inputs
_CPU_RATE, _GPU_RATE = 3e10, 3e13  # operations a second, of a core and of a GPU: what a slow one reaches


@dataclass(frozen=True)
class Choice:
    """quantizer: "gptq" or "rtn". device: "cpu" or "cuda". reason: one line for the report."""

    quantizer: str
    device: str
    reason: str


def choose(parameters: int, tokens: int, device: str | None = None) -> Choice:
    """The quantizer for a model of so many weights, calibrated on so many tokens, on this machine.

    device: "cpu", "cuda", or None for the faster one that is there.
    """
    if importlib.util.find_spec("torch") is None:
        return Choice("rtn", "cpu", "gptq loses less and needs PyTorch: pip install 'cnllama[convert]'")
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rate = _GPU_RATE if device == "cuda" else _CPU_RATE * (os.cpu_count() or 1)
    seconds = _OPERATIONS * parameters * tokens / rate
    if seconds > PATIENCE:
        return Choice("rtn", "cpu", f"--quantizer gptq loses less and would take about {seconds / 60:,.0f} minutes")
    return Choice("gptq", device, "chosen because it loses less and is soon done here; --quantizer rtn needs seconds")
