# SPDX-License-Identifier: Apache-2.0
"""The conversion itself: check everything, then stream every tensor through merge, quantizer and writer."""

from __future__ import annotations

import importlib.metadata
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cnllama.config import EMBEDDING, from_hf
from cnllama.container import read_json
from cnllama.errors import CnllamaError, InputError, os_errors_explained
from cnllama.format import TOKENIZER, CnlWriter, stored_bytes
from cnllama.templates import TEMPLATES, default_template
from cnllama.tokenizer import Tokenizer
from cnllama.verify import Statistics

from . import fingerprint, parity
from .adapters import Adapter, open_adapter
from .checkpoint import Checkpoint, FloatArray, open_checkpoint
from .merge import MergedTensor, check_adapter, check_base, is_tied, merge
from .quantize.base import CalibrationError, Quantizer, Rtn, Work
from .quantize.calibration import DEFAULT_TOKENS, Calibration, read_calibration
from .quantize.choice import choose
from .quantize.registry import AUTO, check_quantizer, open_quantizer
from .quantize.rules import Rule, quantizations, scheme_of, scheme_table
from .quantize.trial import Trial, Verdict, judge, unchecked_sentence, verdict_sentence
from .vocab import Vocabulary, check_vocabulary, size_table

QUANTIZATIONS = quantizations()
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # of generation_config.json, when it samples


@dataclass
class Plan:
    """A conversion whose input has been checked: nothing but the weights themselves can still be wrong."""

    checkpoint: Checkpoint
    adapters: Sequence[Adapter]
    config: dict[str, Any]
    vocabulary: Vocabulary
    tensors: Mapping[str, MergedTensor]
    notices: list[str]


@dataclass
class Report:
    """What a conversion did. Sizes in bytes, times in seconds; errors are sqrt(sum of squared error / of squares)."""

    file: str
    size: int
    parameters: int
    scheme: str
    bits_per_weight: float
    template: str
    vocab_size: int
    worst_tensor: str
    worst_error: float
    mean_error: float
    fingerprint: str
    content_sha256: str
    peak_memory: int
    seconds: float
    warnings: list[str] = field(default_factory=list)
    quantizer: str = "rtn"
    reason: str = ""  # why "auto" chose it
    held_out: dict[str, Any] | None = None  # trial.Verdict
    notes: list[str] = field(default_factory=list)  # what the calibration says of every tensor

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make_plan(base: Path, loras: Sequence[Path] = (), tokenizer: Path | None = None) -> Plan:
    """Opens and checks base, adapters (in order) and tokenizer. Reads no base weights. Raises InputError."""
    checkpoint = open_checkpoint(base)
    config = from_hf(checkpoint.config, str(base / "config.json"))
    adapters = [open_adapter(directory) for directory in loras]
    check_base(checkpoint, config)
    try:
        for adapter in adapters:
            check_adapter(adapter, checkpoint, config)
    except InputError as error:
        raise InputError(str(error), size_table(checkpoint, adapters, tokenizer)) from None
    vocabulary = check_vocabulary(checkpoint, adapters, is_tied(checkpoint), tokenizer)
    for adapter in adapters:
        adapter.check_values()
    config["vocab_size"] = vocabulary.rows
    tensors, config["tie_word_embeddings"], notices = merge(checkpoint, adapters, config)
    notices = [w for adapter in adapters for w in adapter.warnings] + vocabulary.warnings + notices
    return Plan(checkpoint, adapters, config, vocabulary, tensors, notices)


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
    if template is not None and template not in TEMPLATES:
        raise InputError(f"--template {template!r} is unknown, expected one of {', '.join(TEMPLATES)}")
    check_quantizer(quantizer, device or "cpu")
    scheme = scheme_of(quant, "--quant")
    started = time.monotonic()
    with os_errors_explained(base):
        plan = make_plan(base, loras, tokenizer)
        table = scheme_table(plan.tensors, scheme, rules)
        metadata = _metadata(plan, template) | {"quantization": _quantization(scheme, table, rules)}
        job = _Job(plan, table, metadata, threads, progress)
        options = _Settings(quantizer, device, calibrate, calibrate_tokens, check)
        written, verdict, reason = _write(job, output, options)
    errors = {name: record["error"] for name, record in written.records.items() if table[name][0] != "f32"}
    worst, worst_error = max(errors.items(), key=lambda item: item[1])
    return Report(
        file=str(output),
        size=written.size,
        parameters=_parameters(table),
        scheme=scheme,
        bits_per_weight=_bits_per_weight(table),
        template=metadata["template"],
        vocab_size=plan.config["vocab_size"],
        worst_tensor=worst,
        worst_error=worst_error,
        mean_error=sum(errors.values()) / len(errors),
        fingerprint=fingerprint.short_name(written.records),
        content_sha256=written.content,
        peak_memory=peak_memory(),
        seconds=time.monotonic() - started,
        warnings=plan.notices,
        quantizer=written.quantizer,
        reason=reason,
        held_out=verdict.to_dict() if verdict else None,
        notes=written.notes,
    )


@dataclass(frozen=True)
class _Written:
    quantizer: str
    size: int
    content: str
    records: dict[str, dict[str, float]]
    notes: list[str]


@dataclass
class _Job:
    """A checked conversion that can be written by one quantizer or another."""

    plan: Plan
    table: dict[str, tuple[str, int, int]]
    metadata: dict[str, Any]
    threads: int
    progress: bool

    def write(self, path: Path, quantizer: Quantizer, more: Mapping[str, Any] | None = None) -> _Written:
        """The whole file. more: of the `quantization` metadata."""
        model = self.plan.vocabulary.tokenizer.model
        metadata = self.metadata | {"quantization": self.metadata["quantization"] | (more or {})}
        notes: list[str] = []
        with CnlWriter(path, metadata, self.table | {TOKENIZER: ("raw", len(model), 1)}) as writer:
            records = self._pack(writer, quantizer, notes)
            writer.write_padded(TOKENIZER, model)
            content = writer.finish({"fingerprint": {"tensors": records}})
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


@dataclass(frozen=True)
class _Settings:
    """The options of `convert` that say how the values are chosen."""

    quantizer: str
    device: str | None
    calibrate: Path | None
    calibrate_tokens: tuple[int, int]
    check: bool


def _write(job: _Job, output: Path, settings: _Settings) -> tuple[_Written, Verdict | None, str]:
    """Writes the file; the reason is what "auto" says of its choice."""
    if settings.quantizer == AUTO:
        return _write_auto(job, output, settings)
    if settings.quantizer == "rtn":
        return job.write(output, Rtn()), None, ""
    calibration = _calibration(job.plan, settings.calibrate, settings.calibrate_tokens)
    quantizer = open_quantizer(settings.quantizer, calibration, settings.device or "cpu")
    return *_calibrated(job, output, quantizer, calibration, settings.check), ""


def _write_auto(job: _Job, output: Path, settings: _Settings) -> tuple[_Written, Verdict | None, str]:
    """What nobody insisted on is not worth an error: where it cannot be done the file is rounded."""
    length = min(settings.calibrate_tokens[1], job.plan.config["max_position_embeddings"])
    try:
        calibration = _calibration(job.plan, settings.calibrate, (settings.calibrate_tokens[0], length))
        choice = choose(_parameters(job.table), calibration.samples.size, settings.device)
        if choice.quantizer == "rtn":
            return job.write(output, Rtn()), None, choice.reason
        quantizer = open_quantizer(choice.quantizer, calibration, choice.device)
        return *_calibrated(job, output, quantizer, calibration, settings.check), choice.reason
    except CalibrationError as problem:
        return job.write(output, Rtn()), None, f"because {problem}"


def _calibration(plan: Plan, path: Path | None, tokens: tuple[int, int]) -> Calibration:
    files = plan.vocabulary.tokenizer
    calibration = read_calibration(path, Tokenizer(files.model, files.settings()), plan.config, tokens)
    plan.notices.extend(calibration.notices)
    return calibration


def _calibrated(
    job: _Job, output: Path, quantizer: Quantizer, calibration: Calibration, check: bool
) -> tuple[_Written, Verdict | None]:
    """Writes the calibrated file, and with `check` rtn's beside it for as long as it takes to compare the two."""
    more = {"quantizer": quantizer.name, "calibration": calibration.record()}
    if not check:
        return job.write(output, quantizer, more), None
    with Trial(output, quantizer.name) as trial:
        calibrated = job.write(trial.calibrated, quantizer, more)
        plain = job.write(trial.plain, Rtn())
        try:
            verdict = judge(trial.calibrated, trial.plain, calibration.held_out, quantizer.name, job.threads)
        except CnllamaError as problem:
            job.plan.notices.append(unchecked_sentence(quantizer.name, problem))
            trial.keep(trial.calibrated)
            return calibrated, None
        if verdict.kept == quantizer.name:
            trial.keep(trial.calibrated)
            return calibrated, verdict
        job.plan.notices.append(verdict_sentence(verdict))
        trial.keep(trial.plain)
        return plain, verdict


def _parameters(table: Mapping[str, tuple[str, int, int]]) -> int:
    return sum(rows * cols for _, rows, cols in table.values())


def _bits_per_weight(table: Mapping[str, tuple[str, int, int]]) -> float:
    return sum(stored_bytes(*row) for row in table.values()) * 8 / _parameters(table)


def _quantization(scheme: str, table: Mapping[str, tuple[str, int, int]], rules: Sequence[Rule]) -> dict[str, Any]:
    """The `quantization` metadata of rtn."""
    found = {"scheme": scheme, "embeddings": table[EMBEDDING][0], "bits_per_weight": round(_bits_per_weight(table), 4)}
    return found | ({"rules": [list(rule) for rule in rules]} if rules else {})


def _metadata(plan: Plan, template: str | None) -> dict[str, Any]:
    """What the header says before a weight is read; proves the tokenizer's parity on the way."""
    files = plan.vocabulary.tokenizer
    settings = files.settings()
    return {
        "config": plan.config,
        "template": template or default_template(plan.config["vocab_size"]),
        "generation": generation_defaults(plan),
        "tokenizer": settings,
        "parity": parity.record(files.model, settings, str(files.file)),
        "fingerprint": {"tensors": {}},
        "source": _source(plan),
    }


def generation_defaults(plan: Plan) -> dict[str, Any]:
    """The `generation` metadata: end tokens as a list, and sampling settings where generation_config.json samples."""
    base = plan.checkpoint.directory
    path = base / "generation_config.json"
    given = read_json(path) if path.exists() else {}
    processor = plan.vocabulary.tokenizer.processor
    rows = plan.config["vocab_size"]
    fallback = plan.checkpoint.config
    eos = given.get("eos_token_id", fallback.get("eos_token_id"))
    ids = [i for i in (eos if isinstance(eos, list) else [eos]) if _is_id(i, rows)]
    if not ids and processor.eos_id() >= 0:
        ids = [processor.eos_id()]
    bos = given.get("bos_token_id", fallback.get("bos_token_id"))
    if not _is_id(bos, rows):
        bos = processor.bos_id() if processor.bos_id() >= 0 else None
    result: dict[str, Any] = {"eos_token_ids": list(dict.fromkeys(ids)), "bos_token_id": bos}
    for key in (*_SAMPLING * bool(given.get("do_sample")), "repetition_penalty"):
        value = given.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6:
            result[key] = value
    return result


def _is_id(value: object, rows: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows


def _source(plan: Plan) -> dict[str, Any]:
    return {
        "base": plan.checkpoint.directory.resolve().name,
        "adapters": [adapter.directory.resolve().name for adapter in plan.adapters],
        "tokenizer": plan.vocabulary.tokenizer.file.resolve().parent.name,
        "cnllama": importlib.metadata.version("cnllama"),
    }


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's number starts with the parent's size at the fork
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
