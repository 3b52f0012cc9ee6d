# SPDX-License-Identifier: Apache-2.0
"""The conversion itself: check everything, then stream every tensor through merge, quantizer and writer."""

from __future__ import annotations

import importlib.metadata
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cnllama.config import EMBEDDING, LM_HEAD
from cnllama.errors import InputError, os_errors_explained, printable
from cnllama.files import check_place
from cnllama.format import TOKENIZER, CnlWriter, planned_size, stored_bytes
from cnllama.space import check_space
from cnllama.templates import TEMPLATES, default_template
from cnllama.tokenizer import Tokenizer
from cnllama.verify import Statistics

from . import fingerprint, parity
from .adapter_facts import check_adapters
from .adapters import Adapter, open_adapter
from .checkpoint import Checkpoint, FloatArray
from .facts import settle
from .generation import generation_metadata, tokenizer_notices
from .merge import MergedTensor, is_tied, merge
from .provenance import model_name
from .quantize.base import CalibrationError, Quantizer, Rtn, Work
from .quantize.calibration import DEFAULT_TOKENS, Calibration, read_calibration
from .quantize.choice import choose
from .quantize.registry import AUTO, check_quantizer, open_quantizer
from .quantize.rules import Rule, quantizations, scheme_of, scheme_table
from .quantize.trial import TooLargeError, Trial, Verdict, judge, unchecked_sentence, verdict_sentence
from .report import Report, peak_memory
from .selfcheck import check_written
from .vocab import Vocabulary, check_vocabulary, size_table

QUANTIZATIONS = quantizations()


@dataclass
class Plan:
    """A conversion whose input has been checked: nothing but the weights themselves can still be wrong."""

    checkpoint: Checkpoint
    adapters: Sequence[Adapter]
    config: dict[str, Any]
    vocabulary: Vocabulary
    tensors: Mapping[str, MergedTensor]
    notices: list[str]


def make_plan(base: Path, loras: Sequence[Path] = (), tokenizer: Path | None = None) -> Plan:
    """Opens and checks base, adapters (in order) and tokenizer. Raises InputError.

    Of the base's weights only those are read that two sources state and that must be compared (facts.py).
    """
    settled = settle(base, loras)
    checkpoint, config = settled.checkpoint, settled.config
    adapters = [open_adapter(directory) for directory in loras]
    try:
        check_adapters(adapters, checkpoint, config)
    except InputError as error:
        raise InputError(str(error), size_table(checkpoint, adapters, tokenizer)) from None
    vocabulary = check_vocabulary(checkpoint, adapters, is_tied(checkpoint), tokenizer)
    for adapter in adapters:
        adapter.check_values()
    tokens = vocabulary.tokenizer.size
    config["vocab_size"] = tokens
    tensors, config["tie_word_embeddings"], notices = merge(checkpoint, adapters, config)
    if tokens < vocabulary.rows:
        padded = [name for name in (EMBEDDING, LM_HEAD) if name in tensors]
        tensors |= {name: replace(tensors[name], rows=tokens) for name in padded}
    notices = [*settled.notices, *(w for a in adapters for w in a.warnings), *vocabulary.warnings, *notices]
    return Plan(checkpoint, adapters, config, vocabulary, tensors, list(dict.fromkeys(notices)))


def merged_tensors(plan: Plan) -> Iterator[tuple[str, FloatArray]]:
    """(Hugging Face name, float32 values) of every tensor of the merged model, in file order: before quantization."""
    for name, tensor in plan.tensors.items():
        yield name, tensor.read()
        tensor.release()


def convert(
    base: Path,
    loras: Sequence[Path],
    output: Path,
    *,
    quant: str = "q4",
    rules: Sequence[Rule] = (),
    quantizer: str = "rtn",
    calibrate: Path | None = None,
    calibrate_tokens: tuple[int, int] = DEFAULT_TOKENS,
    device: str | None = None,
    check: bool = True,
    template: str | None = None,
    tokenizer: Path | None = None,
    threads: int = 0,
    progress: bool = False,
) -> Report:
    """Merges, quantizes and packs; nothing lies under the final name until all of it is done.

    quant: a key of QUANTIZATIONS; rules: exceptions from it. quantizer: one of QUANTIZERS; "gptq" and "awq" need
    PyTorch and are calibrated on `device` (None: "cpu") with the text `calibrate` (None: the bundled one) in (samples,
    length) tokens; "auto" is "gptq" where that is soon done (choice.py). check: a calibrated file is kept unless it
    predicts the text's last tenth worse than rtn's. threads 0: the default of this machine. progress: bars on stderr.
    Raises InputError for wrong input and CnllamaError for a full disk.
    """
    started = time.monotonic()
    options = Options(
        quant, rules, quantizer, calibrate, calibrate_tokens, device, check, template, tokenizer, threads, progress
    )
    with os_errors_explained(base):
        prepared = prepare(base, loras, output, options)
        written, verdict, reason = _write(prepared)
    job = prepared.job
    errors = {name: record["error"] for name, record in written.records.items() if job.table[name][0] != "f32"}
    worst, worst_error = max(errors.items(), key=lambda item: item[1])
    return Report(
        file=str(output),
        size=written.size,
        parameters=job.parameters,
        scheme=job.metadata["quantization"]["scheme"],
        bits_per_weight=_bits_per_weight(job.table),
        template=job.metadata["template"],
        vocab_size=job.plan.config["vocab_size"],
        worst_tensor=worst,
        worst_error=worst_error,
        mean_error=sum(errors.values()) / len(errors),
        fingerprint=fingerprint.short_name(written.records),
        content_sha256=written.content,
        peak_memory=peak_memory(),
        seconds=time.monotonic() - started,
        warnings=[printable(notice) for notice in job.plan.notices],
        quantizer=written.quantizer,
        reason=reason,
        held_out=verdict.to_dict() if verdict else None,
        notes=written.notes,
    )


@dataclass(frozen=True)
class Options:
    """The options of `convert`, which explains them."""

    quant: str = "q4"
    rules: Sequence[Rule] = ()
    quantizer: str = "rtn"
    calibrate: Path | None = None
    calibrate_tokens: tuple[int, int] = DEFAULT_TOKENS
    device: str | None = None
    check: bool = True
    template: str | None = None
    tokenizer: Path | None = None
    threads: int = 0
    progress: bool = False


@dataclass(frozen=True)
class Prepared:
    """A conversion that only the weights' values, or a machine that fails, can still stop.

    calibration: None to round. reason: why "auto" chose so. insisted: an error of the calibration ends it.
    check: write the rounded file too and keep the better one.
    """

    job: _Job
    quantizer: str = "rtn"
    device: str = "cpu"
    calibration: Calibration | None = None
    reason: str = ""
    insisted: bool = True
    check: bool = False

    @property
    def output(self) -> Path:
        """The final name."""
        return self.job.output

    def sizes(self) -> list[int]:
        """Bytes of every file that will lie on the disk at once, the wanted one first."""
        calibrated = self.job.size(self.more())
        return [calibrated, self.job.size({})] if self.check else [calibrated]

    def more(self) -> dict[str, Any]:
        """Of the `quantization` metadata, where it is calibrated."""
        if self.calibration is None:
            return {}
        return {"quantizer": self.quantizer, "calibration": self.calibration.record()}


def prepare(base: Path, loras: Sequence[Path], output: Path, options: Options) -> Prepared:
    """Everything that a conversion does before it writes: all checks, and the choice of a quantizer. Writes nothing.

    Raises InputError for wrong input and CnllamaError where the disk has no room for the files.
    """
    template = options.template
    if template is not None and template not in TEMPLATES:
        raise InputError(f"--template {template!r} is unknown, expected one of {', '.join(TEMPLATES)}")
    check_quantizer(options.quantizer, options.device or "cpu")
    scheme = scheme_of(options.quant, "--quant")
    check_place(output)
    plan = make_plan(base, loras, options.tokenizer)
    table = scheme_table(plan.tensors, scheme, options.rules)
    metadata = _metadata(plan, template) | {"quantization": _quantization(scheme, table, options.rules)}
    job = _Job(plan, output, table, metadata, options.threads, options.progress)
    prepared = _choose(Prepared(job, insisted=options.quantizer != AUTO), options)
    check_space(output, sum(prepared.sizes()))
    return prepared


def _choose(rounded: Prepared, options: Options) -> Prepared:
    """With the calibration that the options ask for, or that "auto" finds worth its time."""
    job, (samples, length) = rounded.job, options.calibrate_tokens
    if options.quantizer == "rtn":
        return rounded
    if not rounded.insisted:
        length = min(length, job.plan.config["max_position_embeddings"])
    calibration = _calibration(job.plan, options.calibrate, (samples, length))
    name, device, reason = options.quantizer, options.device or "cpu", ""
    if not rounded.insisted:
        choice = choose(job.parameters, calibration.samples.size, options.device)
        name, device, reason = choice.quantizer, choice.device, choice.reason
        if name == "rtn":
            return replace(rounded, reason=reason)
    return replace(rounded, quantizer=name, device=device, calibration=calibration, reason=reason, check=options.check)


@dataclass(frozen=True)
class _Written:
    quantizer: str
    size: int
    content: str
    records: dict[str, dict[str, float]]
    notes: list[str]


@dataclass
class _Job:
    """A checked conversion that can be written by one quantizer or another, for the name `output`."""

    plan: Plan
    output: Path
    table: dict[str, tuple[str, int, int]]
    metadata: dict[str, Any]
    threads: int
    progress: bool

    @property
    def parameters(self) -> int:
        """Weights of all tensors."""
        return sum(rows * cols for _, rows, cols in self.table.values())

    @property
    def _files(self) -> dict[str, tuple[str, int, int]]:
        """The table of the file: the tensors and the tokenizer."""
        return self.table | {TOKENIZER: ("raw", len(self.plan.vocabulary.tokenizer.model), 1)}

    def _with(self, more: Mapping[str, Any]) -> dict[str, Any]:
        return self.metadata | {"quantization": self.metadata["quantization"] | dict(more)}

    def size(self, more: Mapping[str, Any]) -> int:
        """Bytes of the file that write() makes of the same `more`."""
        return planned_size(self._with(more), self._files)

    def write(self, path: Path, quantizer: Quantizer, more: Mapping[str, Any] | None = None) -> _Written:
        """The whole file. more: of the `quantization` metadata."""
        notes: list[str] = []
        with CnlWriter(path, self._with(more or {}), self._files) as writer:
            records = self._pack(writer, quantizer, notes)
            writer.write_padded(TOKENIZER, self.plan.vocabulary.tokenizer.model)
            content = writer.finish({"fingerprint": {"tensors": records}}, check_written(self.output, self.threads))
        return _Written(quantizer.name, writer.size, content, records, notes)

    def _pack(self, writer: CnlWriter, quantizer: Quantizer, notes: list[str]) -> dict[str, dict[str, float]]:
        """Streams every tensor of the plan; returns the fingerprint of each."""
        from tqdm import tqdm

        total = sum(math.prod(tensor.shape) for tensor in self.plan.tensors.values())
        what = "packing" if quantizer.name == "rtn" else quantizer.name
        statistics: dict[str, Statistics] = {}
        squared_errors: dict[str, float] = {}
        quiet = not self.progress
        with tqdm(total=total, unit="w", unit_scale=True, desc=what, disable=quiet, file=sys.stderr) as bar:

            def say(line: str) -> None:
                notes.append(line)
                if self.progress:
                    bar.write(line, file=sys.stderr)

            work = Work(self.plan.tensors, self.table, self.plan.config, self.threads, say)
            for piece in quantizer.pieces(work):
                if isinstance(piece.data, bytes):
                    writer.write_padded(piece.name, piece.data)
                else:
                    writer.write(piece.name, piece.data)
                statistics[piece.name] = piece.statistics
                squared_errors[piece.name] = squared_errors.get(piece.name, 0.0) + piece.squared_error
                bar.update(piece.values)
        return {
            name: fingerprint.record(found, math.sqrt(squared_errors[name] / found.squares) if found.squares else 0.0)
            for name, found in statistics.items()
        }


def _write(prepared: Prepared) -> tuple[_Written, Verdict | None, str]:
    """Writes the file; the reason is what "auto" says of its choice."""
    job, output, calibration = prepared.job, prepared.output, prepared.calibration
    if calibration is None:
        return job.write(output, Rtn()), None, prepared.reason
    try:
        quantizer = open_quantizer(prepared.quantizer, calibration, prepared.device)
        return *_calibrated(prepared, quantizer, calibration), prepared.reason
    except CalibrationError as problem:
        if prepared.insisted:
            raise
        return job.write(output, Rtn()), None, f"because {problem}"  # what nobody insisted on is not worth an error


def _calibration(plan: Plan, path: Path | None, tokens: tuple[int, int]) -> Calibration:
    files = plan.vocabulary.tokenizer
    calibration = read_calibration(path, Tokenizer(files.model, files.settings()), plan.config, tokens)
    plan.notices.extend(calibration.notices)
    return calibration


def _calibrated(prepared: Prepared, quantizer: Quantizer, calibration: Calibration) -> tuple[_Written, Verdict | None]:
    """Writes the calibrated file, and with `check` rtn's beside it for as long as it takes to compare the two."""
    job, output, more = prepared.job, prepared.output, prepared.more()
    if not prepared.check:
        return job.write(output, quantizer, more), None
    with Trial(output, quantizer.name, sum(stored_bytes(*row) for row in job.table.values())) as trial:
        calibrated = job.write(trial.calibrated, quantizer, more)
        plain = job.write(trial.plain, Rtn())
        try:
            verdict = judge(trial.calibrated, trial.plain, calibration.held_out, quantizer.name, job.threads)
        except TooLargeError as problem:
            job.plan.notices.append(unchecked_sentence(quantizer.name, problem))
            trial.keep(trial.calibrated)
            return calibrated, None
        if verdict.kept == quantizer.name:
            trial.keep(trial.calibrated)
            return calibrated, verdict
        job.plan.notices.append(verdict_sentence(verdict))
        trial.keep(trial.plain)
        return plain, verdict


def _bits_per_weight(table: Mapping[str, tuple[str, int, int]]) -> float:
    return sum(stored_bytes(*row) for row in table.values()) * 8 / sum(rows * cols for _, rows, cols in table.values())


def _quantization(scheme: str, table: Mapping[str, tuple[str, int, int]], rules: Sequence[Rule]) -> dict[str, Any]:
    """The `quantization` metadata of rtn."""
    found = {"scheme": scheme, "embeddings": table[EMBEDDING][0], "bits_per_weight": round(_bits_per_weight(table), 4)}
    return found | ({"rules": [list(rule) for rule in rules]} if rules else {})


def _metadata(plan: Plan, template: str | None) -> dict[str, Any]:
    """What the header says before a weight is read; proves the tokenizer's parity on the way."""
    files = plan.vocabulary.tokenizer
    chosen = template or default_template(plan.config["vocab_size"])
    generation, notices = generation_metadata(plan)
    settings = files.settings(generation["eos_token_ids"])
    plan.notices.extend([*notices, *tokenizer_notices(files, chosen, template is not None)])
    return {
        "config": plan.config,
        "template": chosen,
        "generation": generation,
        "tokenizer": settings,
        "parity": parity.record(files.model, settings, str(files.file)),
        "fingerprint": {"tensors": {}},
        "source": _source(plan),
    }


def _source(plan: Plan) -> dict[str, Any]:
    return {
        "base": model_name(plan.checkpoint.directory),
        "adapters": [model_name(adapter.directory) for adapter in plan.adapters],
        "tokenizer": model_name(plan.vocabulary.tokenizer.file.parent),
        "cnllama": importlib.metadata.version("cnllama"),
    }
