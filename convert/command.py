# SPDX-License-Identifier: Apache-2.0
"""The command line of `cnllama convert` and `python -m cnllama.convert`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

from cnllama.container import Output
from cnllama.errors import InputError

from .pack import DEFAULT_Q4, QUANTIZATIONS, Report, convert

HELP = "merge adapters into a Hugging Face LLaMA, quantize and pack it into one .cnl file"
_MAX_THREADS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("base", metavar="BASE", type=Path, help="directory of a Hugging Face LLaMA")
    parser.add_argument(
        "--lora",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="PEFT LoRA adapter to merge; may be repeated, and the order counts",
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the .cnl to write")
    parser.add_argument(
        "--quant",
        choices=sorted(QUANTIZATIONS),
        default="q4",
        help=f"weight scheme (default q4, {DEFAULT_Q4})",
    )
    parser.add_argument("--template", metavar="NAME", help="prompt template to store (default: by vocabulary size)")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="take tokenizer.model from this directory")
    parser.add_argument("--threads", metavar="N", type=int, default=0, help="threads (default: this machine's cores)")
    parser.add_argument("--report", metavar="FILE", type=Path, help="also write the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Converts and prints the report. Returns the exit code."""
    if not 0 <= args.threads <= _MAX_THREADS:
        raise InputError(f"--threads is {args.threads}, expected 0 (automatic) to {_MAX_THREADS}")
    # Opened first: a report that cannot be written must not be found out after the conversion.
    with Output(args.report) if args.report else nullcontext() as output:
        report = convert(
            args.base,
            args.lora,
            args.output,
            quant=args.quant,
            template=args.template,
            tokenizer=args.tokenizer,
            threads=args.threads,
            progress=sys.stderr.isatty(),
        )
        if output:
            output.write(json.dumps(report.to_dict(), indent=2).encode() + b"\n", 0)
            output.commit()
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(describe(report))
    return 0


def describe(report: Report) -> str:
    """The report as lines for people."""
    return "\n".join(
        (
            f"{report.file}: {report.size:,} bytes, {report.parameters:,} weights, vocabulary {report.vocab_size:,}",
            f"  scheme       {report.scheme}, {report.bits_per_weight:.3f} bits per weight with everything",
            f"  error        mean {report.mean_error:.2%}, worst {report.worst_error:.2%} ({report.worst_tensor})",
            f"  template     {report.template}",
            f"  fingerprint  {report.fingerprint}, content {report.content_sha256[:16]}",
            f"  took         {report.seconds:.1f} s, peak memory {report.peak_memory / 1e9:.2f} GB",
        )
    )
