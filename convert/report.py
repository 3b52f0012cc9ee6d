# SPDX-License-Identifier: Apache-2.0
"""What a conversion says of itself when it is done."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cnllama.paths import exists


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


def describe(report: Report) -> list[str]:
    """The report as lines for people."""
    return [
        f"{report.file}: {report.size:,} bytes, {report.parameters:,} weights, vocabulary {report.vocab_size:,}",
        f"  scheme       {report.scheme}, {report.bits_per_weight:.3f} bits per weight with everything",
        f"  quantizer    {report.quantizer}{_reason(report)}",
        f"  error        mean {report.mean_error:.2%}, worst {report.worst_error:.2%} ({report.worst_tensor})",
        f"  template     {report.template}",
        f"  fingerprint  {report.fingerprint}, content {report.content_sha256[:16]}",
        f"  took         {report.seconds:.1f} s, peak memory {report.peak_memory / 1e9:.2f} GB",
    ]


def _reason(report: Report) -> str:
    held_out, reason = report.held_out, f": {report.reason}" if report.reason else ""
    if held_out is None:
        return reason
    return (
        f"{reason}; perplexity of the held-out text {held_out['perplexity']:.4f} by {held_out['quantizer']}, "
        f"{held_out['rtn_perplexity']:.4f} by rtn"
    )


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes; 0 where the system does not tell."""
    peak = _status("VmHWM:")  # getrusage's number starts with the parent's size at the fork
    if peak:
        return peak
    try:
        import resource
    except ImportError:
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def resident_memory() -> int:
    """Resident size of this process now, bytes; where the system does not tell, the largest so far."""
    return _status("VmRSS:") or peak_memory()


def _status(key: str) -> int:
    status = Path("/proc/self/status")
    if exists(status):
        for line in status.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0
