# SPDX-License-Identifier: Apache-2.0
"""Perplexity and divergence of a packed file on texts, from the files to the figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnllama.config import EMBEDDING
from cnllama.errors import InputError, printable
from cnllama.eval.models import EngineScorer, Progress, Scorer
from cnllama.eval.perplexity import compare, perplexity
from cnllama.eval.stored import Origin, SavingScorer, Statistics, StoredScorer, stored_bytes
from cnllama.eval.texts import CONVENTION, Text, Window, check_window, windows
from cnllama.plan import DEFAULT_CONTEXT, STEP_TOKENS, trained_length
from cnllama.space import check_space
from cnllama.tokenizer import Tokenizer
from cnllama.verify import statistics_differ

if TYPE_CHECKING:
    from cnllama.format import CnlFile
    from cnllama.llm import LLM

# (file, positions, sequences) -> the model; (name, tokens) -> what counts them
Opener = Callable[[Path, int, int], "LLM"]
Bar = Callable[[str, int], AbstractContextManager[Progress]]
Reference = Callable[[], tuple[Scorer, dict[str, Any]]]

_MAX_LANES = 8


@contextmanager
def progress_bar(name: str, tokens: int) -> Iterator[Progress]:
    """A bar on stderr where that is a terminal."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    with tqdm(total=tokens, unit="tok", unit_scale=True, desc=printable(name), disable=quiet, file=sys.stderr) as bar:
        yield bar.update


def tokenizer_of(file: CnlFile) -> Tokenizer:
    """The tokenizer in a packed file."""
    return Tokenizer(file.tokenizer_model, file.tokenizer, str(file.path))


def default_context(file: CnlFile, context: int | None) -> int:
    """`context`, or the length that the model was trained for, at most 4096."""
    return min(trained_length(file.config), DEFAULT_CONTEXT) if context is None else context


def describe_model(llm: LLM) -> dict[str, Any]:
    """What the figures belong to, for JSON."""
    from cnllama import _core

    return {
        "file": str(llm.path),
        "bytes": llm.file.size,
        "content_sha256": llm.file.fingerprint["content_sha256"],
        "scheme": llm.file.quantization.get("scheme"),
        "bits_per_weight": llm.file.quantization.get("bits_per_weight"),
        "vocab_size": llm.vocab_size,
        "template": llm.file.template,
        "kv_type": llm.engine.kv_type,
        "threads": llm.threads,
        "isa": _core.isa(),
    }


def measure_perplexity(
    file: CnlFile,
    texts: Sequence[Text],
    open_llm: Opener,
    *,
    context: int | None = None,
    stride: int | None = None,
    bar: Bar = progress_bar,
) -> dict[str, Any]:
    """{"model", "context", "stride", "convention", "texts": [figures]} of the packed file on each text.

    context: tokens of a window, None as default_context; stride: None for half of it. Raises InputError for values out
    of range.
    """
    context, stride = _sizes(file, context, stride)
    tokenizer = tokenizer_of(file)
    parts = [windows(tokenizer, text.documents, context, stride) for text in texts]
    lengths = [len(window.ids) for each in parts for window in each] or [1]
    longest = max(lengths)
    # Enough short ones to fill a step, in no more memory than a long one takes.
    lanes = max(1, min(_MAX_LANES, STEP_TOKENS * len(lengths) // sum(lengths), DEFAULT_CONTEXT // longest))
    results = []
    with open_llm(file.path, longest, lanes) as llm, EngineScorer(llm, lanes) as model:
        for text, each in zip(texts, parts, strict=True):
            started, before = time.perf_counter(), model.tokens_run
            with bar(text.path.name, _tokens(each)) as progress:
                found = perplexity(model, each, progress)
            seconds = time.perf_counter() - started
            speed = (model.tokens_run - before) / seconds
            head = {"text": str(text.path), "documents": len(text.documents), "text_characters": text.characters}
            results.append(head | found.figures() | {"seconds": seconds, "tokens_run_per_s": speed})
        described = describe_model(llm)
    return {"model": described, "context": context, "stride": stride, "convention": CONVENTION, "texts": results}


def measure_divergence(
    file: CnlFile,
    text: Text,
    open_llm: Opener,
    *,
    reference: Reference | None = None,
    stored: Path | None = None,
    save: Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    bar: Bar = progress_bar,
    say: Callable[[str], object] = lambda sentence: None,
) -> dict[str, Any]:
    """{"model", "reference", ..., "kl_mean", ...} of KL(reference || packed file), see Comparison.

    reference: opens the model to compare with and describes it; or stored: a file that `save` named in an earlier call.
    say: gets the size of that file before anything is computed. Raises InputError for a reference of another model.
    """
    if (reference is None) == (stored is None):
        raise InputError("give either --reference with the checkpoint or --reference-logits with a file of it")
    if save is not None and reference is None:
        raise InputError("--save-reference needs --reference: a stored one is saved already")
    context, stride = _sizes(file, context, stride)
    parts = windows(tokenizer_of(file), text.documents, context, stride)
    if save is not None:
        size = stored_bytes(parts, file.vocab_size)
        rows = sum(len(window.targets) for window in parts)
        say(f"{save}: {rows:,} tokens x {file.vocab_size:,} log probabilities x 2 bytes = {size / 1e9:.3g} GB")
        check_space(save, size)
    longest = max((len(window.ids) for window in parts), default=1)
    with ExitStack() as stack:
        llm = stack.enter_context(open_llm(file.path, longest, 1))
        model = stack.enter_context(EngineScorer(llm))
        other, described, tensors = _open_other(file, parts, reference, stored)
        difference = other_weights(tensors, file) if tensors else ""
        described["other_weights"] = difference or None
        if difference:
            say(f"{file.path} was packed from other weights than the reference's: {difference}")
        if save is not None:
            origin = Origin(str(described.get("directory", "")), str(described.get("content", "")), tensors)
            other = stack.enter_context(SavingScorer(other, save, parts, origin))
        progress = stack.enter_context(bar(text.path.name, _tokens(parts)))
        found = compare(model, other, parts, progress)
        figures = found.figures()
        head = {"model": describe_model(llm), "reference": described}
    settings = {"text": str(text.path), "documents": len(text.documents), "text_characters": text.characters}
    settings |= {"context": context, "stride": stride}
    return head | settings | {"convention": CONVENTION} | figures


def _open_other(
    file: CnlFile, parts: Sequence[Window], reference: Reference | None, stored: Path | None
) -> tuple[Scorer, dict[str, Any], Statistics]:
    """(the model to compare with, what describes it, statistics of its weights)."""
    if stored is not None:
        kept = StoredScorer(stored, parts, file.vocab_size)
        facts: dict[str, Any] = {"file": str(stored), "source": kept.origin.source, "content": kept.origin.content}
        return kept, facts, kept.origin.tensors
    assert reference is not None
    other, facts = reference()
    if other.vocab_size != file.vocab_size:
        raise other_vocabulary(facts["directory"], other.vocab_size, file)
    return other, facts, facts.pop("tensors", {})


def _sizes(file: CnlFile, context: int | None, stride: int | None) -> tuple[int, int]:
    context = default_context(file, context)
    stride = max(1, context // 2) if stride is None else stride
    check_window(context, stride)
    return context, stride


def _tokens(parts: Sequence[Window]) -> int:
    return sum(len(window.ids) for window in parts)


def other_weights(tensors: Statistics, file: CnlFile) -> str:
    """How the reference's weights differ from those that were packed, by their statistics; "" where they do not.

    Activation-aware scaling changes all matrices but the embedding, of which it is known nevertheless.
    """
    packed = file.fingerprint["tensors"]
    for name in [EMBEDDING] if file.quantization.get("quantizer") == "awq" else packed:
        for difference in statistics_differ(tensors[name], packed[name]) if name in tensors else ["is not in it"]:
            return f"{name}: {difference}"
    return ""


def other_vocabulary(reference: str | Path, found: int, file: CnlFile) -> InputError:
    """The error for a reference that is not what was packed."""
    return InputError(
        f"{reference}: this checkpoint has {found} tokens and {file.path} has {file.vocab_size}: give the checkpoint "
        "and the --lora directories that were packed, in the same order"
    )
