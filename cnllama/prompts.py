# SPDX-License-Identifier: Apache-2.0
"""What callers give as prompts: text, messages or token ids, one or several, told apart and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from cnllama.errors import InputError
from cnllama.templates import Message
from cnllama.values import integer, shown

Prompt = str | Sequence[int] | Sequence[Message]

_MESSAGES = 'a list of messages [{"role": "user", "content": "..."}]'


def read_prompt(prompt: Any) -> str | list[Message] | list[int]:
    """The prompt as plain Python values. Raises InputError for what is neither text nor messages nor token ids."""
    if isinstance(prompt, str):
        return str.__str__(prompt)
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise InputError("a prompt is text, not bytes: decode them first, as in data.decode('utf-8')")
    if isinstance(prompt, Mapping):
        raise InputError(f"a prompt is {_MESSAGES}, not one message: put it into a list")
    if isinstance(prompt, Set) or not _is_iterable(prompt):
        raise InputError(f"a prompt is text, messages or token ids, not {shown(prompt)}")
    items = list(prompt)
    if items and isinstance(items[0], Mapping):
        other = next((item for item in items if not isinstance(item, Mapping)), None)
        if other is not None:
            raise InputError(f"{shown(other)} stands among the messages, expected {_MESSAGES}")
        return items
    return read_ids(items, "a prompt is text, messages or token ids")


def read_prompts(prompts: Any) -> list[Any]:
    """Several prompts, or one of them alone, as a list. Raises InputError for what has no order or is no prompt."""
    if isinstance(prompts, str | bytes | bytearray | memoryview | Mapping):
        return [prompts]
    if isinstance(prompts, Set) or not _is_iterable(prompts):
        raise InputError(f"prompts are a list of them, not {shown(prompts)}")
    items = list(prompts)
    one = bool(items) and (isinstance(items[0], Mapping) or integer(items[0]) is not None)
    return [items] if one else items


def read_ids(ids: Any, expected: str = "token ids are integers") -> list[int]:
    """Token ids as a list. Raises InputError for what is no sequence of integers."""
    if isinstance(ids, str | bytes | bytearray | memoryview | Mapping | Set) or not _is_iterable(ids):
        raise InputError(f"{expected} in a list, not {shown(ids)}")
    tokens = []
    for item in ids:
        token = integer(item)
        if token is None or not -(2**63) <= token < 2**63:
            raise InputError(f"{expected}, and {shown(item)} stands among them")
        tokens.append(token)
    return tokens


def read_text(text: Any) -> str:
    """A text. Raises InputError for everything else."""
    if not isinstance(text, str):
        raise InputError(f"the text is {shown(text)}, expected a str")
    return str.__str__(text)


def _is_iterable(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Iterable) and not isinstance(value, type)
