# SPDX-License-Identifier: Apache-2.0
"""Faults put back on purpose: each takes one check out of the product, and a fuzzer must find that it is gone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Fault:
    """target: the fuzzer that must find it. place: module and attribute. made: the attribute without its check."""

    target: str
    place: str
    made: Callable[[Any], Any]


class _NeverRaised(Exception):
    """Instead of a built-in exception in a module of the product, which then catches by that name nothing any more."""


def _nothing(_: Any) -> Any:
    """Instead of a check: a function that takes anything and does nothing."""
    return lambda *args, **kwargs: None


def _uncaught(_: Any) -> Any:
    return _NeverRaised


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _: lambda *args, **kwargs: value


def _by_library(_: Any) -> Any:
    """open_model without the checks of what the library takes."""
    library, errors = import_module("sentencepiece"), import_module("cnllama.errors")

    def open_model(data: bytes, where: str) -> Any:
        try:
            return library.SentencePieceProcessor(model_proto=data)
        except Exception:
            raise errors.InputError(f"{where} is no SentencePiece model") from None

    return open_model


class _HoldingAll(dict[Any, Any]):
    def __contains__(self, key: object) -> bool:
        return True


def _holding_all(table: Any) -> Any:
    """A table that every key seems to be in."""
    return _HoldingAll(table)


def _first(_: Any) -> Any:
    return lambda value, *args: value


_CNL, _BOX, _HEADER = "cnllama.format:CnlFile.", "cnllama.container:", "cnllama.eval.gguf_header:"
_READING, _BIN = "cnllama.adapt.reading:", "cnllama.convert.checkpoint:"

FAULTS: dict[str, Fault] = {
    "cnl: the header's hash is not compared": Fault("cnl", _CNL + "_check_header_hash", _nothing),
    "cnl: holes and overlaps are taken": Fault("cnl", _BOX + "SafetensorsFile._check_cover", _nothing),
    "cnl: tensors of the architecture are not looked for": Fault("cnl", _CNL + "_check_architecture", _nothing),
    "cnl: the generation defaults are not checked": Fault("cnl", _CNL + "_check_generation", _nothing),
    "cnl: a fingerprint of anything": Fault("cnl", _CNL + "_check_fingerprint", _nothing),
    "checkpoint: JSON without end or sense": Fault(
        "checkpoint", _BOX + "parse_json", lambda _: lambda text, what, names=False: json.loads(text)
    ),
    "checkpoint: tensors of any shape": Fault("checkpoint", "cnllama.convert.tensor_facts:fits", _always(True)),
    "checkpoint: words of SentencePiece as they are": Fault(
        "checkpoint", "cnllama.sentencepiece_model:Exception", _uncaught
    ),
    "checkpoint: whatever SentencePiece takes": Fault(
        "checkpoint", "cnllama.convert.tokenizers:open_model", _by_library
    ),
    "checkpoint: ids outside the vocabulary": Fault("checkpoint", "cnllama.convert.generation:is_count", _always(True)),
    "checkpoint: control characters as they are": Fault("checkpoint", "cnllama.errors:printable", _first),
    "adapter: any rank": Fault("adapter", "cnllama.convert.adapter_config:is_count", _always(True)),
    "adapter: pairs of any shape": Fault("adapter", "cnllama.convert.adapter_facts:fits", _always(True)),
    "adapter: holes and overlaps are taken": Fault("adapter", _BOX + "SafetensorsFile._check_cover", _nothing),
    "adapter: control characters as they are": Fault("adapter", "cnllama.errors:printable", _first),
    "pickle: whatever torch raises": Fault("pickle", _BIN + "Exception", _uncaught),
    "pickle: values of any type": Fault("pickle", _BIN + "all", _always(True)),
    "pickle: sparse and empty tensors": Fault("pickle", _BIN + "any", _always(False)),
    "gguf: unknown types": Fault("gguf", _HEADER + "FORMATS", _holding_all),
    "gguf: tensors beyond the file": Fault("gguf", _HEADER + "any", _always(False)),
    "gguf: a size of any type": Fault("gguf", _HEADER + "is_count", _always(True)),
    "text: JSON without end": Fault("text", _READING + "RecursionError", _uncaught),
    "text: lines that are no UTF-8": Fault("text", _READING + "UnicodeDecodeError", _uncaught),
    "text: half surrogate pairs": Fault("text", _READING + "_unicode", lambda _: lambda name, value: value),
    "text: questions that are no UTF-8": Fault("text", "cnllama.eval.questions:UnicodeDecodeError", _uncaught),
    "text: prompts in no known encoding": Fault("text", "cnllama.textio:UndecodableError", _uncaught),
    "args: numbers of any range": Fault("args", "cnllama.sampling:_number", _nothing),
    "args: the usage instead of one sentence": Fault(
        "args", "cnllama.cli.main:Parser.error", lambda _: import_module("argparse").ArgumentParser.error
    ),
    "args: integers of any size": Fault("args", "cnllama.sampling:_integer", _nothing),
}


@contextmanager
def put_back(name: str | None) -> Iterator[None]:
    """The product with a fault in the block; without one for None."""
    if name is None:
        yield
        return
    module, _, attribute = FAULTS[name].place.partition(":")
    owner: Any = import_module(module)
    *path, last = attribute.split(".")
    for step in path:
        owner = getattr(owner, step)
    before = owner.__dict__.get(last, _ABSENT)  # absent: a built-in name, which the module gets for itself
    setattr(owner, last, FAULTS[name].made(before))
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, last)
        else:
            setattr(owner, last, before)
