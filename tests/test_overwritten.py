# SPDX-License-Identifier: Apache-2.0
"""A file that is cut off or copied over under its map is one sentence with exit code 1: no SIGBUS, no other weights."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import numpy as np
import pytest
from cnllama.convert.checkpoint import open_weights
from cnllama.convert.pack import convert
from processes import python, start, wait

from cnllama import LLM, SamplingParams, _core
from cnllama.container import SafetensorsFile
from cnllama.errors import CnllamaError, FileChangedError
from cnllama.eval.models import EngineScorer, Item
from cnllama.format import open_cnl
from cnllama.mapped import WatchedFile
from cnllama.verify import verify

WORDS = "was overwritten or cut off while it was in use"


@pytest.fixture(scope="module")
def other_cnl(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Path:
    """Another model of the same shape: its file has the same size."""
    folder = tmp_path_factory.mktemp("other")
    return models.convert(models.make_llama(folder / "llama", tokenizer_model, seed=99), folder / "other.cnl")


@pytest.fixture
def cnl(tiny_cnl: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copy(tiny_cnl, tmp_path / "model.cnl"))
    os.utime(path, ns=(1, 10**18))  # long ago: the clock of a file system is coarse
    return path


def cut(path: Path, other: Path) -> None:
    os.truncate(path, 5000)


def empty(path: Path, other: Path) -> None:
    os.truncate(path, 0)


def copy_over(path: Path, other: Path) -> None:
    """As cp does: into the same file."""
    path.write_bytes(other.read_bytes())


def patch(path: Path, other: Path) -> None:
    """One byte of a weight."""
    with open(path, "r+b") as file:
        file.seek(-70_000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-70_000, os.SEEK_END)
        file.write(bytes([byte ^ 255]))


def grow(path: Path, other: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


HARM = [cut, empty, copy_over, patch, grow]
Harm = Callable[[Path, Path], None]


@pytest.mark.parametrize("harm", HARM)
def test_a_running_model(harm: Harm, cnl: Path, other_cnl: Path) -> None:
    with LLM(cnl, ctx=256, threads=2) as llm:
        stream = llm.stream("从前有一个", temperature=0, max_tokens=100, ignore_eos=True)
        next(stream)
        harm(cnl, other_cnl)
        with pytest.raises(FileChangedError, match=WORDS) as caught:
            list(stream)
        assert str(cnl) in str(caught.value)
        for again in (
            lambda: llm.generate("春"),
            lambda: llm.logits([1, 2]),
            lambda: llm.chat([{"role": "user", "content": "x"}]),
        ):
            with pytest.raises(FileChangedError, match=WORDS):
                again()


@pytest.mark.parametrize("harm", HARM)
def test_a_scorer(harm: Harm, cnl: Path, other_cnl: Path) -> None:
    with LLM(cnl, ctx=256, threads=1) as llm, EngineScorer(llm, 1) as scorer:
        list(scorer.rows([Item([1, 2, 3], 0)]))
        harm(cnl, other_cnl)
        with pytest.raises(CnllamaError, match=WORDS):
            list(scorer.rows([Item([4, 5, 6], 0)]))


@pytest.mark.parametrize("harm", HARM)
def test_verify(harm: Harm, cnl: Path, other_cnl: Path) -> None:
    file = open_cnl(cnl)
    checks = verify(file, lambda _: None)
    assert next(checks).passed
    harm(cnl, other_cnl)
    with pytest.raises(FileChangedError, match=WORDS):
        list(checks)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("harm", HARM)
def test_a_checkpoint_that_is_read(form: str, harm: Harm, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / f"model.{form}"
    if form == "bin":
        import safetensors.torch
        import torch

        torch.save(safetensors.torch.load_file(tiny_llama / "model.safetensors"), path)
    else:
        shutil.copy(tiny_llama / "model.safetensors", path)
    other = tmp_path / "other"
    other.write_bytes(bytes(255 - byte for byte in path.read_bytes()[-(1 << 20) :]).rjust(path.stat().st_size))
    os.utime(path, ns=(1, 10**18))
    tensors = open_weights(path)
    last = max(tensors.values(), key=lambda tensor: tensor.size)
    assert np.isfinite(last.read()).all()
    harm(path, other)
    for tensor in tensors.values():
        with pytest.raises(FileChangedError, match=WORDS):
            tensor.read()


@pytest.mark.parametrize("harm", HARM)
def test_a_conversion_leaves_no_file(
    harm: Harm, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    weights = base / "model.safetensors"
    os.utime(weights, ns=(1, 10**18))
    quantize, count = _core.quantize, 0

    def later(*args: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == 5:
            harm(weights, tiny_llama / "config.json")
        return quantize(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(_core, "quantize", later)
    with pytest.raises(FileChangedError, match=WORDS):
        convert(base, [], tmp_path / "x.cnl", quantizer="rtn")
    assert count >= 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_file_that_is_only_touched_goes_on(cnl: Path) -> None:
    with LLM(cnl, ctx=256, threads=1) as llm:
        params = SamplingParams(max_tokens=8)
        text = llm.generate("春天", params)[0].text
        cnl.touch()
        assert llm.generate("春天", params)[0].text == text
        cnl.write_bytes(cnl.read_bytes())  # the same again, in place
        assert llm.generate("春天", params)[0].text == text


def test_a_renamed_file_replaces_nothing_that_runs(cnl: Path, other_cnl: Path, tmp_path: Path) -> None:
    with LLM(cnl, ctx=256, threads=1) as llm:
        text = llm.generate("春天", max_tokens=8, temperature=0)[0].text
        new = Path(shutil.copy(other_cnl, tmp_path / "new.cnl"))
        new.rename(cnl)
        assert llm.generate("春天", max_tokens=8, temperature=0)[0].text == text


# ---- whole processes


@pytest.fixture
def endless(cnl: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = start(
        "run", "-m", cnl, "-p", "从前", "--ctx", 65536, "-n", -1, "--ignore-eos", "--temp", 1.5, "--threads", 2
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("harm", [cut, copy_over])
def test_the_command_line(harm: Harm, cnl: Path, other_cnl: Path, endless: subprocess.Popen[bytes]) -> None:
    assert endless.stdout is not None
    endless.stdout.read(30)
    harm(cnl, other_cnl)
    _, err = wait(endless)
    assert endless.returncode == 1, err
    lines = [
        line for line in err.decode().splitlines() if not line.startswith(("model.cnl: template", "cnllama: warning"))
    ]
    assert len(lines) == 1
    assert WORDS in lines[0]


def test_chat_ends_when_the_model_is_gone(cnl: Path) -> None:
    process = start("chat", "-m", cnl, "-n", 5, "--temp", 0)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("春\n".encode())
    process.stdin.flush()
    process.stdout.read(1)
    os.truncate(cnl, 9000)
    _, err = wait(process, "秋\n冬\n".encode())
    assert process.returncode == 1, err
    assert err.decode().count(WORDS) == 1


# ---- the guard


def test_reads_of_many_threads_survive(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\1" * (64 << 20))
    file = WatchedFile(path)
    _, data = file.map()
    threads = [threading.Thread(target=lambda i=i: [int(data[i::4096].sum()) for _ in range(20)]) for i in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.01)
    os.truncate(path, 3 << 20)
    for thread in threads:
        thread.join()
    assert data[-1] == 0
    with pytest.raises(FileChangedError, match=WORDS):
        file.check_unchanged()


def test_arrays_keep_the_map_and_its_guard_alive(tiny_cnl: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_cnl, tmp_path / "x.cnl"))
    tensors = open_cnl(path).engine_tensors()  # the file itself is gone
    config = open_cnl(path).config
    engine = _core.Engine(config, tensors, threads=1, context=64)
    sequence = engine.open()
    engine.step([(sequence, np.array([1, 2], np.int32), False)])
    os.truncate(path, 4096)
    with pytest.raises(RuntimeError, match="cut off while it was in use"):
        engine.step([(sequence, np.array([3], np.int32), False)])


FOREIGN = """
import ctypes, mmap, os, signal, sys
{before}
from cnllama.container import SafetensorsFile
file = SafetensorsFile(sys.argv[1])
{after}
with open(sys.argv[2], "w+b") as other:
    other.truncate(8192)
    mapping = mmap.mmap(other.fileno(), 8192)
    other.truncate(0)
    print(mapping[5000])
"""


@pytest.mark.parametrize(
    ("before", "after", "code", "words"),
    [
        ("", "", -signal.SIGBUS, b""),
        ("import faulthandler; faulthandler.enable()", "", -signal.SIGBUS, b"Fatal Python error: Bus error"),
        ("", "os.kill(os.getpid(), signal.SIGBUS)", -signal.SIGBUS, b""),
        ("signal.signal(signal.SIGBUS, lambda *_: sys.exit(7))", "os.kill(os.getpid(), signal.SIGBUS)", 7, b""),
    ],
)
def test_other_bus_errors_are_what_they_were(
    before: str, after: str, code: int, words: bytes, tiny_cnl: Path, tmp_path: Path
) -> None:
    process = python("-c", FOREIGN.format(before=before, after=after), tiny_cnl, tmp_path / "x")
    _, err = wait(process)
    assert process.returncode == code, err
    assert words in err


def test_closed_files_leave_no_trace(tiny_cnl: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(5000):  # more than there is room for at once
        SafetensorsFile(tiny_cnl)
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


def test_too_many_open_files_are_one_sentence(tiny_cnl: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from cnllama.container import SafetensorsFile\nfrom cnllama import CnllamaError\n"
        "try: files = [SafetensorsFile(sys.argv[1]) for _ in range(99)]\nexcept CnllamaError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_cnl], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tiny_cnl}: Too many open files\n"
