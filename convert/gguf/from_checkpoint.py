# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint with its adapters as an unquantized GGUF: what llama.cpp makes its own types from."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnllama.errors import InputError, printable
from cnllama.paths import real_path
from cnllama.templates import default_template

from ..checkpoint import FloatArray
from ..generation import generation_metadata
from ..merge import MergedTensor
from ..pack import Plan
from .blocks import nearest
from .container import GgmlType, GgufWriter, TensorInfo
from .export import ROPE_FACTORS, gguf_name, rotary_order
from .metadata import make_metadata

KINDS = {"f16": GgmlType.F16, "f32": GgmlType.F32}
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class Unpacked:
    """A plan as metadata.Described: the model that `convert` would write."""

    path: Path
    config: Mapping[str, Any]
    vocab_size: int
    tokenizer_model: bytes
    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]
    template: str
    fingerprint: Mapping[str, Any] = field(default_factory=dict)


def describe(plan: Plan, template: str | None = None) -> Unpacked:
    """What the metadata of a plan's file are made from. template None: by the size of the vocabulary, as `convert`."""
    files, rows = plan.vocabulary.tokenizer, plan.config["vocab_size"]
    generation, _ = generation_metadata(plan)
    return Unpacked(
        real_path(plan.checkpoint.directory),
        plan.config,
        rows,
        files.model,
        files.settings(generation["eos_token_ids"]),
        generation,
        template or default_template(rows),
    )


def write_checkpoint(
    plan: Plan, output: Path, kind: str = "f16", *, template: str | None = None, progress: bool = False
) -> list[str]:
    """Writes the merged tensors of a plan as GGUF, matrices in `kind`, a key of KINDS; returns warnings.

    Nothing lies under the name `output` until all of it is done. progress: a bar on stderr. Raises InputError for a
    model that llama.cpp cannot run and for weights beyond half precision, CnllamaError for a full disk.
    """
    from tqdm import tqdm

    metadata = make_metadata(describe(plan, template), KINDS[kind])
    types = {name: KINDS[kind] if len(t.shape) == 2 else GgmlType.F32 for name, t in plan.tensors.items()}
    table = [TensorInfo(gguf_name(name), types[name], t.shape) for name, t in plan.tensors.items()]
    if metadata.rope_factors is not None:
        table.append(TensorInfo(ROPE_FACTORS, GgmlType.F32, metadata.rope_factors.shape))
    total = sum(math.prod(tensor.shape) for tensor in plan.tensors.values())
    with (
        GgufWriter(output, metadata.values, table) as writer,
        tqdm(total=total, unit="w", unit_scale=True, desc="writing", disable=not progress, file=sys.stderr) as bar,
    ):
        for name, tensor in plan.tensors.items():
            for values in _chunks(tensor, gguf_name(name), plan.config["head_dim"]):
                try:
                    rows, _, _ = nearest(np.atleast_2d(values), types[name])
                except OverflowError as overflow:
                    raise InputError(
                        f"{tensor.files()}: tensor {name}: {overflow}, expected values that fit it; write it as f32"
                    ) from None
                writer.write(gguf_name(name), rows)
                bar.update(values.size)
            tensor.release()
        if metadata.rope_factors is not None:
            writer.write(ROPE_FACTORS, metadata.rope_factors.astype("<f4"))
        writer.finish()
    return [printable(warning) for warning in metadata.warnings]


def _chunks(tensor: MergedTensor, name: str, head_dim: int) -> Iterator[FloatArray]:
    """float32 rows as llama.cpp orders them. Chunks hold whole heads: rows change places inside them."""
    turned = ".attn_q." in name or ".attn_k." in name
    unit, rows = (head_dim if turned else 1), tensor.shape[0]
    step = rows if len(tensor.shape) == 1 else unit * max(1, _CHUNK_VALUES // tensor.shape[1] // unit)
    for begin in range(0, rows, step):
        values = tensor.read(begin, min(begin + step, rows))
        yield values[rotary_order(len(values), head_dim)] if turned else values
