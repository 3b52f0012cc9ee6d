# SPDX-License-Identifier: Apache-2.0
"""What comes from files, names and models is shown, never obeyed: one line stays one line, on every way out."""

import json
import os
import pty
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from processes import start, wait

from cnllama.cli.main import main
from cnllama.errors import CnllamaError, InputError, from_os_error, printable
from cnllama.stdio import to_json

HOSTILE = "a\x1b[31m\n\r\u2028\u202e\u2066\x9b1m\x00\u200b\x7fb"
NAME = HOSTILE.replace("\x00", "")  # no file can be called that
UNSAFE = {"Cc", "Cf", "Zl", "Zp", "Cs"}
TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def unsafe(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c) in UNSAFE)


@given(st.text(st.characters()))
@example(HOSTILE)
@example("\udce6\udc98\ud800")
def test_printable_text_is_one_line_that_no_terminal_obeys(text: str) -> None:
    shown = printable(text)
    assert not unsafe(shown)
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown


def test_what_people_read_stays() -> None:
    assert printable("写一首　诗，𠮷 é 🙂") == "写一首　诗，𠮷 é 🙂"
    assert printable("\udce6\udc98春\x1b") == r"\xe6\x98春\x1b"


@given(st.text(st.characters()), st.lists(st.text(st.characters()), max_size=3))
@example(HOSTILE, [HOSTILE])
def test_an_error_is_one_sentence_whatever_it_quotes(message: str, details: list[str]) -> None:
    error = InputError(f"{message}: wrong", details)
    assert str(error) == printable(message) + ": wrong"
    assert error.details == list(map(printable, details))
    assert not unsafe(str(CnllamaError(f"{error} {message}")))
    assert not unsafe(str(from_os_error(message, OSError(2, message))))


@given(st.recursive(st.text(st.characters()), lambda s: st.lists(s) | st.dictionaries(st.text(st.characters()), s)))
@example({HOSTILE: [HOSTILE, "\ud800"]})
def test_json_says_the_same_without_control_characters(value: object) -> None:
    text = to_json(value)
    assert not [c for c in text if unicodedata.category(c) in UNSAFE - {"Cf"} or c in TURNING]
    assert json.loads(text) == value


@pytest.mark.parametrize(
    "command",
    [
        ["run", "-p", "x", "-m"],
        ["run", "-f"],
        ["chat", "-m"],
        ["info"],
        ["verify"],
        ["plan"],
        ["bench"],
        ["export", "-o", "x", "--to", "gguf"],
        ["convert", "-o", "x"],
        ["eval", "ppl", "x.cnl"],
        ["tokenizer", "train", "-o", "x", "--vocab-size", "300"],
        ["run", "-p", "x", "--template"],
        ["run", "-p", "x", "-n"],
        [],
    ],
    ids=" ".join,
)
def test_a_hostile_name_is_one_sentence(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, NAME]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert not unsafe(err[:-1])
    assert r"a\x1b[31m\n" in err


@pytest.fixture
def hostile_cnl(tiny_cnl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_cnl, tmp_path / f"{NAME}.cnl"))


@pytest.mark.parametrize("command", ["info", "run", "export", "against"])
def test_results_about_a_hostile_name(command: str, hostile_cnl: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = {
        "run": ["run", "-p", "天", "-n", "2", "--stats", "-m", str(hostile_cnl)],
        "export": ["export", str(hostile_cnl), "-o", str(hostile_cnl.with_suffix(".gguf"))],
        "against": ["verify", str(hostile_cnl), "--against", str(hostile_cnl)],
    }
    assert main(arguments.get(command, [command, str(hostile_cnl)])) == 0
    out, err = capfd.readouterr()
    for line in (out + err).split("\n"):
        assert not unsafe(line), line
    assert r"a\x1b[31m\n" in out + err


def test_json_about_a_hostile_name(hostile_cnl: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(hostile_cnl), "--json"]) == 0
    out, _ = capfd.readouterr()
    assert json.loads(out)["file"] == str(hostile_cnl)
    assert not unsafe(out[:-1].replace("\u200b", ""))


@pytest.mark.parametrize("name", [b"\xff\xfe.cnl", b"\xb4\xba.cnl", "春.cnl".encode()[1:], b"-\xe6.cnl"])
@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_names_are_bytes(tiny_cnl: Path, tmp_path: Path, name: bytes, locale: str) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    shutil.copy(tiny_cnl, path)
    for arguments in ([b"verify", path], [b"run", b"-m", path, b"-p", b"x", b"-n", b"2"], [b"info", b"--json", path]):
        process = start(*arguments, env=os.environ | {"LC_ALL": locale})
        out, err = wait(process, b"")
        assert process.returncode == 0, err
    assert json.loads(out)["file"].encode("utf-8", "surrogateescape") == path
    exported = path + b".\xfe"
    process = start(b"export", path, b"-o", exported)
    _, err = wait(process, b"")
    assert process.returncode == 0, err
    assert os.path.getsize(exported) > 0


CODE = """
import sys
from cnllama.stdio import configure_stdio
configure_stdio()
print("红\\x1b[31m\\x9b2J\\u202e\\r\\t春🧑\\u200d🌾\\n", end="")
print("bar\\r\\x1b]0;title\\x07", end="", file=sys.stderr)
"""


def test_a_terminal_is_shown_control_characters_and_a_file_gets_them() -> None:
    parent, child = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", CODE], stdout=child, stderr=child, check=True, env=os.environ | {"LC_ALL": "C"}
    )
    os.close(child)
    seen = os.read(parent, 4096).decode()
    os.close(parent)
    assert seen == "红\\x1b[31m\\x9b2J\\u202e\\r\t春🧑\u200d🌾\r\nbar\r\\x1b]0;title\\x07"
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True)
    assert done.stdout.decode() == "红\x1b[31m\x9b2J\u202e\r\t春🧑\u200d🌾\n"


@given(st.text(st.characters()), st.integers(0, 20_000), st.sampled_from(["", " ", ", "]))
@example("\ud800", 20_000, "")
def test_a_message_is_bounded_and_keeps_the_file_and_the_mend(piece: str, times: int, between: str) -> None:
    file, mend = "/a/model.cnl: has ", ", expected a number; make it again"
    said = str(InputError(f"{file}{between.join([piece] * times)}{mend}", [piece * times]))
    assert len(said) <= 1500
    assert said.startswith(file.rstrip())
    assert said.endswith(mend.lstrip(", ") if piece else mend)
    assert all(len(line) <= 1500 for line in InputError("", [piece * times]).details)


def test_what_is_short_is_not_cut() -> None:
    text = f"{'/directory' * 50}/model.cnl: " + "one of many words " * 40
    assert str(InputError(text)) == text
