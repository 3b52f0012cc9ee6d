# SPDX-License-Identifier: Apache-2.0
"""Logits for evaluations: the same bits however items are packed, and beginnings that are run once."""

from pathlib import Path

import models
import numpy as np
import pytest

from cnllama import LLM
from cnllama.errors import InputError
from cnllama.eval.models import EngineScorer, Item, shared_length

CONTEXT = 704


@pytest.fixture(scope="module")
def llm(tiny_cnl: Path) -> LLM:
    return LLM(tiny_cnl, ctx=CONTEXT, max_sequences=9)


def ids(seed: int, count: int, vocab: int = 900) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab, count).tolist()


def collect(model: EngineScorer, items: list[Item]) -> list[np.ndarray]:
    """The rows of every item, which must come in ascending, gapless pieces."""
    parts: list[list[np.ndarray]] = [[] for _ in items]
    for number, position, logits in model.rows(items):
        assert position == items[number].begin + sum(map(len, parts[number]))
        parts[number].append(logits.copy())
    return [np.concatenate(each) for each in parts]


def awkward_items() -> list[Item]:
    """Short ones, one longer than two steps, rows wanted at the start, in the middle and at the end, shared starts."""
    long = ids(1, 700)
    items = [
        Item(long, 0),
        Item(long[:300] + ids(2, 40), 320),
        Item(long[:300] + ids(3, 5), 304),
        Item(long[:300], 299),
    ]
    items += [Item(ids(10 + n, 20 + 7 * n), n * 9 % 20) for n in range(8)]
    items += [Item([5], 0), Item([5], 0), Item([5, 6], 1), Item(ids(30, 256), 255), Item(ids(30, 257), 100)]
    return items


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_the_bits_do_not_depend_on_packing(llm: LLM, lanes: int) -> None:
    items = awkward_items()
    with EngineScorer(llm, lanes) as model:
        found = collect(model, items)
        again = collect(model, items)
    for item, first, second in zip(items, found, again, strict=True):
        expected = llm.logits(item.ids)[item.begin :]
        assert first.shape == expected.shape
        assert (first == expected).all()
        assert (second == expected).all()


def test_a_shared_beginning_is_run_once(llm: LLM) -> None:
    prefix = ids(4, 400)
    items = [Item(prefix + ids(50 + n, 30), 429) for n in range(6)]
    for lanes in (1, 4):
        with EngineScorer(llm, lanes) as model:
            collect(model, items)
            assert model.tokens_run == 400 + 6 * 30


def test_unrelated_items_share_steps(llm: LLM) -> None:
    items = [Item(ids(70 + n, 60), 59) for n in range(8)]
    steps = []
    with EngineScorer(llm, 4) as model:
        for number, _, _ in model.rows(items, steps.append):
            assert 0 <= number < 8
    assert model.tokens_run == 480
    assert sum(steps) == 480


def test_progress_counts_every_token_of_every_item(llm: LLM) -> None:
    items = awkward_items()
    done: list[int] = []
    with EngineScorer(llm, 2) as model:
        for _ in model.rows(items, done.append):
            pass
    assert sum(done) == sum(len(item.ids) for item in items)


def test_an_abandoned_call_leaves_the_model_usable(llm: LLM) -> None:
    items = awkward_items()
    with EngineScorer(llm, 2) as model:
        next(model.rows(items))
        found = collect(model, items[4:8])
    for item, rows in zip(items[4:8], found, strict=True):
        assert (rows == llm.logits(item.ids)[item.begin :]).all()


def test_dynamic_scaling_never_mixes_frequencies(tmp_path: Path, tokenizer_model: bytes) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    base = models.make_llama(tmp_path / "hf", tokenizer_model, rope_scaling=scaling, max_position_embeddings=128)
    cnl = models.convert(base, tmp_path / "dynamic.cnl")
    long = ids(5, 400)
    items = [Item(long, 390), Item([*long[:200], 7], 200), Item([*long[:200], 8], 200), Item(long[:100], 99)]
    with LLM(cnl, ctx=512, max_sequences=3) as llm:
        expected = [llm.logits(item.ids)[item.begin :] for item in items]
        for lanes in (1, 2):
            with EngineScorer(llm, lanes) as model:
                for rows, right in zip(collect(model, items), expected, strict=True):
                    assert (rows == right).all()


@pytest.mark.parametrize("item", [Item([], 0), Item([5] * (CONTEXT + 1), 0), Item([5], 1)])
def test_an_item_that_cannot_be_run(llm: LLM, item: Item) -> None:
    with EngineScorer(llm) as model, pytest.raises(InputError, match=str(CONTEXT)):
        list(model.rows([item]))


def test_shared_length() -> None:
    assert shared_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_length([1, 2], [1, 2, 3]) == 2
    assert shared_length([], [1]) == 0
