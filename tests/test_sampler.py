# SPDX-License-Identifier: Apache-2.0
"""The native sampler against a NumPy reference of its documented steps, and the parameters that feed it."""

from typing import Any

import numpy as np
import pytest

from cnllama._core import Sampler
from cnllama.errors import InputError
from cnllama.sampling import SamplingParams


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def distribution(
    logits: np.ndarray,
    history: list[int] | None = None,
    banned: tuple[int, ...] = (),
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repeat_penalty: float = 1.0,
    repeat_last_n: int = 64,
) -> np.ndarray:
    """Probabilities after every step, in the order that sampler.hpp documents. float64 [vocab]."""
    x = logits.astype(np.float32).copy()
    recent = (history or [])[-repeat_last_n:] if repeat_last_n > 0 else (history or []) if repeat_last_n < 0 else []
    for i in set(recent):
        x[i] = x[i] / np.float32(repeat_penalty) if x[i] > 0 else x[i] * np.float32(repeat_penalty)
    x[list(banned)] = -np.inf
    order = np.lexsort((np.arange(len(x)), -x))
    order = order[np.isfinite(x[order])]
    if top_k:
        order = order[:top_k]
    p = np.exp(x[order].astype(np.float64) - x[order[0]])
    p /= p.sum()
    keep = np.searchsorted(np.cumsum(p), top_p * (1 - 1e-9)) + 1 if top_p < 1 else len(p)
    order = order[:keep]
    order = order[np.exp(x[order].astype(np.float64) - x[order[0]]) >= min_p]
    out = np.zeros(len(x))
    weights = np.exp((x[order].astype(np.float64) - x[order[0]]) / temperature)
    out[order] = weights / weights.sum()
    return out


def draws(sampler: Sampler, logits: np.ndarray, count: int) -> np.ndarray:
    return np.array([sampler.sample(logits)[0] for _ in range(count)])


def assert_follows(tokens: np.ndarray, expected: np.ndarray) -> None:
    """Nothing outside the support was drawn, and Pearson's chi-square is under its 99.99 % point."""
    counts = np.bincount(tokens, minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    wanted = expected * len(tokens)
    # Rare tokens are counted together: the approximation needs five expected in each cell.
    rare = wanted < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    # Wilson and Hilferty's approximation of the chi-square quantile.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3 if freedom else 1e-9
    assert statistic <= bound, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, bound {bound:.1f}"


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, 200).astype(np.float32)


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    x = np.array([0, 3, -1, 3, 2.5, 3], np.float32)
    assert Sampler().sample(x)[0] == 1
    assert Sampler().sample(x, [1])[0] == 3
    assert Sampler().sample(np.full(7, -5, np.float32))[0] == 0
    assert Sampler().sample(np.array([-np.inf, -np.inf, -700], np.float32))[0] == 2


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 49953, 49954])
def test_greedy_is_argmax_at_every_size(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for _ in range(5):
        x = rng.normal(0, 3, vocab).astype(np.float32)
        token, logprob, top = Sampler().sample(x, (), min(3, vocab))
        assert token == x.argmax()
        expected = log_softmax(x)
        assert logprob == pytest.approx(expected[token], abs=1e-9)
        order = np.lexsort((np.arange(vocab), -x))[: min(3, vocab)]
        assert [i for i, _ in top] == order.tolist()
        assert [p for _, p in top] == pytest.approx(expected[order], abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 20},
        {"top_k": 1},
        {"top_k": 150},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 0.5, "temperature": 1.5},
        {"top_p": 1e-9},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
    ],
    ids=str,
)
def test_draws_follow_the_documented_distribution(logits: np.ndarray, options: dict[str, Any]) -> None:
    options = {"temperature": 1.0} | options
    tokens = draws(Sampler(seed=11, **options), logits, 20000)
    assert_follows(tokens, distribution(logits, **options))


def test_truncation_keeps_exactly_the_reference_set_on_a_large_vocabulary() -> None:
    """Sets, not counts: with a huge temperature every kept token is about equally likely and soon seen."""
    rng = np.random.default_rng(3)
    for scale in (0.5, 4.0):
        x = rng.normal(0, scale, 50000).astype(np.float32)
        x[rng.integers(0, 50000, 5000)] = x[17]  # many equal logits
        for options in ({"top_k": 30}, {"top_k": 300, "top_p": 0.2}, {"top_p": 0.002}, {"min_p": 0.9}):
            kept = np.flatnonzero(distribution(x, temperature=1.0, **options))
            if len(kept) > 60:
                continue
            seen = set(draws(Sampler(seed=1, temperature=1e6, **options), x, 20 * len(kept) + 20))
            assert seen == set(kept.tolist()), options


@pytest.mark.parametrize("last_n", [0, 3, 64, -1])
def test_repetition_penalty(last_n: int) -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(0, 1, 50).astype(np.float32)
    history = rng.integers(0, 50, 100).tolist()
    sampler = Sampler(temperature=0, repeat_penalty=1.7, repeat_last_n=last_n)
    sampler.accept(history[:60])
    sampler.accept(history[60:])
    for _ in range(300):
        reference = distribution(x, history, repeat_penalty=1.7, repeat_last_n=last_n)
        token, logprob, _ = sampler.sample(x)
        assert token == reference.argmax()
        assert logprob == pytest.approx(log_softmax(x)[token], abs=1e-9), "it is of the logits as given"
        history.append(token)
        x = rng.normal(0, 1, 50).astype(np.float32)


def test_penalty_counts_a_token_once_and_reads_the_sign() -> None:
    sampler = Sampler(repeat_penalty=2.0)
    sampler.accept([0, 0, 0, 1])
    # 0: 4 / 2 = 2, not 0.5; 1: -0.5 * 2 = -1.
    assert sampler.sample(np.array([4, -0.5, 1.9], np.float32))[0] == 0
    sampler = Sampler(repeat_penalty=2.0)
    sampler.accept([0, 1])
    assert sampler.sample(np.array([-0.5, -0.4, -0.9], np.float32))[0] == 1


def test_banned_ids_are_never_drawn_and_the_rest_keeps_its_shape(logits: np.ndarray) -> None:
    banned = np.argsort(-logits)[:5].tolist()
    sampler = Sampler(temperature=1.0, seed=5)
    tokens = np.array([sampler.sample(logits, banned)[0] for _ in range(20000)])
    assert_follows(tokens, distribution(logits, banned=tuple(banned)))


def test_a_seed_gives_the_same_tokens(logits: np.ndarray) -> None:
    same = [draws(Sampler(temperature=1.0, seed=42), logits, 50).tolist() for _ in range(2)]
    assert same[0] == same[1]
    assert draws(Sampler(temperature=1.0, seed=43), logits, 50).tolist() != same[0]


def uniforms(seed: int, count: int) -> list[float]:
    """xoshiro256** seeded by splitmix64, 53 bits of each word."""
    mask = 2**64 - 1
    state = []
    for _ in range(4):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ seed >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        state.append(z ^ z >> 31)

    def rotate(x: int, by: int) -> int:
        return (x << by | x >> 64 - by) & mask

    values = []
    for _ in range(count):
        values.append(((rotate(state[1] * 5 & mask, 7) * 9 & mask) >> 11) * 2.0**-53)
        shifted = state[1] << 17 & mask
        state[2] ^= state[0]
        state[3] ^= state[1]
        state[1] ^= state[2]
        state[0] ^= state[3]
        state[2] ^= shifted
        state[3] = rotate(state[3], 45)
    return values


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("options", [{}, {"top_k": 200, "top_p": 0.95, "min_p": 0.01}], ids=str)
def test_draws_are_the_documented_generator_s_on_every_machine(seed: int, options: dict[str, Any]) -> None:
    x = ((np.arange(1000) * 37 % 1000 - 500) / 128).astype(np.float32)
    cumulative = np.cumsum(distribution(x, temperature=0.75, **options))
    expected = [int(np.searchsorted(cumulative, u, side="right")) for u in uniforms(seed, 100)]
    assert draws(Sampler(temperature=0.75, seed=seed, **options), x, 100).tolist() == expected


def test_bad_logits_are_refused() -> None:
    for value, words in ((np.nan, "token 1 is not a number"), (np.inf, "token 1 is infinite")):
        with pytest.raises(ValueError, match=words):
            Sampler().sample(np.array([0, value, 1], np.float32))
    with pytest.raises(ValueError, match="no token is left"):
        Sampler(temperature=1.0).sample(np.zeros(2, np.float32), [0, 1])
    with pytest.raises(ValueError, match="no token is left"):
        Sampler().sample(np.full(3, -np.inf, np.float32))
    with pytest.raises(ValueError, match="empty"):
        Sampler().sample(np.zeros(0, np.float32))
    with pytest.raises(ValueError, match="axes"):
        Sampler().sample(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="banned token 3"):
        Sampler().sample(np.zeros(3, np.float32), [3])
    with pytest.raises(ValueError, match="negative"):
        Sampler().accept([-1])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repeat_penalty": 0.0},
        {"repeat_last_n": -2},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_both_sides(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is .*, expected"):
        Sampler(**options)
    with pytest.raises(InputError, match=f"{name} is .*, expected"):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, over max_tokens, 4"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "at most 18446744073709551615"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"stop": [3]}, "stop holds 3, expected text"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids holds 'x', expected token ids"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"logprobs": True}, "logprobs is True"),
    ],
)
def test_wrong_parameters_are_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        SamplingParams(**options)
    assert words in str(error.value)


def test_parameters_take_lists_and_know_their_names() -> None:
    params = SamplingParams(stop="。", stop_token_ids=[3, 4])  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("。",), (3, 4))
    assert params.with_changes(temperature=0.5, stop=["a", "b"]).stop == ("a", "b")
    with pytest.raises(InputError, match=r"no sampling parameter 'temprature'.*temperature"):
        params.with_changes(temprature=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repeat_penalty": 1.5, "repeat_last_n": 6},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repeat_penalty": 1.3, "repeat_last_n": -1},
        {"temperature": 2.0, "top_k": 256, "top_p": 0.95},
    ],
)
def test_the_largest_logits_give_the_token_of_all(options: dict[str, Any]) -> None:
    """Fed with no more than it says it needs, a sampler goes the way of one that sees everything."""
    random = np.random.default_rng(6)
    whole, part = (Sampler(seed=9, **options) for _ in range(2))
    for sampler in (whole, part):
        sampler.accept([3, 5, 7, 700])
    for step in range(60):
        logits = np.round(random.standard_normal(900) * 3).astype(np.float32) / 2  # with many equals
        logits[random.integers(0, 900, 30)] = -np.inf
        order = np.lexsort((np.arange(900), -logits))
        banned = [int(order[0]), int(order[3]), 899] if step % 2 else []
        needed = part.needed(len(banned))
        assert 0 < needed < 420
        ids = np.sort(order[:needed]).astype(np.int32)
        assert whole.sample(logits, banned)[0] == part.sample(logits[ids], banned, ids=ids)[0]


def test_where_nothing_limits_the_candidates_all_logits_are_needed() -> None:
    for options in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 257}, {"repeat_penalty": 0.9}):
        assert Sampler(**options).needed(0) == 0
    assert Sampler(temperature=1.0, top_k=40).needed(3) == 44
    penalizing = Sampler(repeat_penalty=1.1, repeat_last_n=8)
    penalizing.accept([1, 2, 3])
    assert penalizing.needed(0) == 5
    penalizing.accept(range(20))
    assert penalizing.needed(0) == 10


def test_wrong_ids_are_refused() -> None:
    logits = np.zeros(3, np.float32)
    for ids in ([1, 2], [2, 1, 3], [1, 1, 2], [-1, 0, 1]):
        with pytest.raises(ValueError, match="ids must be ascending, one for every logit"):
            Sampler().sample(logits, ids=np.array(ids, np.int32))
    ids = np.array([10, 20, 30], np.int32)
    with pytest.raises(ValueError, match=r"logprobs is 1.*expected 0 where some logits are missing"):
        Sampler().sample(logits, logprobs=1, ids=ids)
    with pytest.raises(ValueError, match="the logit of token 20 is not a number"):
        Sampler().sample(np.array([0, np.nan, 0], np.float32), ids=ids)
    with pytest.raises(ValueError, match="no token is left"):
        Sampler().sample(logits, banned=[10, 20, 30, 40], ids=ids)
