# SPDX-License-Identifier: Apache-2.0
"""Numbers from callers: Python's and NumPy's scalars alike, and nothing that only looks like a number."""

from __future__ import annotations

import numpy as np

_SHOWN = 60  # characters


def integer(value: object) -> int | None:
    """The integer that `value` is; None for bools, floats and everything else."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    return None


def real(value: object) -> float | None:
    """The finite number that `value` is; None for bools and everything else."""
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if np.isfinite(number) else None


def shown(value: object) -> str:
    """A value for a sentence, however long or strange it is."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or an object that does not print itself
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def truth(value: object) -> bool | None:
    """The bool that `value` is; None for everything else."""
    return bool(value) if isinstance(value, bool | np.bool_) else None
