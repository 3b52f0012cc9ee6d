# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt sft`: instructions and answers, with the loss on the answers only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnllama.adapt.data import (
    IGNORED,
    ChatDataset,
    Item,
    PadCollator,
    Source,
    chat_template,
    check_sources,
    prepare_chat,
)
from cnllama.adapt.pretrain import Files, make_stage, make_trained, open_cache
from cnllama.adapt.settings import Settings, add_training_arguments, from_arguments, parse_source
from cnllama.adapt.stage import Data, run_stage
from cnllama.adapt.tokenfile import Vocabulary
from cnllama.adapt.trainer import Collator
from cnllama.templates import TEMPLATES

_LEARNING_RATE = 1e-4


class PackedChat:
    """Samples of a ChatDataset laid into blocks of one length, none cut: no padding to speak of, no recompiling.

    An item is {"input_ids", "labels", "position_ids"}: int64 [block_size]. Positions begin at 0 in every sample, by
    which transformers keeps the samples of a block from seeing each other. Every epoch has as many blocks as the first:
    of later ones, the last few samples may be left out or some shown twice.
    """

    def __init__(self, samples: ChatDataset, block_size: int, pad_id: int) -> None:
        self._samples, self._block_size, self._pad_id = samples, block_size, pad_id
        self._blocks = self._pack()
        self._count = len(self._blocks)
        self.epoch = samples.epoch

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch."""
        self._samples.set_epoch(epoch)
        self._blocks = self._pack()
        self.epoch = epoch

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self._count:
            raise IndexError(index)
        ids = np.full(self._block_size, self._pad_id, np.int64)
        labels = np.full(self._block_size, IGNORED, np.int64)
        positions: npt.NDArray[np.int64] = np.zeros(self._block_size, np.int64)
        at = 0
        for sample in self._blocks[index % len(self._blocks)]:
            item = self._samples[sample]
            n = len(item["input_ids"])
            ids[at : at + n] = item["input_ids"]
            labels[at + 1 : at + n] = item["labels"][1:]  # the first id of a sample is not the answer to the one before
            positions[at : at + n] = np.arange(n)
            at += n
        positions[at:] = np.arange(self._block_size - at)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    def _pack(self) -> list[list[int]]:
        """First-fit in order over a few open blocks."""
        blocks: list[list[int]] = []
        opened: list[tuple[int, list[int]]] = []  # (room, samples)
        for sample, length in enumerate(self._samples.lengths()):
            place = next((i for i, (room, _) in enumerate(opened) if room >= length), None)
            if place is None:
                opened.append((self._block_size, []))
                place = len(opened) - 1
            room, members = opened[place]
            members.append(sample)
            opened[place] = (room - length, members)
            if len(opened) > 16:
                fullest = min(range(len(opened)), key=lambda i: opened[i][0])
                blocks.append(opened.pop(fullest)[1])
        return blocks + [members for _, members in opened]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_training_arguments(parser, f"learning rate (default {_LEARNING_RATE:g})", check)
    parser.add_argument("--template", choices=sorted(TEMPLATES), default="alpaca", help="of prompts (default alpaca)")
    parser.add_argument("--pack", action="store_true", help="several samples in each sequence, none cut or mixed")


def check(args: argparse.Namespace) -> Settings:
    """The settings. Raises InputError for options that cannot be, before any file is there."""
    settings = from_arguments(args, _LEARNING_RATE)
    make_trained(args, _mode(args)).check()
    check_sources(*_sources(args), forms=("jsonl", "json"))
    chat_template(args.template)
    return settings


def _mode(args: argparse.Namespace) -> str:
    return "full" if args.full else "lora"


def _sources(args: argparse.Namespace) -> tuple[list[Source], list[Source]]:
    """Training and held-out files."""
    return [parse_source(text) for text in args.data], [Source(Path(name)) for name in args.eval]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns the result. Raises InputError for wrong input."""
    settings = check(args)
    sources, held_out = _sources(args)

    def prepare_data(vocabulary: Vocabulary) -> Data:
        def prepare(files: list[Source], cache: Path, training: bool) -> tuple[Any, ChatDataset]:
            samples = prepare_chat(
                files,
                vocabulary,
                cache,
                template=args.template,
                max_length=settings.block_size,
                seed=settings.seed,
                shuffle=training,
                batch_size=0 if args.pack else settings.batch_size,
                progress=sys.stderr.isatty(),
            )
            return PackedChat(samples, settings.block_size, vocabulary.pad_id) if args.pack else samples, samples

        with open_cache(args) as cache:
            train, samples = prepare(sources, cache, True)
            evaluation = prepare(held_out, cache, False)[0] if held_out else None
        return Data(
            train,
            evaluation,
            Collator() if args.pack else Collator(PadCollator(vocabulary.pad_id)),
            padded=not args.pack,
            report=[line for report in samples.reports for line in report.lines()],
        )

    files_and_form = Files(sources, held_out, prepare_data, {"template": args.template, "pack": args.pack})
    return run_stage(make_stage(args, "sft", _mode(args), settings, files_and_form))
