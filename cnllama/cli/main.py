# SPDX-License-Identifier: Apache-2.0
"""cnllama VERB ...: finds the verb's module, runs it, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cnllama.arguments import list_hint
from cnllama.errors import CnllamaError, InputError
from cnllama.textio import configure_stdio, decode_argument, tr

VERBS = ("run", "chat", "convert", "info", "verify", "plan", "export", "bench", "tokenizer", "adapt", "eval")
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse whose errors are InputErrors: one sentence, not the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        message += list_hint(self) if "required" in message else ""
        raise InputError(tr(f"{message}: see {self.prog} --help", f"{message}：请看 {self.prog} --help"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (without the program's name) and returns the exit code: 0 done, 1 failed, 2 wrong input."""
    configure_stdio()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(arguments)
    try:
        code = _dispatch([decode_argument(argument) for argument in arguments])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _failed(tr("interrupted", "已中断"), INTERRUPTED, debug)
    except BrokenPipeError:
        _abandon_stdout()  # whoever read us has gone
        return 0
    except CnllamaError as error:
        return _failed(str(error), error.exit_code, debug)
    except MemoryError as error:
        message = tr("out of memory", "内存不足")
        return _failed(f"{message}: {error}" if str(error) else message, 1, debug)
    except OSError as error:
        _abandon_stdout()
        return _failed(str(error), CnllamaError.exit_code, debug)
    except ImportError as error:
        # The native module refuses an instruction set that the machine lacks when it is imported.
        wrong_isa = str(error).startswith("CNLLAMA_ISA")
        return _failed(str(error), InputError.exit_code if wrong_isa else CnllamaError.exit_code, debug)
    except Exception as error:
        hint = tr("this is a bug of cnllama; --debug shows where", "这是 cnllama 的错误；--debug 显示位置")
        return _failed(f"{type(error).__name__}: {error} ({hint})", 1, debug)


def run_main() -> int:
    """`cnllama-run ...` is `cnllama run ...`."""
    return main(["run", *sys.argv[1:]])


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


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    try:
        sys.stdout.flush()
    except OSError:
        _abandon_stdout()
    print(f"cnllama: {message}", file=sys.stderr)
    return code


def _abandon_stdout() -> None:
    """Points stdout at nothing: Python would complain, and change the exit code, when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    raise SystemExit(main())
