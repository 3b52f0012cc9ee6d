# SPDX-License-Identifier: Apache-2.0
"""`cnllama export`: a packed file in the format of another program."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from cnllama.arguments import add_model_file, add_output_option
from cnllama.stdio import say, show
from cnllama.textio import tr

if TYPE_CHECKING:
    from cnllama.convert.gguf.export import ExportedMatrix, Report

HELP = tr("write a .cnl file as GGUF, for llama.cpp", "把 .cnl 文件写成 llama.cpp 用的 GGUF")
FORMATS = ("gguf",)
TYPES = ("auto", "q4_0", "q4_1", "q8_0", "f16")
_OUTER = ("model.embed_tokens.weight", "lm_head.weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    add_model_file(parser, "file", tr("a .cnl file", ".cnl 文件"))
    parser.add_argument("--to", choices=FORMATS, default="gguf", help=tr("the format (gguf)", "格式（gguf）"))
    add_output_option(parser, "OUT", tr("the file to write", "要写的文件"))
    parser.add_argument(
        "--type",
        choices=TYPES,
        default="auto",
        help=tr(
            "type of the layers' matrices; auto, the default: the one that holds every weight exactly",
            "各层矩阵的类型；默认 auto：能精确保存每个权重的类型",
        ),
    )


def run(args: argparse.Namespace) -> int:
    """Exports and prints what is exact and what is not. Returns the exit code."""
    from cnllama.convert.gguf.export import export
    from cnllama.errors import os_errors_explained
    from cnllama.format import open_cnl

    file = open_cnl(args.file)
    with os_errors_explained(args.output):
        report = export(file, args.output, wanted=args.type, progress=sys.stderr.isatty())
    for warning in report.warnings:
        say(tr("warning: ", "警告：") + warning)
    show(*describe(report))
    return 0


def describe(report: Report) -> list[str]:
    """The report as lines for people: one for each scheme and type that occur in the layers and outside of them."""
    lines = [
        f"{report.file}: {report.size:,} bytes, {report.tensors} tensors, {report.vocab_size:,} tokens, "
        + ("with" if report.chat_template else "without")
        + " a chat template"
    ]
    groups: dict[tuple[str, str, str], list[ExportedMatrix]] = {}
    for matrix in report.matrices:
        place = "embeddings" if matrix.name in _OUTER else "layers"
        groups.setdefault((place, matrix.scheme, matrix.type.name), []).append(matrix)
    for (place, scheme, kind), matrices in groups.items():
        errors = [matrix.error for matrix in matrices]
        exact = "every weight exact"
        if max(errors) > 0:
            worst = max(matrices, key=lambda matrix: matrix.error)
            exact = f"error mean {sum(errors) / len(errors):.2%}, worst {worst.error:.2%} ({worst.name})"
        lines.append(f"  {place:<10}  {scheme} -> {kind:<4}  {len(matrices)} matrices, {exact}")
    return lines
