# SPDX-License-Identifier: Apache-2.0
"""cnllama chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cnllama.cli.options import add_model_options, add_sampling_options, describe, open_model, sampling_changes
from cnllama.cli.terminal import Turns
from cnllama.errors import CnllamaError, FileChangedError, InputError
from cnllama.start import INTERRUPTED
from cnllama.stdio import say
from cnllama.textio import tr

if TYPE_CHECKING:
    from cnllama.llm import LLM

HELP = tr("a conversation in the terminal", "在终端里对话")
COMMANDS = ("/help", "/reset", "/exit")
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
        say(describe(llm), tr("/help lists the commands, Ctrl-C stops an answer", "/help 列出命令，Ctrl-C 停止回答"))
        return _Conversation(llm, args.system, changes, args.stats).loop()


class _Conversation:
    def __init__(self, llm: LLM, system: str | None, changes: dict[str, Any], stats: bool) -> None:
        self._llm = llm
        self._changes = changes
        self._stats = stats
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []

    def loop(self) -> int:
        said = Turns()
        interrupts = 0
        while True:
            try:
                turn = said.next()
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts == 2:
                    return INTERRUPTED
                say("", tr("/exit or Ctrl-C once more leaves", "/exit 或再按一次 Ctrl-C 退出"))
                continue
            except InputError as error:  # bytes that are no text
                say(f"cnllama: {error}")
                continue
            interrupts = 0
            if turn is None or self._obey(turn):
                return 0

    def _obey(self, turn: str) -> bool:
        """Answers a turn or follows a command. Returns whether the user leaves."""
        word = turn.strip()
        if not word.startswith("/") or "\n" in word:
            if word:
                self._answer(turn)
        elif word.startswith("//"):
            self._answer(turn.replace("/", "", 1))
        elif word.lower() == "/reset":
            self._turns.clear()
        elif word.lower() == "/help":
            say(*_help())
        elif word.lower() != "/exit":
            known = ", ".join(COMMANDS)
            say(
                tr(
                    f"cnllama: there is no command {word:.40}: use {known}, or // for a text that begins with /",
                    f"cnllama：没有命令 {word:.40}：可用的有 {known}；以 / 开头的文本请写成 //",
                )
            )
        return word.lower() == "/exit"

    def _answer(self, question: str) -> None:
        """One answer. What it fails with is one sentence, and the conversation is what it was before."""
        turns = [*self._turns, {"role": "user", "content": question}]
        stream = None
        try:
            turns = self._that_fit(turns)
            stream = self._llm.stream([*self._opening, *turns], **self._changes)
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except FileChangedError:
            raise  # no answer can come any more
        except (CnllamaError, MemoryError) as error:
            if stream is not None:
                print(flush=True)
            say(f"cnllama: {error or tr('out of memory', '内存不足')}")
            return
        print(flush=True)
        if stream is None:
            return
        if stream.completion.text:
            self._turns = [*turns, {"role": "assistant", "content": stream.completion.text}]
        if self._stats:
            from cnllama.stats import measure, table

            say(*table(measure(self._llm, stream.completion)).split("\n"))

    def _that_fit(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        """The last turns, as many as leave an answer some room."""
        limit = max(1, self._llm.context - min(RESERVE, self._llm.context // 4))
        forgotten = 0
        while len(turns) > 1 and len(self._llm.prompt_ids([*self._opening, *turns])) > limit:
            turns = turns[2:]
            forgotten += 1
        if forgotten and len(self._llm.prompt_ids([*self._opening, *turns])) <= self._llm.context:
            say(
                tr(
                    f"the context is full: forgot the oldest turns ({forgotten})",
                    f"上下文已满：忘记了最早的 {forgotten} 轮",
                )
            )
        return turns


def _help() -> list[str]:
    lines = {
        "/help": tr("shows this", "显示本说明"),
        "/reset": tr("begins anew", "重新开始"),
        "/exit": tr("leaves, as Ctrl-D and a second Ctrl-C at the prompt do", "退出；Ctrl-D 或两次 Ctrl-C 亦可"),
        "//": tr("begins a text with /", "以 / 开头的文本"),
        "\\": tr("at the end of a line: the text goes on in the next", "行末：文本在下一行继续"),
        '"""': tr(
            "begins and ends a text of several lines; a pasted one needs none",
            "多行文本的首尾；粘贴时不需要",
        ),
        "Ctrl-C": tr("stops an answer", "停止回答"),
    }
    return [f"{name:<7} {text}" for name, text in lines.items()]
