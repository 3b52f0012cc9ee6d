# SPDX-License-Identifier: Apache-2.0
"""cnllama chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from cnllama.cli.options import add_model_options, add_sampling_options, describe, open_model, sampling_changes
from cnllama.textio import decode_text, tr

if TYPE_CHECKING:
    from cnllama.llm import LLM

HELP = tr("a conversation in the terminal", "在终端里对话")
INTERRUPTED = 130
RESERVE = 256  # positions that an answer should find free


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cnllama chat`."""
    add_model_options(parser)
    add_sampling_options(parser)
    parser.add_argument(
        "--stats", action="store_true", help=tr("speed of every answer, on stderr", "在标准错误输出每次回答的速度")
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 130 when Ctrl-C was pressed twice at the prompt."""
    with open_model(args) as llm:
        changes = sampling_changes(args)
        llm.defaults.with_changes(**changes)  # a wrong option ends the program here, not the first answer
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() then edits lines, wide characters included)
        print(describe(llm), file=sys.stderr)
        print(
            tr(
                "/reset begins anew, /exit leaves, Ctrl-C stops an answer",
                "/reset 重新开始，/exit 退出，Ctrl-C 停止回答",
            ),
            file=sys.stderr,
            flush=True,
        )
        return _Conversation(llm, args.system, changes, args.stats).loop()


class _Conversation:
    def __init__(self, llm: LLM, system: str | None, changes: dict[str, Any], stats: bool) -> None:
        self._llm = llm
        self._changes = changes
        self._stats = stats
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []

    def loop(self) -> int:
        interrupts = 0
        while True:
            try:
                line = _read_line()
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts == 2:
                    return INTERRUPTED
                print(tr("\n/exit or Ctrl-C once more leaves", "\n/exit 或再按一次 Ctrl-C 退出"), file=sys.stderr)
                continue
            interrupts = 0
            if line is None or line.strip() == "/exit":
                return 0
            if line.strip() == "/reset":
                self._turns.clear()
            elif line.strip():
                self._answer(line)

    def _answer(self, question: str) -> None:
        self._turns.append({"role": "user", "content": question})
        self._forget_until_it_fits()
        stream = None
        try:
            stream = self._llm.stream([*self._opening, *self._turns], **self._changes)
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print(flush=True)
        text = stream.completion.text if stream is not None else ""
        if text:
            self._turns.append({"role": "assistant", "content": text})
        else:
            self._turns.pop()
        if self._stats and stream is not None:
            from cnllama.stats import measure, table

            print(table(measure(self._llm, stream.completion)), file=sys.stderr)

    def _forget_until_it_fits(self) -> None:
        limit = max(1, self._llm.context - min(RESERVE, self._llm.context // 4))
        forgotten = 0
        while len(self._turns) > 1 and len(self._llm.prompt_ids([*self._opening, *self._turns])) > limit:
            del self._turns[:2]
            forgotten += 1
        if forgotten:
            print(
                tr(
                    f"the context is full: forgot the oldest turns ({forgotten})",
                    f"上下文已满：忘记了最早的 {forgotten} 轮",
                ),
                file=sys.stderr,
            )


def _read_line() -> str | None:
    """The next line the user typed or piped in; None at the end."""
    if sys.stdin.isatty():
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    line = sys.stdin.buffer.readline()
    return decode_text(line, tr("standard input", "标准输入")).rstrip("\n") if line else None
