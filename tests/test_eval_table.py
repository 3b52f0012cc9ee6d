# SPDX-License-Identifier: Apache-2.0
"""cnllama eval table: its rows against the other measures, kept files, the unquantized GGUF, llama.cpp beside ours."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import gguf_check
import models
import numpy as np
import pytest
import sentencepiece
import sizes
from cnllama.convert.gguf.export import export, gguf_name
from cnllama.convert.gguf.from_checkpoint import write_checkpoint
from cnllama.convert.pack import make_plan
from eval_data import evaluate

from cnllama import _core
from cnllama.errors import CnllamaError, InputError
from cnllama.eval.gguf_header import read_gguf
from cnllama.eval.table import OURS, RIVAL, Form, weigh
from cnllama.eval.table_report import comparison, markdown, picture
from cnllama.format import open_cnl

TEXT = "\n".join(models.chinese_lines())
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "文本.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def turned(name: str, value: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q and k as llama.cpp rotates them: neighbours instead of halves."""
    if "q_proj" not in name and "k_proj" not in name:
        return value
    result = np.empty_like(value)
    for row in range(len(value)):
        head, at = divmod(row, head_dim)
        half = head_dim // 2
        result[head * head_dim + (2 * at if at < half else 2 * (at - half) + 1)] = value[row]
    return result


@pytest.mark.parametrize("config", [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_checkpoint_as_gguf(tmp_path: Path, tokenizer_model: bytes, kind: str, config: dict[str, Any]) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf, which reads the file, is not installed")
    tensors = models.random_tensors(models.small_config(models.piece_count(tokenizer_model), **config))
    base = models.make_llama(tmp_path / "hf", tokenizer_model, dtype="float32", tensors=tensors, **config)
    assert write_checkpoint(make_plan(base), tmp_path / "x.gguf", kind) == []
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == {gguf_name(name) for name in tensors}
    for name, value in tensors.items():
        tensor = found[gguf_name(name)]
        dtype = np.float16 if kind == "f16" and value.ndim == 2 else np.float32
        assert tensor.data.dtype == dtype
        np.testing.assert_array_equal(tensor.data, turned(name, value, 32).astype(dtype))
    # Everything else is what a packed file of the same checkpoint is exported with.
    cnl = models.convert(base, tmp_path / "x.cnl")
    export(open_cnl(cnl), tmp_path / "packed.gguf")
    packed = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "packed.gguf").fields.items()}
    fields = {key: field.contents() for key, field in reader.fields.items()}
    own = {"general.name", "general.file_type", "GGUF.kv_count"}
    assert {key for key in packed if packed[key] != fields.get(key)} - own == {"cnllama.content_sha256"}
    assert fields.keys() == packed.keys() - {"cnllama.content_sha256"}
    assert fields["general.file_type"] == {"f32": 0, "f16": 1}[kind]


def test_adapters_are_merged_into_the_gguf(tmp_path: Path, tiny_llama: Path, tokenizer_model: bytes) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf, which reads the file, is not installed")
    pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama).float()
    merged = models.make_adapter(model, tmp_path / "lora", tokenizer_model)
    write_checkpoint(make_plan(tiny_llama, [tmp_path / "lora"]), tmp_path / "x.gguf", "f32")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for name, value in merged.state_dict().items():
        expected = turned(name, value.float().numpy(), 32)
        np.testing.assert_allclose(found[gguf_name(name)], expected, atol=1e-5, rtol=1e-5)


def test_weights_beyond_half_precision_are_refused(tmp_path: Path, tokenizer_model: bytes) -> None:
    tensors = models.random_tensors(models.small_config(models.piece_count(tokenizer_model)))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    base = models.make_llama(tmp_path / "hf", tokenizer_model, dtype="float32", tensors=tensors)
    with pytest.raises(InputError, match=r"up_proj\.weight: a weight is too large for half precision.*f32"):
        write_checkpoint(make_plan(base), tmp_path / "x.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_table(tiny_llama: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    work, out = tmp_path / "work", tmp_path / "t"
    outputs = (
        "--json",
        out.with_suffix(".json"),
        "--markdown",
        out.with_suffix(".md"),
        "--png",
        out.with_suffix(".png"),
    )
    common = (tiny_llama, text_file, "--ctx", 128, "--chars", 700)
    schemes = ("--schemes", "q8,q4,q4-a64,q4-s64:q8")
    done = evaluate("table", *common, *schemes, "--rounds", 1, "--work", work, *outputs)
    assert done.returncode == 0, done.stderr
    result = models.json_of(out.with_suffix(".json"))
    rows = {row["name"]: row for row in result["rows"]}
    # q4 is q4-a64, which is not measured twice; embeddings are q8 anyway.
    assert list(rows) == ["fp32", "q8-s64", "q4-a64", "q4-s64, q8-s64 outside"]
    assert rows["q8-s64"]["kl_mean"] < 0.05 * rows["q4-a64"]["kl_mean"]
    assert rows["q8-s64"]["bits_per_weight"] > rows["q4-a64"]["bits_per_weight"]
    assert rows["q4-a64"]["prefill"]["tokens_per_s"] > 0
    assert rows["q4-a64"]["decode"]["tokens"] > 0
    assert done.stdout == out.with_suffix(".md").read_text(encoding="utf-8") == markdown(result)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert result["command"].startswith(f"cnllama eval table {tiny_llama}")

    (cnl,) = work.glob("*-q4-a64-rtn.cnl")
    check = tmp_path / "kl.json"
    same = evaluate("kl", cnl, *common[1:], "--reference", tiny_llama, "--json", check)
    assert same.returncode == 0, same.stderr
    expected, row = models.json_of(check), rows["q4-a64"]
    assert row["kl_mean"] == pytest.approx(expected["kl_mean"], abs=2e-5)
    assert row["perplexity_per_token"] == pytest.approx(expected["perplexity_per_token"], rel=1e-9)
    assert rows["fp32"]["perplexity_per_token"] == pytest.approx(expected["reference_perplexity_per_token"], rel=1e-4)
    assert (result["tokens"], result["context"], result["stride"]) == (expected["tokens"], 128, 64)
    ratio = np.log(row["perplexity_per_token"]) / np.log(row["perplexity_per_character"])
    assert ratio == pytest.approx(result["characters"] / result["tokens"])

    # What lies in --work is taken as it is: a damaged file would be made again if it were not.
    before = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    done = evaluate(
        "table", *common, "--schemes", "q4", "--rounds", 0, "--work", work, "--json", out.with_suffix(".json")
    )
    assert done.returncode == 0, done.stderr
    assert "the reference" not in done.stderr
    assert "packing" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in work.iterdir()} == before
    (again,) = models.json_of(out.with_suffix(".json"))["rows"][1:]
    assert again["kl_mean"] == row["kl_mean"]
    assert "prefill" not in again


def test_weigh_counts_every_byte(tiny_cnl: Path) -> None:
    file, found = open_cnl(tiny_cnl), weigh(tiny_cnl)
    tensors = {name: t for name, t in file.tensors.items() if t.scheme != "raw"}
    layers = [t for name, t in tensors.items() if ".layers." in name and t.cols > 1]
    assert found["bits_per_weight"] == pytest.approx(file.quantization["bits_per_weight"], abs=1e-4)
    assert found["layer_bits_per_weight"] == pytest.approx(
        8 * sum(t.data.nbytes for t in layers) / sum(t.rows * t.cols for t in layers)
    )
    assert found["types"] == {"q4-a64": len(layers), "q8-s64": 2}
    assert (found["embeddings"], found["output"], found["bytes"]) == ("q8-s64", "q8-s64", tiny_cnl.stat().st_size)


def test_the_report_is_made_from_the_rows() -> None:
    def row(program: str, kind: str, bits: float, kl: float, **more: Any) -> dict[str, Any]:
        figures = {"kl_mean_standard_error": kl / 50, "kl_median": kl, "kl_p99": 9 * kl, "top1_agreement": 0.9}
        form = Form(program, kind, "rtn" if program == OURS else "")
        named = {"name": form.name, "program": program, "kind": kind, "quantizer": form.quantizer or None}
        size = {"bytes": int(1e6 * bits), "bits_per_weight": bits, "layer_bits_per_weight": bits - 0.25}
        values = {"perplexity_per_token": 10.0, "perplexity_per_character": 9.0, "perplexity_change": 0.01}
        return named | size | values | figures | {"kl_mean": kl, "embeddings": "a", "output": "b"} | more

    speed = {"tokens": 512, "tokens_per_s": 10.0, "tokens_per_s_min": 9.0, "tokens_per_s_max": 1100.0}
    rows = [
        row(OURS, "q4-a64", 4.5, 0.01, prefill=speed),
        row(OURS, "q8-s64", 8.3, 1e-4),
        row(RIVAL, "Q4_0", 4.5, 0.02),
    ]
    rows.append(row(RIVAL, "Q4_K_M", 4.9, 0.008))
    assert comparison(rows).splitlines()[2:] == ["| q4-a64 (4.50 bits, 4.25 in the layers) | -50% | +25% |"]
    assert comparison(rows[:2]) == ""
    head = {"model": "m", "parameters": 1000, "vocab_size": 5, "text": "t", "characters": 3, "tokens": 2, "context": 8}
    head |= {"stride": 4, "cpu": "c", "isa": "i", "threads": 2, "cnllama": "1", "command": "x", "llama_cpp": "0.3"}
    text = markdown(head | {"rows": rows})
    assert "| cnllama q4-a64 | 4.50 | 4.500 | 4.250 | a / b | 10.000 | 9.000 | +1.00% | 0.010000 ±0.000200 |" in text
    assert "| 10 (9-1,100) |  |" in text
    lines = text[text.index("| form |") :].split("\n\n")[0].splitlines()
    assert len({line.count("|") for line in lines}) == 1
    if importlib.util.find_spec("matplotlib"):
        assert picture(head | {"rows": rows})[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--schemes", "q4,q9"), "'q9' is unknown, expected one of"),
        (("--schemes", "q4:"), "'' is unknown"),
        (("--schemes", ","), "--schemes is ','"),
        (("--quantizer", "magic"), "'magic' is unknown"),
        (("--quantizer", "auto"), "expected rtn, gptq, awq"),
        (("--calibrate", "{text}"), "--calibrate needs --quantizer gptq or awq"),
        (("--quantizer", "gptq", "--calibrate", "{tmp}/none"), "none: there is no such file"),
        (("--rounds", "-1"), "--rounds is -1"),
        (("--ctx", "1"), "--ctx is 1"),
        (("--json", "{tmp}/a", "--markdown", "{tmp}/a"), "two results"),
        (("--lora", "{tmp}/none"), "none: there is no such directory"),
        (("--work", "{text}/x"), "is a file, not a directory"),
        (("--work", "{text}"), "this is no directory"),
        (("--work", "{base}/../{name}"), "this is the checkpoint's own directory"),
        (("--threads", "4294967296"), "--threads is 4294967296, expected 0 to 1024"),
    ],
)
def test_bad_input_is_one_sentence(
    tiny_llama: Path, text_file: Path, tmp_path: Path, args: tuple[str, ...], words: str
) -> None:
    pytest.importorskip("transformers")
    done = evaluate(
        "table",
        tiny_llama,
        text_file,
        *(arg.format(tmp=tmp_path, text=text_file, base=tiny_llama, name=tiny_llama.name) for arg in args),
    )
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(("option", "package"), [("--gguf", "llama_cpp"), ("--png", "matplotlib")])
def test_what_is_missing_is_named(
    tiny_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    words = [tiny_llama, text_file, option, *([tmp_path / "x.png"] if option == "--png" else [])]
    done = evaluate("table", *words)
    assert done.returncode == 2
    assert f"{option} needs " in done.stderr
    assert "pip install 'cnllama[bench]'" in done.stderr


def test_llama_cpp_beside_ours(text_file: Path, tmp_path: Path) -> None:
    reason = "llama-cpp-python is not installed (pip install '.[bench]')"
    pytest.importorskip("llama_cpp", reason=reason)
    pytest.importorskip("transformers")
    tokenizer = models.train_tokenizer(models.sample_lines(), 1200)
    base = gguf_check.write_checkpoint(tmp_path / "base", tokenizer, {"num_key_value_heads": 2})
    out, work = tmp_path / "t.json", tmp_path / "work"
    common = ("--ctx", 96, "--chars", 600, "--rounds", 1, "--work", work, "--json", out)
    kinds = "Q8_0,Q4_0,Q4_K_M,Q4_0:Q8_0"
    done = evaluate("table", base, text_file, *common, "--schemes", "q8,q4", "--gguf", kinds)
    assert done.returncode == 0, done.stderr
    result = models.json_of(out)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows)[3:] == ["F32", "Q8_0", "Q4_0", "Q4_K_M", "Q4_0, Q8_0 outside"]
    # The same weights in another program: what is left is float rounding, which proves names, rows and rotation.
    assert rows["F32"]["kl_mean"] < 1e-4
    assert rows["F32"]["top1_agreement"] > 0.99
    assert rows["F32"]["kl_mean"] < rows["Q8_0"]["kl_mean"] < rows["Q4_0"]["kl_mean"]
    assert rows["Q4_0, Q8_0 outside"]["kl_mean"] < rows["Q4_0"]["kl_mean"]
    assert rows["Q4_0"]["layer_bits_per_weight"] == pytest.approx(4.5)
    # Rows of 704 columns cannot be Q4_K: they get a larger type, and the bits say so.
    assert rows["Q4_K_M"]["types"]["Q5_0"] > 0
    assert rows["Q4_K_M"]["layer_bits_per_weight"] > 4.8
    assert (rows["Q4_0"]["embeddings"], rows["Q4_0"]["output"]) == ("Q4_0", "Q6_K")
    assert rows["Q4_0, Q8_0 outside"]["types"]["Q8_0"] == 2
    assert all(row["prefill"]["tokens_per_s"] > 0 for row in result["rows"][1:])
    header = read_gguf(next(work.glob("*-Q4_0.gguf")))
    assert sum(header.tensors.values()) * 8 / sum(n for _, n in header.kinds.values()) == pytest.approx(
        rows["Q4_0"]["bits_per_weight"]
    )
    done = evaluate("table", base, text_file, "--gguf", "Q4_0,Q7")
    assert done.returncode == 2
    assert "--gguf has 'Q7', expected names of " in done.stderr


def test_llama_cpp_gives_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install '.[bench]')")
    from cnllama.eval.llama_cpp import LlamaCpp, file_types, quantize

    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(CnllamaError, match=r"x\.gguf: llama\.cpp cannot load it \(.*header"):
        LlamaCpp(path)
    with pytest.raises(CnllamaError, match=r"x\.gguf: llama\.cpp cannot quantize it to Q4_0"):
        quantize(path, tmp_path / "y.gguf", "Q4_0")
    assert [found.name for found in tmp_path.iterdir()] == ["x.gguf"]
    assert {"Q4_0", "Q4_K_M", "IQ4_NL"} < set(file_types())
    assert not {"IQ2_XXS", "Q2_K_S"} & set(file_types())


def test_a_tokenizer_that_llama_cpp_lacks_is_refused_at_once(text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install '.[bench]')")
    pytest.importorskip("transformers")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(models.sample_lines()), model_writer=model, model_type="unigram", vocab_size=800
    )
    base = models.make_llama(tmp_path / "hf", model.getvalue())
    done = evaluate("table", base, text_file, "--gguf", "Q4_0")
    assert done.returncode == 2
    assert "cannot be exported" in done.stderr
    assert "packing" not in done.stderr


def test_every_scheme_can_be_asked_for() -> None:
    from argparse import Namespace

    from cnllama.cli.eval_table import our_forms

    forms = our_forms(Namespace(schemes="all,q4,q4:q8", quantizer="rtn", calibrate=None))
    assert {form.kind for form in forms} == _core.schemes().keys()
    assert len(forms) == len(_core.schemes()) + 1
    default = our_forms(Namespace(schemes=None, quantizer="rtn", calibrate=None))
    assert {"q8-s64", "q4-a64", "q4-s64", "q4-s32"} <= {form.kind for form in default}


@pytest.mark.parametrize("quant", ["q4", "q8"])
def test_sizes_are_those_of_a_real_file(tiny_llama: Path, tmp_path: Path, quant: str) -> None:
    file = open_cnl(models.convert(tiny_llama, tmp_path / "x.cnl", "--quant", quant))
    weights = sum(entry[0].nbytes for entry in file.engine_tensors().values())
    found, count = sizes.weight_bytes(file.config, file.quantization["scheme"])
    assert found == weights
    assert 8 * found / count == pytest.approx(file.quantization["bits_per_weight"], abs=1e-4)
