# SPDX-License-Identifier: Apache-2.0
"""Standard streams that are closed or lose their readers, and Ctrl-C from the first moment to the last."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import python, start, wait

from cnllama import LLM, SamplingParams
from cnllama import start as start_module
from cnllama.cli import main as main_module

ANSWER = ("-n", 6, "--temp", 0, "--threads", 1)


@pytest.fixture(scope="module")
def expected(tiny_cnl: Path) -> bytes:
    with LLM(tiny_cnl, threads=1) as llm:
        return llm.generate("从前有一个", SamplingParams(max_tokens=6))[0].text.encode()


def shell(redirections: str, *arguments: object) -> tuple[int, bytes, bytes]:
    process = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "cnllama", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize("redirections", ["2>&-", "<&-", "<&- 2>&-", "2>/dev/full", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_takes_nothing_from_the_others(redirections: str, tiny_cnl: Path, expected: bytes) -> None:
    code, out, err = shell(redirections, "run", "-m", tiny_cnl, "-p", "从前有一个", "--stats", *ANSWER)
    assert code == 0, err
    assert out == (b"" if ">&-" in redirections.replace("2>&-", "") else expected + b"\n")
    assert b"Traceback" not in err


@pytest.mark.parametrize("verb", ["run", "chat", "verify", "bench"])
def test_the_work_goes_on_when_the_reader_of_stderr_has_gone(verb: str, tiny_cnl: Path, expected: bytes) -> None:
    arguments = {
        "run": ("run", "-m", tiny_cnl, "-p", "从前有一个", *ANSWER),
        "chat": ("chat", "-m", tiny_cnl, *ANSWER, "--stats"),
        "verify": ("verify", tiny_cnl),
        "bench": ("bench", tiny_cnl, "--quick", "--prefill", 8, "--decode", 0, "--json"),
    }[verb]
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*arguments, stderr=writing)
    os.close(writing)
    out, _ = wait(process, "从前有一个\n/nothing\n".encode() if verb == "chat" else b"")
    assert process.returncode == 0
    assert out == expected + b"\n" if verb in ("run", "chat") else out.count(b"\n") >= 1


@pytest.mark.parametrize("verb", ["run", "verify", "info"])
def test_a_reader_of_stdout_that_has_gone_ends_the_command_quietly(verb: str, tiny_cnl: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = ("run", "-m", tiny_cnl, "-p", "天", *ANSWER) if verb == "run" else (verb, tiny_cnl)
    process = start(*arguments, stdout=writing)
    os.close(writing)
    _, err = wait(process, b"")
    assert process.returncode == 0, err
    assert b"Error" not in err
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("verb", "redirections", "code", "words"),
    [
        ("run", "</dev/zero", 2, b"more than 64 MiB, which no context holds"),
        ("run", "", 2, b"there is no prompt"),
        ("run", "<&-", 2, b"there is no prompt"),
        ("chat", "</dev/zero", 1, b"a line has no end"),
        ("chat", "<&-", 0, b""),
        ("run -f /dev/zero", "", 2, b"/dev/zero: more than 64 MiB"),
    ],
)
def test_what_is_no_text_to_read(verb: str, redirections: str, code: int, words: bytes, tiny_cnl: Path) -> None:
    found, out, err = shell(redirections, *verb.split(), "-m", tiny_cnl)
    assert (found, out) == (code, b""), err
    assert words in err
    assert b"Traceback" not in err


def test_a_broken_pipe_elsewhere_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(main_module, "_dispatch", work)
    assert main_module.main(["info"]) == 1
    assert "Broken pipe" in capfd.readouterr().err


# ---- Ctrl-C

SENT_AT_AN_IMPORT = """
import os, signal, sys
from cnllama.start import main
class Finder:
    left = int(sys.argv.pop(1))
    def find_spec(self, *_):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.exit(main())
"""


def interrupted(code: str, *arguments: object) -> tuple[int, list[str]]:
    """(exit code, lines of stderr) of a child that interrupts itself."""
    process = python("-c", code, *arguments, stdin=subprocess.DEVNULL)
    _, err = wait(process)
    return process.returncode, err.decode().splitlines()


@pytest.mark.parametrize("number", [1, 2, 3, 10, 30, 60, 90, 120, 150, 180, 210, 240, 270, 300])
def test_an_interrupt_in_the_middle_of_an_import_is_one_line(number: int, tiny_cnl: Path) -> None:
    code, lines = interrupted(SENT_AT_AN_IMPORT, number, "run", "-m", tiny_cnl, "-p", "天", *ANSWER)
    if code != 0:  # there are not so many imports
        assert code == 130, lines
        assert lines[-1] == "cnllama: interrupted"
        assert len(lines) <= 2, lines
    else:
        assert number > 200


RUNS = """
import os, signal, sys, time
import cnllama.start, cnllama.cli.main
def work(argv):
    {}
cnllama.cli.main.main = work
sys.exit(cnllama.start.main())
"""


@pytest.mark.parametrize(
    ("work", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", 130),
        # Python ignores exceptions in a destructor.
        ("type('D', (), {'__del__': lambda s: (os.kill(os.getpid(), 2), time.sleep(0))})(); time.sleep(60)", 130),
        ("import atexit; atexit.register(os.kill, os.getpid(), 2); return 0", 0),
        ("import atexit; atexit.register(os.kill, os.getpid(), 2); return 7", 7),
    ],
    ids=["work", "destructor", "end", "end of a failure"],
)
def test_an_interrupt_at_any_other_moment(work: str, code: int) -> None:
    found, lines = interrupted(RUNS.format(work))
    assert found == code, lines
    assert lines == (["cnllama: interrupted"] if code == 130 else [])


def test_an_interrupt_that_a_library_turned_into_another_error(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ImportError("PyCapsule_Import could not import module")
    assert main_module._explained(error) == (str(error), 1)
    monkeypatch.setattr(start_module, "interrupted_at", time.monotonic() - 0.1)
    assert main_module._explained(error) == ("interrupted", 130)
    monkeypatch.setattr(start_module, "interrupted_at", time.monotonic() - 60)
    assert main_module._explained(error) == (str(error), 1)


@pytest.mark.parametrize(
    "arguments", [("run", "-p", "天", "-n", 200), ("verify",), ("convert", "-o", "x.cnl")], ids=str
)
def test_interrupts_at_random_moments(
    arguments: tuple[object, ...], tiny_cnl: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    files = {"run": ("-m", tiny_cnl), "verify": (tiny_cnl,), "convert": (tiny_llama,)}[str(arguments[0])]
    code = "import sys; from cnllama.start import main; sys.stdout.write('.'); sys.stdout.flush(); sys.exit(main())"
    chance = random.Random(str(arguments))
    for _ in range(6):
        process = python("-c", code, *arguments, *files, stdin=subprocess.DEVNULL, cwd=tmp_path)
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        time.sleep(0.003 + chance.random() * 0.7)
        process.send_signal(signal.SIGINT)
        _, err = wait(process)
        assert process.returncode in (0, 130), err
        assert b"Traceback" not in err
        assert b"Error" not in err
        assert (b"interrupted" in err) == (process.returncode == 130), err


def test_where_interrupts_are_ignored_they_stay_ignored(tiny_cnl: Path) -> None:
    ignored: Callable[[], object] = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    process = start("run", "-m", tiny_cnl, "-p", "天", "-n", 50, "--temp", 0, "--ignore-eos", preexec_fn=ignored)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = wait(process)
    assert process.returncode == 0, err
