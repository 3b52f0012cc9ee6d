# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt`: the paper's training road, one verb for each of its parts."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from cnllama.errors import InputError

HELP = "turn a LLaMA into a Chinese model: resize, pretrain, sft, merge; run replays a recipe"

# verb -> (module of cnllama.adapt, its functions for arguments and work, help)
VERBS = {
    "create": ("create", "add_arguments", "run", "make a new LLaMA with random weights"),
    "resize": ("resize", "add_resize_arguments", "run_resize", "grow the embeddings to a merged tokenizer"),
    "pretrain": ("pretrain", "add_arguments", "run", "train on running text"),
    "sft": ("sft", "add_arguments", "run", "train on instructions and answers"),
    "merge": ("merge", "add_arguments", "run", "put adapters into a Hugging Face checkpoint"),
    "run": ("recipe", "add_arguments", "run", "replay a recipe, or go on with it"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verbs."""
    verbs = parser.add_subparsers(metavar="VERB", dest="verb", required=True, parser_class=_lazy(type(parser)))
    for name, (_, _, _, text) in VERBS.items():
        verbs.add_parser(name, help=text, description=text, allow_abbrev=False).set_defaults(verb=name)


def _lazy(base: type[argparse.ArgumentParser]) -> type[argparse.ArgumentParser]:
    """A parser that declares its verb's options when it is used: these modules need torch, which takes seconds."""

    class Verb(base):  # type: ignore[misc,valid-type]
        declared = False

        def declare(self) -> None:
            if not self.declared:
                self.declared = True
                module, declare, _, _ = VERBS[self.get_default("verb")]
                getattr(load(module), declare)(self)

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            self.declare()
            return super().parse_known_args(args, namespace)

    return Verb


def run(args: argparse.Namespace) -> int:
    """Runs the verb. Returns the exit code."""
    module, _, work, _ = VERBS[args.verb]
    result = getattr(load(module), work)(args)
    return result if isinstance(result, int) else 0


def load(module: str) -> object:
    """A module of cnllama.adapt. Raises InputError when what it needs is not installed."""
    try:
        return importlib.import_module(f"cnllama.adapt.{module}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("cnllama"):
            raise
        raise InputError(
            f"cnllama adapt needs {error.name}, which is not installed; run: pip install 'cnllama[adapt]'"
        ) from None
