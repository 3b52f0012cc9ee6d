# SPDX-License-Identifier: Apache-2.0
"""What `--quantizer auto`, the default of the command, turns into."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from cnllama.convert.pack import convert
from cnllama.convert.quantize import choice
from cnllama.convert.quantize.base import CalibrationError
from models import sample_lines

from cnllama.errors import CnllamaError
from cnllama.format import open_cnl

TOKENS = 128 * 512


def test_without_torch_it_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = choice.choose(1_000_000, TOKENS)
    assert (found.quantizer, found.device) == ("rtn", "cpu")
    assert "pip install 'cnllama[convert]'" in found.reason


def test_size_and_machine_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(choice.os, "cpu_count", lambda: 2)
    assert choice.choose(9_000_000, TOKENS).quantizer == "gptq"
    large = choice.choose(6_700_000_000, TOKENS)
    assert large.quantizer == "rtn"
    assert "would take about 366 minutes" in large.reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = choice.choose(6_700_000_000, TOKENS)
    assert (found.quantizer, found.device) == ("gptq", "cuda")


@pytest.mark.parametrize(("patience", "quantizer"), [(choice.PATIENCE, "gptq"), (0.0, "rtn")])
def test_a_conversion_says_what_was_chosen(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float, quantizer: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(choice, "PATIENCE", patience)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sample_lines()), encoding="utf-8")
    out = tmp_path / "x.cnl"
    report = convert(
        tiny_llama, [], out, quantizer="auto", calibrate=text, calibrate_tokens=(4, 64), check=False, threads=1
    )
    assert report.quantizer == quantizer
    assert report.reason
    assert open_cnl(out).quantization.get("quantizer", "rtn") == quantizer


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (CalibrationError("the Hessian has no factor"), "because the Hessian has no factor"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "because the GPU has too little free memory"),
    ],
)
def test_what_cannot_be_calibrated_is_rounded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception, words: str
) -> None:
    def fail(*_: object) -> NoReturn:
        raise problem

    monkeypatch.setattr("cnllama.convert.quantize.gptq.inverse_factor", fail)
    options: dict[str, Any] = {"calibrate_tokens": (4, 64), "device": "cpu", "check": False, "threads": 1}
    out = tmp_path / "x.cnl"
    report = convert(tiny_llama, [], out, quantizer="auto", **options)
    assert report.quantizer == "rtn"
    assert report.reason.startswith(words)
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(CnllamaError, match=words.removeprefix("because ")):
        convert(tiny_llama, [], tmp_path / "y.cnl", quantizer="gptq", **options)
