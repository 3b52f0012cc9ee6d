# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt pretrain`: running text. Stage 1 trains the embeddings, stage 2 adds LoRA, --full trains all."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cnllama.adapt.data import Source, prepare_text
from cnllama.adapt.lora import TARGETS, Trained
from cnllama.adapt.reading import POEM_TEMPLATE
from cnllama.adapt.settings import add_training_arguments, from_arguments, parse_source
from cnllama.adapt.tokenfile import Vocabulary
from cnllama.adapt.train import Data, Stage, run_stage
from cnllama.adapt.trainer import Collator
from cnllama.errors import from_os_error
from cnllama.textio import decode_argument

_LEARNING_RATE = {1: 2e-4, 2: 1e-4}  # the paper's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_training_arguments(parser, 0.0, "learning rate (default 2e-4 in stage 1, 1e-4 in stage 2)")
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains; returns the result. Raises InputError for wrong input."""
    settings = from_arguments(args, args.lr or _LEARNING_RATE[args.stage])
    document = args.document.encode().decode("unicode_escape") if "\\" in args.document else args.document
    sources = [Source(s.path, s.repeat, document) for s in map(parse_source, args.data)]
    held_out = [Source(Path(name), 1.0, document) for name in args.eval]

    def prepare_data(vocabulary: Vocabulary) -> Data:
        size, bar = settings.block_size, sys.stderr.isatty()
        evaluation = None
        with open_cache(args) as cache:
            train = prepare_text(sources, vocabulary, cache, block_size=size, seed=settings.seed, progress=bar)
            if held_out:
                evaluation = prepare_text(held_out, vocabulary, cache, block_size=size, shuffle=False, progress=bar)
        return Data(
            train,
            evaluation,
            Collator(),
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


@contextlib.contextmanager
def open_cache(args: argparse.Namespace) -> Iterator[Path]:
    """The directory of the tokenized files, while no other process of this machine makes any."""
    cache = Path(args.cache) if args.cache else Path(args.out).parent / "tokens"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield cache
    except OSError as error:
        raise from_os_error(cache, error) from None
