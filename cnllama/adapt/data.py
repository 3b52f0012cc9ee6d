# SPDX-License-Identifier: Apache-2.0
"""Training data: blocks of running text for pre-training, masked samples for instruction tuning, in a seeded order.

Both data sets are maps from an index to arrays and are already shuffled for their epoch: read them in the order of the
index (a sequential sampler) and (epoch, index) is a position that can be saved and gone back to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnllama.adapt.reading import (
    FORMATS,
    POEM_TEMPLATE,
    ReadLog,
    check_files,
    format_of,
    read_conversations,
    read_documents,
    template_fields,
)
from cnllama.adapt.tokenfile import Entry, FileReport, Ids, Positions, TokenFile, Vocabulary, token_file
from cnllama.errors import InputError
from cnllama.paths import is_dir
from cnllama.templates import Template, Token, encode_chat, get_template
from cnllama.tokenizer import Tokenizer

IGNORED = -100
_WINDOW_BATCHES = 64

Item = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Source:
    """A data file. repeat: how often an epoch shows it; 0.25 shows another quarter in each epoch, 3 all of it thrice.

    template: how a JSON record without "text" becomes a document, `reading.POEM_TEMPLATE` by default.
    """

    path: Path
    repeat: float = 1.0
    template: str = POEM_TEMPLATE


@dataclass
class DataPosition:
    """How far training has come: `index` items of `epoch` have been used."""

    epoch: int = 0
    index: int = 0

    def advance(self, items: int, per_epoch: int) -> None:
        """Counts `items` more; a full epoch of `per_epoch` begins the next one."""
        self.index += items
        self.epoch, self.index = self.epoch + self.index // per_epoch, self.index % per_epoch

    def indices(self, per_epoch: int) -> Iterator[int]:
        """What is left of this epoch: a sampler."""
        return iter(range(self.index, per_epoch))


class BlockDataset:
    """Documents of all sources, shuffled, joined and cut into blocks of `block_size` tokens, which are shuffled too.

    An item is {"input_ids": int64 [block_size], "labels": the same}. The length is the same in every epoch; up to
    block_size - 1 tokens at the end of an epoch are left out.
    """

    def __init__(
        self, files: Sequence[TokenFile], repeats: Sequence[float], block_size: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.files, self.block_size, self.seed, self.shuffle = list(files), block_size, seed, shuffle
        self._repeats = list(repeats)
        self.reports = [file.report for file in self.files]
        # A file's tokens lie at base .. next base of one imaginary array of all tokens.
        self._bases = np.cumsum([0, *(file.report.tokens for file in self.files)])
        self.tokens = sum(int(r * file.report.tokens) for r, file in zip(self._repeats, self.files, strict=True))
        if self.tokens < block_size:
            raise InputError(
                f"{', '.join(report.file for report in self.reports)}: {self.tokens:,} tokens in all, fewer than one "
                f"block of {block_size:,}; give more text or a smaller block"
            )
        self.set_epoch(0)

    def __len__(self) -> int:
        return self.tokens // self.block_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch: the same for the same seed, files and epoch."""
        self.epoch = epoch
        starts, lengths = self._documents(epoch)
        if self.shuffle:
            order = _permutation(len(starts), self.seed, epoch, 0)
            starts, lengths = starts[order], lengths[order]
        self._starts = starts
        self._ends = np.cumsum(lengths)
        blocks = len(self)
        self._order = _permutation(blocks, self.seed, epoch, 1) if self.shuffle else np.arange(blocks)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        position = int(self._order[index]) * self.block_size
        ids = np.empty(self.block_size, np.int64)
        filled = 0
        document = int(np.searchsorted(self._ends, position, "right"))
        while filled < self.block_size:
            left = int(self._ends[document]) - position
            take = min(left, self.block_size - filled)
            length = left + position - (int(self._ends[document - 1]) if document else 0)
            begin = int(self._starts[document]) + length - left
            ids[filled : filled + take] = self._read(begin, take)
            filled, position, document = filled + take, position + take, document + 1
        return {"input_ids": ids, "labels": ids.copy()}

    def _read(self, begin: int, count: int) -> Ids:
        file = int(np.searchsorted(self._bases, begin, "right")) - 1
        begin -= int(self._bases[file])
        return self.files[file].tokens[begin : begin + count]

    def _documents(self, epoch: int) -> tuple[Positions, Positions]:
        """Start and length of every document that the epoch shows, in the order of the files."""
        starts, lengths = [], []
        for i, (file, repeat) in enumerate(zip(self.files, self._repeats, strict=True)):
            begins, sizes = file.starts, file.ends - file.starts
            whole = int(repeat)
            chosen = [np.arange(len(begins))] * whole
            wanted = int(repeat * file.report.tokens) - whole * file.report.tokens
            shares = [sizes] * whole
            if wanted:
                some = _permutation(len(begins), self.seed, epoch, 2 + i)
                ends = np.cumsum(sizes[some])
                some = some[: int(np.searchsorted(ends, wanted)) + 1]
                share = sizes[some].copy()
                share[-1] -= ends[len(some) - 1] - wanted
                chosen.append(some)
                shares.append(share)
            starts += [begins[c] + self._bases[i] for c in chosen]
            lengths += shares
        return np.concatenate(starts), np.concatenate(lengths)


class ChatDataset:
    """Samples of all sources in a seeded order, each a prompt and its answer.

    An item is {"input_ids": int64 [n], "labels": int64 [n]}, labels IGNORED before the answer. batch_size: samples of
    about the same length are put into the same batch (of this size, counted from index 0), which saves padding; the
    batches themselves are shuffled.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        repeats: Sequence[float],
        seed: int = 0,
        shuffle: bool = True,
        batch_size: int = 0,
    ) -> None:
        self.files, self.seed, self.shuffle, self.batch_size = list(files), seed, shuffle, batch_size
        self._repeats = list(repeats)
        self.reports = [file.report for file in self.files]
        self._bases = np.cumsum([0, *(file.report.entries for file in self.files)])
        self._starts = [file.starts for file in self.files]
        self._lengths = np.concatenate(
            [file.ends - starts for file, starts in zip(self.files, self._starts, strict=True)]
        )
        self._count = sum(int(r * file.report.entries) for r, file in zip(self._repeats, self.files, strict=True))
        if not self._count:
            raise InputError(
                f"{', '.join(report.file for report in self.reports)}: the repeats leave no sample; raise them"
            )
        self.set_epoch(0)

    def __len__(self) -> int:
        return self._count

    @property
    def tokens(self) -> int:
        """Tokens of an epoch without padding (of the present one, when a repeat is no whole number)."""
        return int(self._lengths[self._order].sum())

    def lengths(self) -> Positions:
        """Tokens of every item, in the order of the epoch."""
        lengths: Positions = self._lengths[self._order]
        return lengths

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch: the same for the same seed, files and epoch."""
        self.epoch = epoch
        chosen = []
        for i, (file, repeat) in enumerate(zip(self.files, self._repeats, strict=True)):
            entries, whole = file.report.entries, int(repeat)
            some = _permutation(entries, self.seed, epoch, 2 + i)[: int(repeat * entries) - whole * entries]
            chosen += [part + self._bases[i] for part in [np.arange(entries)] * whole + [some]]
        order = np.concatenate(chosen)
        if self.shuffle:
            order = order[_permutation(len(order), self.seed, epoch, 0)]
            if self.batch_size > 1:
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
        """Sorts by length inside windows of some batches, then shuffles the full batches."""
        window = self.batch_size * _WINDOW_BATCHES
        parts = [order[at : at + window] for at in range(0, len(order), window)]
        order = np.concatenate([part[np.argsort(self._lengths[part], kind="stable")] for part in parts])
        full = len(order) // self.batch_size
        batches = order[: full * self.batch_size].reshape(full, self.batch_size)
        return np.concatenate([batches[_permutation(full, self.seed, epoch, 1)].reshape(-1), order[batches.size :]])


def _permutation(count: int, seed: int, epoch: int, purpose: int) -> Positions:
    return np.random.Generator(np.random.PCG64([seed, epoch, purpose])).permutation(count)


@dataclass(frozen=True)
class PadCollator:
    """Items to a batch of torch tensors, padded on the right to the longest, up to a multiple of `multiple`.

    Gives {"input_ids", "labels", "attention_mask"}: int64 [batch, length], padding pad_id, IGNORED and 0.
    """

    pad_id: int = 0
    multiple: int = 8

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch."""
        import torch

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


def prepare_text(
    sources: Sequence[Source],
    vocabulary: Vocabulary,
    cache: Path,
    *,
    block_size: int = 512,
    seed: int = 0,
    shuffle: bool = True,
    progress: bool = False,
) -> BlockDataset:
    """Pre-training blocks of corpus files (.txt, .jsonl, .json); each document is framed by BOS and EOS.

    Tokens lie in the directory `cache` and are made once. Raises InputError for unreadable or empty files.
    """
    check_sources(sources)
    if block_size < 2:
        raise InputError(f"the block size is {block_size}, expected at least 2")
    files = []
    for source in sources:
        template_fields(source.template)
        options = {"kind": "text", "template": source.template}

        def produce(log: ReadLog, _: FileReport, source: Source = source) -> Iterator[Entry]:
            for document in read_documents(source.path, log, source.template):
                yield Entry(vocabulary.tokenizer.encode(document, bos=True, eos=True), len(document))

        files.append(token_file(source.path, cache, vocabulary, options, produce, progress=progress))
    return BlockDataset(files, [source.repeat for source in sources], block_size, seed, shuffle)


def prepare_chat(
    sources: Sequence[Source],
    vocabulary: Vocabulary,
    cache: Path,
    *,
    template: str = "alpaca",
    max_length: int = 512,
    seed: int = 0,
    shuffle: bool = True,
    batch_size: int = 0,
    progress: bool = False,
) -> ChatDataset:
    """Instruction samples of .jsonl or .json files: the ids are those that the run time makes of the same messages.

    Every answer of a conversation becomes a sample whose prompt is all before it; where that is too long, the oldest
    turns go first and the end of the answer last. Raises InputError for unreadable or empty files.
    """
    check_sources(sources)
    chosen = chat_template(template)
    if max_length < 2:
        raise InputError(f"the maximum length is {max_length}, expected at least 2")
    options = {"kind": "chat", "template": repr(chosen), "max_length": max_length}
    files = []
    for source in sources:

        def produce(log: ReadLog, report: FileReport, source: Source = source) -> Iterator[Entry]:
            for _, messages in read_conversations(source.path, log):
                yield from chat_samples(messages, chosen, vocabulary.tokenizer, max_length, report)

        files.append(token_file(source.path, cache, vocabulary, options, produce, progress=progress))
    return ChatDataset(files, [source.repeat for source in sources], seed, shuffle, batch_size)


def chat_samples(
    messages: Sequence[Mapping[str, str]], template: Template, tokenizer: Tokenizer, max_length: int, report: FileReport
) -> Iterator[Entry]:
    """A sample for every answer in `messages`; cut and unusable ones are counted in `report`."""
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = list(messages[len(system) :])
    end = _end_token(template, tokenizer)
    for last in range(1, len(turns), 2):
        answer = turns[last]["content"]
        answer_ids = [*tokenizer.encode(answer), end]
        for first in range(0, last, 2):
            prompt = encode_chat(template, tokenizer, [*system, *turns[first:last]])
            if len(prompt) + len(answer_ids) <= max_length:
                break
        if len(prompt) >= max_length:
            report.masked += 1
            continue
        ids = (prompt + answer_ids)[:max_length]
        report.truncated += first > 0 or len(prompt) + len(answer_ids) > max_length
        yield Entry(ids, len(answer), [0] * len(prompt) + [1] * (len(ids) - len(prompt)))


def _end_token(template: Template, tokenizer: Tokenizer) -> int:
    """What follows an answer: the token that the template ends it with, EOS where that is none or unknown."""
    last = template.answer[-1]
    named = tokenizer.special_id(last.name) if isinstance(last, Token) and last.name not in ("bos", "eos") else None
    return tokenizer.eos_id if named is None else named


def check_sources(
    sources: Sequence[Source], held_out: Sequence[Source] = (), forms: Sequence[str] = tuple(FORMATS.values())
) -> None:
    """Raises InputError for files that cannot be of these forms by their names, and for repeats that cannot be."""
    if not sources:
        raise InputError("there is no data file; give at least one")
    for source in (*sources, *held_out):
        if not 0 < source.repeat < 1 << 20:
            raise InputError(f"{source.path}: its repeat is {source.repeat:g}, expected a number over 0")
        if is_dir(source.path):
            check_files([source.path])
        if format_of(source.path) not in forms:
            raise InputError(f"{source.path}: a text file holds no instructions, expected .jsonl or .json")


def chat_template(name: str) -> Template:
    """A prompt template to train on. Raises InputError for one that does not tell prompt from answer."""
    chosen = get_template(name)
    if not chosen.fresh_answer:
        raise InputError(f"the template {name!r} does not tell prompt from answer; choose alpaca, alpaca-2 or chatml")
    return chosen
