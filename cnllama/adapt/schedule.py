# SPDX-License-Identifier: Apache-2.0
"""The learning rate of every step: it rises, then falls, and no step has none."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def warmup_steps(share: float, total: int) -> int:
    """Steps of the warm-up: `share` of all, rounded up, but never all of them."""
    return min(math.ceil(share * total), total - 1)


def rate(step: int, total: int, warmup: int, schedule: str) -> float:
    """The factor of the learning rate in step 1 .. total.

    step / (warmup + 1) in the first `warmup` steps. After them, with p = (step - 1 - warmup) / (total - warmup), which
    is 0 in the first and less than 1 in the last: (1 + cos(pi p)) / 2, 1 - p or 1.
    """
    if step <= warmup:
        return step / (warmup + 1)
    progress = min(1.0, (step - 1 - warmup) / (total - warmup))
    if schedule == "constant":
        return 1.0
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
