# SPDX-License-Identifier: Apache-2.0
"""The line reader on a pseudo-terminal: the text that comes out, and what the screen shows meanwhile."""

import os
import pty
import select
import shutil
import termios
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from screen import Screen

from cnllama.cli.line_reader import LineReader

LEFT, RIGHT, UP, DOWN, HOME, END, DELETE = (f"\x1b[{key}" for key in ("D", "C", "A", "B", "H", "F", "3~"))
BACK, KILL, KILL_AFTER, WORD = "\x7f", "\x15", "\x0b", "\x17"
PASTE, PASTED = "\x1b[200~", "\x1b[201~"


class Keyboard:
    """A reader and its terminal. What is typed goes in when the prompt has come: until then the system edits lines."""

    def __init__(
        self, patch: pytest.MonkeyPatch, encoding: str = "utf-8", term: str = "xterm", columns: int = 80
    ) -> None:
        self._parent, self._child = pty.openpty()
        self._encoding = encoding
        self._stream = open(self._child, encoding=encoding, errors="surrogateescape", closefd=False)  # noqa: SIM115
        patch.setattr("sys.stdin", self._stream)
        patch.setattr("sys.stdout", self._stream)
        patch.setenv("TERM", term)
        patch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
        self._reader = LineReader()
        self.modes = termios.tcgetattr(self._child)
        self.shown = ""

    def read(self, keys: str | bytes) -> bytes | None:
        data = keys if isinstance(keys, bytes) else keys.encode(self._encoding, "surrogatepass")
        done = threading.Event()
        worker = threading.Thread(target=self._work, args=(data, done))
        worker.start()
        try:
            return self._reader.read("> ")
        finally:
            done.set()
            worker.join()
            assert termios.tcgetattr(self._child) == self.modes

    def close(self) -> None:
        self._stream.close()
        os.close(self._parent)
        os.close(self._child)

    def _work(self, keys: bytes, done: threading.Event) -> None:
        """Types the keys and takes what the terminal is shown."""
        shown = b""
        while True:
            more = select.select([self._parent], [], [], 0 if done.is_set() else 0.002)[0]
            if more:
                shown += os.read(self._parent, 65536)
            elif done.is_set():
                break
            if b"> " in shown and keys:
                keys = keys[os.write(self._parent, keys[:500]) :]
        self.shown = shown.decode(self._encoding, "replace")


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Keyboard]]:
    made: list[Keyboard] = []

    def make(*args: object) -> Keyboard:
        made.append(Keyboard(monkeypatch, *args))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


LINES = {
    "春天来了\n": "春天来了",
    "春天来\x7f了\r": "春天了",
    "春天\x7f\x7f\x7f\n": "",
    f"一二三{LEFT}{LEFT}{BACK}四\n": "四二三",
    f"一二{HOME}零{END}三\n": "零一二三",
    f"一二三{HOME}{DELETE}{RIGHT}{KILL_AFTER}\n": "二",
    f"写 一首 诗{WORD}歌\n": "写 一首 歌",
    f"写诗{KILL}作文\n": "作文",
    "\x1b[5;5R\x1bOx\x1bx一\x1b\n": "一",
    f"{PASTE}第一行\r第二行\x7f\x04\t{PASTED}。\n": "第一行\n第二行\x7f\x04\t。",
    "a\tb\x00\x04\n": "a\tb",
    "\n": "",
    "x" * 6000 + "春" * 3000 + "\n": "x" * 6000 + "春" * 3000,
    "e\u0301e\u0301\x7f🙂\x7f。\n": "e\u0301。",
}


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
@pytest.mark.parametrize("keys", LINES, ids=range(len(LINES)))
def test_lines(keys: str, encoding: str, keyboard: Callable[..., Keyboard]) -> None:
    assert keyboard(encoding).read(keys) == LINES[keys].encode(encoding)


@pytest.mark.parametrize("bytes_", [b"\xe6\x98", b"\xff\xfe", "写一首春天的诗".encode("gbk"), b"\xb4\xba\xcc", b"\x80"])
def test_bytes_that_are_no_text_stay_what_they_are(bytes_: bytes, keyboard: Callable[..., Keyboard]) -> None:
    board = keyboard()
    assert board.read(bytes_ + b"\n") == bytes_
    assert board.read("秋\n") == "秋".encode()


def test_the_end_comes_on_an_empty_line_only(keyboard: Callable[..., Keyboard]) -> None:
    board = keyboard()
    assert board.read("一\x04二\n") == "一二".encode()
    assert board.read("\x04") is None


def test_several_lines_at_once_are_read_one_by_one(keyboard: Callable[..., Keyboard]) -> None:
    board = keyboard()
    assert board.read("一\n二\n三\n") == "一".encode()
    assert [board.read(""), board.read("")] == ["二".encode(), "三".encode()]


def test_earlier_lines_come_back(keyboard: Callable[..., Keyboard]) -> None:
    board = keyboard()
    for keys, line in (
        ("一\n", "一"), ("二\n", "二"), ("二\n", "二"), (f"{UP}\n", "二"), (f"{UP}{UP}!\n", "一!"),
        (f"三{UP}{UP}{UP}{UP}{UP}{DOWN}{DOWN}{DOWN}{DOWN}{DOWN}\n", "三"), (f"{UP}{BACK}\n", ""), (f"{UP}\n", "三"),
    ):  # fmt: skip
        assert board.read(keys) == line.encode()


KEYS = (
    "a",
    "春",
    "，",
    "e\u0301",
    " ",
    "\t",
    LEFT,
    RIGHT,
    HOME,
    END,
    BACK,
    DELETE,
    WORD,
    KILL_AFTER,
    f"{PASTE}一\r二{PASTED}",
)


def edited(keys: list[str]) -> list[str]:
    """What the keys make of a line, as characters."""
    line: list[str] = []
    at = 0
    for key in keys:
        if key in (LEFT, RIGHT):
            at = min(max(at + (1 if key == RIGHT else -1), 0), len(line))
        elif key in (HOME, END):
            at = 0 if key == HOME else len(line)
        elif key == BACK:
            line[max(at - 1, 0) : at] = []
            at = max(at - 1, 0)
        elif key == DELETE:
            line[at : at + 1] = []
        elif key == KILL_AFTER:
            line[at:] = []
        elif key == WORD:
            kept = "".join(line[:at]).rstrip().rfind(" ") + 1
            while len("".join(line[:at])) > kept:
                at -= 1
                del line[at]
        else:
            put = [key] if "\r" not in key else ["一", "\n", "二"]
            line[at:at] = put
            at += len(put)
    return line


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(KEYS), max_size=40), st.sampled_from([7, 8, 20, 80]), st.sampled_from(["xterm", "dumb"])
)
@example(["春"] * 9 + [LEFT] * 5 + ["a", BACK, BACK], 7, "xterm")
@example(["a"] * 6 + [LEFT, LEFT, "春"], 8, "xterm")
def test_the_screen_shows_the_line(keys: list[str], columns: int, term: str) -> None:
    if term == "dumb":
        keys = [key for key in keys if key not in (LEFT, RIGHT, HOME, END)]
    with pytest.MonkeyPatch.context() as patch:
        board = Keyboard(patch, "utf-8", term, columns)
        try:
            found = board.read("".join(keys) + "\n")
        finally:
            board.close()
    line = "".join(edited(keys))
    assert found == line.encode()
    screen, plain = Screen(columns), Screen(columns)
    screen.feed(board.shown)
    plain.feed("> " + line.replace("\t", "\\t").replace("\n", "\r\n") + "\r\n")
    if term == "xterm":
        assert screen.text() == plain.text()
    else:  # every change is shown anew, below
        assert screen.text()[-len(plain.rows) :] == plain.text()
