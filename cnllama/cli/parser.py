# SPDX-License-Identifier: Apache-2.0
"""argparse as the commands want it: one sentence for an error, numbers with limits, texts that begin with a dash."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from cnllama.arguments import list_hint
from cnllama.errors import InputError
from cnllama.paths import check_name
from cnllama.textio import decode_argument, tr

_SHOWN = 60  # characters of a wrong value


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors: one sentence, not the usage.

    type=int is an integer of 64 bits, type=float a finite number, type=Path what can be a file's name,
    type=decode_argument a text, which may begin with a dash.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", int, _integer)
        self.register("type", float, _number)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        message += list_hint(self) if "required" in message else ""
        raise InputError(tr(f"{message}: see {self.prog} --help", f"{message}：请看 {self.prog} --help"))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but a text may begin with a dash where it cannot be an option."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(self._with_texts_joined(iter(given))), namespace)

    def _with_texts_joined(self, arguments: Iterator[str]) -> Iterator[str]:
        """`-p -1+1` becomes `--prompt=-1+1`."""
        texts = {
            name: action for action in self._actions if action.type is decode_argument for name in action.option_strings
        }
        for argument in arguments:
            if argument == "--":
                yield argument
                yield from arguments
            elif argument not in texts or (text := next(arguments, None)) is None:
                yield argument
            elif texts[argument].nargs is not None and not text.startswith("-"):
                yield from (argument, text)  # of a list, whose other values follow
            else:
                name = max(texts[argument].option_strings, key=len)
                if self._is_option(text):
                    self.error(
                        tr(
                            f"{argument} needs a text and {text!r:.60} is an option; as the text it is {name}={text}",
                            f"{argument} 需要文本，而 {text!r:.60} 是选项；若确是文本，请写成 {name}={text}",
                        )
                    )
                yield f"{name}={text}"

    def _is_option(self, text: str) -> bool:
        known = self._option_string_actions
        return text == "--" or text.partition("=")[0] in known or (text[:2] in known and text[:2] != "--")


def _path(text: str) -> Path:
    check_name(text)
    if not text:
        raise InputError(
            tr(
                "an empty name was given, expected the path of a file or directory",
                "给出了空文件名，应为文件或目录的路径",
            )
        )
    return Path(text)


def _integer(text: str) -> int:
    try:
        value = int(text) if len(text) <= _SHOWN else None
    except ValueError:
        raise argparse.ArgumentTypeError(tr(f"{text!r} is no integer", f"{text!r} 不是整数")) from None
    if value is None or not -(2**63) <= value < 2**64:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise argparse.ArgumentTypeError(tr(f"{shown!r} is no integer of 64 bits", f"{shown!r} 不是 64 位整数"))
    return value


def _number(text: str) -> float:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(tr(f"{shown!r} is no number", f"{shown!r} 不是数")) from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(tr(f"{shown!r} is no finite number", f"{shown!r} 不是有限的数"))
    if value == 0 and any(digit in "123456789" for digit in text.lower().partition("e")[0]):
        raise argparse.ArgumentTypeError(tr(f"{shown!r} is too small, use 0", f"{shown!r} 太小，请用 0"))
    return value
