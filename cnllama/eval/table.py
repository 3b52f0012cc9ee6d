# SPDX-License-Identifier: Apache-2.0
"""One checkpoint in every weight scheme, and in llama.cpp's types, on one text: sizes, divergence, speed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cnllama import bench
from cnllama.config import EMBEDDING, LM_HEAD
from cnllama.eval.models import EngineScorer, Scorer
from cnllama.eval.perplexity import Comparison, compare, perplexity, predicted_characters
from cnllama.eval.stored import Origin, SavingScorer, StoredScorer, stored_bytes, windows_digest
from cnllama.eval.text_scores import Bar, Opener, progress_bar
from cnllama.eval.texts import CONVENTION, Text, Window, check_window, windows
from cnllama.files import remove_file
from cnllama.format import open_cnl
from cnllama.format import stored_bytes as tensor_bytes
from cnllama.paths import exists
from cnllama.plan import DEFAULT_CONTEXT

if TYPE_CHECKING:
    from cnllama.tokenizer import Tokenizer

SCHEMA = 1
OURS, RIVAL, REFERENCE = "cnllama", "llama.cpp", "reference"
PREFILL = 512  # tokens of the timed prompt
Row = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """What to make of the checkpoint. kind: a weight scheme of ours, or a type of llama.cpp's such as Q4_K_M.

    quantizer: of ours. outer: scheme or type of embeddings and output instead of the usual one.
    """

    program: str
    kind: str
    quantizer: str = ""
    outer: str | None = None

    @property
    def name(self) -> str:
        """For people: q4-a64, q4-a64 gptq, Q4_0 with Q8_0 outside."""
        plain = self.quantizer in ("", "rtn")
        text = self.kind + ("" if plain else f" {self.quantizer}")
        return text + (f", {self.outer} outside" if self.outer else "")

    @property
    def file_name(self) -> str:
        """Of the file that is made."""
        parts = [self.kind, *filter(None, (self.quantizer, self.outer))]
        return "-".join(parts) + (".cnl" if self.program == OURS else ".gguf")


class Source(Protocol):
    """A checkpoint with its adapters, and what can be made of it.

    key: hexadecimal digits that change with everything that decides what is made, see eval/keys.py.
    """

    name: str
    key: str
    vocab_size: int
    parameters: int
    context: int  # positions that it was trained for

    def tokenizer(self) -> Tokenizer:
        """Of the packed files."""

    def reference(self) -> Scorer:
        """The unquantized model."""

    def pack(self, form: Form, path: Path) -> list[str]:
        """Writes a .cnl; returns what the user should know about it."""

    def write_gguf(self, path: Path) -> str:
        """Writes the unquantized GGUF that llama.cpp makes its types from; returns its type."""


@dataclass(frozen=True)
class Settings:
    """context, stride: of the windows; None as everywhere. rounds: of the speed, 0 leaves it out. keep: the files."""

    context: int | None = None
    stride: int | None = None
    threads: int = 0
    rounds: int = 3
    keep: bool = False


class Table:
    """The measuring of one table: opened for a source, a text and a directory of work."""

    def __init__(
        self,
        source: Source,
        text: Text,
        work: Path,
        settings: Settings,
        open_llm: Opener,
        *,
        bar: Bar = progress_bar,
        say: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        self._source, self._text, self._work, self._settings = source, text, work, settings
        self._open_llm, self._bar, self._say = open_llm, bar, say
        self.context = min(source.context, DEFAULT_CONTEXT) if settings.context is None else settings.context
        self.stride = max(1, self.context // 2) if settings.stride is None else settings.stride
        check_window(self.context, self.stride)
        self._parts: list[Window] = windows(source.tokenizer(), text.documents, self.context, self.stride)
        self._kept: StoredScorer | None = None
        self._made: set[Path] = set()

    def measure(self, forms: Sequence[Form]) -> dict[str, Any]:
        """The whole result, for JSON: what was measured on what, and a row for each form, the reference first.

        The logits of the reference are computed once and kept in the directory of work, packed files too; those that
        are there already are taken. Unless settings.keep, a file that was made here goes when it has been measured.
        """
        rows = [self._reference_row()]
        for form in (form for form in forms if form.program == OURS):
            rows.append(self._ours(form))
        others = [form for form in forms if form.program == RIVAL]
        if others:
            rows += self._rivals(others)
        from cnllama import _core

        return {
            "schema": SCHEMA,
            "model": self._source.name,
            "parameters": self._source.parameters,
            "vocab_size": self._source.vocab_size,
            "text": self._text.path.name,
            "characters": predicted_characters(self._parts),
            "text_characters": self._text.characters,
            "tokens": sum(len(window.targets) for window in self._parts),
            "context": self.context,
            "stride": self.stride,
            "convention": CONVENTION,
            "cpu": _core.cpu_info()["model"],
            "isa": _core.isa(),
            "threads": self._settings.threads or _core.cpu_info()["default_threads"],
            "rows": rows,
        }

    def _path(self, name: str) -> Path:
        return self._work / f"{self._source.key[:16]}-{name}"

    def _make(self, path: Path, what: str, make: Callable[[], object]) -> None:
        """Makes a file of the directory of work, unless it is there already."""
        if not exists(path):
            self._say(what)
            make()
            self._made.add(path)

    def _reference_row(self) -> Row:
        vocab, source = self._source.vocab_size, self._source
        path = self._path(f"reference-{windows_digest(self._parts)[:16]}.safetensors")

        def save() -> None:
            origin = Origin(source.name, source.key)
            model = source.reference()
            with SavingScorer(model, path, self._parts, origin) as saving, self._counted("fp32") as progress:
                perplexity(saving, self._parts, progress)

        size = stored_bytes(self._parts, vocab) / 1e9
        self._make(path, f"{source.name}: the reference, {size:.3g} GB of log probabilities", save)
        self._kept = StoredScorer(path, self._parts, vocab, source.key)
        found = perplexity(self._kept, self._parts).figures()
        row = {"name": "fp32", "program": REFERENCE, "bytes": 4 * self._source.parameters, "bits_per_weight": 32.0}
        return row | {"layer_bits_per_weight": 32.0} | {key: found[key] for key in found if key.startswith("perpl")}

    def _counted(self, name: str) -> Any:
        return self._bar(name, sum(len(window.ids) for window in self._parts))

    def _ours(self, form: Form) -> Row:
        path = self._path(form.file_name)

        def pack() -> None:
            for sentence in self._source.pack(form, path):
                self._say(f"{form.name}: {sentence}")

        self._make(path, f"{form.name}: packing", pack)
        longest = max(len(window.ids) for window in self._parts)
        with self._open_llm(path, longest, 1) as llm, EngineScorer(llm) as model:
            found = self._compare(form.name, model)
        row = self._row(form, weigh(path), found)
        if self._settings.rounds:
            runner = bench.LLMRunner(path, threads=self._settings.threads)
            row |= self._speed(runner)
            runner.close()
        self._say(_summary(row))
        self._drop(path)
        return row

    def _rivals(self, forms: Sequence[Form]) -> list[Row]:
        """The unquantized GGUF first: its divergence is what the comparison itself costs."""
        from cnllama.eval import llama_cpp

        whole = self._path("unquantized.gguf")
        self._make(whole, "writing the GGUF that llama.cpp quantizes", lambda: self._source.write_gguf(whole))
        rows = [self._rival(Form(RIVAL, llama_cpp.weigh(whole)["output"]), whole)]
        for form in forms:
            path = self._path(f"llama.cpp-{llama_cpp.package_version()}-{form.file_name}")
            make = partial(llama_cpp.quantize, whole, path, form.kind, form.outer, self._settings.threads)
            self._make(path, f"{form.name}: llama.cpp quantizes", make)
            rows.append(self._rival(form, path))
            self._drop(path)
        return rows

    def _rival(self, form: Form, path: Path) -> Row:
        from cnllama.eval.llama_cpp import LlamaCpp
        from cnllama.eval.llama_cpp import weigh as weigh_gguf

        with LlamaCpp(path, self._settings.threads) as model:
            row = self._row(form, weigh_gguf(path), self._compare(form.name, model))
            if self._settings.rounds:
                row |= self._speed(model)
        self._say(_summary(row))
        return row

    def _drop(self, path: Path) -> None:
        if not self._settings.keep and path in self._made:
            remove_file(path)

    def _compare(self, name: str, model: Scorer) -> Comparison:
        assert self._kept is not None
        with self._counted(name) as progress:
            return compare(model, self._kept, self._parts, progress)

    def _row(self, form: Form, weight: dict[str, Any], found: Comparison) -> Row:
        figures = found.figures()
        return {
            "name": form.name,
            "program": form.program,
            "kind": form.kind,
            "quantizer": form.quantizer or None,
            **weight,
            "perplexity_per_token": figures["perplexity_per_token"],
            "perplexity_per_character": figures["perplexity_per_character"],
            "perplexity_change": figures["perplexity_ratio"] - 1,
            **{key: value for key, value in figures.items() if key.startswith(("kl_", "top1"))},
        }

    def _speed(self, runner: bench.Runner) -> Row:
        """{"prefill", "decode"}: tokens a second, median, least and most of the rounds."""
        return {
            kind: speed(runner, kind, self._settings.rounds, self._source.context) for kind in ("prefill", "decode")
        }


def speed(runner: bench.Runner, kind: str, rounds: int, longest: int) -> dict[str, float]:
    """{"tokens", "tokens_per_s", "tokens_per_s_min", "tokens_per_s_max"} of a prompt, or of decoding from nothing.

    longest: positions that the model was made for.
    """
    measure = bench.Measure(kind, min(PREFILL, longest) if kind == "prefill" else 0)
    bench.fill(runner, 0, measure.room, 1)
    if kind == "prefill":
        seconds = [bench.time_prefill(runner, measure.size) for _ in range(rounds)]
    else:
        seconds = [bench.time_decode(runner, measure.steps, 1) for _ in range(rounds)]
    rates = [measure.tokens / each for each in seconds]
    return {
        "tokens": measure.tokens,
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_min": min(rates),
        "tokens_per_s_max": max(rates),
    }


def weigh(path: Path) -> dict[str, Any]:
    """{"bytes", "bits_per_weight", "layer_bits_per_weight", "types", "embeddings", "output"} of a .cnl.

    Bits of all tensors, and of the layers' matrices alone, padding included. types: {scheme: number of matrices}.
    """
    file = open_cnl(path)
    tensors = {name: t for name, t in file.tensors.items() if t.scheme != "raw"}
    matrices = {name: t for name, t in tensors.items() if t.scheme != "f32"}
    layers = [t for name, t in matrices.items() if name not in (EMBEDDING, LM_HEAD)]

    def bits(chosen: Sequence[Any]) -> float:
        stored = sum(tensor_bytes(t.scheme, t.rows, t.cols) for t in chosen)
        weights: int = sum(t.rows * t.cols for t in chosen)
        return 8 * stored / weights

    return {
        "bytes": file.size,
        "bits_per_weight": bits(list(tensors.values())),
        "layer_bits_per_weight": bits(layers),
        "types": dict(Counter(t.scheme for t in matrices.values()).most_common()),
        "embeddings": tensors[EMBEDDING].scheme,
        "output": tensors.get(LM_HEAD, tensors[EMBEDDING]).scheme,
    }


def _summary(row: Row) -> str:
    return (
        f"{row['name']}: {row['bits_per_weight']:.3f} bits per weight ({row['layer_bits_per_weight']:.3f} in layers); "
        f"KL {row['kl_mean']:.6f} ±{row['kl_mean_standard_error']:.6f}; perplexity {row['perplexity_change']:+.2%}"
    )
