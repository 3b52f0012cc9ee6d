# SPDX-License-Identifier: Apache-2.0
"""Base plus adapters as one model whose tensors are merged when they are read: what PEFT's forward pass sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from cnllama.config import EMBEDDING, LM_HEAD, expected_tensors

from .adapter_facts import BIASED, layer_weights, refuse_different
from .adapters import Adapter
from .checkpoint import Checkpoint, FloatArray, SourceTensor, same_values
from .tying import Embeddings, Matrix, on_embeddings, rows_after
from .updates import BiasUpdate, LoraUpdate, Padded, TokensUpdate, Update


@dataclass
class MergedTensor:
    """A tensor of the merged model: stored values and the adapters' updates on top of them, in order.

    rows: the first ones that belong to the model, None for all: the rest are padding.
    """

    name: str
    source: SourceTensor
    updates: list[Update] = field(default_factory=list)
    rows: int | None = None
    _prepared: int = field(default=0, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face stores it, without padding: [rows, cols] or [n]."""
        return self.source.shape if self.rows is None else (self.rows, *self.source.shape[1:])

    def read(self, begin: int = 0, end: int | None = None) -> FloatArray:
        """float32 rows begin .. end (all by default) of the merged tensor."""
        begin, end, _ = slice(begin, end).indices(self.shape[0])
        while self._prepared < len(self.updates):
            count = self._prepared
            self.updates[count].prepare(self.source.shape[0], partial(self._rows, count=count))
            self._prepared += 1
        return self._rows(begin, end, len(self.updates))

    def _rows(self, begin: int, end: int, count: int) -> FloatArray:
        """Rows with the first `count` updates."""
        values = self.source.read(begin, end)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name where it is used
            for update in self.updates[:count]:
                update.apply(values, begin)
        return values

    def padded(self) -> MergedTensor:
        """The same with its padding, as training needs it: adapters are saved for the rows that the base has."""
        return replace(self, rows=None)

    def release(self) -> None:
        """Drops everything that reading brought into memory."""
        self._prepared = 0
        self.source.release()
        for update in self.updates:
            update.release()

    def files(self) -> str:
        """The files its values come from, for error messages."""
        names = [self.source.file, *(source.file for update in self.updates for source in update.sources())]
        return " + ".join(map(str, dict.fromkeys(names)))

    def copied_as(self, name: str) -> MergedTensor:
        """The same values under another name."""
        updates = [LoraUpdate(u.pair, u.name) if isinstance(u, LoraUpdate) else u for u in self.updates]
        return MergedTensor(name, self.source, updates, self.rows)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the base, its facts settled, has one tensor for embed_tokens and lm_head."""
    return LM_HEAD not in checkpoint.tensors


def merge(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], config: Mapping[str, Any]
) -> tuple[dict[str, MergedTensor], bool, list[str]]:
    """(tensors in file order, still tied, notices). config has the vocabulary size after all adapters.

    Each adapter acts on what the ones before it made, as if they had been merged into the base. Embeddings stay tied
    while PEFT runs them as one matrix; afterwards lm_head is a tensor of its own, unless both hold the same values.
    """
    tied, notices = is_tied(checkpoint), []
    merged = {name: MergedTensor(name, tensor) for name, tensor in checkpoint.tensors.items()}
    untied: list[str] = []
    for adapter in adapters:
        found = on_embeddings(adapter, tied)
        _merge_embeddings(adapter, found, merged)
        notices += found.warnings
        if tied and not found.tied:
            untied.append(_untied_notice(adapter, found))
        tied = found.tied
        _merge_layers(adapter, merged, config)
    if untied and same_values(merged[EMBEDDING], merged[LM_HEAD]):
        del merged[LM_HEAD]
        tied = True
    elif untied:
        notices += untied
    order = [name for name, _ in expected_tensors({**config, "tie_word_embeddings": tied}) if name in merged]
    return {name: merged[name] for name in order}, tied, notices


def changed_names(checkpoint: Checkpoint, tensors: Mapping[str, MergedTensor]) -> set[str]:
    """The tensors whose values are not simply the checkpoint's."""
    return {name for name, t in tensors.items() if t.updates or t.source is not checkpoint.tensors.get(name)}


def bias_settings(tensors: Mapping[str, MergedTensor]) -> dict[str, bool]:
    """transformers' attention_bias and mlp_bias of a merged model."""
    return {
        key: any(part in name and name.endswith(".bias") for name in tensors)
        for key, part in zip(("attention_bias", "mlp_bias"), BIASED, strict=True)
    }


def _merge_embeddings(adapter: Adapter, found: Embeddings, merged: dict[str, MergedTensor]) -> None:
    for twins in found.twins:
        refuse_different(adapter, twins)
    rows = rows_after(adapter, found, merged[EMBEDDING].shape[0])
    if not found.tied and LM_HEAD not in merged:
        merged[LM_HEAD] = merged[EMBEDDING].copied_as(LM_HEAD)
    for matrix in (found.embed,) if found.tied else (found.embed, found.head):
        merged[matrix.name] = _merge_matrix(matrix, merged[matrix.name], rows)


def _merge_matrix(matrix: Matrix, tensor: MergedTensor, rows: int) -> MergedTensor:
    if matrix.stated is not None:
        tensor = MergedTensor(matrix.name, matrix.stated)
    if tensor.shape[0] < rows:
        source = tensor.source
        tensor = MergedTensor(
            matrix.name, Padded(source, source.file, source.name, (rows, *tensor.shape[1:])), tensor.updates
        )
    if matrix.tokens is not None:
        tensor.updates.append(TokensUpdate(matrix.tokens))
    if matrix.pair is not None:
        tensor.updates.append(LoraUpdate(matrix.pair, matrix.name))
    return tensor


def _merge_layers(adapter: Adapter, merged: dict[str, MergedTensor], config: Mapping[str, Any]) -> None:
    for name, tensor, twins in layer_weights(adapter):
        for both in twins:
            refuse_different(adapter, both)
        merged[name] = MergedTensor(name, tensor)
    for name, pair in adapter.pairs.items():
        if name in (EMBEDDING, LM_HEAD):
            continue
        merged[name].updates.append(LoraUpdate(pair, name))
        if pair.bias is not None:
            bias = name.removesuffix("weight") + "bias"
            if bias not in merged:
                _add_biases(adapter, bias, merged, config)
            merged[bias].updates.append(BiasUpdate(pair.bias, pair.scale))


def _add_biases(adapter: Adapter, name: str, merged: dict[str, MergedTensor], config: Mapping[str, Any]) -> None:
    """Zeros for every bias of attention, or of the MLPs: transformers' configuration knows all or none."""
    part = next(part for part in BIASED if part in name)
    for other, expected in expected_tensors({**config, "tie_word_embeddings": True}):
        if part in other and other.endswith(".bias") and other not in merged:
            merged[other] = MergedTensor(other, Padded(None, adapter.file, other, expected.shape))


def _untied_notice(adapter: Adapter, found: Embeddings) -> str:
    alone = [m.name.removesuffix(".weight") for m in (found.embed, found.head) if m.changed]
    what = f"{alone[0]} alone" if len(alone) == 1 else "embed_tokens and lm_head in different ways"
    notice = f"{adapter.file}: changes {what}, as PEFT runs it, so they are no longer tied and lm_head is stored too"
    if any(m.pair or m.tokens for m in (found.embed, found.head)):
        notice += "; PEFT's merge_and_unload would change the one tied matrix"
    return notice
