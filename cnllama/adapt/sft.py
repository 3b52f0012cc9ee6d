# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt sft`: instructions and answers, with the loss on the answers only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cnllama.adapt.batches import Collator, PadCollator
from cnllama.adapt.data import Source, chat_template, check_sources, prepare_chat
from cnllama.adapt.datasets import ChatDataset, PackedChat
from cnllama.adapt.pretrain import Files, make_stage, make_trained, open_cache
from cnllama.adapt.settings import Settings, add_training_arguments, from_arguments, parse_source
from cnllama.adapt.stage import Data, divided, run_stage
from cnllama.adapt.tokenfile import FileReport, Vocabulary
from cnllama.templates import TEMPLATES

_LEARNING_RATE = 1e-4


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
        reports: list[FileReport] = []

        def prepare(files: list[Source], cache: Path, training: bool) -> ChatDataset | PackedChat:
            samples = prepare_chat(
                files,
                vocabulary,
                cache,
                template=args.template,
                max_length=settings.block_size,
                seed=settings.seed,
                shuffle=training,
                step_items=0 if args.pack else divided(settings).items,
                progress=sys.stderr.isatty(),
            )
            reports.extend(samples.reports)
            return PackedChat(samples, settings.block_size, vocabulary.pad_id) if args.pack else samples

        with open_cache(args) as cache:
            train = prepare(sources, cache, True)
            evaluation = prepare(held_out, cache, False) if held_out else None
        collator = Collator() if args.pack else Collator(PadCollator(vocabulary.pad_id))
        return Data(train, evaluation, collator, report=[line for report in reports for line in report.lines()])

    files_and_form = Files(sources, held_out, prepare_data, {"template": args.template, "pack": args.pack})
    return run_stage(make_stage(args, "sft", _mode(args), settings, files_and_form))
