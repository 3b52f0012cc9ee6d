# SPDX-License-Identifier: Apache-2.0
"""The CUDA engine against the CPU's: the same logits, bit for bit, and the same manners."""

import ast
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_backend
import numpy as np
import pytest

from cnllama import _core
from cnllama.format import open_cnl

ROOT = Path(__file__).resolve().parents[1]
TEXT = np.array([1, 5, 40, 300, 7, 7, 210, 13, 99, 4, 61, 500, 18, 2, 77], np.int32)


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    return cuda_backend.load()


@pytest.fixture(scope="module")
def model(tiny_cnl: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    file = open_cnl(tiny_cnl)
    return file.config, file.engine_tensors()


def engines(cuda, model, **options) -> tuple[Any, Any]:
    config, tensors = model
    options = {"context": 384, "max_sequences": 3, **options}
    return cuda.Engine(config, tensors, **options), _core.Engine(config, tensors, threads=1, **options)


def same_step(pair, batch) -> np.ndarray:
    got, expected = (engine.step(batch) for engine in pair)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    return got


@pytest.mark.parametrize("kv_type", ["fp16", "int8"])
def test_logits_are_the_cpu_s(cuda, model, kv_type) -> None:
    pair = engines(cuda, model, kv_type=kv_type)
    assert [engine.open() for engine in pair] == [0, 0]
    same_step(pair, [(0, TEXT, True)])
    for token in (3, 8, 9, 10):  # the second decode step is captured, later ones are replays
        same_step(pair, [(0, np.array([token], np.int32), False)])
    assert pair[0].replays() >= 2
    assert [engine.length(0) for engine in pair] == [19, 19]


def test_mixed_batches_and_trimming(cuda, model) -> None:
    pair = engines(cuda, model)
    for engine in pair:
        for _ in range(3):
            engine.open()
    same_step(pair, [(0, TEXT, False), (1, TEXT[:3], True)])
    same_step(pair, [(2, TEXT, False), (1, TEXT[3:4], False), (0, TEXT[:2], True)])
    for engine in pair:
        engine.trim(0, 9)
    one = [(i, TEXT[i : i + 1], False) for i in range(3)]
    for _ in range(3):
        same_step(pair, one)


def test_generate_is_step_and_argmax(cuda, model) -> None:
    got, expected = engines(cuda, model)
    first = []
    for engine in (got, expected):
        tokens = []
        for sequence, length in enumerate((15, 4)):
            engine.open()
            tokens.append(int(engine.step([(sequence, TEXT[:length], False)])[0].argmax()))
        first.append(tokens)
    assert first[0] == first[1]
    chosen = got.generate([0, 1], np.array(first[0], np.int32), 5)
    tokens = first[1]
    for row in chosen:
        logits = expected.step([(i, np.array([token], np.int32), False) for i, token in enumerate(tokens)])
        tokens = [int(x.argmax()) for x in logits]
        assert row.tolist() == tokens
    assert got.length(0) == expected.length(0)


def test_a_failed_step_changes_nothing(cuda, model) -> None:
    engine, _ = engines(cuda, model, context=64, max_sequences=1)
    engine.open()
    engine.step([(0, TEXT, False)])
    with pytest.raises(RuntimeError, match=r"is full: sequence 0 has 15 positions and asks for 60"):
        engine.step([(0, np.resize(TEXT, 60), False)])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        engine.step([(0, np.array([1 << 20], np.int32), False)])
    assert engine.length(0) == 15


def test_largest_logits_are_those_of_a_step(cuda, model) -> None:
    got, expected = engines(cuda, model)
    for engine in (got, expected):
        for _ in range(2):
            engine.open()
    batches = [[(0, TEXT, False), (1, TEXT[:4], True)]] + [[(0, TEXT[i : i + 1], False)] for i in range(4)]
    for batch in batches:
        logits = expected.step(batch)
        ids, values = got.step_top(batch, 40)
        order = np.stack([np.lexsort((np.arange(row.size), -row))[:40] for row in logits])
        np.testing.assert_array_equal(ids, order)
        np.testing.assert_array_equal(values, np.take_along_axis(logits, order, axis=1))
    assert got.replays() >= 2
    assert got.length(0) == expected.length(0)
    np.testing.assert_array_equal(got.step(batches[1]), expected.step(batches[1]))  # another graph, all logits
    with pytest.raises(ValueError, match="k is 0, outside 1"):
        got.step_top(batches[1], 0)


def test_a_scheme_without_kernels_is_refused(cuda, model) -> None:
    config, tensors = model
    name = "model.layers.0.mlp.down_proj.weight"
    data, _, rows, cols = tensors[name]
    message = (
        rf"{name} is stored as q3-a64, and the GPU has kernels for q4-s64, q4-a64, q4-s32 and q8-s64 only: convert the "
        "model with one of these, or leave --device cuda out"
    )
    with pytest.raises(ValueError, match=message):
        cuda.Engine(config, {**tensors, name: (data, "q3-a64", rows, cols)}, context=64)
    assert set(cuda.SCHEMES) <= set(_core.schemes())


# --- a device that fails

emulated = pytest.mark.skipif(cuda_backend.on_a_gpu(), reason="a GPU cannot be made to fail")


@pytest.fixture
def fault(monkeypatch):
    """fault("cudaMalloc", 3, 2): the third call from now on fails with error 2; fault(): none does."""

    def set_fault(*words) -> None:
        monkeypatch.setenv("CNLLAMA_EMULATOR_FAULT", " ".join(map(str, words)))

    set_fault()
    return set_fault


@emulated
@pytest.mark.parametrize(("call", "what"), [("cudaMalloc", "GPU memory"), ("cudaHostAlloc", "pinned host memory")])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_memory_that_runs_out_while_loading_is_given_back(cuda, model, fault, call, what, number) -> None:
    free = cuda.device()["free_bytes"]
    fault(call, number, 2)
    with pytest.raises(RuntimeError, match=rf"needs \d+\.\d\d GiB of {what}"):
        engines(cuda, model, context=64)
    fault()
    assert cuda.device()["free_bytes"] == free
    same_step(opened(engines(cuda, model, context=64)), [(0, TEXT, False)])


def opened(pair):
    for engine in pair:
        engine.open()
    return pair


@emulated
def test_memory_that_runs_out_in_a_step(cuda, model, fault) -> None:
    pair = opened(engines(cuda, model))
    long = np.resize(TEXT, 60)  # more rows of logits than there is room for at first
    fault("cudaMalloc", 1, 2)
    with pytest.raises(RuntimeError, match=r"the logits of a step needs .* GiB of GPU memory and .* are free"):
        pair[0].step([(0, long, True)])
    assert pair[0].length(0) == 0
    same_step(pair, [(0, long, True)])
    fault("cudaMalloc", 2, 2)
    with pytest.raises(RuntimeError, match="the choice of tokens needs"):
        pair[0].step_top([(0, TEXT[:1], False)], 4)
    same_step(pair, [(0, TEXT[:1], False)])


@emulated
@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("cudaLaunchKernelEx", 1),
        ("cudaLaunchKernelEx", 9),
        ("cudaMemcpyAsync", 1),
        ("cudaMemcpyAsync", 2),
        ("cudaStreamBeginCapture", 1),
        ("cudaGraphInstantiate", 1),
        ("cudaGraphLaunch", 1),
    ],
)
def test_a_step_that_fails_leaves_the_engine_as_it_was(cuda, model, fault, call, number) -> None:
    pair = opened(engines(cuda, model))
    same_step(pair, [(0, TEXT, False)])
    same_step(pair, [(0, TEXT[:1], False)])
    fault(call, number, 701)
    with pytest.raises(RuntimeError, match=r": the GPU answers cudaErrorLaunchOutOfResources \(.*\)$"):
        pair[0].step([(0, TEXT[1:2], False)])  # the one that is captured
    assert pair[0].length(0) == pair[1].length(0)
    for token in TEXT[1:4]:
        same_step(pair, [(0, np.array([token], np.int32), False)])


@emulated
def test_a_lost_device_says_so_every_time(cuda, model, fault) -> None:
    pair = opened(engines(cuda, model))
    same_step(pair, [(0, TEXT, False)])
    fault("cudaStreamSynchronize", 1, 700)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"cudaErrorIllegalAddress .*it is lost to this process, start it again"):
            pair[0].step([(0, TEXT[:1], False)])
        assert pair[0].length(0) == TEXT.size


@emulated
@pytest.mark.parametrize("code", [214, 220, 700, 714, 719, 721, 999])
def test_errors_that_end_everything_are_known(cuda, model, fault, code) -> None:
    pair = opened(engines(cuda, model))
    fault("cudaLaunchKernelEx", 3, code)
    with pytest.raises(RuntimeError, match="it is lost to this process, start it again"):
        pair[0].step([(0, TEXT, False)])


@emulated
def test_a_process_that_was_forked_is_told_to_spawn(cuda, model, fault) -> None:
    fault("cudaMalloc", 1, 3)
    with pytest.raises(RuntimeError, match="a forked process cannot use the GPU: start processes with spawn"):
        engines(cuda, model)


@emulated
def test_code_that_does_not_wait_is_not_started_early(cuda, model, monkeypatch) -> None:
    """A module built for older GPUs, on a newer one."""
    monkeypatch.setenv("CNLLAMA_EMULATOR_CODE", "80")
    pair = opened(engines(cuda, model))
    same_step(pair, [(0, TEXT, False)])
    for token in (3, 8, 9):
        same_step(pair, [(0, np.array([token], np.int32), False)])


def test_captured_steps_that_are_kept_are_counted(cuda, model) -> None:
    pair = engines(cuda, model, context=64, max_sequences=32)
    for _ in range(32):
        opened(pair)
    shapes = [(rows, k) for rows in (32, 16, 8, 4, 2, 1) for k in (520, 270, 140, 70, 40, 1)]  # buffers do not grow
    for rows, k in (*shapes, shapes[0], shapes[-1]):
        batch = [(i, TEXT[i % 9 : i % 9 + 1], False) for i in range(rows)]
        _, values = pair[0].step_top(batch, k)
        expected = -np.sort(-pair[1].step(batch), axis=1)[:, :k]
        np.testing.assert_array_equal(-np.sort(-values, axis=1), expected)
        assert pair[0].graphs() <= 32
    assert pair[0].graphs() == 32


def test_a_step_of_more_rows_than_a_grid_has_is_refused(cuda, model) -> None:
    with pytest.raises(ValueError, match=r"max_step_tokens is 65505, outside 1 \.\. 65504"):
        engines(cuda, model, max_step_tokens=65505)


def test_limit_of_a_step_is_the_one_asked_for(cuda, model) -> None:
    engine, _ = engines(cuda, model, max_step_tokens=10)
    engine.open()
    assert engine.max_step_tokens == 10
    with pytest.raises(ValueError, match="a step of 15 tokens is over the limit of 10"):
        engine.step([(0, TEXT, False)])


@pytest.mark.skipif(cuda_backend.on_a_gpu(), reason="the size of a GPU cannot be set")
def test_too_small_a_gpu_is_refused_with_the_context_that_fits(cuda, model, monkeypatch) -> None:
    engine, _ = engines(cuda, model, context=64)
    sizes = engine.memory()
    fixed = sizes["weights"] + sizes["scratch"] + (256 << 20)
    del engine
    monkeypatch.setenv("CNLLAMA_EMULATOR_MEMORY", str(fixed + 200 * 3 * sizes["kv_per_token"]))
    with pytest.raises(
        RuntimeError, match=r"a context of 4096 needs .* GiB of GPU memory .*: a context of \d+ fits, --ctx"
    ):
        engines(cuda, model, context=4096)
    monkeypatch.setenv("CNLLAMA_EMULATOR_MEMORY", str(1 << 20))
    with pytest.raises(RuntimeError, match="no context fits; use the CPU or a larger GPU"):
        engines(cuda, model, context=64)


@pytest.mark.parametrize("option", ["no-graphs", "dp4a", "wait no-early-start"])
def test_options_change_no_bit(cuda, model, monkeypatch, option) -> None:
    monkeypatch.setenv("CNLLAMA_CUDA_OPTIONS", option)
    pair = engines(cuda, model)
    for engine in pair:
        engine.open()
    same_step(pair, [(0, TEXT, False)])
    for token in (3, 8, 9):
        same_step(pair, [(0, np.array([token], np.int32), False)])
    assert (pair[0].replays() > 0) == (option == "dp4a")


def test_unknown_options_are_refused(cuda, model, monkeypatch) -> None:
    monkeypatch.setenv("CNLLAMA_CUDA_OPTIONS", "fast")
    with pytest.raises(ValueError, match="CNLLAMA_CUDA_OPTIONS has 'fast', expected no-graphs"):
        engines(cuda, model)


def test_the_device_describes_itself(cuda) -> None:
    device = cuda.device()
    assert set(device) == {
        "problem", "name", "compute_capability", "processors", "driver", "runtime", "free_bytes", "total_bytes",
    }  # fmt: skip
    assert device["problem"] == ""
    assert device["name"]


def test_stub_names_what_the_module_has(cuda) -> None:
    tree = ast.parse((ROOT / "cnllama/_cuda.pyi").read_text())
    members = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    members |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    (engine,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    for child in engine.body:
        if isinstance(child, ast.FunctionDef | ast.AnnAssign):
            name = child.name if isinstance(child, ast.FunctionDef) else child.target.id
            members.add(f"Engine.{name}")
    found = {name for name, value in vars(cuda).items() if not isinstance(value, ModuleType)}
    found |= {f"Engine.{name}" for name in vars(cuda.Engine)}
    found = {name for name in found if not name.split(".")[-1].startswith("_") and not name.startswith("_")}
    assert members - {"Engine.__init__"} == found


def answers(path: Path | None, device: str, tokens: int, **options: Any) -> list[Any]:
    """(ids, their log probabilities) of two answers."""
    from cnllama import LLM

    with LLM(path, device=device, max_sequences=2, ctx=256, speculate=options.pop("speculate", None)) as llm:
        prompts = ["你好，请介绍一下你自己。", "The cat sat on the mat and the cat sat on"]
        found = llm.generate(prompts, max_tokens=tokens, ignore_eos=True, **options)
    return [(completion.token_ids, completion.logprobs) for completion in found]


@pytest.mark.parametrize(
    ("options", "largest_decide"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0, "speculate": "lookup", "repeat_penalty": 1.0}, True),
        ({"temperature": 1.1, "top_k": 12, "top_p": 0.9, "min_p": 0.01, "repeat_penalty": 1.3, "seed": 3}, True),
        ({"temperature": 1.1, "top_k": 0, "top_p": 0.9, "seed": 3}, False),
        ({"temperature": 0, "logprobs": 2}, False),
    ],
)
def test_answers_are_the_cpu_s(cuda, tiny_cnl, monkeypatch, options, largest_decide) -> None:
    monkeypatch.setitem(sys.modules, "cnllama._cuda", cuda)
    monkeypatch.setattr("cnllama._cuda", cuda, raising=False)

    def refused(*_):
        raise AssertionError("this way was not to be taken")

    monkeypatch.setattr(cuda.Engine, "step" if largest_decide else "step_top", refused)
    assert answers(tiny_cnl, "cuda", 6, **options) == answers(tiny_cnl, "cpu", 6, **options)


@pytest.mark.skipif(not cuda_backend.on_a_gpu(), reason="no GPU, and the demonstration model is slow in the emulation")
def test_demonstration_model_says_the_same() -> None:
    if not list((ROOT / "cnllama/demo").glob("*.cnl")):
        pytest.skip("no demonstration model in this tree")
    assert answers(None, "cuda", 100, temperature=0) == answers(None, "cpu", 100, temperature=0)


def test_one_thread_at_a_time(cuda, model) -> None:
    config, tensors = model
    engine = cuda.Engine(config, tensors, context=64, max_sequences=4)
    reference = _core.Engine(config, tensors, threads=1, context=64)
    reference.open()
    expected = reference.step([(0, TEXT, True)])

    def run(_: int) -> None:
        for _ in range(4):
            sequence = engine.open()
            for begin in range(0, len(TEXT), 5):
                found = engine.step([(sequence, TEXT[begin : begin + 5], True)])
                np.testing.assert_array_equal(found, expected[begin : begin + 5])
            engine.trim(sequence, 3)
            ids, _ = engine.step_top([(sequence, TEXT[3:], False)], 1)
            assert ids[0, 0] == expected[-1].argmax()
            assert engine.length(sequence) == len(TEXT)
            engine.close(sequence)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3), timeout=120))


def test_a_forked_child_is_refused(cuda, model) -> None:
    config, tensors = model
    engine = cuda.Engine(config, tensors, context=64)
    engine.open()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            engine.step([(0, TEXT, False)])
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"a forked process cannot use its parent's GPU memory" in os.read(reading, 1000)
    assert engine.step([(0, TEXT, False)]).shape[0] == 1
