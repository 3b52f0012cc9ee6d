# SPDX-License-Identifier: Apache-2.0
"""The command line of `cnllama convert` and `python -m cnllama.convert`."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cnllama import _core
from cnllama.arguments import add_list_option, add_output_option
from cnllama.errors import InputError, os_errors_explained
from cnllama.files import Output, check_place
from cnllama.stdio import say, show
from cnllama.templates import TEMPLATES

from .pack import Options, convert, prepare
from .quantize.calibration import DEFAULT_TOKENS, parse_tokens
from .quantize.registry import AUTO, CALIBRATED, DEVICES, QUANTIZERS, check_quantizer
from .quantize.rules import DEFAULT_Q4, EMBEDDINGS, parse_rules, quantizations, scheme_of
from .report import describe

HELP = "merge adapters into a Hugging Face LLaMA, quantize and pack it into one .cnl file"
_MAX_THREADS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("base", metavar="BASE", type=Path, help="directory of a Hugging Face LLaMA")
    add_list_option(parser, "--lora", metavar="DIR", type=Path, help="PEFT LoRA adapters to merge; their order counts")
    add_output_option(parser, "FILE", "the .cnl to write", required=False)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print sizes, memory and time, and write nothing (-o may be left out)",
    )
    _add_quantization(parser)
    parser.set_defaults(check_options=check)
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
    add_list_option(
        parser,
        "--quant-rule",
        metavar="RULES",
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


def check(args: argparse.Namespace) -> None:
    """Raises InputError for options that cannot be, before any file is there."""
    if not 0 <= args.threads <= _MAX_THREADS:
        raise InputError(f"--threads is {args.threads}, expected 0 (automatic) to {_MAX_THREADS}")
    if args.quantizer == "rtn" and (args.calibrate or args.no_check or args.device):
        raise InputError(f"--calibrate, --device and --no-check need --quantizer {' or '.join(CALIBRATED)}")
    if args.output is None and not args.dry_run:
        raise InputError("-o FILE is missing: name the .cnl to write")
    if args.template is not None and args.template not in TEMPLATES:
        raise InputError(f"--template {args.template!r:.40} is unknown, expected one of {', '.join(TEMPLATES)}")
    scheme_of(args.quant, "--quant")
    parse_rules(args.quant_rule)
    parse_tokens(args.calibrate_tokens)
    check_quantizer(args.quantizer, args.device or "cpu")


def run(args: argparse.Namespace) -> int:
    """Converts and prints the report, or what a conversion would take. Returns the exit code."""
    check(args)
    options: dict[str, Any] = {
        "quant": args.quant,
        "rules": parse_rules(args.quant_rule),
        "quantizer": args.quantizer,
        "calibrate": args.calibrate,
        "calibrate_tokens": parse_tokens(args.calibrate_tokens),
        "device": args.device,
        "check": not args.no_check,
        "template": args.template,
        "tokenizer": args.tokenizer,
        "threads": args.threads,
        "progress": sys.stderr.isatty(),
    }
    return _dry_run(args, Options(**options)) if args.dry_run else _convert(args, options)


def _convert(args: argparse.Namespace, options: dict[str, Any]) -> int:
    # Opened first: a report that cannot be written must not be found out after the conversion.
    with Output(args.report) if args.report else nullcontext() as output:
        report = convert(args.base, args.lora, args.output, **options)
        if output:
            output.write(json.dumps(report.to_dict(), indent=2).encode() + b"\n", 0)
            output.commit()
    say(*(f"warning: {warning}" for warning in report.warnings))
    show(*describe(report))
    return 0


def _dry_run(args: argparse.Namespace, options: Options) -> int:
    from . import dry_run

    if args.report:
        check_place(args.report)
    with os_errors_explained(args.base):
        prepared = prepare(args.base, args.lora, args.output or Path("model.cnl"), options)
        found = dry_run.forecast(prepared)
    say(*(f"warning: {warning}" for warning in found.warnings))
    show(*dry_run.describe(found))
    return 0
