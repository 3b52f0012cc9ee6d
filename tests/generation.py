# SPDX-License-Identifier: Apache-2.0
"""What the tests of generation ask: prompts, settings of sampling, a message."""

from __future__ import annotations

from typing import Any

PROMPTS = ["从前", "The old man", "天空是蓝色的，因为" * 20, "1984", "好", "a" * 300, "深度学习", "🙂"]
HOT: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "repeat_penalty": 1.1, "seed": 7}


def user(text: str) -> dict[str, str]:
    """A message of the user."""
    return {"role": "user", "content": text}
