# SPDX-License-Identifier: Apache-2.0
"""A conversion that says done made a file that runs: faults in a written file are found before it has its name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnllama.convert import selfcheck
from cnllama.convert.pack import convert
from cnllama.convert.selfcheck import check_written, faults
from models import make_llama, write_json
from test_format import metadata, read, write

from cnllama import LLM
from cnllama.container import Output
from cnllama.errors import CnllamaError, InputError
from cnllama.plan import Available

MATRIX = "model.layers.1.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"
Spoil = Callable[[Path], None]


def flipped(name: str, offset: int = 0, bit: int = 6) -> Spoil:
    """One bit of a tensor's bytes is another."""

    def spoil(path: Path) -> None:
        header, _ = read(path)
        at = 8 + int.from_bytes(path.read_bytes()[:8], "little") + header[name]["data_offsets"][0] + offset
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << bit]))

    return spoil


def said(key: str, change: Callable[[Any], Any]) -> Spoil:
    """Another value in the header, whose hash is made right."""

    def spoil(path: Path) -> None:
        header, body = read(path)
        room = int.from_bytes(path.read_bytes()[:8], "little")
        metadata(key, change)(header)
        write(path, header, body, room + 640)  # longer values must fit; data stay on a multiple of 64

    return spoil


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 64)


FAULTS: dict[str, tuple[Spoil, str]] = {
    "a bit of a matrix": (flipped(MATRIX, 3000), "content: sha256 is"),
    "a bit of the embedding": (flipped(EMBED, 100), "content: sha256 is"),
    "a bit of the tokenizer": (flipped("tokenizer.model", 40), "the tokenizer does not match its hash"),
    "the file's end": (cut, "is no .cnl|claims bytes|the file was cut off"),
    "statistics": (
        said("fingerprint", lambda f: f["tensors"][MATRIX].update(rms=f["tensors"][MATRIX]["rms"] * 2)),
        f"tensors: {MATRIX}: rms is",
    ),
    "parity": (said("parity", lambda p: p.update(sha256="0" * 64)), "tokenizer: the ids of the corpus hash to"),
    "two tokens of one id": (
        said("tokenizer", lambda t: t.update(added_tokens={"[PAD]": 899, "<|im_end|>": 899})), "share one id",
    ),
    "an end token outside": (said("generation", lambda g: g.update(eos_token_ids=[1 << 20])), "the end tokens are"),
    "a default that no run can use": (
        said("generation", lambda g: g.update(top_k=-7)), "its sampling defaults cannot be used: top_k is -7",
    ),
}  # fmt: skip


@pytest.fixture
def written(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Spoil], str]:
    """written(spoil) -> what a conversion says whose file is spoiled between its last byte and its check."""

    def run(spoil: Spoil, **options: Any) -> str:
        honest = selfcheck.faults

        def spoiled(path: Path, threads: int) -> str | None:
            spoil(path)
            return honest(path, threads)

        monkeypatch.setattr(selfcheck, "faults", spoiled)
        with pytest.raises(CnllamaError) as caught:
            convert(tiny_llama, [], tmp_path / "x.cnl", **options)
        monkeypatch.setattr(selfcheck, "faults", honest)
        return str(caught.value)

    return run


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_written_file_is_found_before_its_name(
    written: Callable[[Spoil], str], tmp_path: Path, name: str
) -> None:
    import re

    spoil, words = FAULTS[name]
    (tmp_path / "x.cnl").write_text("the file of before")
    found = written(spoil)
    assert re.search(words if "|" in words else re.escape(words), found)
    assert found.startswith(f"{tmp_path / 'x.cnl'}: the new file does not pass its own check and was not kept: ")
    assert ".part" not in found
    assert "\n" not in found
    assert [path.name for path in tmp_path.iterdir()] == ["x.cnl"]
    assert (tmp_path / "x.cnl").read_text() == "the file of before"


def test_both_files_of_a_trial_are_checked(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each once; a fault in either ends the conversion, which then leaves nothing."""
    pytest.importorskip("torch")
    from cnllama.convert.quantize.calibration import BUNDLED

    options: dict[str, Any] = {"quantizer": "gptq", "calibrate": BUNDLED, "calibrate_tokens": (2, 32), "threads": 1}
    checked: list[str] = []
    honest = selfcheck.faults
    spoiled_ones: list[int] = []

    def spoiled(path: Path, threads: int) -> str | None:
        checked.append(path.name)
        if len(checked) in spoiled_ones:
            flipped(MATRIX, 3000)(path)
        return honest(path, threads)

    monkeypatch.setattr(selfcheck, "faults", spoiled)
    convert(tiny_llama, [], tmp_path / "x.cnl", **options)
    assert len(checked) == 2
    assert ("model.gptq" in checked[0], "model.rtn" in checked[1]) == (True, True)
    (tmp_path / "x.cnl").unlink()
    for which in (1, 2):
        checked.clear()
        spoiled_ones[:] = [which]
        with pytest.raises(CnllamaError, match=r"x\.cnl: the new file does not pass its own check"):
            convert(tiny_llama, [], tmp_path / "x.cnl", **options)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [7e37, 3.4028235e38])  # the largest that a float32 can be is a number, too
def test_a_model_that_gives_no_numbers_is_not_kept(tokenizer_model: bytes, tmp_path: Path, value: float) -> None:
    """Weights that are finite, and their sums are not: no second try and no report to us can help."""
    from models import random_tensors, small_config

    base = tmp_path / "base"
    tensors = random_tensors(small_config(900))
    tensors["model.norm.weight"][:] = np.float32(value)
    make_llama(base, tokenizer_model, tensors=tensors, dtype="float32")
    words = (
        r"x\.cnl: was not kept, for .* \(the logit of token \d+ is (not a number|infinite)\); its values are too large"
    )
    with pytest.raises(InputError, match=words):
        convert(base, [], tmp_path / "x.cnl")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_model_larger_than_the_memory_is_checked_all_the_same(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be converted where it cannot be run: its pages come and go."""
    monkeypatch.setattr("cnllama.plan.available_memory", lambda: Available(1 << 20, "test"))
    opened: list[Path] = []
    run = selfcheck._run_one_token
    monkeypatch.setattr(selfcheck, "_run_one_token", lambda path, threads: opened.append(path) or run(path, threads))
    convert(tiny_llama, [], tmp_path / "x.cnl")
    assert len(opened) == 1
    with pytest.raises(CnllamaError, match="no context fits"):
        LLM(tmp_path / "x.cnl")


def test_an_interrupt_during_the_check_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, threads: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(selfcheck, "_run_one_token", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_llama, [], tmp_path / "x.cnl")
    assert list(tmp_path.iterdir()) == []


def test_pages_are_given_back_while_the_token_runs(tiny_cnl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnllama.format import CnlFile

    released: list[str | None] = []
    honest = CnlFile.release
    monkeypatch.setattr(CnlFile, "release", lambda self, name=None: released.append(name) or honest(self, name))
    generate = selfcheck._AnySize.generate

    def slowly(self: Any, *arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + 10
        while None not in released and time.monotonic() < deadline:
            time.sleep(0.001)
        return generate(self, *arguments, **options)

    monkeypatch.setattr(selfcheck._AnySize, "generate", slowly)
    assert faults(tiny_cnl, 1) is None
    tensors = [name for name in released if name is not None]
    assert {MATRIX, EMBED, "lm_head.weight"} <= set(tensors)
    assert None in released


def test_the_adapter_names_an_id_that_the_base_names_too(tmp_path: Path, tokenizer_model: bytes) -> None:
    """A conversion of before made a file of it that could not be opened."""
    import models

    size = models.piece_count(tokenizer_model)
    base = make_llama(tmp_path / "base", tokenizer_model, vocab_size=size + 1)
    write_json(base / "added_tokens.json", {"[PAD]": size})
    config = json.loads((base / "config.json").read_text())
    tensors = models.random_tensors(models.small_config(size + 1))
    model = models.load_transformers(config, tensors)
    models.make_adapter(model, tmp_path / "adapter", tokenizer_model, added_tokens={"<|im_end|>": size})
    shutil.rmtree(tmp_path / "adapter" / "x", ignore_errors=True)
    (tmp_path / "adapter" / "tokenizer.model").unlink()
    report = convert(base, [tmp_path / "adapter"], tmp_path / "x.cnl")
    assert any(f"the id {size} is '<|im_end|>' here, '[PAD]' before it" in w for w in report.warnings)
    with LLM(tmp_path / "x.cnl", ctx=64) as llm:
        assert llm.tokenizer.special_id("<|im_end|>") == size
        assert llm.tokenizer.special_id("[PAD]") is None


def test_a_check_of_any_writer_comes_before_the_name(tmp_path: Path) -> None:
    from test_format_writer import small

    from cnllama.format import CnlWriter, stored_bytes

    path, values, table = small(tmp_path)
    seen: list[tuple[bool, int]] = []
    with CnlWriter(path, values, table) as writer:
        for name, row in table.items():
            writer.write(name, bytes(stored_bytes(*row)))
        writer.finish({}, lambda temporary: seen.append((path.exists(), temporary.stat().st_size)))
    assert seen == [(False, path.stat().st_size)]
    with Output(tmp_path / "y") as output:
        output.write(b"x", 0)
        assert output.temporary.read_bytes() == b"x"
    check = check_written(path)
    with pytest.raises(CnllamaError, match="does not pass its own check"):
        check(path)
