# SPDX-License-Identifier: Apache-2.0
"""Base plus adapters as one model whose tensors are merged when they are read: W + scale * B A in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cnllama.config import EMBEDDING, LM_HEAD, expected_tensors
from cnllama.errors import InputError

from .adapters import Adapter, Pair
from .checkpoint import Checkpoint, FloatArray, SourceTensor, same_values
from .diagnosis import some
from .tensor_facts import fits


@dataclass
class MergedTensor:
    """A tensor of the merged model: stored values and the LoRA pairs on top of them, in order.

    rows: the first ones that belong to the model, None for all: the rest are padding.
    """

    name: str
    source: SourceTensor
    pairs: list[Pair] = field(default_factory=list)
    rows: int | None = None
    _factors: list[tuple[FloatArray, FloatArray]] = field(default_factory=list, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face stores it, without padding: [rows, cols] or [n]."""
        return self.source.shape if self.rows is None else (self.rows, *self.source.shape[1:])

    def read(self, begin: int = 0, end: int | None = None) -> FloatArray:
        """float32 rows begin .. end (all by default) of the merged tensor."""
        if self.rows is not None:
            end = self.rows if end is None else min(end, self.rows)
        values = self.source.read(begin, end)
        if self.pairs and not self._factors:
            self._factors = [_factors(pair) for pair in self.pairs]
        for pair, (left, right) in zip(self.pairs, self._factors, strict=True):
            delta = left[begin:end] @ right
            delta *= np.float32(pair.scale)
            values += delta
        return values

    def padded(self) -> MergedTensor:
        """The same with its padding, as training needs it: adapters are saved for the rows that the base has."""
        return replace(self, rows=None)

    def release(self) -> None:
        """Drops everything that reading brought into memory."""
        self._factors = []
        self.source.release()
        for pair in self.pairs:
            pair.a.release()
            pair.b.release()

    def files(self) -> str:
        """The files its values come from, for error messages."""
        names = dict.fromkeys([self.source.file, *(pair.a.file for pair in self.pairs)])
        return " + ".join(map(str, names))


def _factors(pair: Pair) -> tuple[FloatArray, FloatArray]:
    """(left [rows, r], right [r, cols])."""
    a, b = pair.a.read(), pair.b.read()
    return (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if pair.embedding else (b, a)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the base, its facts settled, has one tensor for embed_tokens and lm_head."""
    return LM_HEAD not in checkpoint.tensors


def check_adapter(adapter: Adapter, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Every tensor of the adapter fits one of the base. Raises InputError naming both sizes, or what fits nothing."""
    expected = dict(expected_tensors({**config, "tie_word_embeddings": False}))
    shapes: dict[str, tuple[int, ...]] = {name: pair.shape for name, pair in adapter.pairs.items()}
    shapes |= {name: tensor.shape for name, tensor in adapter.saved.items()}
    for name, shape in shapes.items():
        if name in expected and not fits(name, shape, expected[name]):
            raise InputError(
                f"{adapter.file}: its {name} is for shape {list(shape)} and the base has {list(expected[name].shape)} "
                f"({checkpoint.directory}, hidden size {config['hidden_size']}): it was trained on a model of another "
                "size; give the adapter of this size"
            )
    lost = adapter.unmatched + [name for name in shapes if name not in expected]
    if lost:
        raise InputError(
            f"{adapter.file}: {some(lost)} in the adapter and in no LLaMA of {config['num_hidden_layers']} layers; "
            "it was trained on another model"
        )


def merge(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], config: Mapping[str, Any]
) -> tuple[dict[str, MergedTensor], bool, list[str]]:
    """(tensors in file order, still tied, notices). config has the vocabulary size after all adapters.

    Embeddings stay tied only while both uses keep the same values: LoRA on one of them, or saved matrices that differ,
    make them two tensors, as they were in training.
    """
    tied, notices = is_tied(checkpoint), []
    merged = {name: MergedTensor(name, tensor) for name, tensor in checkpoint.tensors.items()}
    for adapter in adapters:
        for name, tensor in adapter.saved.items():
            if tied and name == EMBEDDING and LM_HEAD not in adapter.saved and LM_HEAD not in merged:
                notices.append(f"{adapter.file}: its embed_tokens also replaces the tied lm_head")
            merged[name] = MergedTensor(name, tensor)
        for name, pair in adapter.pairs.items():
            if name in (EMBEDDING, LM_HEAD) and LM_HEAD not in merged:
                embedding = merged[EMBEDDING]
                merged[LM_HEAD] = MergedTensor(LM_HEAD, embedding.source, list(embedding.pairs))
            merged[name].pairs.append(pair)
    if tied and LM_HEAD in merged:
        if same_values(merged[EMBEDDING], merged[LM_HEAD]):
            del merged[LM_HEAD]
        else:
            tied = False
            notices.append("the adapters make lm_head differ from embed_tokens: they are no longer tied")
    order = [name for name, _ in expected_tensors({**config, "tie_word_embeddings": tied}) if name in merged]
    return {name: merged[name] for name in order}, tied, notices
