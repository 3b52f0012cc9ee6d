# SPDX-License-Identifier: Apache-2.0
"""`convert --dry-run`: everything that a conversion checks, and what it would take and write. Writes nothing."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cnllama.files import check_place
from cnllama.plan import Available, available_memory, scratch_bytes
from cnllama.space import free_bytes
from cnllama.verify import Statistics

from .merge import MergedTensor
from .pack import Prepared
from .quantize.base import CHUNK_VALUES, chunks, quantize
from .report import resident_memory

_SAMPLE_VALUES = 1 << 20  # of a matrix, to time the quantizer by
_JUDGED_TOKENS = 1 << 13  # of the text kept apart, about, in each of the two files
_FLOAT = 4


@dataclass(frozen=True)
class Forecast:
    """What a conversion will take. Sizes in bytes; seconds: without waiting for the disk.

    sizes: of every file on the disk at once, the wanted one first. peak: of the resident set, mapped pages included.
    """

    prepared: Prepared
    sizes: list[int]
    free: int
    peak: int
    available: Available
    seconds: float

    @property
    def warnings(self) -> list[str]:
        """Of the plan, and about memory, which a conversion takes without asking."""
        notices = list(self.prepared.job.plan.notices)
        if self.peak > self.available.bytes + resident_memory():
            notices.append(
                f"it needs about {self.peak / 1e9:.2f} GB of memory and {self.available.bytes / 1e9:.2f} GB can be had "
                f"({self.available.source}); mapped pages of the checkpoint can be dropped, the rest cannot"
            )
        return notices


def forecast(prepared: Prepared) -> Forecast:
    """Estimates peak and time by the sizes of the tensors and a short measurement. Raises InputError for bad weights
    among the rows that are measured.
    """
    directory = check_place(prepared.output).parent
    return Forecast(
        prepared,
        prepared.sizes(),
        free_bytes(directory),
        _peak(prepared),
        available_memory(),
        _seconds(prepared),
    )


def describe(found: Forecast) -> Iterator[str]:
    """The forecast as lines for people."""
    job, files = found.prepared.job, found.sizes
    yield from job.plan.vocabulary.table
    output, vocabulary = found.prepared.output, job.plan.config["vocab_size"]
    yield f"{output}: would have {files[0]:,} bytes, {job.parameters:,} weights, vocabulary {vocabulary:,}"
    said = job.metadata["quantization"]
    yield f"  scheme       {said['scheme']}, {said['bits_per_weight']:.3f} bits per weight with everything"
    reason = f": {found.prepared.reason}" if found.prepared.reason else ""
    yield f"  quantizer    {found.prepared.quantizer}{reason}"
    yield f"  template     {job.metadata['template']}"
    both = f" (of them {files[1]:,} for a file by rtn to compare with, until the end)" if len(files) > 1 else ""
    yield f"  disk         {sum(files):,} bytes are needed{both}, {found.free:,} are free"
    yield (
        f"  memory       about {found.peak / 1e9:.2f} GB at the peak, {found.available.bytes / 1e9:.2f} GB can be had "
        f"({found.available.source})"
    )
    yield f"  time         about {_duration(found.seconds)}, and what reading and writing wait for the disk"
    yield "nothing was written"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _seconds(prepared: Prepared) -> float:
    """The time to read, round and hash all tensors, from rows of each scheme's largest matrix, and to calibrate."""
    job, calibration = prepared.job, prepared.calibration
    values: dict[str, int] = {}
    largest: dict[str, MergedTensor] = {}
    for name, (scheme, rows, cols) in job.table.items():
        if scheme != "f32":
            values[scheme] = values.get(scheme, 0) + rows * cols
            if scheme not in largest or math.prod(largest[scheme].shape) < rows * cols:
                largest[scheme] = job.plan.tensors[name]
    rounding = sum(count * _rate(largest[scheme], scheme, job.threads) for scheme, count in values.items())
    if calibration is None:
        return rounding
    from .quantize.cost import calibration_seconds

    tokens, judged = calibration.samples.size, 2 * _JUDGED_TOKENS * prepared.check
    found = calibration_seconds(
        prepared.quantizer, job.table, tokens, prepared.device, threads=job.threads, judged=judged
    )
    return rounding * len(prepared.sizes()) + found


def _rate(tensor: MergedTensor, scheme: str, threads: int) -> float:
    """Seconds for each value, from a second run over some rows: the first one waits for the disk."""
    step = max(1, _SAMPLE_VALUES // tensor.shape[1] // 32) * 32
    best = math.inf
    for _ in range(2):
        begin = time.perf_counter()
        sample = next(chunks(tensor, Statistics(), step * tensor.shape[1]))
        packed, _ = quantize(tensor, sample, scheme, threads)
        hashlib.sha256(packed.data).digest()
        best = min(best, (time.perf_counter() - begin) / sample.size)
    tensor.release()
    return best


def _peak(prepared: Prepared) -> int:
    """The largest of the phases; in each, what the process has already and what the phase holds at once."""
    job, calibration = prepared.job, prepared.calibration
    held = max(_rounding(tensor) for tensor in job.plan.tensors.values())
    if calibration is not None:
        from .quantize.cost import calibration_bytes  # loads PyTorch, which is then a part of the process as it is

        config = job.plan.config
        size = calibration_bytes(prepared.quantizer, job.table, config, calibration.samples.size, prepared.device)
        held = max(held, size + max(tensor.source.nbytes for tensor in job.plan.tensors.values()))
        if prepared.check:
            held = max(held, max(prepared.sizes()) + scratch_bytes(config))
    return resident_memory() + held


def _rounding(tensor: MergedTensor) -> int:
    """Pages of the stored tensors, which stay until it is done, a chunk, its packed form, and the updates' values."""
    rows, cols = tensor.shape[0], math.prod(tensor.shape[1:])
    chunk = min(rows * cols, max(32 * cols, CHUNK_VALUES))
    changes = [source for update in tensor.updates for source in update.sources()]
    stored = sum(source.nbytes for source in (tensor.source, *changes))
    held = sum(source.size * _FLOAT for source in changes)
    return stored + chunk * (_FLOAT + 1 + _FLOAT * bool(changes)) + held
