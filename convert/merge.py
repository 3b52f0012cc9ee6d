# SPDX-License-Identifier: Apache-2.0
"""Base plus adapters as one model whose tensors are merged when they are read: W + scale * B A in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cnllama.config import EMBEDDING, LM_HEAD, Expected, expected_tensors
from cnllama.errors import InputError

from .adapters import Adapter, Pair
from .checkpoint import Checkpoint, FloatArray, SourceTensor

_LISTED = 5


@dataclass
class MergedTensor:
    """A tensor of the merged model: stored values and the LoRA pairs on top of them, in order."""

    name: str
    source: SourceTensor
    pairs: list[Pair] = field(default_factory=list)
    _factors: list[tuple[FloatArray, FloatArray]] = field(default_factory=list, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face stores it: [rows, cols] or [n]."""
        return self.source.shape

    def read(self, begin: int = 0, end: int | None = None) -> FloatArray:
        """float32 rows begin .. end (all by default) of the merged tensor."""
        values = self.source.read(begin, end)
        if self.pairs and not self._factors:
            self._factors = [_factors(pair) for pair in self.pairs]
        for pair, (left, right) in zip(self.pairs, self._factors, strict=True):
            delta = left[begin:end] @ right
            delta *= np.float32(pair.scale)
            values += delta
        return values

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
    """Whether the base has one tensor for embed_tokens and lm_head."""
    return bool(checkpoint.config.get("tie_word_embeddings")) or LM_HEAD not in checkpoint.tensors


def check_base(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Every tensor of the architecture is there with the right shape, and no other. The rows of the vocabulary are
    checked in vocab.py. Raises InputError listing what is wrong.
    """
    expected = dict(expected_tensors({**config, "tie_word_embeddings": is_tied(checkpoint)}))
    missing = [name for name, e in expected.items() if not e.optional and name not in checkpoint.tensors]
    if missing:
        raise InputError(f"{checkpoint.directory}: {_some(missing)} missing; get all files of the checkpoint again")
    unknown = [name for name in checkpoint.tensors if name not in expected and name != LM_HEAD]
    if unknown:
        raise InputError(
            f"{checkpoint.directory}: {_some(unknown)} in the checkpoint and in no LLaMA of this config.json; this is "
            "another architecture, or config.json is another model's"
        )
    for name, tensor in checkpoint.tensors.items():
        if name in expected and not _fits(name, tensor.shape, expected[name]):
            raise InputError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(expected[name].shape)}; the two are not of one model"
            )


def check_adapter(adapter: Adapter, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Every tensor of the adapter fits one of the base. Raises InputError naming both sizes, or what fits nothing."""
    expected = dict(expected_tensors({**config, "tie_word_embeddings": False}))
    shapes: dict[str, tuple[int, ...]] = {name: pair.shape for name, pair in adapter.pairs.items()}
    shapes |= {name: tensor.shape for name, tensor in adapter.saved.items()}
    for name, shape in shapes.items():
        if name in expected and not _fits(name, shape, expected[name]):
            raise InputError(
                f"{adapter.file}: its {name} is for shape {list(shape)} and the base has {list(expected[name].shape)} "
                f"({checkpoint.directory}, hidden size {config['hidden_size']}): it was trained on a model of another "
                "size; give the adapter of this size"
            )
    lost = adapter.unmatched + [name for name in shapes if name not in expected]
    if lost:
        raise InputError(
            f"{adapter.file}: {_some(lost)} in the adapter and in no LLaMA of {config['num_hidden_layers']} layers; "
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
    if tied and not checkpoint.config.get("tie_word_embeddings"):
        notices.append(f"{checkpoint.directory}: there is no lm_head, so embed_tokens is used for both")
    merged = {
        name: MergedTensor(name, tensor)
        for name, tensor in checkpoint.tensors.items()
        if not (tied and name == LM_HEAD)
    }
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
        if _same(merged[EMBEDDING], merged[LM_HEAD]):
            del merged[LM_HEAD]
        else:
            tied = False
            notices.append("the adapters make lm_head differ from embed_tokens: they are no longer tied")
    order = [name for name, _ in expected_tensors({**config, "tie_word_embeddings": tied}) if name in merged]
    return {name: merged[name] for name in order}, tied, notices


def _same(a: MergedTensor, b: MergedTensor) -> bool:
    if a.shape != b.shape:
        return False
    equal = all(np.array_equal(a.read(row, row + 1024), b.read(row, row + 1024)) for row in range(0, a.shape[0], 1024))
    a.release()
    b.release()
    return equal


def _fits(name: str, shape: tuple[int, ...], expected: Expected) -> bool:
    if name in (EMBEDDING, LM_HEAD):
        return len(shape) == 2 and shape[1] == expected.cols
    return shape == expected.shape


def _some(names: Sequence[str]) -> str:
    """'a, b and 7 more tensors are'."""
    if len(names) == 1:
        return f"tensor {names[0]} is"
    listed, more = ", ".join(names[:_LISTED]), len(names) - _LISTED
    return f"tensors {listed}{f' and {more} more' if more > 0 else ''} are"
