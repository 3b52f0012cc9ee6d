# SPDX-License-Identifier: Apache-2.0
"""Rates of --stats and of the benchmarks on constructed timings: what is above and below the line is the same thing."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import eval_data
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnllama.bench import Measure, Work, summarize
from cnllama.request import Completion, Timing, Usage
from cnllama.stats import measure, table
from cnllama.textio import count_chinese
from cnllama.tokenizer import Tokenizer

WORDS = ("春夏", "夏", "天空", "大海", "A", "，", "😀", "兲", " 春", "ab 冬")


@functools.cache
def shared_tokenizer() -> Tokenizer:
    return Tokenizer(eval_data.letter_tokenizer())


@pytest.fixture
def tokenizer() -> Tokenizer:
    return shared_tokenizer()


def llm_of(tokenizer: Tokenizer) -> Any:
    """What stats.measure reads of an LLM."""
    file = SimpleNamespace(engine_tensors=dict)
    plan = SimpleNamespace(kv_per_token=10)
    return SimpleNamespace(
        weight_memory=None,
        tokenizer=tokenizer,
        file=file,
        plan=plan,
        threads=2,
        device="cpu",
        speculate=None,
        load_seconds=0.1,
    )


def completion_of(
    tokenizer: Tokenizer, ids: list[int], seconds: float, end: bool, steps: int | None = None
) -> Completion:
    """An answer whose tokens after the first took `seconds` each; end: an end token came last."""
    tokens = max(0, len(ids) + end - 1)
    timing = Timing(prefill=0.5, decode=tokens * seconds, steps=tokens if steps is None else steps, tokens=tokens)
    usage = Usage(prompt_tokens=20, completion_tokens=len(ids), cached_tokens=5)
    return Completion(tokenizer.decode(ids), ids, "stop" if end else "length", None, usage, timing, 1)


def test_two_tokens_of_one_character_are_one_character_in_the_time_of_one(tokenizer: Tokenizer) -> None:
    ids = [next(i for i in range(tokenizer.pieces) if tokenizer.piece(i) == "春")] * 2
    found = measure(llm_of(tokenizer), completion_of(tokenizer, ids, 0.25, end=False), bandwidth=False)
    assert found["decode_tokens_per_s"] == pytest.approx(4)
    assert found["chinese_chars_per_s"] == pytest.approx(4)
    assert found["chinese_chars"] == 2
    assert "2 · 4.0 " in table(found)


@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), end=st.booleans())
def test_characters_are_those_of_the_tokens_whose_time_it_is(words: list[str], end: bool) -> None:
    tokenizer = shared_tokenizer()
    ids = tokenizer.encode("".join(words))
    done = completion_of(tokenizer, ids, 0.125, end)
    found = measure(llm_of(tokenizer), done, bandwidth=False)
    decoder = tokenizer.stream()
    each = [count_chinese(decoder.feed(i)) for i in ids]
    assert sum(each) == found["chinese_chars"]
    if done.timing.decode == 0:
        assert found["chinese_chars_per_s"] is None
        return
    assert found["chinese_chars_per_s"] == pytest.approx(sum(each[1:]) / done.timing.decode)
    assert found["decode_tokens_per_s"] == pytest.approx((len(ids) - 1 + end) / done.timing.decode)
    # In a language of one character a token both rates would be the same: neither has a token that the other lacks.
    assert found["chinese_chars_per_s"] <= found["decode_tokens_per_s"] * max([1, *each])


def test_a_text_cut_inside_its_first_token_has_no_later_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("天空大海农夫")
    whole = completion_of(tokenizer, ids, 0.1, end=False)
    cut = Completion("", ids, "stop", None, whole.usage, whole.timing, 1)
    assert measure(llm_of(tokenizer), cut, bandwidth=False)["chinese_chars_per_s"] == 0
    empty = completion_of(tokenizer, [], 0.1, end=True)
    assert measure(llm_of(tokenizer), empty, bandwidth=False)["chinese_chars_per_s"] is None


def test_other_rates_of_a_request(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("天空大海农夫天空大海")
    done = completion_of(tokenizer, ids, 0.5, end=False, steps=2)
    found = measure(llm_of(tokenizer), done, bandwidth=False)
    assert found["prefill_tokens_per_s"] == 15 / 0.5  # what was in the cache is in neither
    assert found["tokens_per_step"] == (len(ids) - 1) / 2


def test_rates_of_a_benchmark() -> None:
    work = Work(weights=1000, kv=10, layer_macs=50, head_macs=7)
    decode = summarize(Measure("decode", 100, batch=4, steps=16), [(2.0, 500.0)], work, 1.5)
    assert decode["tokens_per_s"] == 4 * 16 / 2
    assert decode["chars_per_s"] == 4 * 16 / 2 * 1.5
    read = sum(1000 + 4 * 10 * (100 + step) for step in range(1, 17))
    assert decode["share"] == pytest.approx(read / 2 / 500)
    prefill = summarize(Measure("prefill", 64), [(2.0, 500.0), (4.0, 500.0), (1.0, 250.0)], work, None)
    assert (prefill["tokens_per_s"], prefill["tokens_per_s_min"], prefill["tokens_per_s_max"]) == (32, 16, 64)
    shares = [(64 * 50 + 7) / seconds / limit for seconds, limit in ((2, 500), (4, 500), (1, 250))]
    assert prefill["share"] == pytest.approx(sorted(shares)[1])
    assert math.isclose(prefill["share_max"], max(shares))
