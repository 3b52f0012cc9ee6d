# SPDX-License-Identifier: Apache-2.0
"""Which items each step trains on, and how they are divided: the same steps for any number of devices and batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from cnllama.adapt.datasets import IGNORED, Items

Batch = dict[str, Any]
Key = tuple[int, int]  # (epoch, index); the index NONE is an item without tokens
NONE = -1


@dataclass(frozen=True)
class Split:
    """How the items of a step are divided: `batch` at a time on each of `devices`, `accum` times."""

    batch: int
    accum: int = 1
    devices: int = 1

    @property
    def items(self) -> int:
        """Items of a full step."""
        return self.batch * self.accum * self.devices

    def parts(self, items: Sequence[int], device: int) -> list[list[int]]:
        """The batches of a device, `accum` of them; those of a step that is not full differ by one item at most.

        A device that nothing is left for gets [NONE]: all devices have to take part in every batch.
        """
        parts = np.array_split(np.asarray(items, np.int64), self.accum * self.devices)
        return [part.tolist() or [NONE] for part in parts[device :: self.devices]]


class Order(Sampler[list[Key]]):
    """The batches of a run on one device, from its first step to its last, over all epochs.

    An epoch is cut into steps of split.items; its last step has what is left. epochs may be a fraction; max_steps,
    where it is not 0, counts instead. full_batches: fills every batch up with items of no tokens, so that all have one
    size.
    """

    def __init__(
        self,
        items: Items,
        split: Split,
        *,
        epochs: float = 1.0,
        max_steps: int = 0,
        device: int = 0,
        full_batches: bool = False,
    ) -> None:
        self._items, self.split, self.device, self._full = items, split, device, full_batches
        self._ends: list[int] = []  # steps up to the end of every epoch that is known
        self.steps = max_steps or self._steps_of(epochs)

    def _steps_of(self, epochs: float) -> int:
        whole = int(epochs)
        part = math.ceil((Fraction(str(epochs)) - whole) * self._steps(whole)) if epochs != whole else 0
        return (self._end(whole - 1) if whole else 0) + part

    def _steps(self, epoch: int) -> int:
        return -(-self._items.count(epoch) // self.split.items)

    def _end(self, epoch: int) -> int:
        """Steps up to the end of an epoch."""
        while len(self._ends) <= epoch:
            self._ends.append(self._steps(len(self._ends)) + (self._ends[-1] if self._ends else 0))
        return self._ends[epoch]

    def position(self, step: int) -> tuple[int, int, int]:
        """After `step` steps: (epoch, steps of it that are done, steps that it has)."""
        epoch, begin = 0, 0
        while self._end(epoch) <= step:
            begin = self._end(epoch)
            epoch += 1
        return epoch, step - begin, self._end(epoch) - begin

    def __len__(self) -> int:
        """Batches."""
        return self.steps * self.split.accum

    def __iter__(self) -> Iterator[list[Key]]:
        """(epoch, index) of every item of a batch."""
        epoch = step = 0
        while step < self.steps:
            count = self._items.count(epoch)
            for begin in range(0, count, self.split.items):
                if step == self.steps:
                    return
                indices = range(begin, min(begin + self.split.items, count))
                for part in self.split.parts(indices, self.device):
                    filled = part + [NONE] * (self.split.batch - len(part) if self._full else 0)
                    yield [(epoch, index) for index in filled]
                step += 1
            epoch += 1


class Ordered(Dataset[Batch]):
    """A data set read by (epoch, index); its items know both, and how many tokens they have."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, key: Key) -> Batch:
        epoch, index = key
        if self._items.epoch != epoch:
            self._items.set_epoch(epoch)
        if index == NONE:
            return {**self._items.empty(), "key": key, "tokens": 0}
        return {**self._items[index], "key": key, "tokens": self._items.size(index)}


class Collator:
    """Items to a batch, with their keys; `pad` makes the batch of items of different lengths."""

    def __init__(self, pad: Callable[[Sequence[Mapping[str, Any]]], Batch] | None = None) -> None:
        self._pad = pad

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """int64 tensors [batch, length]; keys int64 [batch, 2]; tokens int64 []."""
        more = {
            "keys": torch.tensor([item["key"] for item in items]),
            "tokens": torch.tensor(sum(item["tokens"] for item in items)),
        }
        if self._pad is not None:
            return self._pad(items) | more
        names = [name for name in items[0] if name not in ("key", "tokens")]
        return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in names} | more


@dataclass(frozen=True)
class PadCollator:
    """Items to a batch of torch tensors, padded on the right to the longest, up to a multiple of `multiple`.

    Gives {"input_ids", "labels", "attention_mask"}: int64 [batch, length], padding pad_id, IGNORED and 0.
    """

    pad_id: int = 0
    multiple: int = 8

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """One batch."""
        longest = max(len(item["input_ids"]) for item in items)
        shape = (len(items), -(-longest // self.multiple) * self.multiple)
        batch = {
            "input_ids": np.full(shape, self.pad_id, np.int64),
            "labels": np.full(shape, IGNORED, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
        }
        for row, item in enumerate(items):
            n = len(item["input_ids"])
            batch["input_ids"][row, :n] = item["input_ids"]
            batch["labels"][row, :n] = item["labels"]
            batch["attention_mask"][row, :n] = 1
        return {name: torch.from_numpy(value) for name, value in batch.items()}
