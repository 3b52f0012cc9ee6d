# SPDX-License-Identifier: Apache-2.0
"""Perplexity and divergence: the convention by hand, the numbers against NumPy and transformers, files refused."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import eval_data
import models
import numpy as np
import pytest
from eval_data import evaluate

from cnllama import LLM
from cnllama.errors import CnllamaError, InputError
from cnllama.eval.models import EngineScorer, Rows
from cnllama.eval.numerics import divergence, log_softmax, sign_test, target_logprobs
from cnllama.eval.perplexity import compare, perplexity
from cnllama.eval.stored import Origin, SavingScorer, StoredScorer
from cnllama.eval.text_scores import measure_perplexity
from cnllama.eval.texts import Text, Window, read_text, windows
from cnllama.format import open_cnl

TEXT = "\n".join(models.chinese_lines())


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "文本.txt"
    path.write_text(TEXT + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def q8(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(packed at 8 bits, the float32 checkpoint with exactly its weights)."""
    folder = tmp_path_factory.mktemp("q8")
    cnl = models.convert(tiny_llama, folder / "q8.cnl", "--quant", "q8")
    return cnl, eval_data.dequantized_checkpoint(cnl, tiny_llama, folder / "same")


class Digits:
    """Stands for a tokenizer: a token for each character. Windows need no more of one."""

    def __init__(self, add_bos: bool) -> None:
        self.add_bos, self.bos_id, self.removes_extra_spaces = add_bos, 100, False

    def encode(self, text: str) -> list[int]:
        return [int(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(self.feed, ids))

    def surface(self, token: int) -> Any:
        return SimpleNamespace(byte=None)

    def stream(self) -> "Digits":
        return self

    def feed(self, token: int) -> str:
        return str(token)


def test_windows_by_hand() -> None:
    found = windows(Digits(True), ["01234567"], 4, 2)
    assert found == [
        Window([100, 0, 1, 2], 0, [0, 1, 2, 3], 4),
        Window([100, 2, 3, 4], 2, [4, 5], 2),
        Window([100, 4, 5, 6], 2, [6, 7], 2),
    ]
    found = windows(Digits(False), ["01234567", "9", "78"], 4, 3)
    assert found == [
        Window([0, 1, 2, 3], 0, [1, 2, 3, 4], 4),
        Window([3, 4, 5, 6], 1, [5, 6, 7], 3),
        Window([7], 0, [8], 1),
    ]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(("size", "stride"), [(2, 1), (4, 4), (5, 2), (7, 3), (64, 32)])
def test_every_token_is_predicted_once_after_all_it_can_see(bos: bool, size: int, stride: int) -> None:
    text = "".join(str(i % 10) for i in range(37))
    found = windows(Digits(bos), [text], size, stride)
    targets = [target for window in found for target in window.targets]
    assert targets == [int(c) for c in text][0 if bos else 1 :]
    for window in found:
        assert len(window.ids) <= size
        assert len(window.ids) - window.begin == len(window.targets)
        assert list(window.ids[window.begin + 1 :]) == list(window.targets[:-1])
        assert window is found[0] or window.begin >= size - stride
        assert window.characters == len(window.targets)
    with pytest.raises(InputError, match="--stride is 0"):
        windows(Digits(bos), [text], size, 0)
    with pytest.raises(InputError, match=f"expected 1 to the context, {size}"):
        windows(Digits(bos), [text], size, size + 1)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tmp_path: Path, tokenizer_model: bytes) -> None:
    vocab = models.piece_count(tokenizer_model)
    tensors = models.random_tensors(models.small_config(vocab))
    tensors["lm_head.weight"][:] = 0
    cnl = models.convert(models.make_llama(tmp_path / "hf", tokenizer_model, tensors=tensors), tmp_path / "flat.cnl")
    (tmp_path / "t.txt").write_text("天空\n大海，😀", encoding="utf-8")
    done = evaluate("ppl", cnl, tmp_path / "t.txt", "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    (row,) = models.json_of(tmp_path / "r.json")["texts"]
    with LLM(cnl, ctx=64) as llm:
        tokens = len(llm.tokenize("天空\n大海，😀"))
    assert (row["tokens"], row["characters"]) == (tokens, 7)
    assert row["perplexity_per_token"] == pytest.approx(vocab, rel=1e-6)
    assert row["perplexity_per_character"] == pytest.approx(vocab ** (tokens / 7), rel=1e-6)
    assert row["bits_per_character"] == pytest.approx(tokens / 7 * math.log2(vocab), rel=1e-6)


@pytest.mark.parametrize(("size", "stride"), [(64, 32), (512, 100), (300, 300)])
def test_perplexity_is_numpy_s(tiny_cnl: Path, size: int, stride: int) -> None:
    with LLM(tiny_cnl, ctx=1024, max_sequences=5) as llm:
        parts = windows(llm.tokenizer, [TEXT, TEXT[:50]], size, stride)
        expected = 0.0
        for window in parts:
            logits = llm.logits(window.ids)[window.begin :].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            expected -= logits[np.arange(len(logits)), window.targets].sum()
        with EngineScorer(llm, 4) as model:
            found = perplexity(model, parts)
    assert found.tokens == sum(len(llm.tokenizer.encode(text)) for text in (TEXT, TEXT[:50]))
    assert found.nll == pytest.approx(expected, rel=1e-8)
    assert found.characters == len(TEXT) + 50


def test_perplexity_and_divergence_against_transformers(q8: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    cnl, checkpoint = q8
    kept = tmp_path / "reference.safetensors"
    common = (cnl, text_file, "--ctx", 128, "--chars", 1500)
    done = evaluate(
        "kl", *common, "--reference", checkpoint, "--save-reference", kept, "--json", tmp_path / "live.json"
    )
    assert done.returncode == 0, done.stderr
    live = models.json_of(tmp_path / "live.json")
    assert f"{live['tokens']:,} tokens x {live['model']['vocab_size']} log probabilities x 2 bytes" in done.stderr
    assert "KL(reference || q8.cnl)" in done.stdout
    # What remains on the same weights is the engine's int8 activations and fp16 cache.
    assert 0 < live["kl_mean"] < 1e-3
    assert live["kl_mean"] <= live["kl_p99"] <= live["kl_max"] < 3e-2
    assert live["top1_agreement"] > 0.96
    assert live["perplexity_ratio"] == pytest.approx(1, abs=5e-3)
    assert live["perplexity_per_token"] != live["reference_perplexity_per_token"]

    done = evaluate("ppl", *common, "--json", tmp_path / "ppl.json")
    assert done.returncode == 0, done.stderr
    (row,) = models.json_of(tmp_path / "ppl.json")["texts"]
    assert row["tokens"] == live["tokens"]
    assert row["perplexity_per_token"] == pytest.approx(live["perplexity_per_token"], rel=1e-6)

    done = evaluate("kl", *common, "--reference-logits", kept, "--json", tmp_path / "kept.json")
    assert done.returncode == 0, done.stderr
    stored = models.json_of(tmp_path / "kept.json")
    assert stored["kl_mean"] == pytest.approx(live["kl_mean"], rel=0.02)
    assert stored["reference_perplexity_per_token"] == pytest.approx(live["reference_perplexity_per_token"], rel=1e-3)
    assert stored["command"].startswith("cnllama eval kl ")

    done = evaluate("kl", cnl, text_file, "--ctx", 96, "--chars", 1500, "--reference-logits", kept)
    assert done.returncode == 2
    assert "another text, tokenizer, --ctx or --stride" in done.stderr


def test_the_reference_is_torch_on_whole_sequences(q8: tuple[Path, Path]) -> None:
    """Its reuse of the cache and its merged weights give what one plain forward pass gives."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from cnllama.eval.models import Item
    from cnllama.eval.reference import open_reference

    plain = transformers.LlamaForCausalLM.from_pretrained(q8[1], dtype=torch.float32).eval()
    scorer = open_reference(q8[1])
    start = list(range(5, 65))
    items = [Item(start, 0), Item([*start[:40], 9, 8, 7], 42), Item([*start[:40], 9], 40), Item([1, 2], 1)]
    for (number, position, logits), item in zip(scorer.rows(items), items, strict=True):
        with torch.no_grad():
            expected = plain(torch.tensor([list(item.ids)])).logits[0].numpy()[item.begin :]
        assert (items[number], position) == (item, item.begin)
        np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_a_model_does_not_diverge_from_itself(tiny_cnl: Path, tmp_path: Path) -> None:
    with LLM(tiny_cnl, ctx=128) as first, LLM(tiny_cnl, ctx=128) as second:
        parts = windows(first.tokenizer, [TEXT[:400]], 64, 32)
        ours, other = EngineScorer(first), EngineScorer(second)
        same = compare(ours, other, parts).figures()
        assert same["kl_max"] < 1e-12
        assert same["top1_agreement"] == 1
        assert same["perplexity_ratio"] == pytest.approx(1, abs=1e-12)
        path = tmp_path / "kept.safetensors"
        with SavingScorer(other, path, parts, Origin("itself")) as saving:
            compare(ours, saving, parts)
        stored = StoredScorer(path, parts, first.vocab_size)
        kept = compare(ours, stored, parts).figures()
        assert stored.origin == Origin("itself")
        assert kept["kl_max"] < 1e-5
        with pytest.raises(InputError, match="has 901 tokens"):
            StoredScorer(path, parts, 901)


def test_another_model_diverges(tiny_cnl: Path, tmp_path: Path, tokenizer_model: bytes, text_file: Path) -> None:
    pytest.importorskip("transformers")
    other = models.make_llama(tmp_path / "other", tokenizer_model, seed=9)
    done = evaluate(
        "kl", tiny_cnl, text_file, "--reference", other, "--ctx", 64, "--chars", 300, "--json", tmp_path / "r"
    )
    assert done.returncode == 0, done.stderr
    result = models.json_of(tmp_path / "r")
    assert result["kl_mean"] > 0.5
    assert result["top1_agreement"] < 0.5


def test_a_failed_run_leaves_no_reference_file(tiny_cnl: Path, tmp_path: Path) -> None:
    with LLM(tiny_cnl, ctx=128) as llm:
        parts = windows(llm.tokenizer, [TEXT[:100]], 64, 32)

        def stop() -> None:
            with SavingScorer(EngineScorer(llm), tmp_path / "kept", parts, Origin("")) as saving:
                next(saving.rows(parts))
                raise CnllamaError("stopped")

        with pytest.raises(CnllamaError, match="stopped"):
            stop()
    assert list(tmp_path.iterdir()) == []


def test_texts_and_documents(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_bytes("一二\r\n三\r\n\r\n四五六\r\n".encode("gbk"))
    text, problems = read_text(plain)
    assert (text.documents, text.characters, problems) == (["一二\n三\n\n四五六"], 9, [])
    assert read_text(plain, split=True)[0].documents == ["一二\n三", "四五六"]
    assert read_text(plain, split=True, characters=5)[0].documents == ["一二\n三", "四"]
    records = tmp_path / "a.jsonl"
    records.write_text('{"text": "一二"}\n{"no": 1}\n{"text": "三"}\n', encoding="utf-8")
    text, problems = read_text(records)
    assert text.documents == ["一二", "三"]
    assert "a.jsonl:2" in problems[1]
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(InputError, match="there is no text in it"):
        read_text(tmp_path / "empty")


def test_documents_are_scored_apart_and_together_they_are_the_sum(tiny_cnl: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("从前有一个农夫\n\n他每天都去田里", encoding="utf-8")
    file = open_cnl(tiny_cnl)

    def open_llm(path: Path, context: int, sequences: int) -> LLM:
        return LLM(path, ctx=context, max_sequences=sequences)

    both = read_text(tmp_path / "a.txt", split=True)[0]
    single = [Text(both.path, [document]) for document in both.documents]
    result = measure_perplexity(file, [both, *single], open_llm)
    total, first, second = (row["nll"] for row in result["texts"])
    assert total == pytest.approx(first + second, rel=1e-12)
    assert (result["context"], result["stride"]) == (1024, 512)


def test_numerics() -> None:
    logits = np.array([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, -1000.0, 999.0]], np.float32)
    np.testing.assert_allclose(target_logprobs(logits, [2, 0]), [-math.log(4), -math.log(1 + math.exp(-1))], rtol=1e-7)
    p, q = log_softmax(np.log([[0.5, 0.5]])), log_softmax(np.log([[0.25, 0.75]]))
    assert divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert divergence(p, p) == 0
    with np.errstate(divide="ignore"):
        never, other = log_softmax(np.log([[0.5, 0.5, 0.0]])), log_softmax(np.log([[0.25, 0.75, 0.0]]))
    assert divergence(never, other) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_an_infinite_divergence_is_one_sentence() -> None:
    class One:
        vocab_size = 3

        def __init__(self, row: list[float]) -> None:
            self.row = row

        def rows(self, items: Any, progress: Any = None) -> Any:
            yield Rows(0, 0, np.array([self.row], np.float32))

    parts = [Window([5], 0, [0], 1)]
    with pytest.raises(CnllamaError, match="a token that one model can choose is impossible in the other"):
        compare(One([0, 1, -math.inf]), One([0, 1, 0]), parts)
    assert compare(One([0, 1, 0]), One([0, 1, -math.inf]), parts).kl.max() > 0


@pytest.mark.parametrize(
    ("b", "c", "p"), [(0, 0, 1), (1, 0, 1), (5, 5, 1), (0, 6, 2 / 64), (2, 8, 2 * 56 / 1024), (8, 2, 2 * 56 / 1024)]
)
def test_sign_test_by_hand(b: int, c: int, p: float) -> None:
    assert sign_test(b, c) == pytest.approx(p, rel=1e-12)
    assert sign_test(4000, 4300) == pytest.approx(0.00102, abs=3e-5)  # the normal approximation says 0.00099


def test_perplexity_imports_no_training_library(tiny_cnl: Path, text_file: Path) -> None:
    code = (
        "import sys; from cnllama.cli.main import main; "
        f"assert main(['eval', 'ppl', {str(tiny_cnl)!r}, {str(text_file)!r}, '--chars', '50']) == 0; "
        "assert not {'torch', 'transformers', 'cnllama.convert'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("ppl", "{cnl}", "missing.txt"), "missing.txt: there is no such file"),
        (("ppl", "{cnl}", "{text}", "--stride", "0"), "--stride is 0"),
        (("ppl", "{cnl}", "{text}", "--ctx", "1"), "--ctx is 1"),
        (("ppl", "{cnl}", "{text}", "--ctx", "9" * 18), "expected 2 to 16,777,216 tokens"),
        (("ppl", "{cnl}", "{text}", "--threads", "9" * 18), "--threads is 9"),
        (("kl", "{cnl}", "{text}", "--reference-logits", "{cnl}", "--threads", "-1"), "--threads is -1"),
        (("ppl", "{cnl}", "{text}", "--chars", "0"), "--chars is 0"),
        (("ppl", "{cnl}", "{text}", "--json", "{text}/x"), "is a file, not a directory"),
        (("ppl", "{text}", "{text}"), "expected a"),
        (("kl", "{cnl}", "{text}"), "--reference"),
        (("kl", "{cnl}", "{text}", "--reference-logits", "{cnl}"), "no reference log probabilities"),
        (("kl", "{cnl}", "{text}", "--reference-logits", "{cnl}", "--save-reference", "x"), "needs --reference"),
        (("kl", "{cnl}", "{text}", "--lora", "x"), "--lora belongs to --reference"),
        (("kl", "{cnl}", "{text}", "--reference", "missing"), "missing: there is no such directory"),
        ((), "required"),
    ],
)
def test_bad_input_is_one_sentence(tiny_cnl: Path, text_file: Path, args: tuple[str, ...], words: str) -> None:
    done = evaluate(*(arg.format(cnl=tiny_cnl, text=text_file) for arg in args))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_checkpoint_of_another_vocabulary_is_refused(tiny_cnl: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    small = models.train_tokenizer(models.sample_lines(), 860)
    base = models.make_llama(tmp_path / "small", small)
    done = evaluate("kl", tiny_cnl, text_file, "--reference", base, "--chars", 50)
    assert done.returncode == 2
    assert f"this checkpoint has {models.piece_count(small)} tokens" in done.stderr


def test_the_command_is_in_the_result(tiny_cnl: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "my result.json"
    done = evaluate("ppl", tiny_cnl, text_file, "--chars", 60, "--ctx", 32, "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    words = ["cnllama", "eval", "ppl", tiny_cnl, text_file, "--chars", 60, "--ctx", 32, "--json", out]
    assert shlex.split(result["command"]) == list(map(str, words))
    assert result["model"]["content_sha256"] == open_cnl(tiny_cnl).fingerprint["content_sha256"]
    assert "BOS" in result["convention"]
