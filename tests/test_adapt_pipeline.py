# SPDX-License-Identifier: Apache-2.0
"""The road from end to end: recipes/tiny.toml from text to a packed file that answers, and what PEFT makes of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import adapt_data
import numpy as np
import pytest

pytest.importorskip("transformers", reason="the training road needs transformers")
pytest.importorskip("peft", reason="the training road needs peft")

ROOT = Path(__file__).resolve().parent.parent
# Nats of held-out loss that each stage of recipes/tiny.toml must gain; measured 5.0, 1.5 and 7.6.
GAINS = {"stage1": 3.0, "stage2": 0.5, "tuned": 5.0}


def cnllama(*words: object, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line with one thread: these models are too small for two."""
    result = subprocess.run(
        [sys.executable, "-m", "cnllama", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == expect, result.stderr
    return result


def inside(*words: object, expect: int = 0) -> str:
    """Runs the command line in this process, which spares the imports; returns what it wrote to stderr."""
    import torch

    from cnllama.cli.main import main

    torch.set_num_threads(1)
    written = io.StringIO()
    with contextlib.redirect_stderr(written), contextlib.redirect_stdout(io.StringIO()):
        code = main([str(word) for word in words])
    assert code == expect, written.getvalue()
    return written.getvalue()


def free_port() -> int:
    """A port for torchrun."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    directory = tmp_path_factory.mktemp("road")
    data = adapt_data.write_data(directory / "data")
    cnllama("adapt", "run", ROOT / "recipes/tiny.toml", "--data", data, "--out", directory / "run")
    return directory / "run"


def test_held_out_loss_falls_at_each_stage(road: Path) -> None:
    for stage, gain in GAINS.items():
        result = json.loads((road / stage / "result.json").read_text())
        assert result["held_out_loss"] < result["held_out_loss_before"] - gain, stage
    before = json.loads((road / "stage2/result.json").read_text())["held_out_loss_before"]
    after = json.loads((road / "stage1/result.json").read_text())["held_out_loss"]
    assert before == pytest.approx(after, abs=1e-5), "stage 2 begins where stage 1 ended"


def test_each_stage_trains_what_it_says(road: Path) -> None:
    names = {}
    for stage in ("stage1", "stage2", "tuned"):
        from safetensors.numpy import load_file

        names[stage] = set(load_file(road / stage / "adapter_model.safetensors"))
    saved = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert names["stage1"] == saved
    assert len(names["stage2"]) == 2 + 2 * 7 * 2, "embeddings, and A and B of seven matrices in two layers"
    assert names["tuned"] == names["stage2"]


def test_packed_model_answers_in_the_form_it_was_taught(road: Path) -> None:
    """`cnllama run` on the packed file: questions that it never saw get sentences of the grammar, ended by EOS."""
    from cnllama import LLM

    llm = LLM(road / "packed/tiny.cnl", threads=1)
    asked = adapt_data.questions()[-40:]
    prompts = [f"{record['instruction']}\n{record['input']}" for record in asked]
    answers = llm.generate(prompts, temperature=0, max_tokens=60)
    sentences = {record["output"] for record in adapt_data.questions()}
    assert [a.finish_reason for a in answers] == ["stop"] * 40
    assert sum(a.text in sentences for a in answers) >= 36, [a.text for a in answers]
    printed = cnllama("run", "-m", road / "packed/tiny.cnl", "-p", prompts[0], "--temp", 0, "-n", 60).stdout
    assert printed.strip() == answers[0].text


def test_files_of_a_run_are_there(road: Path) -> None:
    for stage in ("english", "stage1", "stage2", "tuned"):
        records = [json.loads(line) for line in (road / stage / "log.jsonl").read_text().splitlines()]
        steps = [record["step"] for record in records if "loss" in record]
        assert steps == sorted(set(steps))
        assert {"step", "epoch", "tokens", "seconds", "loss", "lr", "grad_norm"} <= set(records[-1]) | set(records[-2])
        assert (road / stage / "loss.png").read_bytes()[:4] == b"\x89PNG"
        assert not list((road / stage).glob("checkpoint-*")), "a finished stage needs no optimizer state"
    assert {row["stage"] for row in json.loads((road / "summary.json").read_text())} == {"english", *GAINS}


def test_peft_reads_the_adapters_and_agrees_with_the_converter(road: Path, tmp_path: Path) -> None:
    """PEFT, adapter by adapter, and `cnllama adapt merge` give the same logits."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(road / "resized", dtype=torch.float32)
    for stage in ("stage1", "stage2", "tuned"):
        model = PeftModel.from_pretrained(model, road / stage).merge_and_unload()
    adapters = [road / "stage1", road / "stage2", road / "tuned"]
    inside("adapt", "merge", road / "resized", "--lora", *adapters, "-o", tmp_path / "merged", "--dtype", "float32")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(3, 67).reshape(2, 32)
    with torch.no_grad():
        np.testing.assert_allclose(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_merge_writes_other_types_within_their_precision(road: Path, tmp_path: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    ids = torch.arange(3, 35)[None]
    logits = {}
    for dtype in ("float32", "float16", "bfloat16"):
        out = tmp_path / dtype
        inside("adapt", "merge", road / "resized", "--lora", road / "stage1", "-o", out, "--dtype", dtype)
        model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            logits[dtype] = model(ids).logits
    scale = logits["float32"].abs().max()
    assert (logits["float16"] - logits["float32"]).abs().max() < 0.01 * scale
    assert (logits["bfloat16"] - logits["float32"]).abs().max() < 0.08 * scale
    assert not torch.equal(logits["bfloat16"], logits["float32"])


def test_finished_run_is_not_run_again(road: Path) -> None:
    data = road.parent / "data"
    before = {path: path.stat().st_mtime_ns for path in road.glob("*/stage.json")}
    inside("adapt", "run", ROOT / "recipes/tiny.toml", "--data", data, "--out", road)
    assert {path: path.stat().st_mtime_ns for path in road.glob("*/stage.json")} == before
    message = inside(
        "adapt", "run", ROOT / "recipes/tiny.toml", "--data", data, "--out", road, "--set", "steps=81", expect=2
    )
    assert "--redo stage2" in message
