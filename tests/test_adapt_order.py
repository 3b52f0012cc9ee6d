# SPDX-License-Identifier: Apache-2.0
"""What each epoch shows and each step trains on: everything once, the same steps for any division of the work."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from adapt_data import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="batches are made by torch")

import torch

from cnllama.adapt.batches import NONE, Collator, Order, Ordered, PadCollator, Split
from cnllama.adapt.data import Source, prepare_chat, prepare_text
from cnllama.adapt.datasets import IGNORED, ChatDataset, PackedChat
from cnllama.adapt.tokenfile import Vocabulary, open_vocabulary


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Path:
    """A tokenizer, 37 documents and 53 samples of very different lengths."""
    directory = tmp_path_factory.mktemp("order")
    models.write_tokenizer(directory, tokenizer_model)
    texts = [{"text": "春江潮水" * (1 + i % 9) + str(i)} for i in range(37)]
    write_jsonl(directory / "text.jsonl", texts)
    write_jsonl(directory / "chat.jsonl", [{"instruction": f"第{i}", "output": "字" * (1 + 7 * i)} for i in range(53)])
    return directory


@pytest.fixture(scope="module")
def vocabulary(place: Path) -> Vocabulary:
    return open_vocabulary(place)


def shown(data: Any, epoch: int) -> list[tuple[int, ...]]:
    """The ids of all items of an epoch that are no padding."""
    data.set_epoch(epoch)
    assert len(data) == data.count(epoch)
    return [tuple(data[i]["input_ids"][: data.size(i)].tolist()) for i in range(len(data))]


def tokens(items: Iterable[tuple[int, ...]]) -> Counter[int]:
    return Counter(i for ids in items for i in ids)


@given(block=st.integers(2, 200), repeat=st.sampled_from([1.0, 2.0, 0.5, 0.25, 0.3, 1.7]), seed=st.integers(0, 9))
@settings(max_examples=12, deadline=None)
def test_every_token_is_in_one_block_of_each_pass(
    place: Path, vocabulary: Vocabulary, block: int, repeat: float, seed: int
) -> None:
    """After 20 epochs of 0.3, every token was shown 6 times; no token is lost where an epoch ends inside a block."""
    whole = prepare_text([Source(place / "text.jsonl")], vocabulary, place, block_size=2, shuffle=False)
    data = prepare_text([Source(place / "text.jsonl", repeat)], vocabulary, place, block_size=block, seed=seed)
    once = Counter(whole.files[0].tokens.tolist())
    got: Counter[int] = Counter()
    lost = 0
    for epoch in range(20):
        items = shown(data, epoch)
        got += tokens(items)
        lost += data.tokens - sum(map(len, items))
        assert data.tokens % block == 1 or sum(map(len, items)) == data.tokens
    assert lost <= 20, "a single token has nothing to predict"
    expected = Counter({token: round(20 * repeat) * count for token, count in once.items()})
    assert sum((expected - got).values()) == lost
    assert not got - expected


@pytest.mark.parametrize("repeat", [1.0, 3.0, 0.25, 0.5, 0.1, 1.5])
@pytest.mark.parametrize("step_items", [0, 4, 16, 64])
def test_every_sample_is_shown_in_each_pass(
    place: Path, vocabulary: Vocabulary, repeat: float, step_items: int
) -> None:
    data = prepare_chat([Source(place / "chat.jsonl", repeat)], vocabulary, place, step_items=step_items)
    epochs = 20
    seen = Counter(item for epoch in range(epochs) for item in shown(data, epoch))
    assert set(seen.values()) == {round(epochs * repeat)}
    assert len(seen) == 53


def test_what_fills_no_step_changes_with_the_epoch(place: Path, vocabulary: Vocabulary) -> None:
    """Sorted by length, it would be the longest samples in every epoch."""
    data = prepare_chat([Source(place / "chat.jsonl")], vocabulary, place, step_items=8)
    last = [frozenset(shown(data, epoch)[-(53 % 8) :]) for epoch in range(6)]
    assert len(set(last)) == 6
    longest = max(last[0] | last[1], key=len)
    assert not all(longest in rest for rest in last)


def test_packing_shows_every_sample_in_every_epoch(place: Path, vocabulary: Vocabulary) -> None:
    samples = prepare_chat([Source(place / "chat.jsonl")], vocabulary, place)
    alone = Counter(shown(samples, 0))
    packed = PackedChat(samples, 512, vocabulary.pad_id)
    counts = set()
    for epoch in (0, 1, 2, 1):
        found = Counter(part for i in range(packed.count(epoch)) for part in parts(packed, epoch, i))
        assert found == alone
        counts.add(packed.count(epoch))
    assert packed.epoch == 1
    assert packed.count(7) > 0
    assert packed.epoch == 1, "counting another epoch changes nothing"


def parts(packed: PackedChat, epoch: int, index: int) -> list[tuple[int, ...]]:
    """The samples of a block, by the positions, which begin again at each."""
    if packed.epoch != epoch:
        packed.set_epoch(epoch)
    block, size = packed[index], packed.size(index)
    starts = [*np.flatnonzero(block["position_ids"][:size] == 0).tolist(), size]
    return [tuple(block["input_ids"][a:b].tolist()) for a, b in itertools.pairwise(starts)]


@dataclass
class Numbers:
    """Items without contents: `counts` of each epoch, over and over."""

    counts: tuple[int, ...]
    epoch: int = 0

    def count(self, epoch: int) -> int:
        return self.counts[epoch % len(self.counts)]


def steps(order: Order) -> list[list[list[tuple[int, int]]]]:
    """The batches of a device, step by step."""
    batches = list(order)
    assert len(batches) == len(order)
    accum = order.split.accum
    return [batches[at : at + accum] for at in range(0, len(batches), accum)]


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any),
    batch=st.integers(1, 4),
    accum=st.integers(1, 3),
    devices=st.integers(1, 4),
    epochs=st.sampled_from([1, 2, 0.5, 2.25]),
    max_steps=st.sampled_from([0, 1, 7]),
    full=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_steps_are_the_same_however_they_are_divided(
    counts: list[int], batch: int, accum: int, devices: int, epochs: float, max_steps: int, full: bool
) -> None:
    items = Numbers(tuple(counts))
    split = Split(batch, accum, devices)
    options = {"epochs": epochs, "max_steps": max_steps}
    one = steps(Order(items, Split(split.items), **options))  # type: ignore[arg-type]
    found = [steps(Order(items, split, device=d, full_batches=full, **options)) for d in range(devices)]  # type: ignore[arg-type]
    seen: Counter[tuple[int, int]] = Counter()
    for number, (together,) in enumerate(one):
        divided = [key for device in found for part in device[number] for key in part if key[1] != NONE]
        assert Counter(divided) == Counter(together)
        seen.update(divided)
        for device in found:
            assert len(device[number]) == accum, "all devices take part in every batch"
            assert all(0 < len(part) <= batch for part in device[number])
            assert not full or all(len(part) == batch for part in device[number])
    assert all(len(device) == len(one) for device in found)
    assert not seen or max(seen.values()) == 1
    if not max_steps:
        assert all(seen[epoch, i] for epoch in range(int(epochs)) for i in range(items.count(epoch)))


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any), items=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_a_position_is_that_of_the_items_that_come_next(counts: list[int], items: int) -> None:
    order = Order(Numbers(tuple(counts)), Split(items), max_steps=20)  # type: ignore[arg-type]
    for step, (batch,) in enumerate(steps(order)):
        epoch, done, of_epoch = order.position(step)
        assert batch[0] == (epoch, done * items)
        assert done < of_epoch == -(-counts[epoch % len(counts)] // items)


def test_a_data_set_is_read_by_epoch_and_index(place: Path, vocabulary: Vocabulary) -> None:
    data = prepare_chat([Source(place / "chat.jsonl")], vocabulary, place)
    third = shown(data, 3)
    ordered = Ordered(data)
    assert tuple(ordered[0, 5]["input_ids"]) == shown(data, 0)[5] != third[5]
    batch = Collator(PadCollator(vocabulary.pad_id))([ordered[3, 5], ordered[3, NONE]])
    assert tuple(batch["input_ids"][0, : len(third[5])].tolist()) == third[5]
    assert batch["keys"].tolist() == [[3, 5], [3, NONE]]
    assert int(batch["tokens"]) == len(third[5])
    assert set(batch["labels"][1].tolist()) == {IGNORED}


def test_padding() -> None:
    items = [{"input_ids": np.arange(1, n + 1), "labels": np.full(n, n)} for n in (3, 9)]
    batch = PadCollator(pad_id=7, multiple=4)(items)
    assert all(value.shape == (2, 12) and value.dtype == torch.int64 for value in batch.values())
    assert batch["input_ids"][0].tolist() == [1, 2, 3] + [7] * 9
    assert batch["labels"][0].tolist() == [3] * 3 + [IGNORED] * 9
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]


def test_samples_of_a_step_are_of_like_length(place: Path, vocabulary: Vocabulary) -> None:
    data: ChatDataset = prepare_chat([Source(place / "chat.jsonl", 20)], vocabulary, place, step_items=8)
    widths = [np.ptp(data.lengths()[at : at + 8]) for at in range(0, 53 * 20 - 8, 8)]
    assert np.median(widths) < 0.1 * np.ptp(data.lengths())
