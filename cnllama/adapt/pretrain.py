# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt pretrain`: running text. Stage 1 trains the embeddings, stage 2 adds LoRA, --full trains all."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cnllama.adapt.data import Source, prepare_text
from cnllama.adapt.lora import TARGETS, Trained
from cnllama.adapt.reading import POEM_TEMPLATE
from cnllama.adapt.settings import add_training_arguments, from_arguments, parse_source
from cnllama.adapt.tokenfile import Vocabulary
from cnllama.adapt.train import Data, Stage, run_stage
from cnllama.adapt.trainer import Collator

_LEARNING_RATE = {1: 2e-4, 2: 1e-4}  # the paper's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_training_arguments(parser, 0.0, "learning rate (default 2e-4 in stage 1, 1e-4 in stage 2)")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), default=2, help="1: embeddings only; 2: LoRA too (default 2)"
    )
    parser.add_argument(
        "--document", metavar="TEXT", default=POEM_TEMPLATE, help="how a JSON record without text becomes a document"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns the result. Raises InputError for wrong input."""
    settings = from_arguments(args, args.lr or _LEARNING_RATE[args.stage])
    document = args.document.encode().decode("unicode_escape") if "\\" in args.document else args.document
    sources = [Source(s.path, s.repeat, document) for s in map(parse_source, args.data)]
    held_out = [Source(Path(name), 1.0, document) for name in args.eval]

    def prepare_data(vocabulary: Vocabulary) -> Data:
        cache, bar = cache_directory(args), sys.stderr.isatty()
        train = prepare_text(
            sources, vocabulary, cache, block_size=settings.block_size, seed=settings.seed, progress=bar
        )
        evaluation = (
            prepare_text(held_out, vocabulary, cache, block_size=settings.block_size, shuffle=False, progress=bar)
            if held_out
            else None
        )
        return Data(
            train,
            evaluation,
            Collator(),
            settings.block_size,
            padded=False,
            identity={"files": [[r.entries, r.tokens, s.repeat] for r, s in zip(train.reports, sources, strict=True)]},
            report=[line for report in train.reports for line in report.lines()],
        )

    mode = "full" if args.full else "embeddings" if args.stage == 1 else "lora"
    label = f"pretrain, stage {args.stage}" if not args.full else "pretrain, full"
    return run_stage(make_stage(args, label, mode, settings, prepare_data))


def make_stage(args: argparse.Namespace, label: str, mode: str, settings: Any, prepare_data: Any) -> Stage:
    """The stage that a parsed command line describes."""
    trained = Trained(
        mode=mode,
        rank=args.rank,
        alpha=args.alpha,
        dropout=args.dropout,
        targets=tuple(args.targets or TARGETS),
        old_rows=args.train_new_rows_only,
    )
    return Stage(label, args.model, args.adapter, args.out, trained, settings, prepare_data, args.restart)


def cache_directory(args: argparse.Namespace) -> Path:
    """Where the tokenized files of a stage lie."""
    return Path(args.cache) if args.cache else Path(args.out).parent / "tokens"
