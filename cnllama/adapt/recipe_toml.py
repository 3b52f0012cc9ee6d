# SPDX-License-Identifier: Apache-2.0
"""A recipe's TOML, which may be a stranger's: read in bounded time, and of the outermost shape that recipes have."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from typing import Any

from cnllama.errors import InputError
from cnllama.paths import read_bytes

_MAX_BYTES, _MAX_DEPTH, _MAX_STAGES = 1 << 18, 20, 200
# What of TOML may hold dots without being a key, in the order in which it is recognized.
_NO_KEY = re.compile(r'''"""(?:\\.|[^\\])*?"""|\'{3}.*?\'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|#[^\n]*''', re.DOTALL)


def read_toml(path: Path) -> dict[str, Any]:
    """{"variables": a table of scalars, "stage": one table or more} of the file at `path`.

    Raises InputError for what is no TOML, for anything else in it, and for more or deeper than a recipe can need.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            tomllib = importlib.import_module("tomli")
        except ModuleNotFoundError:
            raise InputError("recipes need tomli on this Python; run: pip install 'cnllama[adapt]'") from None
    try:
        text = read_bytes(path, _MAX_BYTES).decode("utf-8")
        # The time that tomllib takes for a dotted key grows with the square of its parts.
        if any(words.count(".") > _MAX_DEPTH for words in re.split(r"[\n=,\[\]{}]", _NO_KEY.sub("", text))):
            raise ValueError(f"a key has more than {_MAX_DEPTH} parts")
        content: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid TOML ({error!s:.200})") from None
    _check_values(path, content)
    unknown = set(content) - {"variables", "stage", "description"}
    if unknown:
        raise InputError(f"{path}: has {min(unknown)!r:.60}, expected only description, [variables] and [[stage]]")
    variables, stages = content.get("variables", {}), content.get("stage", [])
    if not isinstance(variables, dict):
        raise InputError(f"{path}: variables is {variables!r:.60}, expected a table, [variables]")
    for name, value in variables.items():
        if not is_scalar(value):
            raise InputError(
                f"{path}: the variable {name!r:.60} is {value!r:.60}, expected text, a number or a boolean"
            )
    if isinstance(stages, dict):
        raise InputError(f"{path}: has [stage], expected [[stage]]: double brackets, once for each stage")
    if not isinstance(stages, list) or not all(isinstance(table, dict) for table in stages):
        raise InputError(f"{path}: stage is {stages!r:.60}, expected tables, each under [[stage]]")
    if not stages:
        raise InputError(f"{path}: has no [[stage]], expected at least one")
    if len(stages) > _MAX_STAGES:
        raise InputError(f"{path}: has {len(stages):,} [[stage]], expected at most {_MAX_STAGES}")
    return {"variables": variables, "stage": stages}


def _check_values(path: Path, value: object, depth: int = 0) -> None:
    """Raises InputError for an integer that TOML does not have, which Python may not print, and for endless nesting."""
    if depth > _MAX_DEPTH:
        raise InputError(f"{path}: is nested more than {_MAX_DEPTH} deep, expected [variables] and [[stage]]")
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_values(path, item, depth + 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"{path}: holds an integer of {value.bit_length():,} bits, expected at most 64 with its sign")


def is_scalar(value: object) -> bool:
    """Text, a boolean or a finite number."""
    if isinstance(value, str):
        return "\0" not in value
    return isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
