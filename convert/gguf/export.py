# SPDX-License-Identifier: Apache-2.0
"""The export itself: choose a GGML type for every tensor, then stream them through, some rows at a time."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cnllama import _core
from cnllama.config import EMBEDDING, FINAL_NORM, LM_HEAD
from cnllama.container import Bytes
from cnllama.errors import InputError, printable
from cnllama.format import CnlFile, TensorEntry
from cnllama.paths import same_file

from .blocks import BLOCK, PANEL_ROWS, is_exact, nearest, own_type, to_blocks
from .container import GgmlType, GgufWriter, TensorInfo
from .metadata import make_metadata

TYPES = {"q4_0": GgmlType.Q4_0, "q4_1": GgmlType.Q4_1, "q8_0": GgmlType.Q8_0, "f16": GgmlType.F16}
ROPE_FACTORS = "rope_freqs.weight"
_CHUNK_VALUES = 1 << 22
_ROW_ALIGN = 32
_OUTER = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", LM_HEAD: "output.weight"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class ExportedMatrix:
    """How one matrix went. error: sqrt(sum of squared error / of squares), 0 where every value is the same float."""

    name: str
    scheme: str
    type: GgmlType
    error: float


@dataclass
class Report:
    """What an export did. size in bytes."""

    file: str
    size: int
    tensors: int
    vocab_size: int
    chat_template: bool
    matrices: list[ExportedMatrix]
    warnings: list[str] = field(default_factory=list)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_INNER[part]}.{kind}"


def choose_type(tensor: TensorEntry, wanted: GgmlType | None) -> GgmlType:
    """The GGML type of a tensor. wanted None: the smallest that holds it exactly.

    Types with blocks need columns in multiples of 32; a matrix without goes out as F32. Embeddings and lm_head keep
    their own precision when the layers are asked for in 4 bits, as in llama.cpp's own files.
    """
    if tensor.scheme == "f32":
        return GgmlType.F32
    own = own_type(tensor.scheme)
    chosen = own if wanted is None else wanted
    if tensor.name in (EMBEDDING, LM_HEAD) and chosen in (GgmlType.Q4_0, GgmlType.Q4_1):
        chosen = own
    return chosen if tensor.cols % chosen.block == 0 else GgmlType.F32


def rotary_order(rows: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Where llama.cpp's row i of a q or k projection is in ours.

    We turn the pairs (j, j + head_dim / 2) of a head, as Hugging Face does; llama.cpp turns (2 j, 2 j + 1).
    """
    order = np.arange(rows, dtype=np.int64).reshape(-1, 2, head_dim // 2)
    return order.transpose(0, 2, 1).reshape(-1)


def export(file: CnlFile, output: Path, *, wanted: str = "auto", progress: bool = False) -> Report:
    """Writes `file` as GGUF; nothing lies under the name `output` until all of it is done.

    wanted: a key of TYPES, or "auto" for what is exact. progress: a bar on stderr. Raises InputError for a model that
    llama.cpp cannot run and for a wrong output, CnllamaError for a full disk.
    """
    from tqdm import tqdm

    if same_file(output, file.path):
        raise InputError(f"{output}: this is the file to export; choose another name for the result")
    tensors = {n: t for n, t in file.tensors.items() if t.scheme != "raw"}
    types = {name: choose_type(tensor, TYPES.get(wanted)) for name, tensor in tensors.items()}
    metadata = make_metadata(file, _main_type(tensors, types))
    table = [_info(tensor, types[name]) for name, tensor in tensors.items()]
    if metadata.rope_factors is not None:
        table.append(TensorInfo(ROPE_FACTORS, GgmlType.F32, metadata.rope_factors.shape))
    matrices = []
    total = sum(tensor.rows * tensor.cols for tensor in tensors.values())
    with (
        GgufWriter(output, metadata.values, table) as writer,
        tqdm(total=total, unit="w", unit_scale=True, desc="exporting", disable=not progress, file=sys.stderr) as bar,
    ):
        for name, tensor in tensors.items():
            error = _write(writer, file, tensor, types[name])
            if tensor.scheme != "f32":
                matrices.append(ExportedMatrix(name, tensor.scheme, types[name], error))
            file.check_unchanged()
            file.release(name)
            bar.update(tensor.rows * tensor.cols)
        if metadata.rope_factors is not None:
            writer.write(ROPE_FACTORS, metadata.rope_factors.astype("<f4"))
        writer.finish()
    return Report(
        file=str(output),
        size=writer.size,
        tensors=len(table),
        vocab_size=file.vocab_size,
        chat_template="tokenizer.chat_template" in metadata.values,
        matrices=matrices,
        warnings=[printable(warning) for warning in metadata.warnings],
    )


def _main_type(tensors: Mapping[str, TensorEntry], types: Mapping[str, GgmlType]) -> GgmlType:
    """The type of most weights of the layers."""
    weights: Counter[GgmlType] = Counter()
    for name, tensor in tensors.items():
        if tensor.scheme != "f32" and name not in (EMBEDDING, LM_HEAD):
            weights[types[name]] += tensor.rows * tensor.cols
    return weights.most_common(1)[0][0]


def _info(tensor: TensorEntry, kind: GgmlType) -> TensorInfo:
    shape = (tensor.rows,) if tensor.scheme == "f32" else (tensor.rows, tensor.cols)
    return TensorInfo(gguf_name(tensor.name), kind, shape)


def _write(writer: GgufWriter, file: CnlFile, tensor: TensorEntry, kind: GgmlType) -> float:
    """Writes one tensor; returns its relative error."""
    name = gguf_name(tensor.name)
    head_dim = file.config["head_dim"] if ".attn_q." in name or ".attn_k." in name else 0
    if tensor.scheme == "f32":
        vector = tensor.data.view("<f4")[: tensor.rows]
        writer.write(name, vector[rotary_order(tensor.rows, head_dim)] if head_dim else vector)
        return 0.0
    squared_error = squares = 0.0
    try:
        for rows, error, square in _chunks(tensor, kind, head_dim):
            writer.write(name, rows)
            squared_error, squares = squared_error + error, squares + square
    except OverflowError as overflow:
        raise InputError(
            f"{file.path}: tensor {tensor.name}: {overflow}; export it as auto, q8_0 or a 4-bit type"
        ) from None
    return math.sqrt(squared_error / squares) if squares else 0.0


def _chunks(tensor: TensorEntry, kind: GgmlType, head_dim: int) -> Iterator[tuple[Bytes, float, float]]:
    """(blocks of some rows, squared error, squares). Chunks hold whole heads: rows change places inside them."""
    unit = math.lcm(_ROW_ALIGN, head_dim or 1)
    step = unit * max(1, _CHUNK_VALUES // tensor.cols // unit)
    panels = tensor.data.reshape(_core.padded_rows(tensor.rows) // PANEL_ROWS, -1)
    for begin in range(0, tensor.rows, step):
        end = min(begin + step, tensor.rows)
        error = squares = 0.0
        if kind.block == BLOCK and is_exact(tensor.scheme, kind):
            part = panels[begin // PANEL_ROWS : -(-end // PANEL_ROWS)]
            rows = to_blocks(part, tensor.scheme, tensor.cols, kind)[: end - begin]
        else:
            values = _core.dequantize(tensor.data, tensor.scheme, tensor.rows, tensor.cols, begin, end)
            rows, error, squares = nearest(values, kind)
        yield rows[rotary_order(end - begin, head_dim)] if head_dim else rows, error, squares
