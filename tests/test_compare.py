# SPDX-License-Identifier: Apache-2.0
"""bench/compare.py: what fits into memory together, engines that fail, and the whole with this project alone."""

from __future__ import annotations

import importlib.util
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import compare
import numpy as np
import pytest
import report
from peers.base import OVERHEAD, Spec
from peers.client import Client, PeerError
from peers.session import Session, Settings, divergence, need, waves
from test_bench import ROOT, python

from cnllama import LLM, _core, bench
from cnllama.bench import Measure
from cnllama.errors import InputError
from cnllama.eval.gguf_header import read_gguf


def spec(name: str, module: str = "hf", **changes: Any) -> Spec:
    values: dict[str, Any] = {"options": {"model": name}, "file_bytes": 100, "weights": 90, "kv": 2}
    return Spec(name, module, **(values | changes))


def test_memory_that_engines_need_together() -> None:
    ours = spec("cnllama", "cnl", mapped=Path("a"))
    plain, repack = spec("p", mapped=Path("b")), spec("r", mapped=Path("b"), private=100)
    assert need([ours], 5) == 100 + OVERHEAD + 10
    assert need([ours, plain, repack], 5) == 200 + 100 + 3 * (OVERHEAD + 10)
    assert need([ours], 5, [plain]) == 200 + 2 * OVERHEAD + 10


def test_what_does_not_fit_together_is_measured_in_groups_with_ours() -> None:
    ours = spec("cnllama", "cnl", mapped=Path("a"))
    a, b, huge = spec("a", private=100), spec("b", private=100), spec("huge", private=10**12)
    together = need([ours, a, b], 5)
    assert waves([ours, a, huge, b], 5, together) == ([[ours, a, b]], [huge])
    assert waves([ours, a, huge, b], 5, together - 1) == ([[ours, a], [ours, b]], [huge])
    assert waves([a], 5, together) == ([[a]], [])
    assert waves([ours], 5, 1) == ([], [ours])


def test_divergence_of_two_distributions() -> None:
    p, q = np.log(np.float32([0.5, 0.5])), np.log(np.float32([0.25, 0.75])) + np.float32(3)
    assert divergence(p, p + 7) == pytest.approx(0, abs=1e-12)
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


def test_sizes_with_rounds() -> None:
    assert compare.parse_sizes("128,512:3", "--prefill", 1) == [(128, None), (512, 3)]
    for wrong in ("0", "8:", "8:0", "-1", "a"):
        with pytest.raises(InputError, match="expected N or N:ROUNDS"):
            compare.parse_sizes(wrong, "--prefill", 1)


def test_planned_measures(tiny_cnl: Path) -> None:
    args = compare.arguments([str(tiny_cnl), "--prefill", "512,2048", "--decode-context", "0:7,64", "--batch", "1,8"])
    planned = [(p.measure.name, p.rounds) for p in compare.plan_measures(args)]
    assert planned == [
        ("prefill 512", 5),
        ("prefill 2048", 3),
        ("decode at 0", 7),
        ("decode at 64", 5),
        ("decode at 0, batch 8", 5),
    ]


def gguf_bytes(file_type: int = 2) -> bytes:
    """Two tensors of 64 and 96 bytes behind a header with one value of each kind that is read."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    numbers = {"general.file_type": file_type, "llama.block_count": 3, "llama.embedding_length": 128}
    numbers |= {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    pairs = [text(key) + struct.pack("<II", 4, value) for key, value in numbers.items()]
    pairs.append(text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("甲") + text("乙"))
    pairs.append(text("scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.5))
    tensors = [
        text(name) + struct.pack("<IQQIQ", 2, 8, 8, 2, offset)
        for name, offset in (("token_embd.weight", 0), ("output.weight", 64))
    ]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return header + bytes(-len(header) % 32) + bytes(64 + 96)


def test_gguf_header(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes())
    found = read_gguf(path)
    assert found.tensors == {"token_embd.weight": 64, "output.weight": 96}
    assert found.step_bytes == 96
    assert found.kv_bytes == 3 * 2 * 32 * 2 * 2  # layers, kv heads, values, keys and values, fp16
    assert found.type_name == "q4_0"
    whole = path.read_bytes()
    for length in (3, 10, 100, len(whole) - 200):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.gguf: "):
            read_gguf(path)
    with pytest.raises(InputError, match="no GGUF file"):
        read_gguf(ROOT / "pyproject.toml")


def session(specs: list[Spec], available: int = 1 << 40) -> Session:
    return Session(specs, Settings(2, bench.TEXT, 0.0, 16, available, (1000, 10)), lambda line: None)


def test_an_engine_that_dies_is_named_and_the_others_go_on(tiny_cnl: Path) -> None:
    options = {"model": str(tiny_cnl), "threads": 1, "kv_type": "fp16"}
    good = spec("cnllama", "cnl", options=options, mapped=tiny_cnl)
    dead = spec("dead", options={"model": "x"}, python="/bin/false")
    broken = spec("broken", "cnl", options=options | {"model": str(ROOT / "pyproject.toml")})
    with session([good, dead, broken]) as running:
        (start,) = running.start(1, 8)
        assert start["engine"] == "cnllama"
        assert start["process_to_first_s"][0] > start["open_to_first_s"][0] > start["load_s"][0] > 0
        (row,) = running.run(Measure("decode", 3, steps=4), 2, None)
    assert (row["engine"], len(row["seconds"])) == ("cnllama", 2)
    reasons = {entry["name"]: entry["reason"] for entry in running.skipped}
    assert reasons["dead"] == "its process ended with exit code 1"
    assert "InputError" in reasons["broken"]
    assert "pyproject.toml" in reasons["broken"]


def test_an_engine_too_large_for_the_memory_is_named(tiny_cnl: Path) -> None:
    huge = spec("huge", private=1 << 40)
    with session([huge], available=1 << 35) as running:
        assert running.run(Measure("prefill", 8), 1, None) == []
        assert running.start(1, 8) == []
    assert [entry["measure"] for entry in running.skipped] == ["prefill 8", None]
    assert "it needs 1024.5 GiB and 32.0 GiB can be had" in running.skipped[0]["reason"]


def test_a_worker_says_what_went_wrong(tiny_cnl: Path) -> None:
    client = Client(spec("cnllama", "cnl"), 1)
    try:
        with pytest.raises(PeerError, match="do_nonsense"):
            client.call("nonsense")
        facts = client.call("open", options={"model": str(tiny_cnl), "threads": 1, "kv_type": "fp16"}, text="天空。")
        with LLM(tiny_cnl, ctx=64) as llm:
            assert facts["text_tokens"] == len(llm.tokenize("天空。"))
            assert facts["vocab_size"] == llm.vocab_size
    finally:
        client.close()
    with pytest.raises(PeerError, match="cannot be started"):
        Client(spec("x", python="/nowhere/python"), 1)


ROW = {"measure", "kind", "size", "batch", "steps", "seconds", "limits", "tokens_per_s", "tokens_per_s_min"}
ROW |= {"tokens_per_s_max", "chars_per_s", "limit", "share", "share_min", "share_max", "engine", "against"}
ROW |= {"ours_to_this", "ours_to_this_min", "ours_to_this_max"}


def test_compare_from_end_to_end(tiny_cnl: Path, tmp_path: Path) -> None:
    out = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "png")}
    options = [part for name, path in out.items() for part in (f"--{name}", path)]
    sizes = ("--prefill", "8", "--decode-context", "0,9", "--batch", "1,2")
    done = python("bench/compare.py", tiny_cnl, "--quick", "--avx2", *sizes, *options)

    found = json.loads(out["json"].read_text(encoding="utf-8"))
    assert set(found) == {
        "schema", "machine", "limits", "settings", "engines", "start", "measures", "skipped"
    }  # fmt: skip
    rows = ["cnllama", "cnllama-avx2"] if "avx2" in _core.isas() else ["cnllama"]
    assert [engine["name"] for engine in found["engines"]] == rows
    assert [entry["measure"] for entry in found["measures"]] == [
        "prefill 8", "decode at 0", "decode at 9", "decode at 0, batch 2"
    ]  # fmt: skip
    for entry in found["measures"]:
        assert [row["engine"] for row in entry["results"]] == rows
        assert all(set(row) == ROW for row in entry["results"])
    if len(rows) == 2:
        assert found["engines"][1]["settings"].startswith("avx2")
        assert found["start"][1]["divergence"] == 0  # the same bits on every instruction set
    skipped = {entry["name"] for entry in found["skipped"]}
    assert {"llama.cpp", "transformers-bf16", "transformers-fp32", "ctranslate2-int8"} <= skipped
    text = out["markdown"].read_text(encoding="utf-8")
    assert text == report.markdown(found)
    for heading in ("## Start", "## Prefill 8", "## Decode at 0, batch 2", "## Skipped"):
        assert heading in text
    assert "## Decode at 9" in done.stdout
    assert out["png"].read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.markdown", "out.png"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("absent.cnl",), "no such file"),
        (("{file}", "--gguf", "pyproject.toml"), "pyproject.toml: this is no GGUF file"),
        (("{file}", "--only", "vllm"), "--only names 'vllm'; the engines are cnllama, "),
        (("{file}", "--prefill", "8:x"), "--prefill has '8:x'"),
        (("{file}", "--hf", "nowhere"), "--hf nowhere: there is no such directory"),
        (("{file}", "--json", "nowhere/out.json"), "there is no directory"),
        (("{file}", "--q4-k-m"), "--q4-k-m has no GGUF"),
        (("{file}", "--budget", "0"), "--budget is 0"),
        (("{file}", "--prefill", "", "--decode-context", ""), "there is nothing to measure"),
    ],
)
def test_compare_refuses(tiny_cnl: Path, arguments: tuple[str, ...], sentence: str) -> None:
    given = [argument.format(file=tiny_cnl) for argument in arguments]
    if sentence == "there is nothing to measure":
        given += ["--batch", ""]
    done = python("bench/compare.py", *given, code=2)
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_runs_the_same_weights(tiny_cnl: Path, tmp_path: Path) -> None:
    gguf, out = tmp_path / "tiny.gguf", tmp_path / "out.json"
    python("-m", "cnllama", "export", tiny_cnl, "--to", "gguf", "-o", gguf)
    sizes = ("--prefill", "40", "--decode-context", "33", "--batch", "1,2")
    python("bench/compare.py", tiny_cnl, "--gguf", gguf, "--only", "cnllama,llama", "--quick", *sizes, "--json", out)
    found = json.loads(out.read_text(encoding="utf-8"))
    ours, repack, plain = found["engines"]
    assert (repack["name"], plain["name"]) == ("llama.cpp-q4_1-repack", "llama.cpp-q4_1-plain")
    assert ours["chars_per_token"] == repack["chars_per_token"] == plain["chars_per_token"]
    assert ours["kv_bytes"] == plain["kv_bytes"]
    assert [entry["measure"] for entry in found["measures"]] == ["prefill 40", "decode at 33", "decode at 0, batch 2"]
    for entry in found["measures"]:
        assert [row["against"] for row in entry["results"]] == [None, "cnllama", "cnllama"]
    assert all(0 < start["divergence"] < 0.05 for start in found["start"][1:])


def test_workers_end_with_the_run(tiny_cnl: Path) -> None:
    command = [sys.executable, "bench/compare.py", str(tiny_cnl), "--start-rounds", "0", "--prefill", "8:999"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "1/999 rounds" in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.terminate()
    assert "interrupted" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert not Path(f"/proc/{children[0]}").exists()


def test_a_spent_budget_is_named(tiny_cnl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ("--quick", "--budget", "0.001", "--start-rounds", "0", "--prefill", "8", "--batch", "", "--json", out)
    done = python("bench/compare.py", tiny_cnl, *arguments, code=1)
    assert "no engine could be measured" in done.stderr
    (entry,) = [e for e in json.loads(out.read_text())["skipped"] if e["name"] == "all"]
    assert entry == {"name": "all", "reason": "the budget was spent", "measure": "prefill 8"}
