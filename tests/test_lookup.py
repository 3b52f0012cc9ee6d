# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: what is guessed, how likely a guess is right, and which guesses are worth running; the option."""

import random
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest
from processes import start, wait

from cnllama.lookup import Draft, Lookup, StepCosts, worth_running


class FixedCosts(StepCosts):
    """Costs that no clock changes: the same drafts are run in every run of a test."""

    def note(self, tokens: int, drafted: int, seconds: float) -> None:
        pass


# --- guesses


def brute_force(tokens: list[int], limit: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest ending of up to 4 tokens, going round at the end."""
    for size in (4, 3, 2, 1):
        for at in range(len(tokens) - 1, size - 1, -1):
            if size < len(tokens) and tokens[at - size : at] == tokens[-size:]:
                period = len(tokens) - at
                return [tokens[at + i % period] for i in range(limit)]
    return []


def test_drafts_follow_the_latest_longest_match() -> None:
    rng = random.Random(0)
    found = 0
    for _ in range(300):
        tokens = [rng.randrange(rng.choice((2, 4, 9))) for _ in range(rng.randrange(60))]
        begin, limit = rng.randrange(len(tokens) + 1), rng.randint(1, 12)
        lookup = Lookup(tokens[:begin])
        for at in range(begin, len(tokens) + 1):
            expected = brute_force(tokens[:at], limit)
            draft = lookup.draft(limit)
            assert draft.tokens == expected[: len(draft.tokens)], (tokens[:at], limit)
            assert len(draft.tokens) == len(draft.chances)
            assert len(draft.tokens) == len(expected) or lookup.draft(limit + 1).tokens == draft.tokens, "unlikely"
            assert all(1 > a >= b > 0 for a, b in zip(draft.chances, draft.chances[1:], strict=False))
            found += bool(draft.tokens)
            if at < len(tokens):
                lookup.add(tokens[at])
    assert found > 1000


def test_chances_are_learned_from_every_match_without_running_it() -> None:
    quoting, wandering = Lookup(range(100)), Lookup([*range(100), *range(100)])
    for token in range(60):
        quoting.add(token)
    assert quoting.draft(5).tokens == [60, 61, 62, 63, 64]
    assert quoting.draft(5).chances[4] > 0.9
    rng = random.Random(1)
    for _ in range(60):
        begin = rng.randrange(95)
        for token in (begin, begin + 1, 1000 + rng.randrange(1000)):  # each run of two is known, its successor is not
            wandering.add(token)
    wandering.add(7)
    wandering.add(8)
    assert sum(wandering.draft(5).chances) < 0.05


def test_a_lookup_costs_the_same_for_every_token() -> None:
    """No scan of the context: the entries made for a token are bounded, and so is what a draft reads."""
    lookup = Lookup([])
    for token in range(5000):
        before = len(lookup._next)
        lookup.add(token % 1777)
        assert len(lookup._next) - before <= 4
        assert len(lookup._ends) <= 4


# --- what is worth running


def brute_force_lengths(
    drafts: list[Draft], tokens: int, deciding: int, room: int, cost: Callable[[int], float]
) -> float:
    """The best tokens per time over every combination of lengths, at least that of running no draft."""
    rates = [deciding / cost(tokens)]
    for lengths in np.ndindex(*(len(draft.tokens) + 1 for draft in drafts)):
        if sum(lengths) <= room:
            gain = sum(sum(draft.chances[:length]) for draft, length in zip(drafts, lengths, strict=True))
            rates.append((deciding + gain) / cost(tokens + sum(lengths)))
    return max(rates)


def test_the_lengths_bring_the_most_tokens_for_the_time() -> None:
    rng = random.Random(2)
    costs = FixedCosts()
    for _ in range(300):
        steps = np.cumsum([rng.random() * rng.choice((0.02, 0.3)) for _ in range(StepCosts._LARGEST)])
        costs._table = [1.0, 1.0, *(1.0 + steps[1:]).tolist()]
        drafts = []
        for _ in range(rng.randint(1, 3)):
            chances = np.cumprod([rng.uniform(0.1, 0.99) for _ in range(rng.randint(0, 5))]).tolist()
            drafts.append(Draft(list(range(len(chances))), chances))
        tokens, room = rng.randint(len(drafts), 8), rng.randint(0, 9)
        lengths = worth_running(drafts, tokens, len(drafts), room, costs)
        assert sum(lengths) <= room
        assert all(0 <= n <= len(draft.tokens) for n, draft in zip(lengths, drafts, strict=True))
        gain = sum(sum(draft.chances[:n]) for draft, n in zip(drafts, lengths, strict=True))
        rate = (len(drafts) + gain) / costs.of(tokens + sum(lengths))
        best = brute_force_lengths(drafts, tokens, len(drafts), room, costs.of)
        assert best <= rate * 1.03 * (1 + 1e-9), (drafts, lengths)


def test_a_poor_guess_is_not_run() -> None:
    costs = FixedCosts()
    assert worth_running([Draft([1, 2], [0.03, 0.001])], 1, 1, 100, costs) == [0]
    assert worth_running([Draft([1, 2], [0.9, 0.8])], 1, 1, 100, costs) == [2]
    assert worth_running([Draft([1], [0.2]), Draft([1, 2], [0.9, 0.8])], 2, 2, 2, costs) == [0, 2]
    assert worth_running([Draft([1, 2], [0.9, 0.8])], 1, 1, 0, costs) == [0]
    assert worth_running([Draft([], [])], 1, 1, 100, costs) == [0]


def decode_steps(costs: StepCosts, draft: Draft, seconds: Callable[[int], float], count: int) -> list[int]:
    """How many tokens of a draft that is always at hand are run, with a step without one between any two."""
    chosen = []
    for _ in range(count):
        (length,) = worth_running([draft], 1, 1, 100, costs)
        chosen.append(length)
        costs.note(1 + length, length, seconds(1 + length))
        costs.note(1, 0, seconds(1))
    return chosen


@pytest.mark.parametrize("chance", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(
    "cost",
    [
        lambda m: 1.0 + 0.02 * (m - 1),
        lambda m: 1.0 if m <= 4 else m - 1.0,
        lambda m: 1.05 if m <= 4 else 2.9,
        lambda m: 0.4 + 0.6 * m,
        float,
    ],
    ids=["flat", "a knee at 4", "a jump after 4", "steep", "in proportion"],
)
def test_costs_are_learned(cost: Callable[[int], float], chance: float) -> None:
    """After some steps it is nearly as fast as with the best length; trying others costs little."""
    draft = Draft(list(range(7)), [chance ** (i + 1) for i in range(7)])
    expected = [1 + sum(draft.chances[:length]) for length in range(8)]
    chosen = decode_steps(StepCosts(), draft, lambda m: 0.1 * cost(m), 200)[20:]
    rate = sum(expected[length] for length in chosen) / sum(cost(1 + length) for length in chosen)
    best = max(expected[length] / cost(1 + length) for length in range(8))
    assert rate > 0.9 * best, chosen


def test_a_size_that_was_slow_is_tried_again() -> None:
    costs, draft = StepCosts(), Draft(list(range(7)), [0.95 ** (i + 1) for i in range(7)])
    decode_steps(costs, draft, lambda m: 0.1 * m, 50)
    assert worth_running([draft], 1, 1, 100, costs) == [0]
    assert decode_steps(costs, draft, lambda m: 0.1, 2000)[-1] == 7


def test_one_slow_step_changes_little() -> None:
    costs = StepCosts()
    for _ in range(3):
        costs.note(1, 0, 0.1)
        costs.note(4, 3, 0.11)
    costs.note(4, 3, 5.0)
    costs.note(1, 0, 5.0)
    assert 1.1 < costs.of(4) < 1.8
    for _ in range(20):
        costs.note(1, 0, 0.1)
        costs.note(4, 3, 0.11)
    assert costs.of(4) == pytest.approx(1.1, abs=0.1)


def test_costs_of_sizes_that_were_not_seen_follow_those_that_were() -> None:
    costs = StepCosts()
    assert [costs.of(n) for n in (1, 2, 3)] == pytest.approx([1.0, 1.05, 1.1])
    costs.note(1, 0, 0.1)
    for _ in range(100):
        costs.note(8, 7, 0.24)
        costs.note(4, 3, 0.12)
    table = [costs.of(n) for n in range(1, 100)]
    assert table == sorted(table)
    assert table[3] == pytest.approx(1.2, abs=0.01)
    assert table[7] == pytest.approx(2.4, abs=0.01)
    assert 1.0 < table[1] < 1.1, "flat first"
    assert table[15] == pytest.approx(2.4 + 8 * 1.4 / 7, abs=0.02)
    assert table[98] == pytest.approx(table[31] * 99 / 32)


# --- the command line


def run(tiny_cnl: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return models.command("cnllama", "run", "-m", tiny_cnl, "--ctx", 256, "-p", "a" * 100, "-n", 60, *options)


def test_the_command_line(tiny_cnl: Path) -> None:
    plain = run(tiny_cnl, "--temp", 0, "--ignore-eos")
    guessing = run(tiny_cnl, "--temp", 0, "--ignore-eos", "--speculate", "lookup", "--stats")
    assert guessing.returncode == 0, guessing.stderr
    assert guessing.stdout == plain.stdout
    found = re.search(r"guesses: (\d+) tokens · (\d+) right \(\d+%\) · (\d+\.\d\d) tokens a step", guessing.stderr)
    assert found, guessing.stderr
    assert int(found[1]) > 0
    assert float(found[3]) >= 1
    refused = run(tiny_cnl, "--speculate", "luck")
    assert refused.returncode == 2
    assert refused.stderr.strip() == "cnllama: speculation is 'luck': choose lookup, or leave it out"


def test_ctrl_c_while_guessing(tiny_cnl: Path) -> None:
    options = ("--speculate", "lookup", "--stats", "--ctx", "65536", "-n", "-1", "--ignore-eos", "--temp", "0")
    process = start("chat", "-m", tiny_cnl, *options)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(("a" * 100 + "\n").encode())
    process.stdin.flush()
    process.stdout.read(50)
    process.send_signal(signal.SIGINT)
    _, err = wait(process, b"/exit\n")
    assert process.returncode == 0, err
    assert b"Traceback" not in err
    assert b"guesses: " in err
