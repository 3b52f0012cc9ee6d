# SPDX-License-Identifier: Apache-2.0
"""Prompt-lookup speculation: what followed the last time is guessed to follow again, where the guess is worth its cost.

A guess changes nothing but the speed. The sampler chooses every token from the same logits with the same state as
without one; where its choice is what was guessed, the logits for the next choice are there already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

MAX_DRAFT = 11  # with the token before them 12, the widest tile of the kernels for few tokens
_SIZES = (4, 3, 2, 1)  # of the runs that are looked up, the longest first
_FIRST_RATES = {1: 0.03, 2: 0.1, 3: 0.25, 4: 0.5}  # how often a match is thought right before any was seen
_LEARNING = 0.15  # weight of the newest match in its length's rate
_HOPELESS = 0.02  # chance under which no step is so cheap that a guess pays
_MARGIN = 1.03  # gain a draft must promise: measured costs and rates are that uncertain


class Draft(NamedTuple):
    """A guess of the next tokens. chances[i]: how likely the first i + 1 of them are all right."""

    tokens: list[int]
    chances: list[float]


class Lookup:
    """Where the last few tokens of one sequence occurred before, and how often such a match has told the next token.

    Every token costs the same few dictionary entries, however long the sequence is. A match is judged by every token
    that is added, whether a draft was made of it or not: a text that does not repeat itself is found out for free.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # a run of tokens -> where its latest successor lies
        self._ends: list[tuple[int, ...]] = []  # the runs of _SIZES that end the sequence
        self._rates = dict(_FIRST_RATES)
        for token in prompt:
            self._append(token)

    def add(self, token: int) -> None:
        """Appends a generated token."""
        size, at = self._match()
        if size:
            self._rates[size] += _LEARNING * ((self._tokens[at] == token) - self._rates[size])
        self._append(token)

    def draft(self, limit: int) -> Draft:
        """At most `limit` tokens that followed the longest match; fewer or none where they are unlikely."""
        size, at = self._match()
        if not size:
            return Draft([], [])
        chances: list[float] = []
        chance = self._rates[size]
        while len(chances) < limit and chance > _HOPELESS:
            chances.append(chance)
            size = min(size + 1, _SIZES[0])
            chance *= self._rates[size]
        guess = self._tokens[at : at + len(chances)]
        while len(guess) < len(chances):  # the match overlaps the end: the text goes round, and so does the guess
            guess.append(guess[len(guess) + at - len(self._tokens)])
        return Draft(guess, chances)

    def _match(self) -> tuple[int, int]:
        """(length of the longest run that occurred before, where its successor lies); length 0 when none did."""
        for run in self._ends:
            at = self._next.get(run)
            if at is not None:
                return len(run), at
        return 0, 0

    def _append(self, token: int) -> None:
        for run in self._ends:
            self._next[run] = len(self._tokens)
        self._tokens.append(token)
        self._ends = [tuple(self._tokens[-size:]) for size in _SIZES if size <= len(self._tokens)]


class StepCosts:
    """How long a step of some tokens takes, in steps of one token: measured as they come, guessed until then.

    Few tokens read the same weights as one, so they cost little more until arithmetic becomes the limit; where that
    is depends on the machine, the model and the kernels. The first guess is hopeful: an error costs a slow step and is
    known then, while a size that is thought too dear would never be tried.
    """

    _LARGEST = 32  # tokens; beyond, time grows in proportion
    _EACH = 0.05  # guess for each token after the first
    _WEIGHT = 0.5  # of the newest step
    _OUTLIER = 2.0  # a step that took that many times longer says more about the machine's other work
    _FORGETTING = 0.03  # once in _PERIOD steps without drafts, so that every size is tried again some day
    _PERIOD = 16

    def __init__(self) -> None:
        self._single = 0.0  # seconds of a step of one token, as steps without drafts show; 0: not known yet
        self._plain_steps = 0
        self._seen: dict[int, float] = {}
        self._table: list[float] = []  # by tokens; empty when it has to be made again

    def of(self, tokens: int) -> float:
        """The cost of a step of `tokens` tokens."""
        if not self._table:
            self._table = self._make_table()
        return self._table[min(tokens, self._LARGEST)] * max(1.0, tokens / self._LARGEST)

    def note(self, tokens: int, drafted: int, seconds: float) -> None:
        """A step that decoded took `seconds` for `tokens` tokens, of which `drafted` were guesses."""
        if tokens > self._LARGEST:
            return
        cost = self.of(tokens)
        if drafted and self._single:
            found = min(max(seconds / self._single, 1.0), float(tokens), self._OUTLIER * cost)
            self._seen[tokens] = cost + self._WEIGHT * (found - cost)
            self._table = []
            return
        single = self._single or seconds / cost
        self._single = single + self._WEIGHT * (min(seconds / cost, self._OUTLIER * single) - single)
        self._plain_steps += 1
        if self._plain_steps % self._PERIOD == 0:
            for size, seen in self._seen.items():
                self._seen[size] = seen + self._FORGETTING * (1.0 + self._EACH * (size - 1) - seen)
            self._table = []

    def _make_table(self) -> list[float]:
        """Sizes seen, and for the others a curve through them: flat first and then steeper, as the limit changes."""
        seen = [(1, 1.0), *sorted(self._seen.items())]
        table = [1.0, 1.0]
        for (low, low_cost), (high, high_cost) in pairwise(seen):
            rise = high_cost - low_cost
            table += [low_cost + rise * ((i - low) / (high - low)) ** 3 for i in range(low + 1, high + 1)]
        last, cost = seen[-1]
        slope = max(self._EACH, (cost - 1.0) / max(1, last - 1))
        return table + [cost + slope * (i - last) for i in range(last + 1, self._LARGEST + 1)]


def worth_running(drafts: Sequence[Draft], tokens: int, deciding: int, room: int, costs: StepCosts) -> list[int]:
    """How many tokens of each draft to run, so that a step brings the most tokens for its time.

    The step has `tokens` without them and brings `deciding` for sure; at most `room` are added.
    """
    offers = [(chance, i) for i, draft in enumerate(drafts) for chance in draft.chances]
    offers.sort(key=lambda offer: -offer[0])  # chances of one draft fall: its beginning stays in front
    expected = float(deciding)
    best_rate, best = _MARGIN * expected / costs.of(tokens), 0
    for count, (chance, _) in enumerate(offers[:room], 1):
        expected += chance
        rate = expected / costs.of(tokens + count)
        if rate > best_rate:
            best_rate, best = rate, count
    lengths = [0] * len(drafts)
    for _, i in offers[:best]:
        lengths[i] += 1
    return lengths
