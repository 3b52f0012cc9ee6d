# SPDX-License-Identifier: Apache-2.0
"""File size and memory of a model's shape in every weight scheme, by the arithmetic of `cnllama plan`.

    python bench/sizes.py [1b,7b,13b] [--schemes q8,q6,q5,q4,q3,q2] [--vocab 49953] [--ctx 4096] [--kv fp16]

Nothing is made: sizes follow from the shape. Memory is weights, cache, buffers and what the process itself takes.
Embeddings and output are q8-s64, as `cnllama convert` makes them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from cnllama.convert.facts import from_hf
from cnllama.convert.quantize.rules import EMBEDDINGS, quantizations, scheme_of
from make_checkpoint import GROWN_VOCAB, SHAPES

from cnllama.config import EMBEDDING, LM_HEAD, expected_tensors
from cnllama.errors import CnllamaError, InputError
from cnllama.format import stored_bytes
from cnllama.plan import Available, make_plan

DEFAULT = "q8,q6,q5,q4,q3,q2"


def weight_bytes(config: Mapping[str, Any], scheme: str) -> tuple[int, int]:
    """(bytes of all tensors of a model, its weights)."""
    total = weights = 0
    for name, tensor in expected_tensors(config):
        if tensor.optional:
            continue
        kind = "f32" if tensor.vector else EMBEDDINGS if name in (EMBEDDING, LM_HEAD) else scheme
        total += stored_bytes(kind, tensor.rows, tensor.cols)
        weights += tensor.rows * tensor.cols
    return total, weights


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="?", default="1b,7b,13b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--schemes", metavar="NAME,...", help=f"as --quant of convert, or all (default {DEFAULT})")
    parser.add_argument("--vocab", type=int, default=GROWN_VOCAB)
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--kv", default="fp16")
    args = parser.parse_args()
    try:
        print("\n".join(lines(args)))
    except CnllamaError as error:
        print(f"sizes: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def lines(args: argparse.Namespace) -> list[str]:
    """The table. Raises InputError for unknown shapes and schemes."""
    shapes = args.shapes.split(",")
    for shape in shapes:
        if shape not in SHAPES:
            raise InputError(f"there is no shape {shape!r}: choose of {', '.join(SHAPES)}")
    known = quantizations()
    if args.schemes == "all":
        schemes = list(dict.fromkeys(known.values()))
    else:
        names = args.schemes.split(",") if args.schemes else [name for name in DEFAULT.split(",") if name in known]
        schemes = [scheme_of(name, "--schemes") for name in names]
    short = {scheme: name for name, scheme in known.items() if name != scheme}
    rows = [["scheme", *(f"{shape}: {what}" for shape in shapes for what in ("bits per weight", "file", "memory"))]]
    rows.append(["---"] * len(rows[0]))
    for scheme in schemes:
        row = [f"`{scheme}`" + (f" ({short[scheme]})" if scheme in short else "")]
        for shape in shapes:
            config = from_hf(SHAPES[shape] | {"vocab_size": args.vocab, "max_position_embeddings": 1 << 20}, shape)
            total, weights = weight_bytes(config, scheme)
            plan = make_plan(config, total, context=args.ctx, kv_type=args.kv, available=Available(1 << 62, ""))
            row += [f"{8 * total / weights:.2f}", f"{total / 1e9:.2f} GB", f"{plan.total / 2**30:.2f} GiB"]
        rows.append(row)
    return ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    raise SystemExit(main())
