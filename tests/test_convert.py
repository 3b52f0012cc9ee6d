# SPDX-License-Identifier: Apache-2.0
"""The conversion as a whole: what it writes, what it reports, and that it never leaves half a file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnllama.convert import parity
from cnllama.convert.pack import QUANTIZATIONS, convert, make_plan, merged_tensors
from cnllama.convert.parity_corpus import TEXTS
from models import command, make_llama, random_tensors, small_config, write_json, write_weights

from cnllama import _core
from cnllama.errors import InputError
from cnllama.format import CnlFile, open_cnl
from cnllama.verify import Statistics, compare, dequantized, verify

MATRIX = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint, free to be changed."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "tiny.cnl"
    convert(tiny_llama, [], path)
    return path


def values(file: CnlFile, name: str) -> np.ndarray:
    return np.concatenate(list(dequantized(file.tensors[name])))


def checks(path: Path) -> dict[str, str]:
    """Name -> detail of the failed checks of a file."""
    return {check.name: check.detail for check in verify(open_cnl(path), parity.check) if not check.passed}


@pytest.mark.parametrize("quant", QUANTIZATIONS)
def test_every_scheme_decodes_to_the_checkpoint(base: Path, tmp_path: Path, quant: str) -> None:
    report = convert(base, [], tmp_path / "x.cnl", quant=quant)
    file = open_cnl(tmp_path / "x.cnl")
    assert file.quantization["scheme"] == report.scheme == QUANTIZATIONS[quant]
    limit = {8: 0.007, 6: 0.03, 5: 0.06, 4: 0.12, 3: 0.25, 2: 0.55}
    errors = {}
    for name, original in merged_tensors(make_plan(base)):
        tensor = file.tensors[name]
        if tensor.scheme == "f32":
            assert np.array_equal(values(file, name), original)
            continue
        embedding = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert tensor.scheme == ("q8-s64" if embedding else QUANTIZATIONS[quant])
        error = np.linalg.norm(values(file, name) - original) / np.linalg.norm(original)
        assert error < limit[_core.schemes()[tensor.scheme]["bits"]]
        assert error == pytest.approx(file.fingerprint["tensors"][name]["error"], rel=1e-3)
        errors[name] = error
    assert errors[report.worst_tensor] == pytest.approx(max(errors.values()), rel=1e-3)  # stored with 4 digits
    assert report.worst_error == pytest.approx(max(errors.values()), rel=1e-3)


def test_report_and_metadata(packed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    report = convert(tiny_llama, [], tmp_path / "x.cnl", template="alpaca")
    file = open_cnl(tmp_path / "x.cnl")
    assert file.template == report.template == "alpaca"
    assert report.size == file.size == (tmp_path / "x.cnl").stat().st_size
    assert report.vocab_size == file.vocab_size
    weights = [t for t in file.tensors.values() if t.scheme != "raw"]
    assert report.parameters == sum(t.rows * t.cols for t in weights)
    assert report.bits_per_weight == pytest.approx(sum(t.data.size for t in weights) * 8 / report.parameters)
    assert report.content_sha256 == file.fingerprint["content_sha256"]
    assert report.peak_memory > 1 << 20
    assert file.generation == {"eos_token_ids": [2], "bos_token_id": 1}
    assert file.source["base"] == tiny_llama.name
    assert open_cnl(packed).fingerprint == file.fingerprint
    assert (tmp_path / "x.cnl").read_bytes()[-200:] == packed.read_bytes()[-200:]


def test_chunks_do_not_change_the_file(packed: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("cnllama.convert.quantize.base.CHUNK_VALUES", 1)
    convert(tiny_llama, [], tmp_path / "x.cnl", threads=2)
    assert open_cnl(tmp_path / "x.cnl").fingerprint == open_cnl(packed).fingerprint
    assert (tmp_path / "x.cnl").read_bytes() == packed.read_bytes()


def test_fingerprint_survives_container_sharding_and_scheme(packed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    tensors = dict(merged_tensors(make_plan(tiny_llama)))
    for kind, shards, quant in (("bin", 3, "q4"), ("safetensors", 2, "q8")):
        other = tmp_path / f"{kind}{shards}"
        other.mkdir()
        write_weights(other, tensors, kind=kind, shards=shards)
        write_json(other / "config.json", config)
        shutil.copy(tiny_llama / "tokenizer.model", other)
        convert(other, [], tmp_path / "other.cnl", quant=quant)
        assert compare(open_cnl(packed), open_cnl(tmp_path / "other.cnl")) == []
    tensors[MATRIX] = tensors[MATRIX] * np.float32(1.01)
    write_weights(other, tensors, shards=2)
    convert(other, [], tmp_path / "other.cnl")
    differences = compare(open_cnl(packed), open_cnl(tmp_path / "other.cnl"))
    assert differences
    assert all(MATRIX in difference for difference in differences)


def test_statistics_are_exact() -> None:
    random = np.random.default_rng(3).standard_normal((1000, 37)).astype(np.float32)
    statistics = Statistics()
    for part in np.array_split(random, 7):
        statistics.add(part)
    wide = random.astype(np.float64)
    assert statistics.mean == pytest.approx(wide.mean(), rel=1e-12)
    assert statistics.rms == pytest.approx(np.sqrt((wide**2).mean()), rel=1e-12)
    assert statistics.absmax == np.abs(random).max()
    for bad in (np.nan, np.inf, -np.inf):
        broken = Statistics()
        broken.add(random)
        broken.add(np.array([1, bad], np.float32))
        assert not broken.finite


def test_verify_finds_every_kind_of_damage(packed: Path, tmp_path: Path) -> None:
    assert checks(packed) == {}
    broken = tmp_path / "broken.cnl"
    file = open_cnl(packed)
    data = bytearray(packed.read_bytes())
    base = np.frombuffer(packed.read_bytes(), np.uint8)
    tensor = file.tensors[MATRIX]
    begin = base.tobytes().index(tensor.data.tobytes())
    data[begin : begin + 2] = np.float16(np.inf).tobytes()
    broken.write_bytes(data)
    failed = checks(broken)
    assert set(failed) == {"content", "tensors"}
    assert failed["tensors"] == f"{MATRIX}: holds NaN or infinity"
    data[begin : begin + len(tensor.data.tobytes())] = bytes(len(tensor.data.tobytes()))
    broken.write_bytes(data)
    assert "rms is 0, expected" in checks(broken)["tensors"]


def test_verify_finds_another_parity(packed: Path, tmp_path: Path) -> None:
    from test_format import metadata, read, write

    for change, expected in (
        (lambda p: p.update(sha256="0" * 64), "hash to"),
        (lambda p: p.update(corpus="7"), "parity corpus is '7'"),
    ):
        header, body = read(packed)
        metadata("parity", change)(header)
        failed = checks(write(tmp_path / "broken.cnl", header, body))
        assert set(failed) == {"tokenizer"}
        assert expected in failed["tokenizer"]


def test_parity_refuses_a_tokenizer_that_differs(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnllama.tokenizer import Tokenizer

    files = make_plan(tiny_llama).vocabulary.tokenizer
    assert parity.record(files.model, files.settings(), "x", "1")["texts"] == len(TEXTS) == len(set(TEXTS))
    honest = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, **more: honest(self, text.replace("  ", " "), **more))
    with pytest.raises(InputError, match=r"differs from SentencePiece on '  two leading spaces'|double  space"):
        parity.record(files.model, files.settings(), "x")


@pytest.mark.parametrize("fault", ["words are not found", "control tokens are found", "every text has a prefix"])
def test_parity_covers_added_tokens(tokenizer_model: bytes, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpus 1, whose texts have no token of the file, does not see these faults."""
    from cnllama.added_tokens import AddedTokens, Span
    from cnllama.tokenizer import Tokenizer

    settings = {
        "add_dummy_prefix": True, "legacy": False, "added_tokens": {"<|im_end|>": 900, "词语": 901},
        "token_flags": {"<|im_end|>": ["special"], "词语": []},
    }  # fmt: skip
    sound = parity.record(tokenizer_model, settings, "x")
    assert (sound["corpus"], sound["texts"] > len(TEXTS)) == ("2", True)
    split, plain = AddedTokens.split, Tokenizer._encode_plain
    wrong: dict[str, tuple[object, str, object]] = {
        "words are not found": (AddedTokens, "split", lambda self, text, special: [Span(0, len(text), None)]),
        "control tokens are found": (AddedTokens, "split", lambda self, text, special: split(self, text, True)),
        "every text has a prefix": (Tokenizer, "_encode_plain", lambda self, text, at_start: plain(self, text, True)),
    }
    monkeypatch.setattr(*wrong[fault])
    if fault != "control tokens are found":
        assert parity.record(tokenizer_model, settings, "x", "1")["texts"] == len(TEXTS)
    with pytest.raises(InputError, match=r"differs from SentencePiece on .* at token \d+: .*, expected"):
        parity.record(tokenizer_model, settings, "x")


def test_files_of_the_first_corpus_still_verify(packed: Path, tmp_path: Path) -> None:
    from test_format import metadata, read, write

    header, body = read(packed)
    file = open_cnl(packed)
    first = parity.record(file.tokenizer_model, file.tokenizer, "x", "1")
    metadata("parity", lambda p: p.update(first))(header)
    metadata("tokenizer", lambda t: [t.pop(key) for key in ("token_flags", "legacy")] and None)(header)
    old = write(tmp_path / "old.cnl", header, body)
    assert open_cnl(old).parity["corpus"] == "1"
    assert checks(old) == {}


@pytest.mark.parametrize("prefix", [True, False])
def test_parity_with_and_without_the_dummy_prefix(tiny_llama: Path, prefix: bool) -> None:
    files = make_plan(tiny_llama).vocabulary.tokenizer
    first = parity.record(files.model, files.settings(), "x")
    second = parity.record(files.model, files.settings() | {"add_dummy_prefix": prefix}, "x")
    assert (first == second) is prefix


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [MATRIX, "model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(base: Path, tmp_path: Path, value: float, name: str) -> None:
    tensors = dict(merged_tensors(make_plan(base)))
    tensors[name][(41, 5) if tensors[name].ndim == 2 else 41] = value
    write_weights(base, tensors)
    with pytest.raises(InputError) as caught:
        convert(base, [], tmp_path / "x.cnl")
    place = "row 41, column 5" if tensors[name].ndim == 2 else "row 41"
    assert f"tensor {name} is {value} at {place}, expected finite numbers" in str(caught.value)
    assert str(base / "model.safetensors") in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_values_beyond_the_scales(base: Path, tmp_path: Path) -> None:
    tensors = dict(merged_tensors(make_plan(base)))
    tensors[MATRIX][3, 4] = 3e38
    write_weights(base, tensors)
    with pytest.raises(InputError, match=f"tensor {MATRIX} cannot be quantized"):
        convert(base, [], tmp_path / "x.cnl")
    assert not (tmp_path / "x.cnl").exists()


def test_generation_defaults(base: Path, tmp_path: Path) -> None:
    write_json(
        base / "generation_config.json",
        {"eos_token_id": [2, 7, 10**9], "bos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.9,
         "repetition_penalty": 1.1, "max_length": 4096, "top_k": True},
    )  # fmt: skip
    convert(base, [], tmp_path / "x.cnl")
    assert open_cnl(tmp_path / "x.cnl").generation == {
        "eos_token_ids": [2, 7], "bos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1
    }  # fmt: skip
    write_json(base / "generation_config.json", {"temperature": 0.6})
    write_json(base / "config.json", json.loads((base / "config.json").read_text()) | {"eos_token_id": None})
    convert(base, [], tmp_path / "x.cnl")
    assert open_cnl(tmp_path / "x.cnl").generation == {"eos_token_ids": [2], "bos_token_id": 1}


def test_biases_and_tied_embeddings_are_packed(tmp_path: Path, tokenizer_model: bytes) -> None:
    base = make_llama(tmp_path / "base", tokenizer_model, attention_bias=True, tie_word_embeddings=True)
    convert(base, [], tmp_path / "x.cnl")
    file = open_cnl(tmp_path / "x.cnl")
    assert "lm_head.weight" not in file.tensors
    assert file.config["tie_word_embeddings"] is True
    bias = random_tensors(small_config(file.vocab_size, attention_bias=True, tie_word_embeddings=True))
    name = "model.layers.2.self_attn.k_proj.bias"
    assert np.array_equal(values(file, name), bias[name].astype(np.float16).astype(np.float32))
    assert _core.Engine(file.config, file.engine_tensors(), threads=1, context=64).vocab_size == file.vocab_size


def test_command_writes_file_and_report(tiny_llama: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "x.cnl", tmp_path / "report.json"
    options = "--quant", "q8", "--quantizer", "rtn", "--report", report, "--threads", "1"
    done = command("cnllama.convert", tiny_llama, "-o", out, *options)
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout
    assert "peak memory" in done.stdout
    written = json.loads(report.read_text())
    assert written["scheme"] == "q8-s64"
    assert written["size"] == out.stat().st_size
    assert command("cnllama", "verify", out).returncode == 0


def test_safetensors_need_no_torch(tiny_llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cnllama.convert.pack import convert\n"
        "convert(Path(sys.argv[1]), [], Path(sys.argv[2]))\n"
        "assert not {'torch', 'transformers', 'peft', 'safetensors'} & set(sys.modules)"
    )
    arguments = [sys.executable, "-c", code, str(tiny_llama), str(tmp_path / "x.cnl")]
    done = subprocess.run(arguments, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_command_refuses_in_one_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.cnl"
    for arguments, expected in (
        ([tmp_path / "absent", "-o", out], "there is no such directory"),
        ([tiny_llama, "-o", tmp_path / "no" / "x.cnl"], "no such file or directory"),
        ([tiny_llama, "-o", tmp_path], "this is a directory"),
        ([tiny_llama, "-o", out, "--template", "vicuna"], "--template 'vicuna' is unknown, expected one of"),
        ([tiny_llama, "-o", out, "--quant", "q9"], "the scheme 'q9' is unknown, expected one of"),
        ([tiny_llama, "-o", out, "--threads", "-1"], "--threads is -1"),
        ([tiny_llama, "-o", out, "--report", tmp_path / "no" / "x.json"], "no such file or directory"),
        ([tiny_llama, "-o", out, "--lora", tiny_llama], "this is a whole model"),
    ):
        done = command("cnllama.convert", *arguments)
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_info_prints_everything(packed: Path) -> None:
    done = command("cnllama", "info", packed)
    assert done.returncode == 0, done.stderr
    for expected in (
        "3 layers",
        "q4-a64",
        "template",
        "raw",
        "bits per weight",
        "kernels",
        open_cnl(packed).tokenizer["sha256"],
    ):
        assert expected in done.stdout
    facts = json.loads(command("cnllama", "info", packed, "--json").stdout)
    assert facts["config"] == open_cnl(packed).config
    assert facts["isa"] in _core.isas()


def test_info_escapes_what_a_stranger_wrote(packed: Path, tmp_path: Path) -> None:
    from test_format import metadata, read, write

    header, body = read(packed)
    metadata("source", lambda s: s.update(base="\x1b[31mred\nline"))(header)
    done = command("cnllama", "info", write(tmp_path / "x.cnl", header, body))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert r"\x1b[31mred\nline" in done.stdout


def test_verify_command_compares_two_files(
    packed: Path, tmp_path: Path, tiny_llama: Path, tokenizer_model: bytes
) -> None:
    convert(tiny_llama, [], tmp_path / "same.cnl", quant="q8")
    done = command("cnllama", "verify", packed, "--against", tmp_path / "same.cnl")
    assert done.returncode == 0, done.stdout
    assert "ok      same model" in done.stdout
    convert(make_llama(tmp_path / "other", tokenizer_model, seed=5), [], tmp_path / "other.cnl")
    done = command("cnllama", "verify", packed, "--against", tmp_path / "other.cnl")
    assert done.returncode == 1
    assert "FAILED  same model" in done.stdout
    broken = bytearray(packed.read_bytes())
    broken[-5000] ^= 1
    (tmp_path / "broken.cnl").write_bytes(broken)
    done = command("cnllama", "verify", tmp_path / "broken.cnl")
    assert done.returncode in (1, 2)
    assert "FAILED" in done.stdout or "hash" in done.stderr
