# SPDX-License-Identifier: Apache-2.0
"""The command line: what comes out where, in which encoding, with which exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import start, wait

from cnllama import LLM, SamplingParams
from cnllama.cli.main import VERBS
from cnllama.textio import count_chinese

GREEDY = ("--temp", 0, "--seed", 1)
ENDLESS = ("--ctx", 65536, "-n", -1, "--ignore-eos", "--temp", 1.5, "--seed", 1)


def cli(*args: object, stdin: bytes | None = None, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Runs the command line on bytes, in a clean locale unless `env` says otherwise."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-m", "cnllama", *[a if isinstance(a, bytes) else str(a) for a in args]],
        input=b"" if stdin is None else stdin,
        capture_output=True,
        timeout=120,
        check=False,
        env=clean | {"LC_ALL": "C.UTF-8"} | env,
    )


@pytest.fixture(scope="module")
def expected(tiny_cnl: Path) -> Callable[[str], str]:
    """The greedy text of twelve tokens that the API gives for a prompt."""

    def answer(prompt: str) -> str:
        with LLM(tiny_cnl, ctx=256) as llm:
            return llm.generate([prompt], SamplingParams(max_tokens=12))[0].text

    return answer


def run(tiny_cnl: Path, *args: object, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    return cli("run", "-m", tiny_cnl, "-n", 12, *GREEDY, "--ctx", 256, *args, **kwargs)


def test_the_answer_goes_to_stdout_and_one_line_to_stderr(tiny_cnl: Path, expected: Callable[[str], str]) -> None:
    done = run(tiny_cnl, "-p", "从前有一个")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().removesuffix("\n") == expected("从前有一个").removesuffix("\n")
    assert re.fullmatch(r"tiny\.cnl: template raw, context 256, \d+ threads, \w+\n", done.stderr.decode())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16"])
def test_prompt_files(tiny_cnl: Path, expected: Callable[[str], str], tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "提示.txt"
    file.write_bytes("天空，\r\n大海。\r\n".encode(encoding))
    done = run(tiny_cnl, "-f", file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == expected("天空，\n大海。").strip()


@pytest.mark.parametrize("encoding", ["utf-8", "gbk"])
def test_a_prompt_from_a_pipe(tiny_cnl: Path, expected: Callable[[str], str], encoding: str) -> None:
    done = run(tiny_cnl, stdin="从前有一个\n".encode(encoding))
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == expected("从前有一个").strip()


def test_an_argument_in_gbk(tiny_cnl: Path, expected: Callable[[str], str]) -> None:
    done = run(tiny_cnl, "-p", "从前有一个".encode("gbk"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == expected("从前有一个").strip()


@pytest.mark.parametrize(
    ("env", "encoding"),
    [
        ({"PYTHONIOENCODING": "gbk"}, "gb18030"),
        ({"PYTHONIOENCODING": "ascii"}, "utf-8"),
        ({"PYTHONIOENCODING": "latin-1"}, "utf-8"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "utf-8"),
        ({"LC_ALL": "POSIX"}, "utf-8"),
    ],
    ids=str,
)
def test_encodings_of_the_terminal(
    tiny_cnl: Path, expected: Callable[[str], str], env: dict[str, str], encoding: str
) -> None:
    done = run(tiny_cnl, "-p", "从前有一个", "--stats", **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).strip() == expected("从前有一个").strip()


def test_messages_are_chinese_in_a_chinese_locale(tiny_cnl: Path) -> None:
    done = run(tiny_cnl, "-p", "天空", "--stats", LC_ALL="zh_CN.UTF-8")
    assert done.returncode == 0
    assert "模板 raw" in done.stderr.decode()
    assert "解码" in done.stderr.decode()
    refused = cli("run", "-m", tiny_cnl, "--ctx", 8, "-p", "天" * 50, LC_ALL="zh_CN.UTF-8")
    assert refused.returncode == 2
    assert re.search(r"5\d 个词元.*8 个", refused.stderr.decode())


def test_json_is_one_object(tiny_cnl: Path, expected: Callable[[str], str]) -> None:
    done = run(tiny_cnl, "-p", "从前有一个", "--json", "--logprobs", 2, "--stats")
    assert done.returncode == 0
    assert done.stderr == b""
    result = json.loads(done.stdout)
    assert result["text"] == expected("从前有一个")
    assert result["finish_reason"] in ("stop", "length")
    assert result["seed"] == 1
    assert len(result["token_ids"]) == result["usage"]["completion_tokens"] == len(result["logprobs"])
    assert [len(p["top"]) for p in result["logprobs"]] == [2] * len(result["logprobs"])
    assert result["stats"]["bandwidth_bytes_per_s"] > 0
    assert result["stats"]["decode_tokens"] >= 0


def test_stats_say_what_was_done(tiny_cnl: Path) -> None:
    done = run(tiny_cnl, "-p", "从前有一个", "--stats")
    text = done.stderr.decode()
    for pattern in (r"load: [\d.]+ s", r"prefill: \d+ tokens · [\d.]+ s · [\d.]+ tok/s", r"decode: \d+ tokens"):
        assert re.search(pattern, text), text
    assert re.search(r"memory: [\d.]+ GB/s of [\d.]+ GB/s measured with \d+ threads: ", text), text
    assert re.search(r"finish: (length|stop) \(.*\) · seed 1", text), text


def test_system_and_templates(tiny_cnl: Path) -> None:
    plain, other = (
        json.loads(run(tiny_cnl, "-p", "好", "--json", "--template", "alpaca-2", *system).stdout)
        for system in ((), ("--system", "短"))
    )
    assert plain["template"] == "alpaca-2"
    assert other["usage"]["prompt_tokens"] < plain["usage"]["prompt_tokens"]


def test_n_zero(tiny_cnl: Path) -> None:
    done = cli("run", "-m", tiny_cnl, "-p", "好", "-n", 0, "--stats")
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run"], "there is no prompt"),
        (["fly"], "no command 'fly': choose one of " + ", ".join(VERBS)),
        (["run", "--fly"], "--fly"),
        (["run", "-p"], "expected one argument"),
        (["run", "-p", "x", "-f", "y"], "exclude each other"),
        (["run", "-f", "没有.txt"], "没有.txt: there is no such file"),
        (["run", "-p", "x", "--raw", "--template", "alpaca"], "exclude each other"),
        (["run", "-p", "x", "--device", "tpu"], "'tpu'"),
        (["run", "-p", "x", "--logprobs", "2"], "--logprobs needs --json"),
        (["run", "-p", "x", "-n", "many"], "'many' is no integer"),
        (["plan"], "FILE"),
    ],
)
def test_wrong_usage_is_one_sentence(args: list[str], words: str) -> None:
    done = cli(*args)
    assert_one_sentence(done.returncode, done.stderr.decode(), words)


def assert_one_sentence(code: int, text: str, words: str) -> None:
    assert code == 2, text
    assert words in text
    assert len(text.strip().splitlines()) == 1
    assert "Traceback" not in text


def test_no_prompt_in_a_terminal() -> None:
    assert_one_sentence(*in_a_terminal("run"), "there is no prompt")


def test_chat_in_a_terminal(tiny_cnl: Path) -> None:
    code, text = in_a_terminal("chat", "-m", str(tiny_cnl), "-n", "3", keys="从前\n/exit\n".encode())
    assert code == 0, text
    assert text.count("> ") >= 2
    assert "Traceback" not in text


def in_a_terminal(*args: str, keys: bytes = b"") -> tuple[int, str]:
    """(exit code, what it wrote) with a pseudo-terminal as stdin and stderr."""
    import pty

    parent, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "cnllama", *args], stdin=child, stdout=child, stderr=child)
    os.close(child)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    os.write(parent, keys)
    output = b""
    try:
        while chunk := os.read(parent, 4096):
            output += chunk
    except OSError:
        pass  # Linux says so when the other side has closed
    os.close(parent)
    code = process.wait()
    watchdog.cancel()
    return code, output.decode()


def test_version_and_help() -> None:
    version = cli("--version")
    assert version.returncode == 0
    assert re.fullmatch(rb"cnllama \d+\.\d+\.\d+\S*\n", version.stdout)
    for args in (["--help"], []):
        done = cli(*args)
        for verb in (b"run", b"chat", b"convert", b"info", b"verify", b"plan", b"tokenizer", b"adapt"):
            assert verb in done.stdout
    for verb in ("run", "chat", "convert", "info", "verify", "plan", "tokenizer", "adapt"):
        shown = cli(verb, "--help")
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith(b"usage: cnllama " + verb.encode())


def test_ctrl_c_stops_with_statistics(tiny_cnl: Path) -> None:
    process = start("run", "-m", tiny_cnl, "-p", "从前", *ENDLESS)
    assert process.stdout is not None
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = wait(process)
    assert process.returncode == 130, err
    assert len(first) == 20
    assert out.endswith(b"\n")
    assert b"tok/s" in err
    assert b"interrupted" in err
    assert b"Traceback" not in err


def test_a_reader_that_leaves_is_no_error(tiny_cnl: Path) -> None:
    process = start("run", "-m", tiny_cnl, "-p", "从前", *ENDLESS)
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait() == 0, err
    watchdog.cancel()
    assert b"Error" not in err
    assert b"Exception" not in err


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(tiny_cnl: Path, closed: str) -> None:
    command = f'"{sys.executable}" -m cnllama run -m "{tiny_cnl}" -p 好 -n 3 --stats {closed}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def test_a_full_disk_is_one_sentence(tiny_cnl: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cnllama", "run", "-m", str(tiny_cnl), "-p", "好", "-n", "5", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "space" in done.stderr


def test_chat_keeps_the_conversation(tiny_cnl: Path) -> None:
    lines = "从前有一个\n\n后来呢\n/reset\n从前有一个\n/exit\n不会读到\n"
    done = cli("chat", "-m", tiny_cnl, "-n", 12, *GREEDY, "--ctx", 256, "--raw", stdin=lines.encode())
    assert done.returncode == 0, done.stderr
    with LLM(tiny_cnl, ctx=256) as llm:
        first = llm.chat([{"role": "user", "content": "从前有一个"}], SamplingParams(max_tokens=12)).text
        history = [
            {"role": "user", "content": "从前有一个"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "后来呢"},
        ]
        second = llm.chat(history, SamplingParams(max_tokens=12)).text
    assert done.stdout.decode() == f"{first}\n{second}\n{first}\n"


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(tiny_cnl: Path) -> None:
    lines = "从前有一个农夫他每天都去田里\n" * 12
    done = cli("chat", "-m", tiny_cnl, "-n", 20, "--ctx", 128, "--seed", 1, stdin=lines.encode())
    assert done.returncode == 0, done.stderr
    assert b"forgot the oldest" in done.stderr


def test_ctrl_c_in_a_chat_stops_the_answer_only(tiny_cnl: Path) -> None:
    process = start("chat", "-m", tiny_cnl, *ENDLESS)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("从前\n".encode())
    process.stdin.flush()
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/exit\n")
    _, err = wait(process)
    assert process.returncode == 0, err
    assert b"Traceback" not in err


def test_chat_refuses_wrong_options_at_once(tiny_cnl: Path) -> None:
    done = cli("chat", "-m", tiny_cnl, "--top-p", 3)
    assert done.returncode == 2
    assert b"top_p is 3.0" in done.stderr


def test_cnllama_run_is_run(tiny_cnl: Path) -> None:
    code = "import sys; from cnllama.start import run_main; sys.exit(run_main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "-m", str(tiny_cnl), "-p", "好", "-n", "3", "--json"],
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["usage"]["completion_tokens"] <= 3


def test_a_verb_imports_only_itself(tiny_cnl: Path) -> None:
    code = (
        "import sys; from cnllama.cli.main import main; main(['plan', sys.argv[1]]); "
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_cnl)], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "cnllama.cli.plan" in loaded
    assert not loaded & {"cnllama.cli.run", "cnllama.cli.convert", "cnllama.convert", "torch", "sentencepiece"}


def test_count_chinese() -> None:
    assert count_chinese("中文, text 123，。🙂㐀𠮷") == 4
