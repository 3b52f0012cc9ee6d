# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt pretrain`: running text. Stage 1 trains the embeddings, stage 2 adds LoRA, --full trains all."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnllama.adapt.batches import Collator
from cnllama.adapt.data import Source, check_sources, prepare_text
from cnllama.adapt.lora import TARGETS, Trained
from cnllama.adapt.reading import POEM_TEMPLATE, template_fields, unescaped
from cnllama.adapt.settings import Settings, add_training_arguments, from_arguments, parse_source
from cnllama.adapt.stage import Data, Stage, run_stage
from cnllama.adapt.tokenfile import Vocabulary
from cnllama.errors import InputError
from cnllama.ownership import OwnedDirectory
from cnllama.paths import real_path
from cnllama.textio import decode_argument

_LEARNING_RATE = {1: 2e-4, 2: 1e-4}  # the paper's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_training_arguments(parser, "learning rate (default 2e-4 in stage 1, 1e-4 in stage 2)", check)
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), default=2, help="1: embeddings only; 2: LoRA too (default 2)"
    )
    parser.add_argument(
        "--document",
        type=decode_argument,
        metavar="TEXT",
        default=POEM_TEMPLATE,
        help="how a JSON record without text becomes a document",
    )


def check(args: argparse.Namespace) -> Settings:
    """The settings. Raises InputError for options that cannot be, before any file is there."""
    settings = from_arguments(args, _LEARNING_RATE[args.stage])
    make_trained(args, _mode(args)).check()
    check_sources(*_sources(args))
    template_fields(unescaped(args.document))
    return settings


def _mode(args: argparse.Namespace) -> str:
    return "full" if args.full else "embeddings" if args.stage == 1 else "lora"


def _sources(args: argparse.Namespace) -> tuple[list[Source], list[Source]]:
    """Training and held-out files."""
    document = unescaped(args.document)
    training = [Source(s.path, s.repeat, document) for s in map(parse_source, args.data)]
    return training, [Source(Path(name), 1.0, document) for name in args.eval]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns the result. Raises InputError for wrong input."""
    settings = check(args)
    sources, held_out = _sources(args)

    def prepare_data(vocabulary: Vocabulary) -> Data:
        size, bar = settings.block_size, sys.stderr.isatty()
        evaluation = None
        with open_cache(args) as cache:
            train = prepare_text(sources, vocabulary, cache, block_size=size, seed=settings.seed, progress=bar)
            if held_out:
                evaluation = prepare_text(held_out, vocabulary, cache, block_size=size, shuffle=False, progress=bar)
        reports = [*train.reports, *(evaluation.reports if evaluation is not None else [])]
        return Data(train, evaluation, Collator(), report=[line for report in reports for line in report.lines()])

    label = f"pretrain, stage {args.stage}" if not args.full else "pretrain, full"
    files = Files(sources, held_out, prepare_data, {"document": unescaped(args.document)})
    return run_stage(make_stage(args, label, _mode(args), settings, files))


@dataclass(frozen=True)
class Files:
    """What a verb makes of its data options: see Stage."""

    data: list[Source]
    held_out: list[Source]
    prepare: Callable[[Vocabulary], Data]
    options: dict[str, Any]


def make_stage(args: argparse.Namespace, label: str, mode: str, settings: Settings, files: Files) -> Stage:
    """The stage that a parsed command line describes."""
    return Stage(
        label=label,
        model=args.model,
        adapters=list(args.adapter),
        out=args.output,
        trained=make_trained(args, mode),
        settings=settings,
        data=files.data,
        held_out=files.held_out,
        prepare_data=files.prepare,
        data_options=files.options,
        restart=args.restart,
    )


def make_trained(args: argparse.Namespace, mode: str) -> Trained:
    """What is to be trained."""
    return Trained(
        mode=mode,
        rank=args.rank,
        alpha=args.alpha,
        dropout=args.dropout,
        targets=tuple(args.targets or TARGETS),
        old_rows=args.train_new_rows_only,
    )


@contextlib.contextmanager
def open_cache(args: argparse.Namespace) -> Iterator[Path]:
    """The directory of the tokenized files, while no other process of this machine makes any."""
    cache = Path(args.cache) if args.cache else Path(args.output).parent / "tokens"
    if real_path(cache) == real_path(args.output):
        raise InputError(f"{cache}: tokenized files and the result cannot share a directory; choose another --cache")
    with OwnedDirectory(cache, "tokenized data", wait=True):
        yield cache
