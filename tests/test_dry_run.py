# SPDX-License-Identifier: Apache-2.0
"""`convert --dry-run` refuses what convert refuses, foretells what convert makes, and leaves no trace."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import command, make_llama, piece_count, random_tensors, small_config, write_json, write_weights

from cnllama.cli.main import main
from cnllama.format import open_cnl

Tree = dict[str, tuple[int, int, bytes]]


def tree(directory: Path) -> Tree:
    """Every name below with its time of change, its mode and its bytes."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(directory))] = (status.st_mtime_ns, status.st_mode, data)
    return found


def run(*words: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["convert", *map(str, words)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint, free to be changed."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1].replace(",", ""))


Change = Callable[[Path], Any]
Case = tuple[Change, list[object]]


def config(**changes: Any) -> Change:
    def change(base: Path) -> None:
        path = base / "config.json"
        write_json(path, json.loads(path.read_text()) | changes)

    return change


def padded(base: Path) -> None:
    rows = 1024
    tensors = random_tensors(small_config(rows))
    write_weights(base, tensors)
    config(vocab_size=rows, torch_dtype="float32")(base)


def tied_and_different(base: Path) -> None:
    config(tie_word_embeddings=True)(base)


def nothing(base: Path) -> None:
    return


def pointer(name: str) -> Change:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 5\n"
    return lambda base: (base / name).write_text(text)


def short_text(base: Path) -> None:
    (base.parent / "short.txt").write_text("太短\n")


ACCEPTED: dict[str, Case] = {
    "plain": (nothing, ["--quantizer", "rtn"]),
    "q8 and rules": (nothing, ["--quantizer", "rtn", "--quant", "q8", "--quant-rule", "lm_head=q6,*.down_proj=q5"]),
    "template": (nothing, ["--quantizer", "rtn", "--template", "alpaca", "--threads", "1"]),
    "padded rows": (padded, ["--quantizer", "rtn"]),
    "tied but different": (tied_and_different, ["--quantizer", "rtn"]),
    "stale vocab_size": (config(vocab_size=7), ["--quantizer", "rtn"]),
    "report": (nothing, ["--quantizer", "rtn", "--report", "report.json"]),
    "gptq": (nothing, ["--quantizer", "gptq", "--calibrate-tokens", "4x32", "--no-check"]),
    "auto": (nothing, ["--calibrate-tokens", "4x32"]),
}
REFUSED: dict[str, Case] = {
    "scheme": (nothing, ["--quant", "q9"]),
    "rule": (nothing, ["--quant-rule", "nothing=q4"]),
    "rule without scheme": (nothing, ["--quant-rule", "lm_head"]),
    "template": (nothing, ["--template", "vicuna"]),
    "threads": (nothing, ["--threads", "-1"]),
    "tokens": (nothing, ["--quantizer", "gptq", "--calibrate-tokens", "4x100000"]),
    "text": (short_text, ["--quantizer", "gptq", "--calibrate", "short.txt"]),
    "no text": (nothing, ["--quantizer", "gptq", "--calibrate", "absent.txt"]),
    "gpu": (nothing, ["--quantizer", "gptq", "--device", "cuda"]),
    "options of rtn": (nothing, ["--quantizer", "rtn", "--device", "cpu"]),
    "tokenizer": (nothing, ["--tokenizer", "absent"]),
    "adapter": (nothing, ["--lora", "absent"]),
    "whole model as adapter": (nothing, ["--lora", "base"]),
    "model_type": (config(model_type="qwen2"), []),
    "layers": (config(num_hidden_layers=9), []),
    "window": (config(sliding_window=8), []),
    "pointer": (pointer("model.safetensors"), []),
    "pointer as tokenizer": (pointer("tokenizer.model"), []),
    "no weights": (lambda base: (base / "model.safetensors").unlink(), []),
    "no tokenizer": (lambda base: (base / "tokenizer.model").unlink(), []),
    "integers": (
        lambda base: write_weights(
            base, random_tensors(small_config(300)) | {"model.norm.weight": np.ones(96, np.int32)}
        ),
        [],
    ),
    "output in no directory": (nothing, ["-o", "absent/x.cnl"]),
    "output is a directory": (nothing, ["-o", "base"]),
    "output in a file": (nothing, ["-o", "base/config.json/x.cnl"]),
    "output of a long name": (nothing, ["-o", "x" * 256]),
    "report in no directory": (nothing, ["--report", "absent/x.json"]),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_it_accepts_converts_to_what_it_foretold(
    base: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, options = ACCEPTED[case]
    if "rtn" not in options:
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    change(base)
    before = tree(tmp_path)
    code, said, warned = run(base, "-o", "x.cnl", "--dry-run", *options)
    assert code == 0, warned
    assert tree(tmp_path) == before, "it left a trace"
    assert said.startswith("vocabulary sizes found:")
    assert said.endswith("nothing was written\n")
    code, report, rewarned = run(base, "-o", "x.cnl", *options)
    assert code == 0, rewarned
    foretold = number(r"x\.cnl: would have ([\d,]+) bytes", said)
    made = (tmp_path / "x.cnl").stat().st_size
    other = re.search(r"of them ([\d,]+) for a file by rtn", said)
    assert made in (foretold, int(other[1].replace(",", "")) if other else foretold)
    assert number(r"([\d,]+) bytes are needed", said) == foretold + (int(other[1].replace(",", "")) if other else 0)
    assert number(r"([\d,]+) weights", said) == number(r"([\d,]+) weights", report)
    assert number(r"vocabulary ([\d,]+)\n", said) == open_cnl(tmp_path / "x.cnl").vocab_size
    assert set(warned.splitlines()) <= set(rewarned.splitlines())


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_refuses_is_what_convert_refuses(
    base: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, options = REFUSED[case]
    if "gptq" in options:
        torch = pytest.importorskip("torch")
        if "cuda" in options and torch.cuda.is_available():
            pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    change(base)
    output = [] if "-o" in options else ["-o", "x.cnl"]
    quantizer = [] if "--quantizer" in options else ["--quantizer", "rtn"]
    before = tree(tmp_path)
    dry = run(base, *output, *quantizer, "--dry-run", *options)
    assert dry[0] == 2
    assert tree(tmp_path) == before, "it left a trace"
    assert run(base, *output, *quantizer, *options) == dry, "another sentence"
    assert len(dry[2].split("\nvocabulary sizes found:")[0].strip().splitlines()) == 1


def test_a_disk_without_room_is_refused_before_the_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = number(r"([\d,]+) bytes are needed", run(base, "--quantizer", "rtn", "--dry-run", "-o", tmp_path / "x")[1])
    monkeypatch.setattr("cnllama.space.free_bytes", lambda directory: need - 1)
    monkeypatch.setattr("cnllama.convert.checkpoint._MappedTensor.read", lambda *_: pytest.fail("a weight was read"))
    words = base, "-o", tmp_path / "x.cnl", "--quantizer", "rtn"
    dry = run(*words, "--dry-run")
    assert dry[0] == 1
    assert f"the file will have {need:,} bytes but its disk has {need - 1:,} free" in dry[2]
    assert run(*words) == dry
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_directory_that_cannot_be_written(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode, **_: "locked" not in str(path))
    code, _, said = run(base, "-o", tmp_path / "locked" / "x.cnl", "--quantizer", "rtn", "--dry-run")
    assert (code, "no permission" in said) == (2, True)


def test_output_may_be_left_out_of_a_dry_run_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, _ = run(base, "--quantizer", "rtn", "--dry-run")
    assert (code, "model.cnl: would have" in said) == (0, True)
    code, _, said = run(base, "--quantizer", "rtn")
    assert (code, "-o FILE is missing" in said) == (2, True)


def test_without_torch_it_says_what_auto_would_do(tiny_llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else f(name, *a)\n"
        "from cnllama.cli.main import main; sys.exit(main(['convert', *sys.argv[1:]]))"
    )
    import subprocess

    words = [sys.executable, "-c", code, str(tiny_llama), "-o", str(tmp_path / "x.cnl"), "--dry-run"]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "quantizer    rtn: gptq loses less and needs PyTorch" in done.stdout


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_memory_and_time_are_about_right(tmp_path: Path, tokenizer_model: bytes, quantizer: str) -> None:
    """Within a half of what a process takes; of the time only the order, for tests share the machine."""
    if quantizer != "rtn":
        pytest.importorskip("torch")
    rows, hidden = (20000, 512) if quantizer == "rtn" else (piece_count(tokenizer_model), 192)
    shape = {"hidden_size": hidden, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32}
    base = make_llama(tmp_path / "base", tokenizer_model, vocab_size=rows, num_hidden_layers=1, **shape)
    if rows == 20000:
        write_json(base / "added_tokens.json", {"<last>": rows - 1})
    options = ["--quantizer", quantizer]
    if quantizer != "rtn":
        options += ["--calibrate-tokens", "4x64", "--no-check"]
    words = [str(base), "-o", str(tmp_path / "x.cnl"), *options]
    said = command("cnllama.convert", *words, "--dry-run").stdout
    found = re.search(r"about ([\d.]+) GB at the peak", said)
    assert found is not None, said
    assert command("cnllama.convert", *words, "--report", tmp_path / "report.json").returncode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert 0.66 < float(found[1]) * 1e9 / report["peak_memory"] < 1.5
    time = re.search(r"time +about (\d+) s", said)
    assert time is not None, said
    assert int(time[1]) < 30 * max(1.0, report["seconds"])


def test_names_of_strangers_stay_on_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "a\nb\x1b[31m"))
    config(architectures=["x\ny"])(base)
    code, said, warned = run(base, "-o", tmp_path / "x\n\x1b.cnl", "--quantizer", "rtn", "--dry-run")
    assert code == 0
    for text in (said, warned):
        assert all(line.isprintable() for line in text.split("\n"))
    assert len(warned.strip().split("\n")) == 1
    assert r"x\n\x1b.cnl: would have" in said
