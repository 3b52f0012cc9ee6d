# SPDX-License-Identifier: Apache-2.0
"""What pandas.read_csv makes of a column: the published scripts print its values, not the text of the file.

A column of which every value is a number becomes numbers (`1.50` is printed as `1.5`, `007` as `7`), and one with a gap
floats; a value that stands for nothing, such as an empty one or `NA`, is printed as `nan`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# pandas 2 and later, default of `na_values`.
_MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null")
)  # fmt: skip
_NAN = "nan"
_SPACE = r"[ \t\n\v\f\r]*"
_INTEGER = re.compile(rf"{_SPACE}[+-]?[0-9]+{_SPACE}")
_FLOAT = re.compile(rf"{_SPACE}[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?{_SPACE}|[+-]?(?i:inf(?:inity)?)")
_BOOLS = {"True": "True", "TRUE": "True", "true": "True", "False": "False", "FALSE": "False", "false": "False"}
_DIGITS = 4000  # more than any number of int64 or any double needs, and no more than Python converts


def printed(column: Sequence[str]) -> list[str]:
    """The values of a column as an f-string prints them after pandas has read it.

    An integer beyond 64 bits, with which versions of pandas deal differently, leaves its column as it is.
    """
    given = [value for value in column if value not in _MISSING]
    shown: Callable[[str], str] = str
    integers = [int(value) for value in given if len(value) <= _DIGITS and _INTEGER.fullmatch(value)]
    if given and max(map(len, given)) <= _DIGITS and all(-(1 << 63) <= i < 1 << 63 for i in integers):
        if len(integers) == len(column):
            shown = _integer
        elif len(integers) == len(given):
            shown = _widened
        elif all(map(_FLOAT.fullmatch, given)):
            shown = _float
        elif all(value in _BOOLS for value in given):
            shown = _BOOLS.__getitem__
    return [_NAN if value in _MISSING else shown(value) for value in column]


def _integer(value: str) -> str:
    return str(int(value))


def _widened(value: str) -> str:
    return str(float(int(value)))


def _float(value: str) -> str:
    return str(float(value))
