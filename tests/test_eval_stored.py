# SPDX-License-Identifier: Apache-2.0
"""Kept results of evaluations: how exact a stored reference is, what names it, what is refused, what is deleted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from eval_data import evaluate, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnllama.cli.eval_table import _key
from cnllama.container import SafetensorsFile
from cnllama.contents import content_key
from cnllama.errors import InputError
from cnllama.eval import table as eval_table
from cnllama.eval.keys import options_key
from cnllama.eval.models import Item, Rows
from cnllama.eval.perplexity import compare, perplexity
from cnllama.eval.stored import Origin, SavingScorer, StoredScorer, stored_bytes
from cnllama.eval.table import OURS, Form, Table
from cnllama.eval.texts import Text, Window
from cnllama.tokenizer import Tokenizer

ROWS = 150


class Fixed:
    """A model that gives prepared logits [n, vocab_size], the rows of one window after those of the other."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits, self.vocab_size = logits, logits.shape[1]

    def rows(self, items: Sequence[Item], progress: Any = None) -> Iterator[Rows]:
        first = 0
        for number, item in enumerate(items):
            count = len(item.ids) - item.begin
            for at in range(0, count, 40):
                end = min(count, at + 40)
                yield Rows(number, item.begin + at, self.logits[first + at : first + end])
            first += count


def problem(vocab: int, spread: float, drift: float) -> tuple[Fixed, Fixed, list[Window]]:
    """(reference, another model, windows whose targets are drawn from the reference)."""
    random = np.random.default_rng(vocab)
    reference = random.standard_normal((ROWS, vocab), np.float32) * np.float32(spread)
    other = reference + random.standard_normal((ROWS, vocab), np.float32) * np.float32(drift)
    targets = (reference + random.gumbel(size=(ROWS, vocab))).argmax(axis=1).tolist()
    ids, half = list(range(100)), ROWS // 3
    parts = [Window(ids[:half], 0, targets[:half], half), Window(ids, 0, targets[half:], ROWS - half)]
    return Fixed(reference), Fixed(other), parts


@pytest.mark.parametrize(("vocab", "spread"), [(900, 1.0), (900, 8.0), (20000, 1.0), (20000, 4.0)])
@pytest.mark.parametrize("drift", [0.01, 0.1, 0.5])
def test_a_stored_reference_is_as_exact_as_the_docs_say(
    tmp_path: Path, vocab: int, spread: float, drift: float
) -> None:
    reference, other, parts = problem(vocab, spread, drift)
    path = tmp_path / "kept"
    with SavingScorer(reference, path, parts, Origin("a model")) as saving:
        live = compare(other, saving, parts)
    kept = StoredScorer(path, parts, vocab)
    stored = compare(other, kept, parts)
    assert abs(live.kl.mean() - stored.kl.mean()) < 1e-5
    assert np.abs(live.kl - stored.kl).max() < 1e-3
    assert abs(live.reference_nll - stored.reference_nll) / ROWS < 1e-6
    assert abs(perplexity(reference, parts).nll - perplexity(kept, parts).nll) / ROWS < 1e-6
    assert path.stat().st_size < stored_bytes(parts, vocab) + 2000 == (2 * vocab + 4) * ROWS + 2000


def test_a_certain_token_stays_certain(tmp_path: Path) -> None:
    logits = np.full((3, 20), -80.0, np.float32)
    logits[0, 4], logits[1, 5], logits[2] = 80, 10, 0
    parts = [Window([1, 2, 3], 0, [4, 5, 6], 3)]
    with SavingScorer(Fixed(logits), tmp_path / "kept", parts, Origin("")) as saving:
        live = compare(Fixed(logits), saving, parts)
    stored = compare(Fixed(logits), StoredScorer(tmp_path / "kept", parts, 20), parts)
    assert stored.kl.max() < 1e-9
    assert stored.reference_nll == pytest.approx(live.reference_nll, abs=1e-6)


def test_the_fp32_row_of_a_table_is_the_checkpoint_s(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text = tmp_path / "t.txt"
    text.write_text("\n".join(models.chinese_lines())[:900], encoding="utf-8")
    common = (text, "--ctx", 64, "--json", tmp_path / "r.json")
    done = evaluate("table", tiny_llama, *common, "--schemes", "q2", "--rounds", 0, "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    reference, row = models.json_of(tmp_path / "r.json")["rows"]
    (cnl,) = (tmp_path / "work").glob("*.cnl")
    done = evaluate("kl", cnl, *common, "--reference", tiny_llama)
    assert done.returncode == 0, done.stderr
    live = models.json_of(tmp_path / "r.json")
    assert live["reference"]["other_weights"] is None
    for found, expected in (
        (reference["perplexity_per_token"], live["reference_perplexity_per_token"]),
        (row["perplexity_change"] + 1, live["perplexity_ratio"]),
    ):
        assert abs(np.log(found) - np.log(expected)) < 1e-6
    assert abs(row["kl_mean"] - live["kl_mean"]) < 1e-5


# --- names


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_model: bytes) -> Path:
    return models.make_llama(tmp_path / "hf", tokenizer_model)


def change_one_byte(path: Path) -> None:
    """Another content under the same name, size and time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_key_is_of_contents_and_not_of_names_and_times(tmp_path: Path, checkpoint: Path) -> None:
    calibrate = tmp_path / "c.txt"
    calibrate.write_text("从前有一个农夫", encoding="utf-8")
    before = _key([checkpoint], calibrate)
    moved = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "other")
    os.utime(moved / "config.json", (5, 5))
    assert _key([moved], calibrate) == before
    keys = {before, _key([checkpoint], None), _key([checkpoint, moved], calibrate)}
    for path in (*sorted(moved.iterdir()), calibrate):
        change_one_byte(path)
        keys.add(_key([moved], calibrate))
    assert len(keys) == 4 + len(list(moved.iterdir()))
    (moved / "config.json").rename(moved / "config2.json")
    assert _key([moved], calibrate) not in keys


def test_keys_of_files_and_options(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x")
    assert content_key([tmp_path / "a"]) == content_key([tmp_path / "b"])
    assert content_key([tmp_path / "a", tmp_path / "b"]) != content_key([tmp_path / "a"])
    assert options_key("a", None) != options_key("a", "None")
    with pytest.raises(InputError, match="missing: there is no such file"):
        content_key([tmp_path / "missing"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: this is no regular file"):
        content_key([tmp_path / "pipe"])


def test_replaced_weights_are_never_measured_with_what_was_kept(
    checkpoint: Path, tokenizer_model: bytes, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    text, work = tmp_path / "t.txt", tmp_path / "work"
    text.write_text("\n".join(models.chinese_lines())[:300], encoding="utf-8")

    def row() -> dict[str, Any]:
        words = ("--schemes", "q8", "--rounds", 0, "--ctx", 64, "--work", work, "--json", tmp_path / "r")
        done = evaluate("table", checkpoint, text, *words)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = models.json_of(tmp_path / "r")["rows"][0]
        return found

    first = row()
    weights = checkpoint / "model.safetensors"
    before = weights.stat()
    models.make_llama(checkpoint, tokenizer_model, seed=5)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    assert row()["perplexity_per_token"] != pytest.approx(first["perplexity_per_token"], rel=1e-3)
    assert len(list(work.glob("*reference*"))) == 2
    # A kept file under another's name is what it says inside, and refused.
    one, other = sorted(work.glob("*reference*"), key=lambda path: path.stat().st_mtime_ns)
    other.write_bytes(one.read_bytes())
    done = evaluate("table", checkpoint, text, "--schemes", "q8", "--rounds", 0, "--ctx", 64, "--work", work)
    assert done.returncode == 2
    assert f"{other}: it was made from other files than those named now" in done.stderr


def test_another_checkpoint_s_reference_is_named(tiny_cnl: Path, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text, kept = tmp_path / "t.txt", tmp_path / "kept"
    text.write_text("从前有一个农夫，他每天都去田里", encoding="utf-8")
    other = models.make_llama(tmp_path / "other", (checkpoint / "tokenizer.model").read_bytes(), seed=9)
    common = ("kl", tiny_cnl, text, "--ctx", 64, "--json", tmp_path / "r")
    for words in (("--reference", other, "--save-reference", kept), ("--reference-logits", kept)):
        done = evaluate(*common, *words)
        assert done.returncode == 0, done.stderr
        assert "was packed from other weights than the reference's: model.embed_tokens.weight: " in done.stderr
        found = models.json_of(tmp_path / "r")["reference"]
        assert found["other_weights"].startswith("model.embed_tokens.weight: ")
        assert found["content"] == content_key([other])
    done = evaluate(*common, "--reference", checkpoint)
    assert "other weights" not in done.stderr


def test_a_file_of_an_earlier_version_is_refused_by_its_version(tmp_path: Path) -> None:
    _, _, parts = problem(30, 1.0, 0.1)
    header = {
        "__metadata__": {"format": "cnllama-reference", "version": "1", "windows_sha256": "", "source": ""},
        "logprobs": {"dtype": "F16", "shape": [ROWS, 30], "data_offsets": [0, 2 * 30 * ROWS]},
    }
    data = json.dumps(header).encode()
    (tmp_path / "old").write_bytes(len(data).to_bytes(8, "little") + data + bytes(2 * 30 * ROWS))
    with pytest.raises(InputError, match="its version is '1' and this cnllama reads '2'; make it again with"):
        StoredScorer(tmp_path / "old", parts, 30)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["logprobs", "target_logprobs"])
def test_values_that_are_no_log_probabilities_are_refused(tmp_path: Path, name: str, value: float) -> None:
    reference, _, parts = problem(30, 1.0, 0.1)
    path = tmp_path / "kept"
    with SavingScorer(reference, path, parts, Origin("")) as saving:
        perplexity(saving, parts)
    entry = SafetensorsFile(path).entries[name]
    kind = {"F16": "<f2", "F32": "<f4"}[entry.dtype]
    data = bytearray(path.read_bytes())
    at = entry.begin + (entry.end - entry.begin) // 2 // 4 * 4
    data[at : at + np.dtype(kind).itemsize] = np.array([value], kind).tobytes()
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"kept: row \d+ and the \d+ after it hold what is no log probability"):
        perplexity(StoredScorer(path, parts, 30), parts)


@given(data=st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    reference, _, parts = problem(12, 1.0, 0.1)
    path = tmp_path / "kept"
    if not path.exists():
        with SavingScorer(
            reference, path, parts, Origin("a", "b", {"x": {"rms": 1, "mean": 0, "absmax": 2}})
        ) as saving:
            perplexity(saving, parts)
    whole = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, size + 200))
        whole[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    damaged = tmp_path / "damaged"
    damaged.write_bytes(whole[: data.draw(st.sampled_from([len(whole), 10, 300]))])
    said = refusal(lambda: perplexity(StoredScorer(damaged, parts, 12), parts))
    assert not said or str(damaged) in said


# --- what is deleted


class Given:
    """A table.Source whose packed files are copies of one."""

    name, key, parameters, context = "given", "0123456789abcdef" * 4, 1000, 128

    def __init__(self, cnl: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._cnl, self._tokenizer, self.vocab_size = cnl, tokenizer, vocab_size
        self.packed: list[str] = []

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def reference(self) -> Fixed:
        return Fixed(np.random.default_rng(0).standard_normal((400, self.vocab_size), np.float32))

    def pack(self, form: Form, path: Path) -> list[str]:
        shutil.copy(self._cnl, path)
        self.packed.append(path.name)
        return []

    def write_gguf(self, path: Path) -> str:
        raise NotImplementedError


def test_only_what_a_table_made_is_deleted(tiny_cnl: Path, tmp_path: Path, tokenizer_model: bytes) -> None:
    from cnllama import LLM

    tokenizer = Tokenizer(tokenizer_model)
    source = Given(tiny_cnl, tokenizer, models.piece_count(tokenizer_model))
    forms = [Form(OURS, "q4-a64", "rtn"), Form(OURS, "q8-s64", "rtn")]
    theirs = tmp_path / f"{source.key[:16]}-{forms[0].file_name}"
    shutil.copy(tiny_cnl, theirs)
    (tmp_path / "photo.jpg").write_bytes(b"x")
    text = Text(tmp_path / "t.txt", ["从前有一个农夫，他每天都去田里"])

    def open_llm(path: Path, context: int, sequences: int) -> LLM:
        return LLM(path, ctx=context, max_sequences=sequences)

    table = Table(source, text, tmp_path, eval_table.Settings(rounds=0), open_llm)
    result = table.measure(forms)
    assert [row["kind"] for row in result["rows"][1:]] == ["q4-a64", "q8-s64"]
    assert source.packed == [f"{source.key[:16]}-{forms[1].file_name}"]
    left = {path.name for path in tmp_path.iterdir()}
    assert {theirs.name, "photo.jpg"} < left
    assert source.packed[0] not in left
    assert theirs.read_bytes() == tiny_cnl.read_bytes()
