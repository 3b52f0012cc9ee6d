# SPDX-License-Identifier: Apache-2.0
"""cnllama VERB ...: finds the verb's module, runs it, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import functools
import importlib
import os
import select
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from cnllama import start
from cnllama.cli.parser import Parser
from cnllama.errors import CnllamaError, InputError, bounded, from_os_error
from cnllama.start import INTERRUPTED
from cnllama.stdio import configure_stdio, say
from cnllama.textio import tr

VERBS = ("run", "chat", "convert", "info", "verify", "plan", "export", "bench", "tokenizer", "adapt", "eval")
_JUST_NOW = 1.0  # seconds
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (without the program's name) and returns the exit code: 0 done, 1 failed, 2 wrong input."""
    configure_stdio()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_warn, warnings.showwarning)
            code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _failed(tr("interrupted", "已中断"), INTERRUPTED, debug)
    except BrokenPipeError as error:
        gone = _reader_has_gone()
        _abandon_stdout()
        return 0 if gone else _failed(str(error), CnllamaError.exit_code, debug)
    except CnllamaError as error:
        return _failed(str(error), error.exit_code, debug, error.details)
    except MemoryError as error:
        message = tr("out of memory", "内存不足")
        return _failed(f"{message}: {error}" if str(error) else message, 1, debug)
    except OSError as error:
        _abandon_stdout()
        said = from_os_error(error.filename, error) if isinstance(error.filename, str) else None
        return _failed(str(said or error.strerror or error), CnllamaError.exit_code, debug)
    except Exception as error:
        return _failed(*_explained(error), debug)


def _explained(error: Exception) -> tuple[str, int]:
    """The sentence and the exit code for what nobody was expected to raise."""
    if time.monotonic() - start.interrupted_at < _JUST_NOW:
        return tr("interrupted", "已中断"), INTERRUPTED  # in the native part of a library, which makes that of it
    if isinstance(error, ImportError):
        # The native module refuses an instruction set that the machine lacks when it is imported.
        wrong_isa = str(error).startswith("CNLLAMA_ISA")
        return str(error), InputError.exit_code if wrong_isa else CnllamaError.exit_code
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return tr(
            "no further thread can be started: raise the limit of processes (ulimit -u)",
            "无法再启动线程：请提高进程数上限（ulimit -u）",
        ), CnllamaError.exit_code
    hint = tr("this is a bug of cnllama; --debug shows where", "这是 cnllama 的错误；--debug 显示位置")
    return f"{type(error).__name__}: {error} ({hint})", CnllamaError.exit_code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_help()
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"cnllama {version('cnllama')}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        raise InputError(
            tr(f"there is no command {verb!r}: choose one of ", f"没有命令 {verb!r}：可用的有 ") + ", ".join(VERBS)
        )
    module = importlib.import_module(f"cnllama.cli.{verb}")
    parser = Parser(prog=f"cnllama {verb}", description=module.HELP, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help=tr("show the traceback of an error", "出错时显示调用栈"))
    module.add_arguments(parser)
    args = parser.parse_args(arguments[1:])
    args.command_line = ["cnllama", *arguments]
    return int(module.run(args))


def _take_debug(arguments: list[str]) -> bool:
    """Removes --debug, which may stand anywhere before a lone `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    found = "--debug" in arguments[:end]
    arguments[:end] = [argument for argument in arguments[:end] if argument != "--debug"]
    return found


def _print_help() -> None:
    print(tr("usage: cnllama COMMAND [options]", "用法：cnllama 命令 [选项]"), end="\n\n")
    for verb in VERBS:
        print(f"  {verb:<9} {importlib.import_module(f'cnllama.cli.{verb}').HELP}")
    print()
    print(tr("cnllama COMMAND --help shows the options.", "cnllama 命令 --help 显示选项。"))


def _failed(message: str, code: int, debug: bool, details: Iterable[str] = ()) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    try:
        sys.stdout.flush()
    except OSError:
        _abandon_stdout()
    say(bounded(f"cnllama: {message}"), *details)
    return code


def _warn(others: Any, message: Warning | str, category: type[Warning], filename: str, *place: Any) -> None:
    """A warning of ours is one line; those of other packages look as always."""
    if issubclass(category, UserWarning) and filename.startswith(_PACKAGE):
        say(bounded(tr("cnllama: warning: ", "cnllama：警告：") + str(message)))
    else:
        others(message, category, filename, *place)


def _reader_has_gone() -> bool:
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return False


def _abandon_stdout() -> None:
    """Points stdout at nothing: Python would complain, and change the exit code, when it flushes at exit."""
    with suppress(OSError, ValueError):  # it has no descriptor, or is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
