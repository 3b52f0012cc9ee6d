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

import numpy as np

from cnllama import _core
from cnllama.config import EMBEDDING, LM_HEAD, from_hf
from cnllama.container import read_json
from cnllama.errors import InputError, os_errors_explained
from cnllama.format import TOKENIZER, CnlWriter, stored_bytes
from cnllama.templates import TEMPLATES, default_template
from cnllama.verify import Statistics

from . import fingerprint, parity
from .adapters import Adapter, open_adapter
from .checkpoint import Checkpoint, FloatArray, open_checkpoint
from .merge import MergedTensor, check_adapter, check_base, is_tied, merge
from .vocab import Vocabulary, check_vocabulary, size_table

DEFAULT_Q4 = "q4-a64"
EMBEDDINGS = "q8-s64"
QUANTIZATIONS = {"q4": DEFAULT_Q4, "q8": "q8-s64", "q4-s64": "q4-s64", "q4-a64": "q4-a64", "q4-s32": "q4-s32"}
_CHUNK_VALUES = 1 << 23  # float32 values merged and quantized at a time: 32 MiB
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
        raise InputError(f"{error}\n{size_table(checkpoint, adapters, tokenizer)}") from None
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
    template: str | None = None,
    tokenizer: Path | None = None,
    threads: int = 0,
    progress: bool = False,
) -> Report:
    """Merges, quantizes and packs; nothing lies under the final name until all of it is done.

    quant: a key of QUANTIZATIONS. threads 0: the default of this machine. progress: a bar on stderr.
    Raises InputError for wrong input and CnllamaError for a full disk.
    """
    if template is not None and template not in TEMPLATES:
        raise InputError(f"--template {template!r} is unknown, expected one of {', '.join(TEMPLATES)}")
    started = time.monotonic()
    with os_errors_explained(base):
        plan = make_plan(base, loras, tokenizer)
        model = plan.vocabulary.tokenizer.model
        table = {name: _row(name, tensor, QUANTIZATIONS[quant]) for name, tensor in plan.tensors.items()}
        parameters = sum(rows * cols for _, rows, cols in table.values())
        bits = sum(stored_bytes(*row) for row in table.values()) * 8 / parameters
        metadata = _metadata(plan, template) | {
            "quantization": {
                "scheme": QUANTIZATIONS[quant],
                "embeddings": EMBEDDINGS,
                "bits_per_weight": round(bits, 4),
            }
        }
        with CnlWriter(output, metadata, table | {TOKENIZER: ("raw", len(model), 1)}) as writer:
            records = _pack(plan, table, writer, threads, progress)
            writer.write_padded(TOKENIZER, model)
            content = writer.finish({"fingerprint": {"tensors": records}})
    errors = {name: values["error"] for name, values in records.items() if table[name][0] != "f32"}
    worst = max(errors, key=lambda name: errors[name])
    return Report(
        file=str(output),
        size=writer.size,
        parameters=parameters,
        scheme=QUANTIZATIONS[quant],
        bits_per_weight=bits,
        template=metadata["template"],
        vocab_size=plan.config["vocab_size"],
        worst_tensor=worst,
        worst_error=errors[worst],
        mean_error=sum(errors.values()) / len(errors),
        fingerprint=fingerprint.short_name(records),
        content_sha256=content,
        peak_memory=peak_memory(),
        seconds=time.monotonic() - started,
        warnings=plan.notices,
    )


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


def _row(name: str, tensor: MergedTensor, scheme: str) -> tuple[str, int, int]:
    if len(tensor.shape) == 1:
        return "f32", tensor.shape[0], 1
    return (EMBEDDINGS if name in (EMBEDDING, LM_HEAD) else scheme), tensor.shape[0], tensor.shape[1]


def _pack(
    plan: Plan, table: Mapping[str, tuple[str, int, int]], writer: CnlWriter, threads: int, progress: bool
) -> dict[str, dict[str, float]]:
    """Streams every tensor of the plan; returns the fingerprint of each."""
    from tqdm import tqdm

    total = sum(math.prod(tensor.shape) for tensor in plan.tensors.values())
    records = {}
    with tqdm(total=total, unit="w", unit_scale=True, desc="packing", disable=not progress, file=sys.stderr) as bar:
        for name, tensor in plan.tensors.items():
            scheme = table[name][0]
            statistics, squared_error = Statistics(), 0.0
            for begin, values in _chunks(tensor):
                statistics.add(values)
                if not statistics.finite:
                    _refuse_values(tensor, values, begin)
                if scheme == "f32":
                    writer.write_padded(name, values.tobytes())
                else:
                    squared_error += _quantize(tensor, values, scheme, threads, writer)
                bar.update(values.size)
            tensor.release()
            error = math.sqrt(squared_error / statistics.squares) if statistics.squares else 0.0
            records[name] = fingerprint.record(statistics, error)
    return records


def _chunks(tensor: MergedTensor) -> Iterator[tuple[int, FloatArray]]:
    """(first row, float32 values) of a tensor, rows in multiples of the quantizer's 32."""
    rows = tensor.shape[0]
    step = rows if len(tensor.shape) == 1 else max(32, _CHUNK_VALUES // tensor.shape[1] // 32 * 32)
    for begin in range(0, rows, step):
        yield begin, tensor.read(begin, min(begin + step, rows))


def _quantize(tensor: MergedTensor, values: FloatArray, scheme: str, threads: int, writer: CnlWriter) -> float:
    try:
        packed, squared_error, _ = _core.quantize(np.ascontiguousarray(values), scheme, threads)
    except ValueError as error:
        raise InputError(f"{tensor.files()}: tensor {tensor.name} cannot be quantized ({error})") from None
    writer.write(tensor.name, packed)
    return squared_error


def _refuse_values(tensor: MergedTensor, values: FloatArray, begin: int) -> None:
    where = np.argwhere(~np.isfinite(values))[0]
    value = values[tuple(where)]
    place = f"row {begin + int(where[0])}" + (f", column {int(where[1])}" if values.ndim == 2 else "")
    raise InputError(
        f"{tensor.files()}: tensor {tensor.name} is {value} at {place}, expected finite numbers; the checkpoint "
        "is damaged or its training diverged, get it again"
    )


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
