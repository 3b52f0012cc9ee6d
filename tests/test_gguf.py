# SPDX-License-Identifier: Apache-2.0
"""The GGUF export: weights bit for bit, names, order of rows, rotation, the container, the command."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import numpy as np
import ops_reference as ref
import pytest
import reference
from cnllama.convert.gguf import export as export_module
from cnllama.convert.gguf.blocks import is_exact, own_type, to_blocks
from cnllama.convert.gguf.container import GgmlType, GgufWriter, TensorInfo
from cnllama.convert.gguf.export import export, gguf_name
from gguf_files import Maker, read, values

from cnllama import _core
from cnllama.cli import export as command
from cnllama.errors import CnllamaError, InputError
from cnllama.format import open_cnl
from cnllama.sentencepiece_model import PieceType

gguf = pytest.importorskip("gguf", reason="the package gguf, which reads the files that are tested, is not installed")

SCHEMES = ("q4-s32", "q4-s64", "q4-a64", "q8-s64")
OWN_TYPE = {"q4-s32": "Q4_0", "q4-s64": "Q4_0", "q4-a64": "Q4_1", "q8-s64": "Q8_0"}
EXACT_TYPES = {
    "q4-s32": ("q4_0", "q4_1", "q8_0"),
    "q4-s64": ("q4_0", "q4_1", "q8_0"),
    "q4-a64": ("q4_1",),
    "q8-s64": ("q8_0",),
}
# Bits of a value, and whether blocks have a min.
GGML_KINDS = {"Q4_0": (4, False), "Q4_1": (4, True), "Q5_0": (5, False), "Q5_1": (5, True), "Q8_0": (8, False)}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def expected_values(cnl: Path) -> dict[str, np.ndarray]:
    """float32 values under GGUF's names, rows as llama.cpp wants them: layouts and orders written a second time."""
    file = open_cnl(cnl)
    half = file.config["head_dim"] // 2
    result = {}
    for name, tensor in file.tensors.items():
        if tensor.scheme == "raw":
            continue
        if tensor.scheme == "f32":
            value = tensor.data.view(np.float32)[: tensor.rows]
        else:
            value = ref.dequantize(tensor.data, tensor.scheme, tensor.rows, tensor.cols).astype(np.float32)
        if ".q_proj." in name or ".k_proj." in name:
            turned = np.empty_like(value)
            for row in range(tensor.rows):
                head, at = divmod(row, 2 * half)
                turned[head * 2 * half + (2 * at if at < half else 2 * (at - half) + 1)] = value[row]
            value = turned
        result[gguf_name(name)] = value
    return result


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize(
    "config",
    [{}, {"num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}],
    ids=["grouped", "biases", "tied"],
)
def test_every_weight_is_the_same_float(make: Maker, tmp_path: Path, quant: str, config: dict[str, Any]) -> None:
    cnl = make(quant, **config)
    report = export(open_cnl(cnl), tmp_path / "x.gguf")
    expected = expected_values(cnl)
    _, tensors = read(tmp_path / "x.gguf")
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(values(tensors[name]), value, err_msg=name)
    inner = {m.type.name for m in report.matrices if m.name not in (EMBED, HEAD)}
    outer = {m.type.name for m in report.matrices if m.name in (EMBED, HEAD)}
    assert (inner, outer) == ({OWN_TYPE[quant]}, {"Q8_0"})
    assert not any(m.error for m in report.matrices)
    assert report.size == (tmp_path / "x.gguf").stat().st_size
    assert ("output.weight" in tensors) == (not config.get("tie_word_embeddings"))


@pytest.mark.parametrize("scheme", ref.SCHEMES)
@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (48, 160), (32, 672)])
def test_blocks_of_every_type_that_holds_a_scheme(scheme: str, rows: int, cols: int) -> None:
    """All integers, in panels that are an odd number or end in half a group, as the package decodes them."""
    s = ref.SCHEMES[scheme]
    rng = np.random.default_rng(rows)
    padded = -(-cols // s.group) * s.group
    q = rng.integers(s.smallest, 1 << s.bits, (rows, padded)).astype(np.uint8)
    scale, low = (rng.uniform(-1, 1, (rows, padded // s.group)).astype(np.float16) for _ in range(2))
    packed = ref.pack(q, scale, low, scheme)
    expected = ref.dequantize(packed, scheme, rows, cols).astype(np.float32)
    targets = [kind for kind in GgmlType if kind is not GgmlType.F32 and is_exact(scheme, kind)]
    wide = {8: "Q8_0", 6: "Q8_0", 5: "Q5_1" if s.asymmetric else "Q5_0"}
    assert own_type(scheme).name == wide.get(s.bits, "Q4_1" if s.asymmetric else "Q4_0")
    assert {kind.name for kind in targets} == {
        kind for kind, (bits, with_min) in GGML_KINDS.items() if s.bits <= bits and (with_min or not s.asymmetric)
    }
    for kind in targets:
        blocks = to_blocks(packed[: rows // 16], scheme, cols, kind)
        assert blocks.shape == (rows, kind.row_bytes(cols))
        decoded = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
        np.testing.assert_array_equal(decoded, expected, err_msg=kind.name)


@pytest.mark.parametrize(("quant", "kind"), [("q5-a64", "Q5_1"), ("q5-s128", "Q5_0"), ("q3-s32", "Q4_0")])
def test_a_model_of_other_bits(make: Maker, tmp_path: Path, quant: str, kind: str) -> None:
    cnl = make(quant)
    report = export(open_cnl(cnl), tmp_path / "x.gguf")
    metadata, tensors = read(tmp_path / "x.gguf")
    assert metadata["general.file_type"] == {"Q5_1": 9, "Q5_0": 8, "Q4_0": 2}[kind]
    for name, value in expected_values(cnl).items():
        np.testing.assert_array_equal(values(tensors[name]), value, err_msg=name)
    assert {m.type.name for m in report.matrices if m.name not in (EMBED, HEAD)} == {kind}
    assert not any(m.error for m in report.matrices)


def test_chunks_make_no_difference(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = open_cnl(make("q4-a64"))
    export(file, tmp_path / "whole.gguf", wanted="q4_0")
    monkeypatch.setattr(export_module, "_CHUNK_VALUES", 1)
    export(file, tmp_path / "chunks.gguf", wanted="q4_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "chunks.gguf").read_bytes()


@pytest.mark.parametrize("quant", ["q4-a64", "q4-s32"])
def test_columns_that_fill_no_block_go_out_as_floats(make: Maker, tmp_path: Path, quant: str) -> None:
    cnl = make(quant, intermediate_size=200)
    export(open_cnl(cnl), tmp_path / "x.gguf", wanted="q4_0")
    _, tensors = read(tmp_path / "x.gguf")
    down = tensors["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == "F32"
    np.testing.assert_array_equal(values(down), expected_values(cnl)["blk.1.ffn_down.weight"])
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == "Q4_0"


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize("wanted", ["q4_0", "q4_1", "q8_0", "f16"])
def test_asked_types_and_their_errors(make: Maker, tmp_path: Path, quant: str, wanted: str) -> None:
    cnl = make(quant)
    report = export(open_cnl(cnl), tmp_path / "x.gguf", wanted=wanted)
    metadata, tensors = read(tmp_path / "x.gguf")
    assert metadata["general.file_type"] == {"q4_0": 2, "q4_1": 3, "q8_0": 7, "f16": 1}[wanted]
    expected = expected_values(cnl)
    for matrix in report.matrices:
        name = gguf_name(matrix.name)
        outside = matrix.name in (EMBED, HEAD)
        kind = "q8_0" if outside and wanted.startswith("q4") else wanted
        assert tensors[name].tensor_type.name == kind.upper()
        truth = expected[name].astype(np.float64)
        left = values(tensors[name]) - truth
        error = math.sqrt((left**2).sum() / (truth**2).sum())
        assert matrix.error == pytest.approx(error, rel=1e-3, abs=1e-9)
        exact = kind in EXACT_TYPES["q8-s64" if outside else quant]
        assert (error == 0) == exact
        if not exact and kind != "f16":  # never worse than GGML's own rule
            plain = gguf.quants.quantize(expected[name], tensors[name].tensor_type)
            other = gguf.quants.dequantize(plain, tensors[name].tensor_type) - truth
            assert error <= math.sqrt((other**2).sum() / (truth**2).sum()) * 1.0001


def test_a_weight_beyond_half_precision_is_refused(make: Maker, tmp_path: Path) -> None:
    file = open_cnl(make("q4-s32"))
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = file.tensors[name]
    data = tensor.data.copy()
    data[:2] = np.frombuffer(np.float16(30000).tobytes(), np.uint8)
    file.tensors[name] = type(tensor)(name, tensor.scheme, tensor.rows, tensor.cols, data)
    for wanted in ("f16", "q4_1"):
        with pytest.raises(InputError, match=f"{name}: .* too large for half precision"):
            export(file, tmp_path / "x.gguf", wanted=wanted)
    assert list(tmp_path.iterdir()) == []
    export(file, tmp_path / "x.gguf")
    _, tensors = read(tmp_path / "x.gguf")
    assert np.abs(values(tensors[gguf_name(name)])).max() > 65504


# --- metadata


def test_architecture_keys(make: Maker, tmp_path: Path) -> None:
    cnl = make("q4-s32", head_dim=64, rope_theta=500000.0, rms_norm_eps=1e-5)
    export(open_cnl(cnl), tmp_path / "zh.gguf")
    metadata, _ = read(tmp_path / "zh.gguf")
    config = open_cnl(cnl).config
    assert metadata["general.architecture"] == "llama"
    assert metadata["general.name"] == cnl.stem
    assert metadata["general.file_type"] == 2
    assert metadata["cnllama.content_sha256"] == open_cnl(cnl).fingerprint["content_sha256"]
    expected = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": 96,
        "block_count": 3,
        "feed_forward_length": 224,
        "attention.head_count": 3,
        "attention.head_count_kv": 1,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "rope.dimension_count": 64,
        "rope.freq_base": 500000.0,
        "vocab_size": config["vocab_size"],
    }
    assert {key: metadata[f"llama.{key}"] for key in expected} == expected
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert not [key for key in metadata if "scaling" in key]


def llama_cpp_rotation(metadata: dict[str, Any], factors: np.ndarray | None) -> tuple[np.ndarray, float]:
    """(inverse frequencies, amplitude) that llama.cpp computes from a file's keys."""
    dims, base = metadata["llama.rope.dimension_count"], metadata["llama.rope.freq_base"]
    prefix = "llama.rope.scaling."
    extrapolated = base ** (-2 * np.arange(dims // 2) / dims) / (1 if factors is None else factors)
    scale = 1 / metadata.get(prefix + "factor", 1.0)
    frequencies, amplitude = extrapolated * scale, metadata.get(prefix + "attn_factor", 1.0)
    if metadata.get(prefix + "type") == "yarn":

        def dimension(turns: float) -> float:
            context = metadata[prefix + "original_context_length"]
            return dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(0, math.floor(dimension(32))), min(dims - 1, math.ceil(dimension(1)))
        ramp = 1 - np.clip((np.arange(dims // 2) - low) / max(0.001, high - low), 0, 1)
        frequencies = frequencies * (1 - ramp) + extrapolated * ramp
        amplitude *= 1 + 0.1 * math.log(1 / scale)
    return frequencies, amplitude


@pytest.mark.parametrize("kind", [kind for kind in models.ROPE_SCALINGS if kind != "dynamic"])
def test_rotation(make: Maker, tmp_path: Path, kind: str) -> None:
    cnl = make("q4-s32", rope_scaling=models.ROPE_SCALINGS[kind], head_dim=64)
    report = export(open_cnl(cnl), tmp_path / "x.gguf")
    metadata, tensors = read(tmp_path / "x.gguf")
    factors = tensors.get("rope_freqs.weight")
    frequencies, amplitude = llama_cpp_rotation(metadata, None if factors is None else values(factors))
    expected, expected_amplitude = reference.rotary_frequencies(open_cnl(cnl).config)
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
    assert amplitude == pytest.approx(expected_amplitude, rel=1e-6)
    assert (factors is not None) == (kind in ("llama3", "yarn-attention", "yarn-mscale"))
    assert report.warnings == []


def test_dynamic_scaling_is_left_out_with_a_warning(make: Maker, tmp_path: Path) -> None:
    report = export(open_cnl(make("q4-s32", rope_scaling=models.ROPE_SCALINGS["dynamic"])), tmp_path / "x.gguf")
    assert "no dynamic RoPE scaling: the file is the same model up to 1024 positions" in report.warnings[0]
    metadata, tensors = read(tmp_path / "x.gguf")
    assert not [key for key in metadata if "scaling" in key]
    assert "rope_freqs.weight" not in tensors


# --- the container and the command


def write_zeros(path: Path, table: list[TensorInfo], steps: list[tuple[str, int]]) -> None:
    with GgufWriter(path, {}, table) as writer:
        for name, size in steps:
            writer.write(name, bytes(size))
        writer.finish()


def test_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    table = [TensorInfo("a", GgmlType.F32, (3,)), TensorInfo("b", GgmlType.Q4_0, (2, 64))]
    path = tmp_path / "x.gguf"
    for steps, words in (
        ([("b", 72)], "b was written where a was due"),
        ([("a", 13)], "a has 1 bytes too many"),
        ([("a", 12), ("b", 72), ("b", 1)], "b was written where nothing was due"),
        ([("a", 12)], "a tensor is missing"),
    ):
        with pytest.raises(ValueError, match=words):
            write_zeros(path, table, steps)
        assert list(tmp_path.iterdir()) == []
    with GgufWriter(path, {}, table) as writer:
        for name, size in (("a", 4), ("a", 8), ("b", 72)):
            writer.write(name, bytes([7]) * size)
        writer.finish()
    assert path.stat().st_size == writer.size
    _, tensors = read(path)
    assert [t.data.tobytes() for t in tensors.values()] == [bytes([7]) * 12, bytes([7]) * 72]


def test_command(make: Maker, tmp_path: Path) -> None:
    cnl, out = make("q4-a64"), tmp_path / "x.gguf"
    done = models.command("cnllama", "export", cnl, "--to", "gguf", "-o", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Q4_1  21 matrices, every weight exact" in done.stdout
    assert "q8-s64 -> Q8_0  2 matrices, every weight exact" in done.stdout
    first = out.read_bytes()
    export(open_cnl(cnl), out)
    assert out.read_bytes() == first
    done = models.command("cnllama", "export", cnl, "-o", out, "--type", "q4_0")
    assert done.returncode == 0
    assert "q4-a64 -> Q4_0  21 matrices, error mean " in done.stdout


def test_command_prints_warnings(make: Maker, tmp_path: Path) -> None:
    cnl = make("q4-s32", rope_scaling=models.ROPE_SCALINGS["dynamic"])
    done = models.command("cnllama", "export", cnl, "-o", tmp_path / "x.gguf")
    assert done.returncode == 0
    assert done.stderr.startswith("warning: llama.cpp has no dynamic RoPE scaling")


def test_command_refuses_in_one_sentence(make: Maker, tmp_path: Path) -> None:
    cnl, out = make("q4-a64"), tmp_path / "x.gguf"
    before = cnl.read_bytes()
    (tmp_path / "text").write_text("this is no model")
    for arguments, words in (
        ([cnl, "-o", cnl], "this is the file to export; choose another name"),
        ([tmp_path / "none.cnl", "-o", out], "no such file"),
        ([tmp_path / "text", "-o", out], "this is a text (this is no model), expected a safetensors file"),
        ([cnl, "-o", tmp_path], "this is a directory"),
        ([cnl, "-o", tmp_path / "none" / "x.gguf"], "no such file or directory"),
        ([cnl, "-o", out, "--type", "q5_0"], "invalid choice"),
        ([cnl, "-o", out, "--to", "onnx"], "invalid choice"),
        ([cnl], "-o/--output"),
    ):
        done = models.command("cnllama", "export", *arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert cnl.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_failure_leaves_no_file(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise CnllamaError("the disk is full")

    monkeypatch.setattr(GgufWriter, "write", full)
    with pytest.raises(CnllamaError):
        export(open_cnl(make("q4-a64")), tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_exporting_needs_no_training_library(make: Maker, tmp_path: Path) -> None:
    code = (
        "import sys; from cnllama.cli.main import main; code = main(sys.argv[1:]); "
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr); sys.exit(code)"
    )
    arguments = ["export", str(make("q4-a64")), "-o", str(tmp_path / "x.gguf")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "sentencepiece" in loaded
    assert not loaded & {"torch", "transformers", "gguf", "google", "safetensors"}


def test_types_are_those_of_the_package() -> None:
    assert ("auto", *export_module.TYPES) == command.TYPES
    for kind in GgmlType:
        values_in_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
        assert gguf.GGMLQuantizationType[kind.name] == kind
        assert (kind.block, kind.row_bytes(64 * values_in_block)) == (values_in_block, 64 * size)
    assert [int(kind) for kind in PieceType] == [1, 2, 3, 4, 5, 6]
    assert set(_core.schemes()) == set(ref.SCHEMES)
