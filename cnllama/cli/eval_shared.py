# SPDX-License-Identifier: Apache-2.0
"""What the verbs of `cnllama eval` share: options, texts, opening a model, files of results."""

from __future__ import annotations

import argparse
import json
import shlex
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnllama import stdio
from cnllama.errors import InputError
from cnllama.files import Output
from cnllama.paths import real_path
from cnllama.textio import tr

if TYPE_CHECKING:
    from cnllama.eval.text_scores import Opener
    from cnllama.eval.texts import Text
    from cnllama.llm import LLM


MAX_THREADS = 1024


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--ctx, --kv, --threads, --json."""
    parser.add_argument("--ctx", type=int, metavar="N", help=tr("tokens of the context", "上下文长度"))
    parser.add_argument("--kv", default="fp16", metavar="TYPE", help=tr("fp16 or int8 cache", "缓存类型：fp16 或 int8"))
    parser.add_argument("--threads", type=int, default=0, metavar="N", help=tr("0: physical cores", "0：物理核数"))
    parser.add_argument("--json", type=Path, metavar="OUT", help=tr("write the result to a file", "把结果写入文件"))


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """--stride, --documents, --chars."""
    parser.add_argument("--stride", type=int, metavar="N", help=tr("tokens a window predicts (ctx / 2)", "窗口步长"))
    parser.add_argument(
        "--documents",
        action="store_true",
        help=tr("blank lines part documents, which are scored apart", "空行分隔的文档分别评测"),
    )
    parser.add_argument("--chars", type=int, metavar="N", help=tr("only the first N characters", "只用前 N 个字符"))


def read(path: Path, args: argparse.Namespace) -> Text:
    """The text as the options of add_text_options want it. Raises InputError."""
    from cnllama.eval.texts import read_text

    if args.chars is not None and args.chars < 1:
        raise InputError(f"--chars is {args.chars}, expected 1 or more")
    text, problems = read_text(path, args.documents, args.chars)
    for problem in problems:
        say(problem)
    return text


def check_threads(args: argparse.Namespace) -> None:
    """Raises InputError for --threads that no machine has."""
    if not 0 <= args.threads <= MAX_THREADS:
        raise InputError(f"--threads is {args.threads}, expected 0 to {MAX_THREADS}")


def opener(args: argparse.Namespace) -> Opener:
    """What opens a packed file with --threads and --kv; warnings go to stderr. Raises InputError as check_threads."""
    check_threads(args)

    def open_llm(path: Path, context: int, sequences: int) -> LLM:
        from cnllama.llm import LLM

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            llm = LLM(path, ctx=context, threads=args.threads, kv_type=args.kv, max_sequences=sequences)
        for warning in caught:
            say(str(warning.message))
        return llm

    return open_llm


def command(args: argparse.Namespace) -> dict[str, Any]:
    """The command line and the version, for JSON."""
    from importlib.metadata import version

    return {"command": shlex.join(args.command_line), "cnllama": version("cnllama")}


def say(sentence: str) -> None:
    """A line on stderr."""
    stdio.say(tr("cnllama: ", "cnllama：") + sentence)


class Files:
    """Results to write: opened before the work, so that a place that cannot be written is found out at once."""

    def __init__(self, *paths: Path | None) -> None:
        self._stack = ExitStack()
        self._outputs: dict[Path, Output] = {}
        given = [path for path in paths if path is not None]
        if len({real_path(path) for path in given}) < len(given):
            raise InputError(f"{given[0]}: two results are to go into one file: give them different names")
        with self._stack:
            for path in given:
                self._outputs[path] = self._stack.enter_context(Output(path))
            self._stack = self._stack.pop_all()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, path: Path | None, content: str | bytes) -> None:
        """A whole result; nothing for None."""
        if path is not None:
            data = content.encode("utf-8", "replace") if isinstance(content, str) else content
            self._outputs[path].write(data, 0)
            self._outputs[path].commit()

    def write_json(self, path: Path | None, value: object) -> None:
        """A result as JSON."""
        self.write(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
