# SPDX-License-Identifier: Apache-2.0
"""Weights that move out of the file's map while a model runs: the same bytes at the same place, whatever happens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest

from cnllama import LLM, weights
from cnllama.errors import FileChangedError, InputError
from cnllama.format import open_cnl
from cnllama.plan import Available
from cnllama.resident import map_memory, resident_memory

ROOT = Path(__file__).resolve().parents[1]
LARGE = 2 << 20
PROMPT = "从前有一座山"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="weights are moved on Linux only")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: bytes) -> Path:
    """A packed model of some large pages."""
    folder = tmp_path_factory.mktemp("weights")
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "head_dim": 64}
    base = models.make_llama(
        folder / "llama", small_tokenizer, num_attention_heads=8, num_key_value_heads=8, seed=7, **sizes
    )
    return models.convert(base, folder / "model.cnl")


@pytest.fixture
def cnl(original: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copy(original, tmp_path / "model.cnl"))
    os.utime(path, ns=(1, 10**18))  # long ago: the clock of a file system is coarse
    return path


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_SMALLEST", 0)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"LC_ALL": "C.UTF-8"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, env=env, check=False
    )


def answer(llm: LLM, count: int = 24) -> tuple[list[int], np.ndarray]:
    """The tokens of an answer, and the logits after them."""
    ids = llm.generate(PROMPT, temperature=0, max_tokens=count, ignore_eos=True)[0].token_ids
    return ids, llm.logits(ids)


def where(llm: LLM) -> tuple[str, str]:
    assert llm.weight_memory is not None
    figures = llm.weight_memory.figures()
    return str(figures["where"]), str(figures["reason"])


def moved(llm: LLM) -> int:
    assert llm.weight_memory is not None
    return int(llm.weight_memory.figures()["moved"])


def same(a: tuple[list[int], np.ndarray], b: tuple[list[int], np.ndarray]) -> bool:
    return a[0] == b[0] and np.array_equal(a[1], b[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits_wherever_they_lie(cnl: Path, everything_is_large: None, threads: int) -> None:
    found = {}
    for mode in weights.MODES:
        with LLM(cnl, ctx=128, threads=threads, weights=mode) as llm:
            before = bytes(np.concatenate([entry[0] for entry in llm.file.engine_tensors().values()]))
            found[mode] = answer(llm)
            after = bytes(np.concatenate([entry[0] for entry in llm.file.engine_tensors().values()]))
            assert before == after
            assert where(llm)[0] == ("map" if mode == "map" else "copy")
    assert same(found["map"], found["copy"])
    assert same(found["map"], found["auto"])


def test_the_first_token_waits_for_nothing(cnl: Path) -> None:
    with LLM(cnl, ctx=128, threads=2, weights="copy") as llm:
        stream = llm.stream(PROMPT, temperature=0, max_tokens=60, ignore_eos=True)
        parts = []
        for _ in range(weights._STEPS + 2):
            llm._step()
            parts.append(moved(llm))
        assert parts[0] == 0
        assert parts == sorted(parts)
        assert all(part % LARGE == 0 for part in parts)
        size = llm.weight_memory.figures()["bytes"] if llm.weight_memory else 0
        assert size > cnl.stat().st_size - 3 * LARGE  # what is no whole large page stays
        assert parts[-1] == size
        assert len(set(parts)) >= 4  # in parts
        stream.close()


def test_both_together_take_what_the_file_takes(cnl: Path) -> None:
    with LLM(cnl, ctx=128, threads=1, weights="copy") as llm:
        answer(llm)
        resident, _ = map_memory(llm.file)
        assert moved(llm) <= resident <= cnl.stat().st_size + 4096
        found = resident_memory(cnl, llm.file)
        assert found is not None
        assert found["mapped"] == resident
    assert llm.weight_memory is None


def test_small_weights_stay(tiny_cnl: Path) -> None:
    with LLM(tiny_cnl, ctx=128, threads=1) as llm:
        answer(llm)
        assert where(llm) == ("map", "small")


def test_a_map_of_large_pages_is_good_enough(
    cnl: Path, everything_is_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "map_memory", lambda file: (file.size, file.size))
    with LLM(cnl, ctx=128, threads=1) as llm:
        answer(llm)
        assert where(llm) == ("map", "large pages")
    with LLM(cnl, ctx=128, threads=1, weights="copy") as llm:
        answer(llm)
        assert where(llm)[0] == "copy"


def test_memory_that_others_need(cnl: Path, everything_is_large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(cnl, ctx=128, threads=1) as llm:
        room = cnl.stat().st_size + llm.plan.kv
        monkeypatch.setattr(weights, "available_memory", lambda: Available(room, "free memory"))
        answer(llm)
        assert where(llm) == ("map", "memory")
        assert "too little memory" in weights.describe(llm.weight_memory.figures() if llm.weight_memory else {})


def test_a_system_that_gives_none(cnl: Path) -> None:
    """With a limit of address space that the model fits and its copy does not."""
    script = f"""
import resource, sys
from cnllama import LLM
llm = LLM({str(cnl)!r}, ctx=128, threads=1, weights="copy")
first = llm.generate("{PROMPT}", temperature=0, max_tokens=1, ignore_eos=True)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
print(llm.generate("{PROMPT}", temperature=0, max_tokens=24, ignore_eos=True)[0].token_ids)
print(llm.weight_memory.figures()["reason"], llm.weight_memory.figures()["moved"])
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    with LLM(cnl, ctx=128, threads=1, weights="map") as llm:
        expected = llm.generate(PROMPT, temperature=0, max_tokens=24, ignore_eos=True)[0].token_ids
    assert done.stdout.splitlines() == [str(expected), "refused 0"]


FAILING = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
static int calls;
void *mremap(void *from, size_t size, size_t to_size, int flags, ...) {
    va_list more;
    va_start(more, flags);
    void *to = va_arg(more, void *);
    va_end(more);
    if (!(flags & MREMAP_FIXED)) abort();
    if (calls++ >= 2) {  // as the kernel may: the old pages are gone, the new ones not there
        munmap(to, size);
        errno = ENOMEM;
        return MAP_FAILED;
    }
    for (size_t i = 0; i < size; ++i) ((volatile char *)mmap(to, size, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | (i ? 0 : MAP_FIXED), -1, 0), i = size);
    __builtin_memcpy(to, from, size);
    munmap(from, size);
    return to;
}
"""


def test_pages_that_are_lost_half_way(cnl: Path, tmp_path: Path) -> None:
    """The system takes the old pages away and then fails to put the new ones there."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the library that stands in for the system")
    source, library = tmp_path / "failing.c", tmp_path / "failing.so"
    source.write_text(FAILING)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    script = f"""
from cnllama import LLM
llm = LLM({str(cnl)!r}, ctx=128, threads=2, weights="copy")
print(llm.generate("{PROMPT}", temperature=0, max_tokens=24, ignore_eos=True)[0].token_ids)
figures = llm.weight_memory.figures()
llm.file.check_unchanged()
print(figures["where"], figures["reason"], 0 < figures["moved"] < figures["bytes"])
"""
    done = python("-c", script, LD_PRELOAD=str(library))
    assert done.returncode == 0, done.stderr
    with LLM(cnl, ctx=128, threads=1, weights="map") as llm:
        expected = llm.generate(PROMPT, temperature=0, max_tokens=24, ignore_eos=True)[0].token_ids
    assert done.stdout.splitlines() == [str(expected), "copy refused True"]


def test_a_child_has_them_too(cnl: Path) -> None:
    with LLM(cnl, ctx=128, threads=2, weights="copy") as llm:
        expected = answer(llm)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                os.write(write, b"same" if same(answer(llm), expected) else b"other")
            finally:
                os._exit(0)
        os.close(write)
        assert os.read(read, 10) == b"same"
        os.close(read)
        os.waitpid(child, 0)
        assert same(answer(llm), expected)


def test_a_child_in_the_middle_of_the_move(cnl: Path) -> None:
    with LLM(cnl, ctx=128, threads=2, weights="copy") as llm:
        before = answer(llm, 4)
        assert 0 < moved(llm) < int(llm.weight_memory.figures()["bytes"] if llm.weight_memory else 0)
        child = os.fork()
        if child == 0:  # pragma: no cover
            rest = answer(llm)
            os._exit(0 if rest[0][:4] == before[0] else 1)
        assert os.waitpid(child, 0)[1] == 0
        rest = answer(llm)
        assert rest[0][:4] == before[0]


def cut(path: Path) -> None:
    os.truncate(path, 5000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def patch(path: Path) -> None:
    """One byte in the middle of the weights."""
    middle = path.stat().st_size // 2
    with open(path, "r+b") as file:
        file.seek(middle)
        byte = file.read(1)[0]
        file.seek(middle)
        file.write(bytes([byte ^ 255]))


@pytest.mark.parametrize("steps", [1, 5, 24], ids=["before", "while", "after"])
@pytest.mark.parametrize("harm", [cut, empty])
def test_a_file_cut_off(cnl: Path, harm: Callable[[Path], None], steps: int) -> None:
    with LLM(cnl, ctx=128, threads=2, weights="copy") as llm:
        answer(llm, steps)
        harm(cnl)
        with pytest.raises(FileChangedError, match="overwritten or cut off"):
            answer(llm)


def test_a_file_patched_before_the_move(cnl: Path) -> None:
    with LLM(cnl, ctx=128, threads=2, weights="copy") as llm:
        answer(llm, 1)
        patch(cnl)
        with pytest.raises(FileChangedError):
            answer(llm)


def test_a_file_patched_after_the_move(cnl: Path) -> None:
    """The weights in use are those that were opened, and every answer is theirs."""
    with LLM(cnl, ctx=128, threads=2, weights="copy") as llm:
        expected = answer(llm)
        patch(cnl)
        assert same(answer(llm), expected)


def test_a_file_that_was_touched_is_hashed_and_no_page_is_lost(cnl: Path) -> None:
    with LLM(cnl, ctx=128, threads=2, weights="copy") as llm:
        expected = answer(llm)
        os.utime(cnl)
        assert same(answer(llm), expected)
        llm.file.release()
        assert same(answer(llm), expected)


def test_two_engines_over_one_open_file(cnl: Path) -> None:
    from cnllama import _core

    file = open_cnl(cnl)
    engines = [
        _core.Engine(file.config, file.engine_tensors(), threads=1, context=64, max_sequences=1, max_step_tokens=64)
        for _ in range(2)
    ]
    file.keep_pages()
    ids = np.arange(5, dtype=np.int32)
    found = []
    for engine in engines:
        sequence = engine.open()
        found.append(engine.step([(sequence, ids, True)]))
        assert engine.own_weights(3 * LARGE) > 0
        found.append(engine.step([(sequence, ids, True)]))
        assert engine.own_weights(1 << 40) == 0
        engine.trim(sequence, 0)
        found.append(engine.step([(sequence, ids, True)]))
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[0], found[3])
    assert np.array_equal(found[0], found[5])
    assert np.array_equal(found[1], found[4])


def test_tensors_of_no_file(cnl: Path) -> None:
    from cnllama import _core

    file = open_cnl(cnl)
    tensors = {name: (np.array(entry[0]), *entry[1:]) for name, entry in file.engine_tensors().items()}
    engine = _core.Engine(file.config, tensors, threads=1, context=64, max_sequences=1, max_step_tokens=64)
    assert engine.own_weights(0) == 0
    assert engine.own_weights(LARGE) == 0
    with pytest.raises(RuntimeError, match="one file's map"):
        engine.read_bandwidth()


@pytest.mark.parametrize("mode", ["", "Map", "large", 1, None, b"map"])
def test_modes_that_are_none(cnl: Path, mode: object) -> None:
    with pytest.raises(InputError, match="choose auto, map or copy"):
        LLM(cnl, weights=mode)  # type: ignore[arg-type]


def test_the_command_line_says_where_they_lie(cnl: Path) -> None:
    command = ["-m", "cnllama", "run", "-m", str(cnl), "-p", PROMPT, "-n", "20", "--ignore-eos", "--temp", "0"]
    answers = {}
    for mode in weights.MODES:
        done = python(*command, "--stats", "--weights", mode)
        assert done.returncode == 0, done.stderr
        answers[mode] = done.stdout
        line = next(line for line in done.stderr.splitlines() if line.startswith("weights: "))
        assert line.startswith("weights: a copy, 100% moved" if mode == "copy" else "weights: the file's map")
    assert len(set(answers.values())) == 1
    done = python(*command, "--weights", "large")
    assert done.returncode == 2
    assert "choose auto, map or copy" in done.stderr


def test_a_system_that_tells_nothing(cnl: Path, tmp_path: Path) -> None:
    assert map_memory(open_cnl(cnl), tmp_path) == (0, 0)
