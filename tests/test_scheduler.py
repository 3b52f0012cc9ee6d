# SPDX-License-Identifier: Apache-2.0
"""What runs together and what the caches keep: batches, conversations, streams side by side, interruptions."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from generation import HOT, PROMPTS, user

from cnllama import LLM, SamplingParams
from cnllama._core import Engine
from cnllama.scheduler import SlotPool


@pytest.fixture
def fresh(tiny_cnl: Path) -> Iterator[LLM]:
    with LLM(tiny_cnl, ctx=512, threads=1) as opened:
        yield opened


def test_a_batch_gives_the_tokens_of_each_alone(tiny_cnl: Path) -> None:
    params = SamplingParams(max_tokens=30, **HOT)
    with LLM(tiny_cnl, ctx=512, threads=2, max_sequences=8) as llm:
        together = llm.generate(PROMPTS, params)
    with LLM(tiny_cnl, ctx=512, threads=1, max_sequences=3) as llm:
        queued = llm.generate(PROMPTS, params)
    for prompt, *answers in zip(PROMPTS, together, queued, strict=True):
        with LLM(tiny_cnl, ctx=512, threads=1) as llm:
            (alone,) = llm.generate([prompt], params)
        assert [a.token_ids for a in answers] == [alone.token_ids] * 2, prompt
        assert {a.text for a in answers} == {alone.text}
        assert {a.finish_reason for a in answers} == {alone.finish_reason}


def test_a_chat_runs_only_what_is_new(fresh: LLM, tiny_cnl: Path) -> None:
    first = fresh.chat([user("一二三")], max_tokens=10, temperature=0.0)
    assert first.usage.cached_tokens == 0
    history = [user("一二三"), {"role": "assistant", "content": first.text}, user("四五六")]
    second = fresh.chat(history, max_tokens=10, temperature=0.0)
    assert second.usage.cached_tokens >= len(fresh.prompt_ids([user("一二三")])) - 1
    with LLM(tiny_cnl, ctx=512, threads=2) as other:
        alone = other.chat(history, max_tokens=10, temperature=0.0)
    assert alone.usage.cached_tokens == 0
    assert alone.token_ids == second.token_ids
    same = fresh.chat(history, max_tokens=10, temperature=0.0)
    assert same.usage.cached_tokens == same.usage.prompt_tokens - 1
    assert same.token_ids == second.token_ids
    other_start = fresh.chat([user("九")], max_tokens=5, temperature=0.0)
    assert other_start.usage.cached_tokens < other_start.usage.prompt_tokens


def test_two_conversations_keep_their_caches(tiny_cnl: Path) -> None:
    with LLM(tiny_cnl, ctx=256, threads=1, max_sequences=2, template="alpaca-2") as llm:
        for text in ("甲" * 20, "乙" * 20):
            llm.chat([{"role": "system", "content": text}, user("问")], max_tokens=3)
        for text in ("甲" * 20, "乙" * 20, "甲" * 20):
            done = llm.chat([{"role": "system", "content": text}, user("问")], max_tokens=3)
            assert done.usage.cached_tokens == done.usage.prompt_tokens - 1


def test_dynamic_positions_never_mix_frequencies(tmp_path: Path, tokenizer_model: bytes) -> None:
    """A cache made for one planned length is not continued for another one past the trained length."""
    base = models.make_llama(
        tmp_path / "base", tokenizer_model, max_position_embeddings=32, rope_scaling={"type": "dynamic", "factor": 4.0}
    )
    cnl = models.convert(base, tmp_path / "dynamic.cnl")
    ids = list(range(300, 400))
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with LLM(cnl, ctx=128, threads=1) as llm:
        short, long, longer = (llm.generate([ids[:n]], params)[0] for n in (10, 60, 90))
        assert short.usage.cached_tokens == long.usage.cached_tokens == longer.usage.cached_tokens == 0 or (
            long.usage.cached_tokens == 0 and longer.usage.cached_tokens == 0
        )
        again = llm.generate([ids[:90]], params)[0]
        assert again.usage.cached_tokens == 89
    for n, answer in ((10, short), (60, long), (90, longer), (90, again)):
        with LLM(cnl, ctx=128, threads=1) as llm:
            assert llm.generate([ids[:n]], params)[0].token_ids == answer.token_ids


def test_an_interrupt_leaves_it_usable(fresh: LLM) -> None:
    expected = fresh.generate(["从前"], max_tokens=20, **HOT)[0]
    long_prompt = "天空是蓝色的，" * 50

    def interrupt(done: int, total: int) -> None:
        if 0 < done < total:
            raise KeyboardInterrupt

    stream = fresh.stream(long_prompt, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert stream.completion.text == ""
    assert fresh.generate(["从前"], max_tokens=20, **HOT)[0].token_ids == expected.token_ids
    whole = fresh.generate([long_prompt], SamplingParams(max_tokens=5))[0]
    assert whole.usage.cached_tokens == 0 or whole.usage.cached_tokens < whole.usage.prompt_tokens


def test_an_interrupt_between_two_answers_of_a_batch(tiny_cnl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(tiny_cnl, ctx=512, threads=1, max_sequences=3) as llm:
        expected = [a.token_ids for a in llm.generate(PROMPTS, max_tokens=10, **HOT)]
        scheduler = llm._scheduler
        assert scheduler is not None
        advance, calls = scheduler._advance, 0

        def interrupted(batch: Any, logits: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise KeyboardInterrupt
            advance(batch, logits)

        monkeypatch.setattr(scheduler, "_advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, max_tokens=10, **HOT)
        assert [a.token_ids for a in llm.generate(PROMPTS, max_tokens=10, **HOT)] == expected


def test_an_abandoned_stream_makes_room(fresh: LLM) -> None:
    for _ in range(3):
        next(fresh.stream("从前", max_tokens=100, ignore_eos=True))
    stream = fresh.stream("从前", max_tokens=100, ignore_eos=True)
    next(stream)
    stream.close()
    assert len(fresh.generate(["好"], SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids) == 5
    assert not list(stream)


def test_streams_of_one_model_can_alternate(tiny_cnl: Path) -> None:
    for sequences in (1, 2):
        with LLM(tiny_cnl, ctx=512, threads=1, max_sequences=sequences) as llm:
            expected = [a.text for a in llm.generate(["从前", "好"], max_tokens=20, **HOT)]
            streams = [llm.stream(prompt, max_tokens=20, **HOT) for prompt in ("从前", "好")]
            texts = ["", ""]
            for _ in range(60):
                for i, stream in enumerate(streams):
                    texts[i] += next(stream, "")
            assert texts == expected


def test_threads_share_one_model(tiny_cnl: Path) -> None:
    with LLM(tiny_cnl, ctx=512, threads=1, max_sequences=2) as llm:
        expected = [a.text for a in llm.generate(PROMPTS, max_tokens=15, **HOT)]
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            texts = list(pool.map(lambda prompt: "".join(llm.stream(prompt, max_tokens=15, **HOT)), PROMPTS))
    assert texts == expected


class Interrupted:
    """The engine, with Ctrl-C pressed just after it has opened a sequence."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.interrupts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def open(self, rope_length: int) -> int:
        sequence = self._engine.open(rope_length)
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt
        return sequence


def test_no_sequence_is_lost_to_an_interrupt(tiny_cnl: Path) -> None:
    """The pool never has more sequences than it may, whenever Ctrl-C comes, and ends with sound caches."""
    with LLM(tiny_cnl, ctx=64, threads=1, max_sequences=3) as llm:
        engine = Interrupted(llm.engine)
        pool = SlotPool(engine, 3, unscaled_length=10)  # type: ignore[arg-type]

        def run(tokens: list[int], length: int) -> None:
            slot = pool.acquire(tokens, length, [])
            assert slot is not None
            llm.engine.step([(slot.sequence, np.array(tokens[len(slot.tokens) :], np.int32), False)])
            slot.tokens[:] = tokens

        for i in range(12):
            engine.interrupts = i % 3
            for _ in range(engine.interrupts):
                with pytest.raises(KeyboardInterrupt):
                    run(list(range(300 + i, 360 + i)), 20 + i)  # a length of its own: a new sequence each time
            run(list(range(300 + i, 360 + i)), 20 + i)  # fails when lost sequences hold the cache's pages
            opened = [i for i in range(6) if is_open(llm.engine, i)]
            assert len(opened) <= 3
            assert {slot.sequence for slot in pool._slots} <= set(opened)
            assert all(llm.engine.length(slot.sequence) == len(slot.tokens) for slot in pool._slots)
        assert len(pool._slots) == 3


def is_open(engine: Engine, sequence: int) -> bool:
    try:
        engine.length(sequence)
    except ValueError:
        return False
    return True
