# SPDX-License-Identifier: Apache-2.0
"""`cnllama verify`: re-checks a packed file, or compares two by their fingerprints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cnllama.cli.info import printable
from cnllama.format import CnlFile, open_cnl

HELP = "re-check a .cnl file: hashes, tensors, fingerprint, tokenizer"
_LISTED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("file", metavar="FILE", type=Path, help="a .cnl file")
    parser.add_argument("--against", metavar="OTHER", type=Path, help="also compare with the model in this .cnl")


def run(args: argparse.Namespace) -> int:
    """Prints one line per check. Returns 0 when all pass, 1 otherwise."""
    file = open_cnl(args.file)
    other = open_cnl(args.against) if args.against else None
    passed = _verify(file)
    if other is not None:
        passed = _compare(file, other) and passed
    return 0 if passed else 1


def _verify(file: CnlFile) -> bool:
    from cnllama.convert import parity
    from tqdm import tqdm

    from cnllama.verify import verify

    total = sum(t.rows * t.cols for t in file.tensors.values() if t.scheme != "raw")
    passed = True
    quiet = not sys.stderr.isatty()
    with tqdm(total=total, unit="w", unit_scale=True, desc="verifying", disable=quiet, file=sys.stderr) as bar:
        for check in verify(file, parity.check, bar.update):
            passed &= check.passed
            bar.clear()
            print(f"{'ok    ' if check.passed else 'FAILED'}  {check.name:<10} {printable(check.detail)}", flush=True)
    return passed


def _compare(file: CnlFile, other: CnlFile) -> bool:
    from cnllama.verify import compare

    differences = compare(file, other)
    if not differences:
        print(f"ok      {'same model':<10} as {other.path}")
        return True
    print(f"FAILED  {'same model':<10} {len(differences)} differences from {other.path}:")
    for difference in differences[:_LISTED]:
        print(f"        {printable(difference)}")
    if len(differences) > _LISTED:
        print(f"        and {len(differences) - _LISTED} more")
    return False
