# SPDX-License-Identifier: Apache-2.0
"""The model in the package. Logits are the same bits on every machine, so what it writes for a seed is too: the counts
here are those of docs/demo-model.md, not a matter of luck."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import eval_demo
import pytest

from cnllama import LLM
from cnllama.errors import InputError
from cnllama.format import open_cnl
from cnllama.llm import bundled_model

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with LLM() as llm:
        yield llm


def test_command_without_a_model_prints_a_poem(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cnllama", "run", "-p", "写一首关于春天的诗", "--seed", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60)
    assert result.returncode == 0, result.stderr
    lines = eval_demo.lines_of(result.stdout)
    assert len(lines) >= 4
    assert {len(line) for line in lines} <= {5, 7}


def test_installation_without_it_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnllama.llm.__file__", str(tmp_path / "llm.py"))
    with pytest.raises(InputError, match="no model was given: make one with `cnllama convert BASE"):
        LLM()


def test_file_is_small_and_went_through_the_converter() -> None:
    file = open_cnl(bundled_model())
    assert file.size <= 14 * MEGABYTE
    assert file.quantization["scheme"].startswith("q4")
    assert len(file.source["adapters"]) == 1
    assert file.template == "alpaca"
    parameters = sum(e.rows * e.cols for e in file.tensors.values() if e.scheme != "raw")
    assert 4e6 <= parameters <= 25e6


def test_quatrains_keep_their_form(demo: LLM) -> None:
    report = eval_demo.quatrains(demo, temperature=0.8, seed=1)
    assert report["of"] == 100
    assert report["kept"] >= 95, report["broken"]


def test_best_known_couplets_are_completed(demo: LLM) -> None:
    report = eval_demo.couplets(demo)
    assert report["of"] == 100
    assert report["right"] >= 40, report["wrong"]


def test_answers_end_by_themselves(demo: LLM) -> None:
    for completion in demo.generate(list(eval_demo.INSTRUCTIONS), seed=1, max_tokens=160):
        assert completion.text.strip()
        assert completion.finish_reason == "stop", completion.text
