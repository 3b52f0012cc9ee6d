# SPDX-License-Identifier: Apache-2.0
"""`cnllama verify`: re-checks a packed file, or compares two by their fingerprints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cnllama.arguments import add_model_file
from cnllama.errors import CnllamaError
from cnllama.format import CnlFile, open_cnl
from cnllama.stdio import show

HELP = "re-check a .cnl file: hashes, tensors, fingerprint, tokenizer"
_LISTED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add_model_file(parser, "file", "a .cnl file")
    parser.add_argument("--against", metavar="OTHER", type=Path, help="also compare with the model in this .cnl")


def run(args: argparse.Namespace) -> int:
    """Prints one line per check. Raises CnllamaError when one fails."""
    file = open_cnl(args.file)
    other = open_cnl(args.against) if args.against else None
    failed = _verify(file)
    if failed:
        raise CnllamaError(
            f"{file.path}: {', '.join(failed)} failed; the file is damaged, get it again or convert again"
        )
    if other is not None and not _compare(file, other):
        raise CnllamaError(f"{file.path}: holds another model than {other.path}")
    return 0


def _verify(file: CnlFile) -> list[str]:
    """Prints every check; the names of the failed ones."""
    from tqdm import tqdm

    from cnllama.convert import parity
    from cnllama.verify import verify

    total = sum(t.rows * t.cols for t in file.tensors.values() if t.scheme != "raw")
    failed = []
    quiet = not sys.stderr.isatty()
    with tqdm(total=total, unit="w", unit_scale=True, desc="verifying", disable=quiet, file=sys.stderr) as bar:
        for check in verify(file, parity.check, bar.update):
            if not check.passed:
                failed.append(check.name)
            bar.clear()
            show(f"{'ok    ' if check.passed else 'FAILED'}  {check.name:<10} {check.detail}")
    return failed


def _compare(file: CnlFile, other: CnlFile) -> bool:
    from cnllama.verify import compare

    differences = compare(file, other)
    if not differences:
        show(f"ok      {'same model':<10} as {other.path}")
        return True
    show(f"FAILED  {'same model':<10} {len(differences)} differences from {other.path}:")
    for difference in differences[:_LISTED]:
        show(f"        {difference}")
    if len(differences) > _LISTED:
        show(f"        and {len(differences) - _LISTED} more")
    return False
