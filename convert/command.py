# SPDX-License-Identifier: Apache-2.0
"""The command line of `cnllama convert` and `python -m cnllama.convert`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

from cnllama import _core
from cnllama.container import Output
from cnllama.errors import InputError
from cnllama.stdio import say, show

from .pack import Report, convert
from .quantize.calibration import DEFAULT_TOKENS, parse_tokens
from .quantize.registry import AUTO, CALIBRATED, DEVICES, QUANTIZERS
from .quantize.rules import DEFAULT_Q4, EMBEDDINGS, parse_rules, quantizations

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
    _add_quantization(parser)
    parser.add_argument("--template", metavar="NAME", help="prompt template to store (default: by vocabulary size)")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="take tokenizer.model from this directory")
    parser.add_argument("--threads", metavar="N", type=int, default=0, help="threads (default: this machine's cores)")
    parser.add_argument("--report", metavar="FILE", type=Path, help="also write the report as JSON")


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    schemes = _core.schemes()
    bits = {name: f"{name} {facts['bits_per_weight']:g}" for name, facts in schemes.items()}
    short = [f"{name} {scheme}" for name, scheme in quantizations().items() if name != scheme]
    parser.add_argument(
        "--quant",
        metavar="NAME",
        default="q4",
        help=f"weight scheme, default q4 ({DEFAULT_Q4}); short names: {', '.join(short)}; schemes and their bits per "
        f"weight: {', '.join(bits.values())}",
    )
    parser.add_argument(
        "--quant-rule",
        metavar="RULES",
        action="append",
        default=[],
        help="other schemes for some matrices: 'PATTERN=NAME,...', the last that matches wins, as in "
        f"'lm_head=q8,*.down_proj=q8' (embed_tokens and lm_head are {EMBEDDINGS} unless a rule says otherwise)",
    )
    parser.add_argument(
        "--quantizer",
        choices=QUANTIZERS,
        default=AUTO,
        help="rtn: the nearest value of the best scale; gptq, awq: calibrated on text, need PyTorch; auto (default): "
        "gptq where that takes minutes at most, else rtn",
    )
    group = parser.add_argument_group("calibration", f"for --quantizer auto, {' and '.join(CALIBRATED)}")
    group.add_argument(
        "--calibrate", metavar="FILE", type=Path, help="text or .jsonl (default: a bundled Chinese text)"
    )
    group.add_argument(
        "--calibrate-tokens",
        metavar="SAMPLESxLENGTH",
        default="x".join(map(str, DEFAULT_TOKENS)),
        help="how much of it (default %(default)s)",
    )
    group.add_argument("--device", choices=DEVICES, help="where to calibrate (default cpu; auto takes a GPU)")
    group.add_argument(
        "--no-check",
        action="store_true",
        help="keep the calibrated file even if it should predict the text's last tenth worse than rtn's",
    )


def run(args: argparse.Namespace) -> int:
    """Converts and prints the report. Returns the exit code."""
    if not 0 <= args.threads <= _MAX_THREADS:
        raise InputError(f"--threads is {args.threads}, expected 0 (automatic) to {_MAX_THREADS}")
    if args.quantizer == "rtn" and (args.calibrate or args.no_check or args.device):
        raise InputError(f"--calibrate, --device and --no-check need --quantizer {' or '.join(CALIBRATED)}")
    # Opened first: a report that cannot be written must not be found out after the conversion.
    with Output(args.report) if args.report else nullcontext() as output:
        report = convert(
            args.base,
            args.lora,
            args.output,
            quant=args.quant,
            rules=parse_rules(args.quant_rule),
            quantizer=args.quantizer,
            calibrate=args.calibrate,
            calibrate_tokens=parse_tokens(args.calibrate_tokens),
            device=args.device,
            check=not args.no_check,
            template=args.template,
            tokenizer=args.tokenizer,
            threads=args.threads,
            progress=sys.stderr.isatty(),
        )
        if output:
            output.write(json.dumps(report.to_dict(), indent=2).encode() + b"\n", 0)
            output.commit()
    for warning in report.warnings:
        say(f"warning: {warning}")
    show(*describe(report))
    return 0


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
