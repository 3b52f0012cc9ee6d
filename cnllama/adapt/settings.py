# SPDX-License-Identifier: Apache-2.0
"""The options of a training stage: declared once for pretrain and sft, checked, and compared when a run goes on."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cnllama.adapt.data import Source
from cnllama.adapt.schedule import SCHEDULES
from cnllama.arguments import add_list_option, add_output_option
from cnllama.errors import InputError

DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "adamw-8bit")
_MAX_COUNT = 2**31 - 1
_MAX_EPOCHS = 10_000
# What may differ between the run that was stopped and the one that goes on.
_FREE = {"save_every", "keep", "eval_every", "log_every", "compile", "deepspeed", "dtype"}


@dataclass(frozen=True)
class Settings:
    """A training stage without its model and data. Sizes in tokens or sequences, times in optimizer steps.

    batch_size is of one device; a step has batch_size * grad_accum * devices sequences. max_steps overrides epochs.
    warmup is the share of all steps (schedule.py). save_every, eval_every: 0 is only at the end.
    """

    lr: float
    block_size: int = 512
    batch_size: int = 8
    grad_accum: int = 1
    epochs: float = 1.0
    max_steps: int = 0
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    bf16: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    deepspeed: str | None = None
    save_every: int = 500
    eval_every: int = 500
    log_every: int = 10
    keep: int = 2

    def check(self) -> None:
        """Raises InputError for values that cannot be."""
        for name, low in (("block_size", 2), ("batch_size", 1), ("grad_accum", 1), ("log_every", 1), ("keep", 1)):
            if getattr(self, name) < low:
                raise InputError(f"{_option(name)} is {getattr(self, name)}, expected at least {low}")
        for name in ("max_steps", "save_every", "eval_every", "seed", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{_option(name)} is {getattr(self, name)}, expected 0 or more")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value > _MAX_COUNT:
                raise InputError(f"{_option(field.name)} is {value:.3g}, expected at most {_MAX_COUNT}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"--lr is {self.lr:g}, expected a number over 0")
        if not 0 < self.epochs <= _MAX_EPOCHS:
            raise InputError(
                f"--epochs is {self.epochs:g}, expected a number over 0 and at most {_MAX_EPOCHS}; --max-steps counts "
                "steps instead"
            )
        for name in ("warmup", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{_option(name)} is {getattr(self, name):g}, expected 0 to less than 1")
        if self.optimizer == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise InputError(
                "--optimizer adamw-8bit needs bitsandbytes, which is not installed; run pip install bitsandbytes, "
                "or use --optimizer adamw"
            )
        if self.deepspeed and importlib.util.find_spec("deepspeed") is None:
            raise InputError("--deepspeed needs deepspeed, which is not installed; run pip install deepspeed")

    def identity(self) -> dict[str, object]:
        """The values that a resumed run must share; the dtype as it turned out, and files, are added by the stage."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _FREE}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_training_arguments(parser: argparse.ArgumentParser, lr_help: str, check: Callable[..., object]) -> None:
    """Declares the options that every training stage has. check: looks at the parsed ones, before any file is there."""
    defaults = Settings(lr=1.0)
    add = parser.add_argument
    parser.set_defaults(check_options=check)
    add("model", metavar="MODEL", type=Path, help="directory of a Hugging Face LLaMA, resized if its tokenizer grew")
    add_output_option(parser, "DIR", "where checkpoints, log and result go")
    add_list_option(
        parser, "--data", metavar="FILE[:N]", required=True, help="training files; N times each epoch (default 1)"
    )
    add_list_option(parser, "--eval", metavar="FILE", help="held-out files")
    add_list_option(parser, "--adapter", metavar="DIR", type=Path, help="earlier adapters, merged first, in order")
    add("--full", action="store_true", help="train every parameter; the result is a whole checkpoint")
    add("--rank", type=int, default=8, help="rank of LoRA (default 8)")
    add("--alpha", type=float, default=32.0, help="alpha of LoRA (default 32)")
    add("--dropout", type=float, default=0.05, help="dropout of LoRA (default 0.05)")
    add_list_option(parser, "--targets", metavar="NAME", help="matrices that get LoRA (default: all seven)")
    add("--train-new-rows-only", metavar="OLD", type=int, help="leave the first OLD rows of the embeddings as they are")
    add("--lr", type=float, help=lr_help)
    for name, kind, text in (
        ("block_size", int, "tokens of a sequence"),
        ("batch_size", int, "sequences on a device at a time"),
        ("grad_accum", int, "batches to a step"),
        ("epochs", float, "passes over the data"),
        ("max_steps", int, "stop after so many steps, 0: after the epochs"),
        ("warmup", float, "share of the steps in which the learning rate rises"),
        ("weight_decay", float, "AdamW's"),
        ("beta2", float, "AdamW's"),
        ("max_grad_norm", float, "gradients are clipped to this norm, 0: never"),
        ("seed", int, "of the order of the data, dropout and new weights"),
        ("save_every", int, "steps between checkpoints, 0: only the end"),
        ("eval_every", int, "steps between held-out evaluations, 0: only the end"),
        ("log_every", int, "steps between lines of the log"),
        ("keep", int, "checkpoints to keep"),
    ):
        default = getattr(defaults, name)
        add(_option(name), type=kind, default=default, metavar="N", help=f"{text} (default {default:g})")
    add("--schedule", choices=SCHEDULES, default=defaults.schedule, help="of the learning rate (default cosine)")
    add("--optimizer", choices=OPTIMIZERS, default=defaults.optimizer, help="8-bit needs bitsandbytes")
    add("--dtype", choices=DTYPES, default="auto", help="of weights that do not train; auto: bfloat16 on a GPU")
    add("--bf16", action="store_true", help="matrix products in bfloat16 (autocast)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--gradient-checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    add("--deepspeed", metavar="FILE", help="DeepSpeed configuration; others come through accelerate launch")
    add("--cache", metavar="DIR", type=Path, help="where tokenized files lie (default: DIR/../tokens)")
    add("--restart", action="store_true", help="discard what an earlier run left in DIR")


def from_arguments(args: argparse.Namespace, lr: float) -> Settings:
    """The checked settings of a parsed command line. lr: the learning rate where none is given."""
    names = {field.name for field in dataclasses.fields(Settings)} - {"lr"}
    settings = Settings(lr=lr if args.lr is None else args.lr, **{name: getattr(args, name) for name in names})
    settings.check()
    return settings


def parse_source(text: str) -> Source:
    """`FILE` or `FILE:N`, N the passes over the file in an epoch."""
    name, colon, number = text.rpartition(":")
    try:
        return Source(Path(name), float(number)) if colon and name else Source(Path(text))
    except ValueError:
        return Source(Path(text))
