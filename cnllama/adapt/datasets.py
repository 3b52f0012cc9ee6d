# SPDX-License-Identifier: Apache-2.0
"""Data sets of a training run: blocks of running text, instruction samples, samples packed into blocks.

Each is a map from an index to arrays, shuffled already for its epoch: read in the order of the index, (epoch, index) is
a position. Every token of what an epoch shows is in exactly one item of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cnllama.adapt.tokenfile import Ids, Positions, TokenFile
from cnllama.errors import InputError

IGNORED = -100
_WINDOW_STEPS = 64
_OPEN_BLOCKS = 16

Item = dict[str, npt.NDArray[np.int64]]


class Items(Protocol):
    """What the three data sets have in common."""

    epoch: int

    def count(self, epoch: int) -> int:
        """Items of an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch: the same for the same seed, files and epoch."""

    def size(self, index: int) -> int:
        """Tokens of an item of the chosen epoch, without padding."""

    def empty(self) -> Item:
        """An item of no token that is learned or counted, for a device that has nothing else to do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...


def _share(total: int, repeat: float, epoch: int) -> tuple[int, int, int]:
    """How an epoch shows `total` things `repeat` times: (whole passes, begin, end).

    begin .. end lie in an endless row of further passes: what is left of one epoch comes in the next, so that
    1 / repeat epochs show everything once.
    """
    exact = Fraction(str(repeat))
    whole = int(exact)
    part = (exact - whole) * total
    return whole, int(part * epoch), int(part * (epoch + 1))


def _amount(total: int, repeat: float, epoch: int) -> int:
    """How many of `total` things an epoch shows."""
    whole, begin, end = _share(total, repeat, epoch)
    return whole * total + end - begin


def _passes(total: int, begin: int, end: int) -> list[tuple[int, int, int]]:
    """begin .. end of the endless row, pass by pass: (number of the pass, begin and end in it)."""
    return [
        (number, max(begin - number * total, 0), min(end - number * total, total))
        for number in range(begin // total, -(-end // total))
    ]


def _permutation(count: int, seed: int, epoch: int, purpose: int) -> Positions:
    return np.random.Generator(np.random.PCG64([seed, epoch, purpose])).permutation(count)


class BlockDataset:
    """Documents of all sources, shuffled, joined and cut into blocks of `block_size` tokens, which are shuffled too.

    An item is {"input_ids": int64 [block_size], "labels": the same}. The last block of an epoch has what is left; its
    labels are IGNORED after that. A single token, which has nothing to predict, makes no block.
    """

    def __init__(
        self, files: Sequence[TokenFile], repeats: Sequence[float], block_size: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.files, self.block_size, self.seed, self.shuffle = list(files), block_size, seed, shuffle
        self._repeats = list(repeats)
        self.reports = [file.report for file in self.files]
        # A file's tokens lie at base .. next base of one imaginary array of all tokens.
        self._bases = np.cumsum([0, *(file.report.tokens for file in self.files)])
        least, what = (block_size, "one block of ") if shuffle else (2, "")  # held-out text may be short
        if self._tokens(0) < least:
            raise InputError(
                f"{', '.join(report.file for report in self.reports)}: {self._tokens(0):,} tokens in all, fewer than "
                f"{what}{least:,}; give more text or a smaller block"
            )
        self.set_epoch(0)

    def _tokens(self, epoch: int) -> int:
        amounts = (_amount(f.report.tokens, r, epoch) for f, r in zip(self.files, self._repeats, strict=True))
        return sum(amounts)

    @property
    def tokens(self) -> int:
        """Tokens of the chosen epoch."""
        return self._tokens(self.epoch)

    def count(self, epoch: int) -> int:
        """Blocks of an epoch."""
        return -(-(self._tokens(epoch) - 1) // self.block_size)

    def __len__(self) -> int:
        return len(self._order)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch: the same for the same seed, files and epoch."""
        self.epoch = epoch
        starts, lengths = self._documents(epoch)
        if self.shuffle:
            order = _permutation(len(starts), self.seed, epoch, 0)
            starts, lengths = starts[order], lengths[order]
        self._starts = starts
        self._ends = np.cumsum(lengths)
        blocks = self.count(epoch)
        self._order = _permutation(blocks, self.seed, epoch, 1) if self.shuffle else np.arange(blocks)

    def size(self, index: int) -> int:
        """Tokens of a block: block_size, or what is left for the last one."""
        return min(self.block_size, int(self._ends[-1]) - int(self._order[index]) * self.block_size)

    def empty(self) -> Item:
        """A block without a token to learn."""
        return {
            "input_ids": np.zeros(self.block_size, np.int64),
            "labels": np.full(self.block_size, IGNORED, np.int64),
        }

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        position = int(self._order[index]) * self.block_size
        size = self.size(index)
        item = self.empty()
        ids = item["input_ids"]
        filled = 0
        document = int(np.searchsorted(self._ends, position, "right"))
        while filled < size:
            left = int(self._ends[document]) - position
            take = min(left, size - filled)
            length = left + position - (int(self._ends[document - 1]) if document else 0)
            begin = int(self._starts[document]) + length - left
            ids[filled : filled + take] = self._read(begin, take)
            filled, position, document = filled + take, position + take, document + 1
        item["labels"][:size] = ids[:size]
        return item

    def _read(self, begin: int, count: int) -> Ids:
        file = int(np.searchsorted(self._bases, begin, "right")) - 1
        begin -= int(self._bases[file])
        return self.files[file].tokens[begin : begin + count]

    def _documents(self, epoch: int) -> tuple[Positions, Positions]:
        """Start and length of every document, or part of one, that the epoch shows, in the order of the files."""
        starts, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for i, (file, repeat) in enumerate(zip(self.files, self._repeats, strict=True)):
            begins, sizes = file.starts, file.ends - file.starts
            whole, begin, end = _share(file.report.tokens, repeat, epoch)
            for number, low, high in _passes(file.report.tokens, begin, end):
                some = _permutation(len(begins), self.seed, number, 2 + i)
                ends = np.cumsum(sizes[some])
                cut_low = np.clip(low - (ends - sizes[some]), 0, None)
                cut_high = np.clip(ends - high, 0, None)
                left = sizes[some] - cut_low - cut_high
                starts.append((begins[some] + cut_low)[left > 0] + self._bases[i])
                lengths.append(left[left > 0])
            starts += [begins + self._bases[i]] * whole
            lengths += [sizes] * whole
        return np.concatenate(starts), np.concatenate(lengths)


class ChatDataset:
    """Samples of all sources in a seeded order, each a prompt and its answer.

    An item is {"input_ids": int64 [n], "labels": int64 [n]}, labels IGNORED before the answer. step_items: samples of
    about the same length are put into the same step (of so many samples, counted from index 0), which saves padding;
    the steps themselves are shuffled, and the last one, where it is not full, has any samples.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        repeats: Sequence[float],
        seed: int = 0,
        shuffle: bool = True,
        step_items: int = 0,
    ) -> None:
        self.files, self.seed, self.shuffle, self.step_items = list(files), seed, shuffle, step_items
        self._repeats = list(repeats)
        self.reports = [file.report for file in self.files]
        self._bases = np.cumsum([0, *(file.report.entries for file in self.files)])
        self._starts = [file.starts for file in self.files]
        self._lengths = np.concatenate(
            [file.ends - starts for file, starts in zip(self.files, self._starts, strict=True)]
        )
        if not self.count(0):
            raise InputError(
                f"{', '.join(report.file for report in self.reports)}: the repeats leave no sample; raise them"
            )
        self.set_epoch(0)

    def count(self, epoch: int) -> int:
        """Samples of an epoch."""
        amounts = (_amount(f.report.entries, r, epoch) for f, r in zip(self.files, self._repeats, strict=True))
        return sum(amounts)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def tokens(self) -> int:
        """Tokens of the chosen epoch without padding."""
        return int(self._lengths[self._order].sum())

    def lengths(self) -> Positions:
        """Tokens of every item, in the order of the epoch."""
        lengths: Positions = self._lengths[self._order]
        return lengths

    def size(self, index: int) -> int:
        """Tokens of a sample."""
        return int(self._lengths[self._order[index]])

    def empty(self) -> Item:
        """A sample without an answer."""
        return {"input_ids": np.zeros(1, np.int64), "labels": np.full(1, IGNORED, np.int64)}

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch: the same for the same seed, files and epoch."""
        self.epoch = epoch
        chosen = []
        for i, (file, repeat) in enumerate(zip(self.files, self._repeats, strict=True)):
            entries = file.report.entries
            whole, begin, end = _share(entries, repeat, epoch)
            parts = [np.arange(entries)] * whole
            parts += [_permutation(entries, self.seed, n, 2 + i)[a:b] for n, a, b in _passes(entries, begin, end)]
            chosen += [part + self._bases[i] for part in parts]
        order = np.concatenate(chosen)
        if self.shuffle:
            order = order[_permutation(len(order), self.seed, epoch, 0)]
            if self.step_items > 1:
                order = self._group(order, epoch)
        self._order = order

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        entry = int(self._order[index])
        file = int(np.searchsorted(self._bases, entry, "right")) - 1
        begin = int(self._starts[file][entry - self._bases[file]])
        end = begin + int(self._lengths[entry])
        ids = self.files[file].tokens[begin:end].astype(np.int64)
        mask = self.files[file].mask
        assert mask is not None  # prepare_chat writes one
        return {"input_ids": ids, "labels": np.where(mask[begin:end] != 0, ids, IGNORED)}

    def _group(self, order: Positions, epoch: int) -> Positions:
        """Sorts by length inside windows of some steps, then shuffles the steps.

        What fills no step is set aside before: after the sorting it would always be the longest samples.
        """
        full = len(order) // self.step_items
        grouped, rest = np.split(order, [full * self.step_items])
        window = self.step_items * _WINDOW_STEPS
        parts = [grouped[at : at + window] for at in range(0, len(grouped), window)]
        steps = np.concatenate([*map(self._by_length, parts), grouped[:0]]).reshape(full, self.step_items)
        return np.concatenate([steps[_permutation(full, self.seed, epoch, 1)].reshape(-1), self._by_length(rest)])

    def _by_length(self, part: Positions) -> Positions:
        return part[np.argsort(self._lengths[part], kind="stable")]


class PackedChat:
    """Samples of a ChatDataset laid into blocks of one length, none cut: no padding to speak of, no recompiling.

    An item is {"input_ids", "labels", "position_ids"}: int64 [block_size]. Positions begin at 0 in every sample, by
    which transformers keeps the samples of a block from seeing each other. How many blocks there are may differ from
    epoch to epoch.
    """

    def __init__(self, samples: ChatDataset, block_size: int, pad_id: int) -> None:
        self._samples, self._block_size, self._pad_id = samples, block_size, pad_id
        self._counts: dict[int, int] = {}
        self.set_epoch(samples.epoch)

    def count(self, epoch: int) -> int:
        """Blocks of an epoch."""
        if epoch not in self._counts:
            chosen = self._samples.epoch
            self._samples.set_epoch(epoch)
            self._counts[epoch] = len(self._pack())
            self._samples.set_epoch(chosen)
        return self._counts[epoch]

    def __len__(self) -> int:
        return len(self._blocks)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch: the same for the same seed, files and epoch."""
        self._samples.set_epoch(epoch)
        blocks = self._pack()
        self._counts[epoch] = len(blocks)
        # The blocks that are made last have the most room left.
        order = _permutation(len(blocks), self._samples.seed, epoch, 1) if self._samples.shuffle else range(len(blocks))
        self._blocks = [blocks[i] for i in order]
        self._lengths = self._samples.lengths()
        self.epoch = epoch

    def size(self, index: int) -> int:
        """Tokens of a block, without the room that is left."""
        return int(self._lengths[self._blocks[index]].sum())

    def empty(self) -> Item:
        """A block without a sample."""
        return {
            "input_ids": np.full(self._block_size, self._pad_id, np.int64),
            "labels": np.full(self._block_size, IGNORED, np.int64),
            "position_ids": np.arange(self._block_size),
        }

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        block = self.empty()
        at = 0
        for sample in self._blocks[index]:
            item = self._samples[sample]
            n = len(item["input_ids"])
            block["input_ids"][at : at + n] = item["input_ids"]
            # the first id of a sample is not the answer to the one before
            block["labels"][at + 1 : at + n] = item["labels"][1:]
            block["position_ids"][at : at + n] = np.arange(n)
            at += n
        block["position_ids"][at:] = np.arange(self._block_size - at)
        return block

    def _pack(self) -> list[list[int]]:
        """First-fit in order over a few open blocks."""
        blocks: list[list[int]] = []
        opened: list[tuple[int, list[int]]] = []  # (room, samples)
        for sample, length in enumerate(self._samples.lengths().tolist()):
            place = next((i for i, (room, _) in enumerate(opened) if room >= length), None)
            if place is None:
                opened.append((self._block_size, []))
                place = len(opened) - 1
            room, members = opened[place]
            members.append(sample)
            opened[place] = (room - length, members)
            if len(opened) > _OPEN_BLOCKS:
                fullest = min(range(len(opened)), key=lambda i: opened[i][0])
                blocks.append(opened.pop(fullest)[1])
        return blocks + [members for _, members in opened]
