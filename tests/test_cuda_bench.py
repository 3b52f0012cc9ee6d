# SPDX-License-Identifier: Apache-2.0
"""bench/gpu without a GPU: the stages say why they cannot run, the gate's parts read what they should."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_backend
import numpy as np
import pytest

from cnllama import _core

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench" / "gpu"))

import correctness  # noqa: E402
import engine_stage  # noqa: E402
import gate  # noqa: E402
import journal  # noqa: E402
import machine_code  # noqa: E402
import measures  # noqa: E402
import run  # noqa: E402

PTXAS = """ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, 352 bytes cmem[0]
"""


RES_USAGE = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1av:
  REG:42 STACK:16 SHARED:64 LOCAL:8 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
arch = sm_90a
 Function _Z1av:
  REG:40 STACK:0 SHARED:1088 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = """
Fatbin elf code:
================
arch = sm_80
\t\tFunction : _Z1av
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                /* 0x00000a00ff017624 */
                                                                         /* 0x000fe400078e00ff */
        /*0010*/               @P0 EXIT ;                                /* 0x000000000000094d */
\t\tFunction : _Z1bv
        /*0000*/                   EXIT ;                                /* 0x000000000000094d */

Fatbin elf code:
arch = sm_90a
\t\tFunction : _Z1av
        /*0000*/                   NOP ;                                 /* 0x000000000000094d */
"""

PYTEST = """tests/test_cuda_ops.py::test_rope[32-fp16] PASSED                [ 10%]
tests/test_cuda_ops.py::test_rope[wait no-early-start] FAILED            [ 20%]
tests/test_cuda_ops.py::test_argmax[forward] SKIPPED (a GPU has an order of its own) [ 30%]
tests/test_cuda_ops.py::test_embed PASSED                                [ 40%]
tests/test_cuda_ops.py::test_crash Fatal Python error: Segmentation fault
FAILED tests/test_cuda_ops.py::test_rope[wait no-early-start] - AssertionError: 3 values differ
"""


@pytest.mark.skipif(cuda_backend.on_a_gpu(), reason="a dry run is for machines without a GPU")
def test_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    emulation = Path(cuda_backend.load().__file__).parent
    command = [
        sys.executable,
        ROOT / "bench/gpu/run.py",
        "--dry",
        "--out",
        tmp_path,
        "--match",
        "test_gather_rows or test_argmax",
    ]
    variables = {**os.environ, "CNLLAMA_EMULATION": str(emulation)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=variables)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["environment"]["python"]
    assert found["environment"]["dry"] == "figures mean nothing"
    statuses = {name: stage["status"] for name, stage in found["stages"].items()}
    expected = dict.fromkeys(statuses, "ok") | {"peers": "skipped"}
    assert statuses == expected
    assert set(statuses) == set(run.LIMITS)
    tests = found["stages"]["correctness"]["tests"]
    assert {"test_cuda_ops.py::test_gather_rows", "test_cuda_ops.py::test_argmax"} <= set(tests)
    assert all(verdict["passed"] and not verdict["failed"] for verdict in tests.values())
    for name, rows in (("ceilings", 6), ("kernels", 25), ("engine", 7)):
        assert len(found["stages"][name]["rows"]) >= rows
    log = (tmp_path / "gpu.log").read_text()
    table = result.stdout.splitlines()[-len(log.split("\n\n")[-1].splitlines()) :]
    assert any(line.startswith("correct   ") for line in table)
    assert any(line.startswith("engine    prefill 9 ") for line in table)
    assert log.splitlines()[-1] == table[-1] == "8 stages, failed: none"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log"]


def test_what_cannot_run_says_why(tmp_path: Path, monkeypatch, capsys) -> None:
    if cuda_backend.on_a_gpu():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(run, "find_tool", lambda _: None)
    assert run.main(["--out", str(tmp_path)]) == 0
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert stages["build"]["reason"] == "no nvcc"
    reasons = {stage["reason"] for name, stage in stages.items() if name != "build"}
    assert len(reasons) == 1
    assert "\n" not in reasons.pop()
    assert "no figures: nothing ran on a GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "known", "expected"),
    [
        ("9.0", "compute_80\ncompute_90", "90a-real"),
        ("8.9", "compute_89", "89-real"),
        ("12.1", "compute_80\ncompute_90", ""),
        ("", "compute_90", ""),
    ],
)
def test_build_is_for_this_gpu(tmp_path: Path, monkeypatch, capability, known, expected) -> None:
    answers = {"--query-gpu=compute_cap": capability, "--list-gpu-arch": known, "-L": "GPU 0: one"}
    monkeypatch.setattr(run, "find_tool", lambda name: f"/toolkit/bin/{name}")
    monkeypatch.setattr(run, "output_of", lambda _, option, *__: answers[option])
    book, calls = journal.Journal(tmp_path), []
    monkeypatch.setattr(book, "check", lambda command, limit, **variables: calls.append((command, variables)))
    found = run.build(run.Plan(book, tmp_path, dry=False, match=""), 100)
    ((command, variables),) = calls
    assert found == {"architecture": expected or "all"}
    assert ("-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=" + expected in command) == bool(expected)
    assert "-Ccmake.define.CNLLAMA_CUDA=ON" in command
    assert variables["CUDACXX"] == "/toolkit/bin/nvcc"
    assert variables["PATH"].endswith(":/toolkit/bin")


def test_a_failing_stage_keeps_what_it_found_and_does_not_stop_the_next(tmp_path: Path, monkeypatch) -> None:
    row = {"name": "x", "value": 1, "unit": "GB/s"}

    def fails(*_):
        raise journal.StageFailedError("the device is lost", {"rows": [row]})

    def breaks(*_):
        raise KeyError("nobody thought of this")

    monkeypatch.setitem(run.RUNNERS, "ceilings", fails)
    monkeypatch.setitem(run.RUNNERS, "kernels", breaks)
    monkeypatch.setitem(run.RUNNERS, "peers", lambda *_: {"rows": [row]})
    assert run.main(["--out", str(tmp_path), "--stages", "ceilings", "kernels", "peers"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert (found["ceilings"]["status"], found["ceilings"]["reason"]) == ("failed", "the device is lost")
    assert found["ceilings"]["rows"] == [row]
    assert (found["kernels"]["status"], found["peers"]["status"]) == ("failed", "ok")
    assert (tmp_path / "gpu.log").read_text().splitlines()[-1] == "3 stages, failed: ceilings, kernels"


def test_a_program_ends_with_its_time_and_all_it_started(tmp_path: Path) -> None:
    book = journal.Journal(tmp_path)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    ran = book.run([sys.executable, "-c", f"print('begun', flush=True); {child}"], 3)
    assert ran.code is None
    assert ran.reason(3) == "took more than 3 s"
    assert ran.text == "begun\n"
    with pytest.raises(journal.StageFailedError, match=r"^ended with 3:\nwhy$"):
        book.check([sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60)


def test_verdicts_of_tests() -> None:
    found, running = correctness.verdicts(PYTEST)
    assert {name: (v.passed, v.failed, v.skipped) for name, v in found.items()} == {
        "test_rope": (1, 1, 0),
        "test_argmax": (0, 0, 1),
        "test_embed": (1, 0, 0),
    }
    assert found["test_rope"].reason == "AssertionError: 3 values differ"
    assert running == "test_crash"
    assert correctness.culprit(found, running) == "test_crash"
    found["test_embed"].reason = "RuntimeError: ... (an illegal access); it is lost to this process, start it again"
    assert correctness.culprit(found, running) == "test_embed"


def test_a_test_that_ends_the_process_is_blamed_alone(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_three.py").write_text(
        "import os\n"
        "def test_first(): pass\n"
        "def test_second(): os._exit(7)\n"
        "def test_third(): raise RuntimeError('wrong; it is lost to this process, start it again')\n"
        "def test_fourth(): pass\n"
    )
    monkeypatch.setattr(journal, "ROOT", tmp_path)
    monkeypatch.setattr(correctness, "FILES", ("test_three.py",))
    with pytest.raises(journal.StageFailedError, match=r"^2 of 4: test_three\.py::test_second, ") as caught:
        correctness.run(journal.Journal(tmp_path), 300)
    tests = {name.split("::")[1]: verdict for name, verdict in caught.value.found["tests"].items()}
    assert {name: verdict["passed"] for name, verdict in tests.items()} == {
        "test_first": 1, "test_second": 0, "test_third": 0, "test_fourth": 1,
    }  # fmt: skip
    assert tests["test_second"]["reason"] == "ended with 7:"
    assert "is lost to this process" in tests["test_third"]["reason"]
    assert any(
        line.startswith("WRONG     test_three.py::test_second: 1 of 1")
        for line in correctness.lines(caught.value.found["tests"])
    )


def test_calls_are_repeated_and_must_agree() -> None:
    count = iter(range(100))
    functions = SimpleNamespace(same=lambda: (np.ones(3),), other=lambda: np.array([next(count)]))
    repeated = cuda_backend.Repeated(functions)
    assert repeated.same()[0].tolist() == [1, 1, 1]
    with pytest.raises(AssertionError, match="other gives other bits the next time"):
        repeated.other()


def test_random_model_has_the_sizes_of_its_config() -> None:
    config = {**measures.SMALL_MODEL, "num_hidden_layers": 2}
    engine = _core.Engine(config, engine_stage.random_model(config), context=64, threads=1)
    engine.open()
    assert np.isfinite(engine.step([(0, np.array([1, 2, 3], np.int32), False)])).all()


def test_gate_reads_ptxas() -> None:
    first, second = machine_code.ptxas_kernels(PTXAS, "80")
    assert (first.name, first.registers, first.shared, first.stack, first.spills) == ("_Z1aPf", 40, 1024, 16, 12)
    assert (second.name, second.registers, second.spills) == ("_Z1bv", 12, 0)
    assert list(gate.problems_of(first)) == [
        "sm_80 _Z1aPf: 12 bytes of spills, limit 0",
        "sm_80 _Z1aPf: 16 bytes of stack, limit 0",
    ]
    assert not list(gate.problems_of(second))


def test_gate_reads_a_module() -> None:
    first, second = machine_code.usage_of(iter(RES_USAGE.splitlines(keepends=True)))
    assert (first.architecture, first.registers, first.shared, first.stack, first.spills) == ("80", 42, 64, 16, 8)
    assert (second.architecture, second.registers, second.shared) == ("90a", 40, 64)  # Hopper's own kilobyte
    functions = list(machine_code.functions_of(iter(SASS.splitlines(keepends=True))))
    assert functions == [
        ("80", "_Z1av", ["MOV R1, c[0x0][0x28]", "@P0 EXIT"]),
        ("80", "_Z1bv", ["EXIT"]),
        ("90a", "_Z1av", ["NOP"]),
    ]


def test_gate_reads_machine_code() -> None:
    loop = [
        "LDG.E.NA.128.CONSTANT R4, [R2]",
        *["IMMA.16832.U8.S8 R8, R4, R6, R8"] * 2,
        *["FFMA R1, R2, R3, R4"] * 29,
        "@P0 BRA 0x10",
    ]
    code = ["MOV R1, c[0x0][0x28]", *loop, "EXIT"]
    kernel = machine_code.Kernel("stream_kernel<1, 1, 1, false>", "80", registers=70, code=code)
    assert gate.hot_loop(kernel.code) == loop
    assert gate.instructions_per_weight(kernel) == pytest.approx(len(loop) * 32 / 1024)
    assert not list(gate.problems_of(kernel))
    kernel.code[1] = "LDL R4, [R2]"
    assert list(gate.problems_of(kernel)) == [
        "sm_80 stream_kernel<1, 1, 1, false>: 1 accesses to local memory, limit 0",
        "sm_80 stream_kernel<1, 1, 1, false>: 0 loads of weights with 128 bits, expected some",
    ]
    kernel.code[1:2] = ["LDG.E.NA.128.CONSTANT R4, [R2]", *["NOP"] * 40]
    kernel.code[-2] = "@P0 BRA 0x10"
    (problem,) = gate.problems_of(kernel)
    assert problem == "sm_80 stream_kernel<1, 1, 1, false>: 2.28 instructions a weight, limit 1.6"
    numbers, problems = gate.judge([kernel])
    assert problems == [problem]
    assert numbers["80"][kernel.name] == {"registers": 70, "shared": 0, "instructions_per_weight": 2.28}


def test_gate_compares_with_the_table() -> None:
    own = {"80": {"a": {"registers": 60, "shared": 0}, "b": {"registers": 10, "shared": 2}}}
    table = {"80": {"a": {"registers": 40, "shared": 0}, "c": {"registers": 1, "shared": 0}}}
    assert gate.compare(own, table) == [
        "sm_80 a: registers 60, limit 48",
        "sm_80 b: not in kernels.json; run gate.py --update and look at it",
        "sm_80 c: in kernels.json but gone",
    ]
    assert len(gate.compare(own, table, whole=False)) == 2


def test_gate_says_why_it_has_nothing_to_look_at(monkeypatch, capsys) -> None:
    monkeypatch.setattr(gate, "installed_module", lambda: (None, "no cnllama._cuda is installed"))
    monkeypatch.setattr(gate.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["gate.py"])
    assert gate.main() == gate.SKIPPED
    assert capsys.readouterr().out == ("skipped: no cnllama._cuda is installed, and there is no nvcc to compile with\n")


def test_gate_fails_with_a_line_for_every_violation(monkeypatch, capsys) -> None:
    table = json.loads((ROOT / "bench/gpu/kernels.json").read_text())
    limit = table["80"]["gather_kernel"]["registers"] + gate.REGISTER_SLACK
    kernels = [
        machine_code.Kernel(name, architecture, int(numbers["registers"]), int(numbers["shared"]))
        for architecture, own in table.items()
        for name, numbers in own.items()
    ]
    (changed,) = (k for k in kernels if (k.architecture, k.name) == ("80", "gather_kernel"))
    monkeypatch.setattr(gate, "chosen_kernels", lambda *_: iter(kernels))
    monkeypatch.setattr(sys, "argv", ["gate.py"])
    assert gate.main() == 0
    changed.registers, changed.stack = limit + 1, 8
    assert gate.main() == 1
    assert capsys.readouterr().out.splitlines()[1:] == [
        "sm_80 gather_kernel: 8 bytes of stack, limit 0",
        f"sm_80 gather_kernel: registers {limit + 1}, limit {limit}",
        f"{len(kernels)} kernels, 2 problems",
    ]


def test_committed_table_names_the_kernels_of_the_sources() -> None:
    table = json.loads((ROOT / "bench/gpu/kernels.json").read_text())
    assert set(table) == set(machine_code.ARCHITECTURES)
    assert all(set(kernels) == set(table["80"]) for kernels in table.values())
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "csrc/cuda").glob("*.cu")))
    launched = set(re.findall(r"__global__ void (?:__launch_bounds__\([^;{]*?\)\s+)?(\w+)\(", sources))
    assert launched == {name.split("<")[0] for name in table["80"]}
