# SPDX-License-Identifier: Apache-2.0
"""What identifies a merged model however it was stored: rounded statistics of every tensor before quantization."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cnllama.verify import Statistics

DIGITS = 4


def rounded(value: float) -> float:
    """`value` to 4 significant digits: differences of library versions and of summation order disappear."""
    return float(f"{value:.{DIGITS - 1}e}")


def record(statistics: Statistics, error: float) -> dict[str, float]:
    """The fingerprint of one tensor. error: relative, sqrt(sum of squared quantization error / sum of squares)."""
    return {
        "rms": rounded(statistics.rms),
        "mean": rounded(statistics.mean),
        "absmax": rounded(statistics.absmax),
        "error": rounded(error),
    }


def short_name(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """Sixteen hexadecimal digits for people to compare: a hash of names and statistics to 2 digits.

    Equal for the same model nearly always; `cnllama verify --against` compares with a tolerance and decides.
    """
    coarse = {name: [f"{values['rms']:.1e}", f"{values['absmax']:.1e}"] for name, values in sorted(tensors.items())}
    return hashlib.sha256(json.dumps(coarse).encode()).hexdigest()[:16]
