# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of strangers: Python's syntax, matched in time linear in the name, whatever the expression."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cnllama.errors import InputError

MAX_LENGTH = 4000  # characters of one pattern
_MAX_STATES = 8000
_MAX_REMEMBERED = 1 << 20
_LITERAL_COST = 5  # of a comparison by Python's own matcher, in states
_LITERAL = re.compile(r"[\w.\-]*", re.ASCII)
# The characters of LLaMA's module names: all that a pattern is ever compared with.
_ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_.")
_DIGITS = frozenset("0123456789")
_CATEGORIES = {
    "CATEGORY_DIGIT": _DIGITS,
    "CATEGORY_NOT_DIGIT": _ALPHABET - _DIGITS,
    "CATEGORY_WORD": _ALPHABET - {"."},
    "CATEGORY_NOT_WORD": frozenset("."),
    "CATEGORY_SPACE": frozenset(""),
    "CATEGORY_NOT_SPACE": _ALPHABET,
}
# Python's own parser, so that the syntax is Python's; it moved in 3.11.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

_States = frozenset[int]
_Key = tuple[_States, str, str]


_UNSUPPORTED = {
    "ASSERT": "look-around",
    "ASSERT_NOT": "look-around",
    "GROUPREF": "references to groups",
    "GROUPREF_EXISTS": "references to groups",
    "ATOMIC_GROUP": "atomic groups",
    "POSSESSIVE_REPEAT": "possessive repeats",
}


class _UnsupportedError(Exception):
    """Something that no finite automaton does, or not a small one; carries its name."""


@dataclass
class Budget:
    """How many states all patterns of one file may pass through: so many take some seconds."""

    left: int = 30_000_000

    def spend(self, states: int) -> None:
        """Raises _UnsupportedError when nothing is left."""
        self.left -= states
        if self.left < 0:
            raise _UnsupportedError("takes too long to compare")


class Pattern:
    """A regular expression as PEFT would compare it with names of modules.

    text: the whole expression. shown: what the file has of it, for messages; `where` begins them. Raises InputError for
    what is no expression, for one that is too long, and for look-around, references to groups and flags, whose time
    has no bound; matching raises it when the budget is used up.
    """

    def __init__(self, text: str, shown: str, where: str, budget: Budget) -> None:
        self.shown = shown
        self._problem = problem = f"{where}: the pattern {shown!r:.60}"
        if len(shown) > MAX_LENGTH:
            raise InputError(f"{problem} has {len(shown):,} characters, expected at most {MAX_LENGTH:,}")
        self._budget = budget
        self._literal: re.Pattern[str] | None = None
        self._automaton: _Automaton | None = None
        try:
            if _LITERAL.fullmatch(shown):
                self._literal = re.compile(text)
            else:
                self._automaton = _Automaton(text, budget)
        except _UnsupportedError as unsupported:
            raise InputError(
                f"{problem} has {unsupported}, which cannot be compared in bounded time; list the names of the modules"
            ) from None
        except (re.error, RecursionError, OverflowError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise InputError(
                f"{problem} is no regular expression ({reason:.80}); correct it or list the names of the modules"
            ) from None

    def match(self, name: str) -> bool:
        """Whether the expression matches a beginning of `name`, as re.match does."""
        return self._accepts(name, whole=False)

    def fullmatch(self, name: str) -> bool:
        """Whether the expression matches all of `name`, as re.fullmatch does."""
        return self._accepts(name, whole=True)

    def _accepts(self, name: str, whole: bool) -> bool:
        try:
            if self._literal is not None:
                self._budget.spend(_LITERAL_COST)
                return (self._literal.fullmatch(name) if whole else self._literal.match(name)) is not None
            assert self._automaton is not None
            return self._automaton.accepts(name, whole)
        except _UnsupportedError as unsupported:
            raise InputError(f"{self._problem} {unsupported}; list the names of the modules") from None


class _Automaton:
    """Thompson's construction over the tree of Python's parser, run as a set of states with remembered steps.

    A state is either a set of characters and the state after them, or a list of states that are reached without one,
    each under a condition on the place ("" for none).
    """

    def __init__(self, text: str, budget: Budget) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's plans for its syntax
            tree = _parser.parse(text)
        if tree.state.flags & ~re.UNICODE:
            raise _UnsupportedError("flags")
        self._consume: list[tuple[frozenset[str], int] | None] = [None]
        self._free: list[list[tuple[str, int]]] = [[]]  # state 0 accepts
        self._start = self._sequence(tree, 0)
        self._steps: dict[_Key, tuple[bool, _States]] = {}
        self._remembered = 0
        self._budget = budget

    def accepts(self, name: str, whole: bool) -> bool:
        """Whether it matches all of `name` (`whole`) or any beginning of it. name: of _ALPHABET."""
        states = frozenset({self._start})
        for i in range(len(name) + 1):
            key = (states, name[i - 1] if i else "", name[i] if i < len(name) else "")
            step = self._steps.get(key)
            if step is None:
                step = self._steps[key] = self._step(*key)
                self._remembered += 1 + len(step[1])
                if self._remembered > _MAX_REMEMBERED:
                    self._steps.clear()
                    self._remembered = 0
            accepted, states = step
            if accepted and (not whole or i == len(name)):
                return True
            if not states:
                return False
        return False

    def _step(self, states: _States, before: str, after: str) -> tuple[bool, _States]:
        """(accepted here, the states after the character `after`); "" stands for the ends of the name."""
        boundary = (before in _CATEGORIES["CATEGORY_WORD"]) != (after in _CATEGORIES["CATEGORY_WORD"])
        holds = {"": True, "begin": not before, "end": not after, "boundary": boundary, "inside": not boundary}
        seen, todo = set(states), list(states)
        while todo:
            for condition, following in self._free[todo.pop()]:
                if holds[condition] and following not in seen:
                    seen.add(following)
                    todo.append(following)
        self._budget.spend(len(seen))
        arcs = (self._consume[state] for state in seen)
        return 0 in seen, frozenset(arc[1] for arc in arcs if arc is not None and after in arc[0])

    def _add(self, consume: tuple[frozenset[str], int] | None, free: Iterable[tuple[str, int]] = ()) -> int:
        if len(self._consume) >= _MAX_STATES:
            raise _UnsupportedError("too many repetitions")
        self._consume.append(consume)
        self._free.append(list(free))
        return len(self._consume) - 1

    def _sequence(self, items: Iterable[tuple[Any, Any]], end: int) -> int:
        """The state from which the items lead to `end`."""
        for kind, value in reversed(list(items)):
            end = self._item(str(kind), value, end)
        return end

    def _item(self, kind: str, value: Any, end: int) -> int:
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return self._add((_characters(kind, value), end))
        if kind == "BRANCH":
            return self._add(None, [("", self._sequence(option, end)) for option in value[1]])
        if kind == "SUBPATTERN":
            _, added, removed, inner = value
            if added or removed:
                raise _UnsupportedError("flags")
            return self._sequence(inner, end)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(value[0], value[1], value[2], end)
        if kind == "AT":
            return self._add(None, [(_condition(str(value)), end)])
        raise _UnsupportedError(_UNSUPPORTED.get(kind, kind.lower()))

    def _repeat(self, low: int, high: Any, inner: Any, end: int) -> int:
        if str(high) == "MAXREPEAT":
            loop = self._add(None, [("", end)])
            self._free[loop].append(("", self._sequence(inner, loop)))
            end = loop
        else:
            final = end
            for _ in range(int(high) - low):
                end = self._add(None, [("", final), ("", self._sequence(inner, end))])
        for _ in range(low):
            end = self._sequence(inner, end)
        return end


def _characters(kind: str, value: Any) -> frozenset[str]:
    """The characters of _ALPHABET that one item takes."""
    if kind == "ANY":
        return _ALPHABET
    if kind == "LITERAL":
        return _ALPHABET & {chr(value)}
    if kind == "NOT_LITERAL":
        return _ALPHABET - {chr(value)}
    found: set[str] = set()
    negated = False
    for operation, argument in value:
        match str(operation):
            case "NEGATE":
                negated = True
            case "LITERAL":
                found.add(chr(argument))
            case "RANGE":
                found.update(c for c in _ALPHABET if argument[0] <= ord(c) <= argument[1])
            case "CATEGORY":
                found |= _CATEGORIES[str(argument)]
    return _ALPHABET - found if negated else _ALPHABET & found


def _condition(at: str) -> str:
    found = {
        "AT_BEGINNING": "begin",
        "AT_BEGINNING_STRING": "begin",
        "AT_END": "end",
        "AT_END_STRING": "end",
        "AT_BOUNDARY": "boundary",
        "AT_NON_BOUNDARY": "inside",
    }.get(at)
    if found is None:
        raise _UnsupportedError(at.lower())
    return found
