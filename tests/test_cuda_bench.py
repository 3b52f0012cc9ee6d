# SPDX-License-Identifier: Apache-2.0
"""bench/gpu without a GPU: the stages say why they cannot run, the gate's parts read what they should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench" / "gpu"))

PTXAS = """ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, 352 bytes cmem[0]
"""


def test_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    stages = ["build", "ceilings", "sanitizer", "kernels", "engine", "peers"]
    command = [sys.executable, ROOT / "bench/gpu/run.py", "--dry", "--out", tmp_path, "--stages", *stages]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["environment"]["python"]
    assert set(found["stages"]) == set(stages) - {"build"}
    for name in ("ceilings", "kernels", "engine"):
        assert found["stages"][name]["status"] == "skipped"
        assert found["stages"][name]["reason"]
    assert (tmp_path / "gpu.log").read_text().splitlines()[-1].endswith("failed: none")


def test_a_failing_stage_does_not_stop_the_next(tmp_path: Path, monkeypatch) -> None:
    import run

    def fails(*_):
        raise RuntimeError("the device is lost")

    monkeypatch.setitem(run.RUNNERS, "ceilings", fails)
    monkeypatch.setitem(run.RUNNERS, "kernels", lambda *_: {"rows": [{"name": "x", "value": 1, "unit": "GB/s"}]})
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path), "--stages", "ceilings", "kernels"])
    assert run.main() == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert found["ceilings"]["status"] == "failed"
    assert found["ceilings"]["reason"] == "the device is lost"
    assert found["kernels"]["status"] == "ok"


def test_random_model_has_the_sizes_of_its_config() -> None:
    import stages

    from cnllama import _core

    config = {
        **stages.MODEL_7B,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 128,
        "num_attention_heads": 2,
    }
    config.update(num_key_value_heads=2, head_dim=32)
    config, tensors = stages.random_model(config, 2)
    engine = _core.Engine(config, tensors, context=64, threads=1)
    engine.open()
    import numpy as np

    assert np.isfinite(engine.step([(0, np.array([1, 2, 3], np.int32), False)])).all()


def test_gate_reads_ptxas() -> None:
    import gate

    first, second = gate.ptxas_kernels(PTXAS)
    assert (first.name, first.registers, first.shared, first.stack, first.spills) == ("_Z1aPf", 40, 1024, 16, 12)
    assert (second.name, second.registers, second.spills) == ("_Z1bv", 12, 0)
    assert len(list(gate.problems_of(first, "80"))) == 1
    assert not list(gate.problems_of(second, "80"))


def test_gate_reads_machine_code() -> None:
    import gate

    loop = [
        "LDG.E.NA.128.CONSTANT R4, [R2]",
        *["IMMA.16832.U8.S8 R8, R4, R6, R8"] * 2,
        *["FFMA R1, R2, R3, R4"] * 29,
        "@P0 BRA 0x10",
    ]
    kernel = gate.Kernel("stream_kernel<1, 1, 1, false>", code=["MOV R1, c[0x0][0x28]", *loop, "EXIT"])
    assert gate.hot_loop(kernel.code) == loop
    assert gate.instructions_per_weight(kernel) == pytest.approx(len(loop) * 32 / 1024)
    assert not list(gate.problems_of(kernel, "80"))
    kernel.code[1] = "LDL R4, [R2]"
    assert len(list(gate.problems_of(kernel, "80"))) == 2


def test_gate_compares_with_the_table() -> None:
    import gate

    own = {"80": {"a": {"registers": 60, "shared": 0}, "b": {"registers": 10, "shared": 2}}}
    table = {"80": {"a": {"registers": 40, "shared": 0}, "c": {"registers": 1, "shared": 0}}}
    problems = gate.compare(own, table)
    assert len(problems) == 3
    assert any("registers 60, expected at most 48" in problem for problem in problems)


def test_committed_table_names_every_kernel_that_is_compiled() -> None:
    table = json.loads((ROOT / "bench/gpu/kernels.json").read_text())
    names = {name.split("<")[0] for kernels in table.values() for name in kernels}
    sources = "\n".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cu"))
    assert names
    assert all(name in sources for name in names)
