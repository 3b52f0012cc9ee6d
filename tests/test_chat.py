# SPDX-License-Identifier: Apache-2.0
"""A conversation survives every turn, and typed Chinese arrives under every locale."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import heeds_interrupts, start, wait

from cnllama import LLM, SamplingParams
from cnllama.llm import bundled_model

DEMO = bundled_model()  # its answers are text
OPTIONS = ("-n", 8, "--temp", 0, "--ctx", 512, "--threads", 1)
SECONDS = 60


@pytest.fixture(scope="module")
def answers() -> Callable[..., list[str]]:
    """The answers to turns, each with the ones before it."""
    llm = LLM(DEMO, ctx=512, threads=1)

    def of(*turns: str) -> list[str]:
        history: list[dict[str, str]] = []
        found = []
        for turn in turns:
            history.append({"role": "user", "content": turn})
            found.append(llm.chat(history, SamplingParams(max_tokens=8)).text)
            history.append({"role": "assistant", "content": found[-1]})
        return found

    return of


def piped(*turns: bytes | str) -> tuple[str, list[str]]:
    """(stdout, lines of stderr without the two of the start)."""
    process = start("chat", *OPTIONS)
    data = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in turns)
    out, err = wait(process, data)
    assert process.returncode == 0, err
    return out.decode(), err.decode().splitlines()[2:]


def lines(texts: list[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("春天来了。" * 300, "tokens and the context holds 512"),
        (b"\xff\xff", "neither valid UTF-8"),
        ("春天".encode()[:-1], "it was cut off"),
        (b"a\0b", "NUL at byte 1"),
        ("春天來了，萬物".encode("big5"), "iconv -f BIG5"),
        ("/nothing", "there is no command /nothing: use /help, /reset, /exit, or // for a text that begins with /"),
        ("/usr/bin", "there is no command /usr/bin"),
        ("/reset now", "there is no command /reset now"),
    ],
)
def test_a_bad_turn_is_one_sentence_and_no_turn(
    bad: bytes | str, words: str, answers: Callable[..., list[str]]
) -> None:
    out, err = piped("从前", bad, "后来")
    assert out == lines(answers("从前", "后来"))
    assert len(err) == 1
    assert words in err[0]


def test_a_turn_that_is_too_long_makes_it_forget_nothing(answers: Callable[..., list[str]]) -> None:
    turns = ["从前有一个农夫", "他每天都去田里", "后来呢"]
    out, err = piped(turns[0], turns[1], "很久" * 600, turns[2])
    assert out == lines(answers(*turns))
    assert len(err) == 1


def test_commands(answers: Callable[..., list[str]]) -> None:
    out, err = piped("从前", "/RESET", "从前", " /help ", "//usr/bin", "///", "", "/Exit", "never read")
    first = answers("从前", "/usr/bin", "//")
    assert out == lines([first[0], *first])
    assert [line.split()[0] for line in err] == ["/help", "/reset", "/exit", "//", "\\", '"""', "Ctrl-C"]


def test_lines_of_a_pipe_are_turns_as_they_are(answers: Callable[..., list[str]]) -> None:
    turns = ["一\\", '"""', "二", '"""']
    assert piped(*turns)[0] == lines(answers(*turns))
    assert piped("一\r", "二".encode("gbk") + "天地人".encode("gbk"))[0] == lines(answers("一", "二天地人"))


# ---- on a terminal


class Session:
    """A chat on a terminal: keys go in when it waits for them."""

    def __init__(self, *options: object, size: tuple[int, int] = (24, 80), **environment: str) -> None:
        self._parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON", "TERM"))}
        self.process = start(
            *("chat", *(options or OPTIONS)),
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=lambda: (heeds_interrupts(), fcntl.ioctl(child, termios.TIOCSCTTY, 0)),
            env=clean | {"TERM": "xterm"} | environment,
        )
        os.close(child)
        self.output = b""
        self._prompt = b"> " if environment.get("TERM") == "dumb" else b"\x1b[?2004h> "
        self._prompts = 0

    def type(self, keys: bytes | str, encoding: str = "utf-8", waits: bool = True, enough: int = 1 << 30) -> bytes:
        """Types when the prompt is there, and returns what is shown up to the next one, or so much of it."""
        if waits:
            self._read_until(lambda: self.output.count(self._prompt) > self._prompts)
            self._prompts = self.output.count(self._prompt)
        begin = len(self.output)
        os.write(self._parent, keys if isinstance(keys, bytes) else keys.encode(encoding))
        self._read_until(lambda: self.output.count(self._prompt) > self._prompts or len(self.output) - begin > enough)
        return self.output[begin:]

    def end(self) -> int:
        self._read_until(lambda: False)
        os.close(self._parent)
        return self.process.wait(SECONDS)

    def _read_until(self, enough: Callable[[], bool]) -> None:
        limit = time.monotonic() + SECONDS
        while not enough():
            assert time.monotonic() < limit, self.output
            if select.select([self._parent], [], [], 1)[0]:
                try:
                    chunk = os.read(self._parent, 65536)
                except OSError:  # Linux says so when the other side has closed
                    return
                if not chunk:
                    return
                self.output += chunk


LOCALES: list[dict[str, str]] = [
    {"LC_ALL": "C.UTF-8"},
    {"LC_ALL": "C"},
    {"LC_ALL": "POSIX"},
    {"LC_ALL": "zh_CN.UTF-8"},
    {"LANG": "C"},
    {"LC_ALL": "xx_YY.UTF-8"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]


@pytest.mark.parametrize("environment", LOCALES, ids=lambda e: " ".join(f"{k}={v}" for k, v in e.items()))
def test_typed_chinese_under_every_locale(environment: dict[str, str], answers: Callable[..., list[str]]) -> None:
    session = Session(**environment)
    for keys, answer in zip(["从前\n", "后来呢\x7f\n"], answers("从前", "后来"), strict=True):
        assert answer.encode() in session.type(keys)
    session.type("/exit\n")
    assert session.end() == 0


def test_a_terminal_that_cannot_move(answers: Callable[..., list[str]]) -> None:
    session = Session(TERM="dumb")
    assert answers("从前")[0].encode() in session.type("从前\n")
    session.type("/exit\n")
    assert session.end() == 0


@pytest.mark.parametrize(
    "environment", [{"LANG": "zh_CN.GBK"}, {"LC_ALL": "zh_CN.gb2312"}, {"LC_CTYPE": "zh_CN.GB18030"}]
)
def test_a_gbk_terminal(environment: dict[str, str], answers: Callable[..., list[str]]) -> None:
    session = Session(**environment)
    for keys, answer in zip(
        ["从前\n", "校园\x7f\n", "\x1b[200~一\r二\x1b[201~\n"], answers("从前", "校", "一\n二"), strict=True
    ):
        assert answer.encode("gb18030") in session.type(keys, encoding="gbk").replace(b"\r\n", b"\n")
    session.type("/exit\n")
    assert session.end() == 0


def test_turns_of_several_lines(answers: Callable[..., list[str]]) -> None:
    expected = answers("第一行\n第二行", "一\n二\n三", "一\n二", "x", "/x\n/exit")
    session = Session()
    assert expected[0].encode() in session.type("\x1b[200~第一行\n第二行\x1b[201~\n")
    assert expected[1].encode() in session.type("一\\\n二\\\n三\n")
    assert expected[2].encode() in session.type('"""\n一\n二\n"""\n')
    assert expected[3].encode() in session.type('"""x"""\n')
    assert expected[4].encode() in session.type("\x1b[200~/x\r/exit\x1b[201~\n")
    session.type("/exit\n")
    assert session.end() == 0


@pytest.mark.parametrize("size", [(0, 0), (2, 5), (1, 1)])
def test_odd_windows(size: tuple[int, int], answers: Callable[..., list[str]]) -> None:
    session = Session(size=size)
    assert answers("从前有一个农夫")[0].encode() in session.type("从前有一个农夫们\x7f\n")
    session.type("/exit\n")
    assert session.end() == 0


@pytest.mark.parametrize("bad", [b"\xe6\x98", b"\xff", b"\x00\xfe", "春天来了。".encode() * 300])
def test_bad_turns_on_a_terminal(bad: bytes, answers: Callable[..., list[str]]) -> None:
    expected = answers("从前", "后来")
    session = Session()
    assert expected[0].encode() in session.type("从前\n")
    shown = session.type(bad[:4000] + b"\n")
    assert shown.count(b"cnllama: ") == 1
    assert expected[1].encode() in session.type("后来\n")
    session.type("/exit\n")
    assert session.end() == 0


@pytest.mark.parametrize("keys", [b"\n", b"\x1a\n", b"\x00\n", b"\x1b\n", b" \t\n", b"\x1b[200~\x1b[201~\n"])
def test_keys_that_say_nothing(keys: bytes, answers: Callable[..., list[str]]) -> None:
    session = Session()
    assert b"cnllama" not in session.type(keys)
    assert answers("从前")[0].encode() in session.type("从前\n")
    session.type(b"\x04")
    assert session.end() == 0


def test_ctrl_c_at_the_prompt() -> None:
    session = Session()
    assert b"/exit or Ctrl-C once more leaves" in session.type("half a line\x03")
    session.type("从前\n")
    assert b"/exit or Ctrl-C once more leaves" in session.type(b"\x03")
    session.type(b"\x03")
    assert session.end() == 130
    assert b"Traceback" not in session.output


def test_ctrl_c_in_an_answer() -> None:
    endless = ("--ctx", 65536, "-n", -1, "--ignore-eos", "--temp", 1.5, "--seed", 1)
    session = Session(*endless)
    session.type("从前\n", enough=200)
    session.type(b"\x03", waits=False)
    session.type("/exit\n")
    assert session.end() == 0
    assert b"Traceback" not in session.output


def test_the_terminal_is_as_it_was() -> None:
    parent, child = pty.openpty()
    before = termios.tcgetattr(child)
    process = start("chat", *OPTIONS, stdin=child, stdout=child, stderr=child)
    os.write(parent, b"/exit\n")
    assert process.wait(SECONDS) == 0
    assert termios.tcgetattr(child) == before
    os.close(parent)
    os.close(child)


def test_answers_to_a_file_while_typing(answers: Callable[..., list[str]], tmp_path: Path) -> None:
    parent, child = pty.openpty()
    with open(tmp_path / "out", "wb") as out:
        options: dict[str, Any] = {"stdin": child, "stdout": out, "stderr": subprocess.PIPE}
        process = start("chat", *OPTIONS, **options)
    os.write(parent, "从前\n/exit\n".encode())
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert (tmp_path / "out").read_text() == answers("从前")[0] + "\n"
    os.close(parent)
    os.close(child)
