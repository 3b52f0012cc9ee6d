# SPDX-License-Identifier: Apache-2.0
"""What to generate: the parameters of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from cnllama.errors import InputError
from cnllama.values import integer, real, shown, truth

_LARGEST = 2**63 - 1

# generation_config.json's names, which are those of a .cnl's `generation` metadata, and SamplingParams'.
GENERATION_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "max_tokens",
}
_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
_LARGEST_COUNT, _LARGEST_DEFAULT = 2**31 - 1, 1e6


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. The defaults are greedy and neutral.

    The steps, in this order: end tokens are kept out until `min_tokens`; repetition penalty over the last
    `repeat_last_n` tokens of prompt and answer (-1: all); at temperature 0 the most likely token; otherwise top_k
    (0: all), top_p, min_p, temperature, draw. seed None: a random one, reported in the result. max_tokens None: until
    the context is full. stop: strings that end the text, which is cut before them. stop_token_ids: ids that end it
    besides the model's end tokens. ignore_eos: the model's end tokens end nothing. logprobs: None, or how many of the
    most likely tokens to report besides the chosen one. NumPy's scalars are numbers, too. Raises InputError for a value
    outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    max_tokens: int | None = 512
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _texts("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        _number(self, "temperature", low=0)
        _number(self, "top_p", above=0, high=1)
        _number(self, "min_p", low=0, high=1)
        _number(self, "repeat_penalty", above=0)
        _integer(self, "top_k", low=0)
        _integer(self, "repeat_last_n", low=-1)
        _integer(self, "min_tokens", low=0)
        for name, high in (("seed", 2**64 - 1), ("max_tokens", _LARGEST), ("logprobs", 1000)):
            if getattr(self, name) is not None:
                _integer(self, name, low=0, high=high)
        if truth(self.ignore_eos) is None:
            raise InputError(f"ignore_eos is {shown(self.ignore_eos)}, expected True or False")
        object.__setattr__(self, "ignore_eos", truth(self.ignore_eos))
        if any(not text for text in self.stop):
            raise InputError("a stop string is empty: leave it out")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens is {self.min_tokens}, over max_tokens, {self.max_tokens}")

    def with_changes(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed. Raises InputError for a name that is not a field."""
        unknown = sorted(set(changes) - {f.name for f in fields(self)})
        if unknown:
            known = ", ".join(f.name for f in fields(self))
            raise InputError(f"there is no sampling parameter {unknown[0]!r}: choose from {known}")
        return replace(self, **changes)


def read_defaults(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(usable values, parameter -> sentence on one that is not) of what a file says under GENERATION_NAMES' names.

    Every form of "off" that tools write is understood: null, a top_k of 0, -1 or more than there can be, a
    repetition_penalty of 0, a max_new_tokens of 0 or -1, which is left out. Numbers may be written as text.
    """
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for key, name in GENERATION_NAMES.items():
        if key not in given:
            continue
        try:
            found = _default(key, given[key])
            SamplingParams(**{GENERATION_NAMES[k]: value for k, value in found.items()})
        except InputError as error:
            problems[name] = f"{str(error).replace(name, key, 1)}: ignored"
        else:
            values |= found
    return values, problems


def _default(key: str, value: object) -> dict[str, Any]:
    """{name: value in SamplingParams' sense} of one value of a file, empty where it says nothing."""
    number = _number_in(value)
    if value is None:
        return {key: _OFF[key]} if key in _OFF else {}
    if number is None:
        raise InputError(f"{key} is {shown(value)}, expected a number")
    if key == "max_new_tokens":
        return {} if number in (-1, 0) or number > _LARGEST_COUNT else {key: number}
    if key == "top_k" and (number == -1 or number > _LARGEST_COUNT):
        return {key: 0}
    if key == "top_p" and number == 0:
        return {"top_k": 1}  # only the most likely token is left, as in transformers
    if key == "repetition_penalty" and number == 0:
        return {key: 1.0}
    if abs(number) > _LARGEST_DEFAULT and not (key == "top_k" and number > 0):
        raise InputError(f"{key} is {shown(value)}, expected at most {_LARGEST_DEFAULT:,.0f}")
    return {key: number}


def _number_in(value: object) -> int | float | None:
    """A finite number, whole ones as int; None for what is none."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        return None
    return int(value) if value == int(value) and abs(value) < _LARGEST_COUNT else value


def file_defaults(template: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[SamplingParams, dict[str, str]]:
    """(the parameters of a request that sets none, parameter -> sentence on a value that cannot be used).

    template: a Template's `sampling`. generation: the metadata of a .cnl, whose usable values come before those.
    """
    values, problems = read_defaults(generation)
    named = {GENERATION_NAMES[key]: value for key, value in values.items()}
    return SamplingParams(**{**template, **named}), problems


def _texts(name: str, values: Any) -> tuple[str, ...]:
    items = _items(values)
    for item in items:
        if not isinstance(item, str):
            raise InputError(f"{name} holds {shown(item)}, expected text")
    return tuple(map(str.__str__, items))


def _ids(name: str, values: Any) -> tuple[int, ...]:
    items = _items(values)
    ids = tuple(i for i in map(integer, items) if i is not None)
    if len(ids) < len(items):
        wrong = next(item for item in items if integer(item) is None)
        raise InputError(f"{name} holds {shown(wrong)}, expected token ids")
    return ids


def _items(values: Any) -> tuple[Any, ...]:
    """Several values, or a single one."""
    if isinstance(values, str | bytes | Mapping):
        return (values,)
    try:
        return tuple(values)
    except TypeError:
        return (values,)


def _number(
    params: SamplingParams,
    name: str,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> None:
    value = real(getattr(params, name))
    good = value is not None and (low is None or value >= low) and (above is None or value > above)
    if not good or value is None or (high is not None and value > high):
        ranges = [f"at least {low:g}" if low is not None else f"over {above:g}" if above is not None else ""]
        ranges += [f"at most {high:g}"] if high is not None else []
        expected = " and ".join(r for r in ranges if r)
        raise InputError(f"{name} is {shown(getattr(params, name))}, expected a number {expected}")
    object.__setattr__(params, name, value)


def _integer(params: SamplingParams, name: str, low: int, high: int = _LARGEST) -> None:
    value = integer(getattr(params, name))
    if value is None or not low <= value <= high:
        limit = f" and at most {high}" if high != _LARGEST else ""
        raise InputError(f"{name} is {shown(getattr(params, name))}, expected an integer, at least {low}{limit}")
    object.__setattr__(params, name, value)
