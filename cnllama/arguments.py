# SPDX-License-Identifier: Apache-2.0
"""Options that are spelled the same way in every command: lists, the output, the model's file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnllama.textio import tr


class ListAction(argparse.Action):
    """All values of an option, in order: of one occurrence or of several. They take the place of the default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Adds the values of an occurrence."""
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, [*([] if before is self.default or before is None else before), *values])


class CommaAction(argparse.Action):
    """A list with commas in one text; what further occurrences give is added to it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Adds the text of an occurrence."""
        before = getattr(namespace, self.dest, None)
        parts = ["" if before is self.default or before is None else before, values]
        setattr(namespace, self.dest, ",".join(filter(None, parts)))


class _FileArgument(argparse.Action):
    """A positional argument that may be missing, and then leaves alone what an option has set."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if values is not None:
            setattr(namespace, self.dest, values)


def add_list_option(parser: Any, *flags: str, default: Sequence[Any] | None = (), **more: Any) -> None:
    """An option with one or more values: `--x A B`, `--x A --x B` and mixtures mean the same.

    parser: a parser or a group. more: as for add_argument.
    """
    parser.add_argument(*flags, action=ListAction, nargs="+", default=default, **more)


def add_comma_option(parser: Any, *flags: str, **more: Any) -> None:
    """An option whose value is a list with commas: `--x a,b` and `--x a --x b` mean the same."""
    parser.add_argument(*flags, action=CommaAction, **more)


def add_output_option(parser: argparse.ArgumentParser, metavar: str, text: str, required: bool = True) -> None:
    """-o, --output. It was called --out in some commands, which is still understood."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("-o", "--output", type=Path, metavar=metavar, help=text)
    group.add_argument("--out", type=Path, dest="output", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def add_model_file(parser: argparse.ArgumentParser, dest: str, text: str, required: bool = True) -> None:
    """The packed model, by FILE or by -m FILE: either works in every command that takes one."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(dest, nargs="?", action=_FileArgument, type=Path, metavar="FILE", help=text)
    same = tr("the same, by its name", "同上")
    group.add_argument("-m", "--model", type=Path, dest=dest, metavar="FILE", help=same)


def list_hint(parser: argparse.ArgumentParser) -> str:
    """What to add to an error about a missing argument, where an option may have taken it: empty in other parsers."""
    option = next((action.option_strings[-1] for action in parser._actions if isinstance(action, ListAction)), None)
    if option is None or all(action.option_strings for action in parser._actions):
        return ""
    return tr(
        f" ({option} and the like take every value after them: put the others first)",
        f"（{option} 等选项会取走其后的所有值：请把其他参数放在前面）",
    )
