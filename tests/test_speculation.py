# SPDX-License-Identifier: Apache-2.0
"""Speculation changes nothing: answers, log probabilities and caches with and without it are the same."""

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import models
import numpy as np
import pytest

from cnllama import LLM, Completion, InputError, SamplingParams
from cnllama.lookup import MAX_DRAFT, Draft, StepCosts
from cnllama.request import Timing

PROMPTS = ["从前有一个农夫，" * 6, "The old man", "天空是蓝色的，因为" * 20, "1984 1984 1984", "好", "a" * 300, "🙂🙂"]
GREEDY: dict[str, Any] = {"temperature": 0.0, "seed": 1}
CALM: dict[str, Any] = {"temperature": 0.3, "top_k": 5, "seed": 3}
HOT: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "repeat_penalty": 1.1, "seed": 7}
WILD: dict[str, Any] = {"temperature": 1.5, "repeat_penalty": 0.8, "repeat_last_n": -1, "seed": 11}

# What a prompt's answer is going to be, for `Oracle`.
Answers = dict[tuple[int, ...], list[int]]


class FixedCosts(StepCosts):
    """Costs that no clock changes: the same drafts are run in every run of a test."""

    def note(self, tokens: int, drafted: int, seconds: float) -> None:
        pass


class Oracle:
    """Drafts from a known answer, one token in six wrong and of any length: many acceptances and many rejections, also
    in texts that never repeat. `known` has the answers by prompt; for others it stays silent.
    """

    known: ClassVar[Answers] = {}

    def __init__(self, prompt: Sequence[int]) -> None:
        self._answer = self.known.get(tuple(prompt), [])
        self._done = 0
        self._random = random.Random(len(prompt))

    def add(self, token: int) -> None:
        self._done += 1

    def draft(self, limit: int) -> Draft:
        tokens = self._answer[self._done : self._done + self._random.randint(0, limit)]
        tokens = [self._random.randrange(300) if self._random.random() < 1 / 6 else token for token in tokens]
        return Draft(tokens, [0.99 ** (i + 1) for i in range(len(tokens))])


@pytest.fixture(scope="module")
def plain(tiny_cnl: Path) -> Iterator[LLM]:
    with LLM(tiny_cnl, ctx=512, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def guessing(tiny_cnl: Path) -> Iterator[LLM]:
    with LLM(tiny_cnl, ctx=512, threads=1, speculate="lookup") as opened:
        yield opened


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Puts `Oracle` in the place of the lookup and takes the clock out of the decisions."""
    monkeypatch.setattr("cnllama.request.Lookup", Oracle)
    monkeypatch.setattr("cnllama.scheduler.StepCosts", FixedCosts)
    monkeypatch.setattr(Oracle, "known", {})
    return Oracle.known


def foresee(oracle: Answers, llm: LLM, prompts: Sequence[Any], **params: Any) -> None:
    """Tells the oracle what `llm` answers to each prompt when nothing ends it."""
    for prompt in prompts:
        ids = llm.prompt_ids(prompt)
        room = llm.context - len(ids) + 1
        answer = llm.generate([ids], SamplingParams(max_tokens=min(80, room), ignore_eos=True, **params))[0]
        oracle[tuple(ids)] = answer.token_ids


def without_counts(answer: Completion) -> Completion:
    """All that must be the same: everything but the time it took and the number of guesses."""
    return replace(
        answer, usage=replace(answer.usage, drafted_tokens=0, accepted_tokens=0), timing=Timing(0.0, 0.0, 0, 0)
    )


def assert_same(answers: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert [without_counts(a) for a in answers] == [without_counts(e) for e in expected]
    for answer in answers:
        chosen = answer.timing.tokens
        assert answer.timing.steps + answer.usage.accepted_tokens == chosen
        assert answer.usage.accepted_tokens <= answer.usage.drafted_tokens


def total(answers: Sequence[Completion], name: str) -> int:
    return sum(getattr(answer.usage, name) for answer in answers)


def caches(llm: LLM) -> list[list[int]]:
    """The tokens that each slot holds; the engine's cache has exactly as many."""
    scheduler = llm._scheduler
    assert scheduler is not None
    slots = scheduler._pool._slots
    assert [llm.engine.length(slot.sequence) for slot in slots] == [len(slot.tokens) for slot in slots]
    return [list(slot.tokens) for slot in slots]


# --- the same answers


@pytest.mark.parametrize("options", [GREEDY, CALM, HOT, WILD], ids=str)
def test_answers_are_the_same_with_the_real_lookup(plain: LLM, guessing: LLM, options: dict[str, Any]) -> None:
    params = {"max_tokens": 100, "ignore_eos": True, "logprobs": 2, **options}
    answers = [guessing.generate(p, **params)[0] for p in PROMPTS]
    assert_same(answers, [plain.generate(p, **params)[0] for p in PROMPTS])
    if options is GREEDY:
        assert total(answers, "accepted_tokens") > 0
        assert total(answers, "drafted_tokens") > total(answers, "accepted_tokens")


ENDINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "the limit": {"max_tokens": 17},
    "min_tokens": {"min_tokens": 30, "max_tokens": 40},
    "the model's end": {"ignore_eos": False},
    "logprobs": {"logprobs": 3},
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("options", [GREEDY, HOT, WILD], ids=str)
def test_answers_are_the_same_wherever_they_end(
    tiny_cnl: Path, plain: LLM, oracle: Answers, options: dict[str, Any], ending: str
) -> None:
    foresee(oracle, plain, PROMPTS, **options)
    params = SamplingParams(**({"max_tokens": 60, "ignore_eos": True} | options | ENDINGS[ending]))
    with LLM(tiny_cnl, ctx=512, threads=1, speculate="lookup") as llm:
        for prompt in PROMPTS:
            expected = plain.generate([prompt], params)
            answers = llm.generate([prompt], params)
            # What is cached depends on what ran before, which differs between the two models here.
            cached = [replace(a, usage=replace(a.usage, cached_tokens=0)) for a in (*answers, *expected)]
            assert_same(cached[:1], cached[1:])
            if ending == "nothing":
                assert 0 < answers[0].usage.accepted_tokens < answers[0].usage.drafted_tokens


@pytest.mark.parametrize("options", [GREEDY, HOT], ids=str)
def test_an_end_token_or_a_stop_string_inside_a_draft(
    tiny_cnl: Path, plain: LLM, oracle: Answers, options: dict[str, Any]
) -> None:
    prompt = PROMPTS[0]
    foresee(oracle, plain, [prompt], **options)
    (free,) = plain.generate([prompt], SamplingParams(max_tokens=60, ignore_eos=True, **options))
    with LLM(tiny_cnl, ctx=512, threads=1, speculate="lookup") as llm, LLM(tiny_cnl, ctx=512, threads=1) as other:
        for at in range(1, 40, 3):
            end = free.token_ids[at]
            stop = free.text[at : at + 2]
            for changes in (
                {"stop_token_ids": (end,)},
                {"stop_token_ids": (end,), "min_tokens": at + 1},
                {"stop": (stop,)},
                {"stop": (stop, free.text[at + 5 : at + 6]), "min_tokens": 5},
                {"max_tokens": at},
            ):
                params = SamplingParams(**({"max_tokens": 60, "ignore_eos": True} | options | changes))
                assert_same(llm.generate([prompt], params), other.generate([prompt], params))
                assert caches(llm) == caches(other)


def test_the_context_ends_inside_a_draft(tiny_cnl: Path, oracle: Answers) -> None:
    """No page of another sequence is taken: both fill their context to the last position."""
    with (
        LLM(tiny_cnl, ctx=64, threads=1, max_sequences=2) as other,
        LLM(tiny_cnl, ctx=64, threads=1, max_sequences=2, speculate="lookup") as llm,
    ):
        prompts = [list(range(300, 300 + n)) for n in (20, 41, 57, 63, 64)]
        foresee(oracle, other, prompts, **HOT)
        params = SamplingParams(max_tokens=None, ignore_eos=True, **HOT)
        answers, expected = llm.generate(prompts, params), other.generate(prompts, params)
        assert [len(a.token_ids) for a in answers] == [65 - len(prompt) for prompt in prompts]
        assert [a.token_ids for a in answers] == [e.token_ids for e in expected]
        assert total(answers, "accepted_tokens") > 0
        assert max(map(len, caches(llm))) == 64


@pytest.mark.parametrize(("kv_type", "threads"), [("fp16", 1), ("int8", 2)])
def test_a_batch_of_drafting_and_other_requests(tiny_cnl: Path, oracle: Answers, kv_type: str, threads: int) -> None:
    prompts = [*PROMPTS, *(f"第{i}个问题：" for i in range(5))]
    params = [
        SamplingParams(max_tokens=20 + 3 * i, ignore_eos=True, **(HOT | {"seed": i})) for i in range(len(prompts))
    ]
    with LLM(tiny_cnl, ctx=512, threads=1, kv_type=kv_type) as alone:
        expected = [alone.generate([p], one)[0] for p, one in zip(prompts, params, strict=True)]
    with LLM(tiny_cnl, ctx=512, threads=threads, kv_type=kv_type, max_sequences=4, speculate="lookup") as llm:
        for i in range(0, len(prompts), 2):
            oracle[tuple(llm.prompt_ids(prompts[i]))] = expected[i].token_ids
        for _ in range(2):  # the second time with what the first has left in the caches
            answers = llm.generate(prompts, params)
            assert [(a.token_ids, a.text) for a in answers] == [(e.token_ids, e.text) for e in expected]
            assert all(a.usage.accepted_tokens > 0 for a in answers[::2])
            assert all(a.usage.drafted_tokens == 0 for a in answers[1::2])
            caches(llm)


def test_every_instruction_set(tiny_cnl: Path, plain: LLM, oracle: Answers, best_isa: object) -> None:
    from cnllama import _core

    foresee(oracle, plain, PROMPTS[:2], **HOT)
    params = SamplingParams(max_tokens=40, ignore_eos=True, **HOT)
    expected = [a.token_ids for a in plain.generate(PROMPTS[:2], params)]
    for isa in _core.isas():
        _core.use_isa(isa)
        with LLM(tiny_cnl, ctx=512, threads=1, speculate="lookup") as llm:
            answers = llm.generate(PROMPTS[:2], params)
        assert [a.token_ids for a in answers] == expected, isa
        assert total(answers, "accepted_tokens") > 0


def test_a_conversation_continues_where_rejected_guesses_were(tiny_cnl: Path, oracle: Answers) -> None:
    params = SamplingParams(max_tokens=25, ignore_eos=True, **HOT)
    with LLM(tiny_cnl, ctx=512, threads=1) as other, LLM(tiny_cnl, ctx=512, threads=1, speculate="lookup") as llm:
        ids = llm.prompt_ids("从前有一个农夫")
        rejected = 0
        for question in ("一二三", "四五六", "七八九", "十"):
            begin = len(ids)
            ids = ids + llm.tokenize(question)
            (expected,) = other.generate([ids], params)
            oracle[tuple(ids)] = expected.token_ids
            (answer,) = llm.generate([ids], params)
            assert_same([answer], [expected])
            assert caches(llm) == caches(other)
            assert rejected == 0 or answer.usage.cached_tokens == begin - 1
            rejected += answer.usage.drafted_tokens - answer.usage.accepted_tokens
            ids = ids + answer.token_ids
        assert rejected > 0


def test_dynamic_positions(tmp_path: Path, tokenizer_model: bytes, oracle: Answers) -> None:
    base = models.make_llama(
        tmp_path / "base", tokenizer_model, max_position_embeddings=32, rope_scaling={"type": "dynamic", "factor": 4.0}
    )
    cnl = models.convert(base, tmp_path / "dynamic.cnl")
    prompts = [list(range(300, 300 + n)) for n in (10, 25, 60, 90)]
    params = SamplingParams(max_tokens=30, ignore_eos=True, **HOT)
    with LLM(cnl, ctx=128, threads=1) as other, LLM(cnl, ctx=128, threads=1, speculate="lookup") as llm:
        expected = other.generate(prompts, params)
        oracle.update((tuple(p), e.token_ids) for p, e in zip(prompts, expected, strict=True))
        answers = llm.generate(prompts, params)
        assert_same(answers, expected)
        assert total(answers, "accepted_tokens") > 0
        assert caches(llm) == caches(other)


# --- cut off in the middle


def test_an_interrupt_after_a_step_with_drafts(
    tiny_cnl: Path, plain: LLM, oracle: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    foresee(oracle, plain, PROMPTS, **HOT)
    params = SamplingParams(max_tokens=30, ignore_eos=True, **HOT)
    expected = [a.token_ids for a in plain.generate(PROMPTS, params)]
    with LLM(tiny_cnl, ctx=512, threads=1, max_sequences=3, speculate="lookup") as llm:
        scheduler = llm._scheduler
        assert scheduler is not None
        advance, drafts = scheduler._advance, 0

        def interrupted(batch: Any, logits: Any) -> None:
            nonlocal drafts
            drafts += any(part.draft for part in batch)
            if drafts == 3:
                raise KeyboardInterrupt
            advance(batch, logits)

        monkeypatch.setattr(scheduler, "_advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, params)
        slots = scheduler._pool._slots
        assert any(llm.engine.length(slot.sequence) > len(slot.tokens) for slot in slots)
        drafts = -1000
        answers = llm.generate(PROMPTS, params)
        assert [a.token_ids for a in answers] == expected
        caches(llm)


def test_a_stream_that_is_left_while_others_run(tiny_cnl: Path, plain: LLM, oracle: Answers) -> None:
    foresee(oracle, plain, PROMPTS, **HOT)
    params = SamplingParams(max_tokens=30, ignore_eos=True, **HOT)
    expected = [a.token_ids for a in plain.generate(PROMPTS[:2], params)]
    with LLM(tiny_cnl, ctx=512, threads=1, max_sequences=2, speculate="lookup") as llm:
        left, kept = (llm.stream(prompt, params) for prompt in PROMPTS[:2])
        next(left)
        next(kept)
        left.close()
        assert not list(left)
        for _ in kept:
            pass
        assert left.completion.token_ids == expected[0][: len(left.completion.token_ids)]
        assert kept.completion.token_ids == expected[1]
        assert [a.token_ids for a in llm.generate(PROMPTS[:2], params)] == expected
        caches(llm)


def test_threads_share_a_guessing_model(tiny_cnl: Path, plain: LLM, oracle: Answers) -> None:
    foresee(oracle, plain, PROMPTS, **HOT)
    params = SamplingParams(max_tokens=25, ignore_eos=True, **HOT)
    expected = [a.text for a in plain.generate(PROMPTS, params)]
    with (
        LLM(tiny_cnl, ctx=512, threads=1, max_sequences=2, speculate="lookup") as llm,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        texts = list(pool.map(lambda prompt: "".join(llm.stream(prompt, params)), PROMPTS))
    assert texts == expected


def test_a_full_step_leaves_no_room_for_drafts(tiny_cnl: Path, plain: LLM, oracle: Answers) -> None:
    """A prompt longer than a step runs beside an answer that drafts: the step never grows past its limit."""
    long = plain.tokenize("天空是蓝色的，" * 80, bos=True)[:500]
    foresee(oracle, plain, [PROMPTS[0]], **HOT)
    params = SamplingParams(max_tokens=60, ignore_eos=True, **HOT)
    (expected,) = plain.generate([PROMPTS[0]], params)
    (expected_long,) = plain.generate([long], max_tokens=5, ignore_eos=True, **HOT)
    with LLM(tiny_cnl, ctx=512, threads=1, max_sequences=2, speculate="lookup") as llm:
        stream = llm.stream(PROMPTS[0], params)
        next(stream)
        (beside,) = llm.generate([long], max_tokens=5, ignore_eos=True, **HOT)
        for _ in stream:
            pass
        assert stream.completion.token_ids == expected.token_ids
        assert stream.completion.usage.accepted_tokens > 0
        assert beside.token_ids == expected_long.token_ids


# --- the options


def test_speculation_is_off_unless_asked_for(tiny_cnl: Path, plain: LLM) -> None:
    assert plain.speculate is None
    usage = plain.generate([PROMPTS[0]], max_tokens=40, **GREEDY)[0].usage
    assert (usage.drafted_tokens, usage.accepted_tokens) == (0, 0)
    with pytest.raises(InputError, match="speculation is 'draft': choose lookup"):
        LLM(tiny_cnl, speculate="draft")


def test_drafts_have_a_limit(guessing: LLM) -> None:
    prompt = [1, *[300] * 100]
    request = guessing._request(prompt, SamplingParams(max_tokens=50), None)
    request.start(0)
    assert not request.draft().tokens, "nothing is decoded yet"
    row = np.zeros((1, guessing.vocab_size), np.float32)
    row[0, 300] = 1
    for _ in range(20):
        request.advance(row)
    assert request.draft().tokens == [300] * MAX_DRAFT
    for _ in range(27):
        request.advance(row)
    assert len(request.draft().tokens) == 2, "three tokens are left, and a step brings one more than it accepts"
    request.cancel()
