# SPDX-License-Identifier: Apache-2.0
"""`cnllama bench`: its arithmetic against numbers worked out by hand, what it times, and the command end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnllama import LLM, _core, bench
from cnllama.bench import LLMRunner, Measure, Work
from cnllama.cli.bench import parse_counts
from cnllama.errors import CnllamaError, InputError
from cnllama.resident import resident_memory

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter; the exit code must be `code`."""
    env = os.environ | {"LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def runner(tiny_cnl: Path) -> Any:
    found = LLMRunner(tiny_cnl, threads=2)
    yield found
    found.close()


# --- arithmetic


def test_bytes_of_a_step_and_multiply_adds_of_a_prompt() -> None:
    work = Work(weights=1000, kv=10, layer_macs=300, head_macs=70)
    # Steps 1 and 2 after 4 tokens read 5 and 6 positions of each of 3 sequences.
    assert work.step_bytes(context=4, steps=2, batch=3) == 1000 + 3 * 10 * 5.5
    assert work.prompt_macs(5) == 5 * 300 + 70


def test_shares_of_the_limits() -> None:
    work = Work(weights=1000, kv=10, layer_macs=300, head_macs=70)
    assert Measure("prefill", 5).share(seconds=2.0, limit=1570.0, work=work) == 0.5
    # 2 steps of 1165 bytes in 0.5 s are 4660 bytes a second.
    assert Measure("decode", 4, batch=3, steps=2).share(seconds=0.5, limit=9320.0, work=work) == 0.5


def test_work_of_a_model(tiny_cnl: Path) -> None:
    with LLM(tiny_cnl, ctx=64) as llm:
        work, vocab = bench.work_of(llm), llm.vocab_size
    shapes = [(96, 96), (32, 96), (32, 96), (96, 96), (224, 96), (224, 96), (96, 224)]  # q k v o gate up down
    assert work.layer_macs == 3 * sum(rows * cols for rows, cols in shapes)
    assert work.head_macs == vocab * 96
    assert work.kv == 3 * 1 * 32 * 2 * 2  # layers, kv heads, values, keys and values, fp16
    packed = 3 * sum(_core.packed_bytes("q4-a64", rows, cols) for rows, cols in shapes)
    assert work.weights == packed + _core.packed_bytes("q8-s64", vocab, 96) + 7 * 96 * 4


def test_summary_of_three_rounds() -> None:
    work = Work(weights=100, kv=0, layer_macs=0, head_macs=0)
    samples = [(2.0, 1600.0), (1.0, 1600.0), (4.0, 400.0)]
    figures = bench.summarize(Measure("decode", 0, batch=2, steps=8), samples, work, chars_per_token=0.5)
    assert [figures[name] for name in ("tokens_per_s", "tokens_per_s_min", "tokens_per_s_max")] == [8.0, 4.0, 16.0]
    assert figures["chars_per_s"] == 4.0
    # 800 bytes in 2, 1 and 4 s: 400, 800 and 200 a second, of 1600, 1600 and 400.
    assert [figures[name] for name in ("share", "share_min", "share_max")] == [0.5, 0.25, 0.5]
    assert bench.summarize(Measure("decode", 0), samples, work, None)["chars_per_s"] is None


def test_names_and_sizes_of_measures() -> None:
    prompt, batch = Measure("prefill", 512), Measure("decode", 0, batch=8)
    assert (prompt.name, prompt.context, prompt.room, prompt.tokens) == ("prefill 512", 0, 512, 512)
    assert (batch.name, batch.context, batch.room, batch.tokens) == ("decode at 0, batch 8", 0, 16, 128)


def test_characters_per_token_counts_ideographs_only(runner: LLMRunner) -> None:
    ideographs = len(re.findall("[\u4e00-\u9fff]", bench.TEXT))
    assert 250 < ideographs < len(bench.TEXT) < 500
    assert runner.chars_per_token == ideographs / len(runner.llm.tokenizer.encode(bench.TEXT))


def test_token_ids_are_fixed_and_ordinary() -> None:
    assert bench.token_ids(3, 1000).tolist() == [300, 300 + 40503 % 700, 300 + 81006 % 700]
    ids = bench.token_ids(4096, 49953)
    assert len(set(ids.tolist())) == 4096
    assert 300 <= ids.min() <= ids.max() < 49953
    assert bench.token_ids(100, 64).max() < 64


def test_interleaved_rounds_rotate_and_take_the_limit_around_each_run() -> None:
    order: list[str] = []
    limits = iter([1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0])

    def run(name: str, seconds: float) -> Any:
        return lambda: (order.append(name), seconds)[1]

    samples = bench.interleave({"a": run("a", 1.0), "b": run("b", 2.0)}, lambda: next(limits), 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert samples == {"a": [(1.0, 2.0), (1.0, 8.0), (1.0, 10.0)], "b": [(2.0, 4.0), (2.0, 6.0), (2.0, 12.0)]}


def test_a_run_that_fails_is_left_out_and_rounds_may_end_early() -> None:
    answers = iter([1.0, None])
    samples = bench.interleave({"a": lambda: next(answers), "b": lambda: 2.0}, lambda: 1.0, 4)
    assert [len(samples[name]) for name in "ab"] == [1, 4]
    samples = bench.interleave({"a": lambda: 1.0}, lambda: 1.0, 9, enough=lambda done: done == 2)
    assert len(samples["a"]) == 2


def test_spread() -> None:
    assert bench.spread([3.0, 1.0, 2.0]) == "2.0 (1.0-3.0)"
    assert bench.spread([0.125], 2) == "0.12"


# --- what is timed


def test_the_runner_computes_what_the_model_computes(runner: LLMRunner) -> None:
    vocab = runner.vocab_size
    runner.prepare(context=300, room=4, batch=2)
    engine = runner.llm.engine
    assert [engine.length(sequence) for sequence in (0, 1)] == [300, 300]
    for step in (0, 1):
        runner.step(bench.token_ids(2, vocab))
        assert [engine.length(sequence) for sequence in (0, 1)] == [301 + step] * 2
    rows = np.array(runner.logits)
    runner.rewind()
    assert [engine.length(sequence) for sequence in (0, 1)] == [300, 300]
    context, next_ids = bench.token_ids(300, vocab).tolist(), bench.token_ids(2, vocab).tolist()
    for row, token in zip(rows, next_ids, strict=True):
        assert np.array_equal(row, runner.llm.logits([*context, token, token])[-1])


@pytest.mark.parametrize("tokens", [5, 300])
def test_a_timed_prompt_starts_from_an_empty_cache(runner: LLMRunner, tokens: int) -> None:
    bench.fill(runner, 0, tokens, 1)
    assert bench.time_prefill(runner, tokens, 0.0) > 0
    timed = np.array(runner.logits)[-1]
    assert runner.llm.engine.length(0) == 0
    assert np.array_equal(timed, runner.llm.logits(bench.token_ids(tokens, runner.vocab_size).tolist())[-1])


def test_timed_decoding_repeats_from_the_same_context(runner: LLMRunner) -> None:
    bench.fill(runner, 7, 16, 1)
    assert bench.time_decode(runner, 16, 1, 0.02) > 0
    assert runner.llm.engine.length(0) == 7
    ids = [*bench.token_ids(7, runner.vocab_size).tolist(), *bench.token_ids(16, runner.vocab_size).tolist()]
    assert np.array_equal(np.array(runner.logits)[0], runner.llm.logits(ids)[-1])


def test_the_first_prompt_has_as_many_tokens_as_fit(runner: LLMRunner) -> None:
    prompt = bench.first_prompt(runner.llm, 16)
    assert len(runner.llm.prompt_ids(prompt)) <= 16
    assert len(runner.llm.prompt_ids(bench.TEXT[: len(prompt) + 1])) > 16


def test_resident_memory_knows_the_mapped_file(runner: LLMRunner, tiny_cnl: Path) -> None:
    runner.prepare(0, 2, 1)
    runner.step(bench.token_ids(1, runner.vocab_size))
    found = resident_memory(tiny_cnl)
    assert found is not None
    assert 0 < found["mapped"] <= tiny_cnl.stat().st_size + 4096
    assert found["mapped"] < found["resident"] <= found["peak"]
    elsewhere = resident_memory(ROOT / "pyproject.toml")
    assert elsewhere is not None
    assert elsewhere["mapped"] == 0


def test_a_first_token_that_never_comes(tmp_path: Path) -> None:
    with pytest.raises(CnllamaError, match=r"ended with exit code 2: .*absent\.cnl"):
        bench.first_token_seconds(tmp_path / "absent.cnl", "天", [])


# --- cnllama bench


def test_bench_prints_every_measure(tiny_cnl: Path) -> None:
    arguments = ("--quick", "--prefill", "8,2000", "--decode", "0,20", "--batch", "2", "--threads", 1)
    out = python("-m", "cnllama", "bench", tiny_cnl, *arguments).stdout
    assert "1 threads" in out
    assert re.search(r"process start to first token of a 1\d-token prompt: [\d.]+ s", out)
    for name in ("prefill 8", "decode at 0", "decode at 20", "decode at 0, batch 2"):
        share = r"\d+% of the (int8 peak|read bandwidth, \d+% of a loop over the weights)"
        assert re.search(rf"^{name} +[\d.]+ tok/s .* chars/s +{share}$", out, re.M), out
    assert "prefill 2000: left out, the model was made for 1024" in out
    assert re.search(r"memory: \d+ MiB of the file, \d+ MiB of cache, \d+ MiB besides", out)


def test_bench_as_json(tiny_cnl: Path) -> None:
    arguments = ("--json", "--quick", "--prefill", "8", "--decode", "", "--batch", "2", "--kv", "int8", "--rounds", 2)
    found = json.loads(python("-m", "cnllama", "bench", tiny_cnl, *arguments).stdout)
    assert found["file"] == str(tiny_cnl)
    assert found["kv_type"] == "int8"
    assert found["start"]["prompt_tokens"] <= bench.FIRST_PROMPT
    assert len(found["start"]["first_token_s"]) == 2
    assert [m["measure"] for m in found["measures"]] == ["prefill 8", "decode at 0, batch 2"]
    for m in found["measures"]:
        assert len(m["seconds"]) == len(m["limits"]) == 2
        assert m["chars_per_s"] == pytest.approx(m["tokens_per_s"] * found["chars_per_token"])
    assert found["memory"]["besides"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("absent.cnl",), "no such file"),
        (("pyproject.toml",), "safetensors"),
        (("{file}", "--prefill", "0"), "--prefill has '0', expected integers from 1"),
        (("{file}", "--decode", "x"), "--decode has 'x'"),
        (("{file}", "--batch", "65"), "--batch has '65', expected integers from 1 to 64"),
        (("{file}", "--rounds", "0"), "--rounds is 0"),
        (("{file}", "--kv", "fp8"), "choose fp16 or int8"),
        (("{file}", "--prefill", "", "--decode", "", "--batch", ""), "there is nothing to measure"),
    ],
)
def test_bench_refuses(tiny_cnl: Path, arguments: tuple[str, ...], sentence: str) -> None:
    given = [argument.format(file=tiny_cnl) for argument in arguments]
    done = python("-m", "cnllama", "bench", *given, code=2)
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_bench_without_a_file_takes_the_bundled_model() -> None:
    arguments = ("-m", "cnllama", "bench", "--quick", "--prefill", "8", "--decode", "", "--batch", "")
    bundled = list((ROOT / "cnllama" / "demo").glob("*.cnl"))
    done = python(*arguments, code=0 if bundled else 2)
    assert done.stdout.startswith(bundled[0].name) if bundled else "no model was given" in done.stderr


def test_counts_of_an_option() -> None:
    assert parse_counts("128,512,128", "--prefill", 1, 1000) == [128, 512]
    with pytest.raises(InputError, match="from 1 to 1,000"):
        parse_counts("1,,2000", "--prefill", 1, 1000)
