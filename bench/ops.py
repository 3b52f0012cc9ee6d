# SPDX-License-Identifier: Apache-2.0
"""The matmul and attention kernels over the shapes of named models, as percentages of what this machine can do.

    python bench/ops.py                          # 7B, all shapes, decode and prefill
    python bench/ops.py --models 7b,13b,8b --tokens 1,4,128,512 --scheme q4-s64 --threads 1 --only matmul
    python bench/ops.py --models 7b,8b --contexts 512,2048 --only attention

Attention of one token (decode) is held against a loop that reads the same keys and values, of a whole prompt against
the instruction set's float multiply-add in registers.

Few tokens are bound by memory: the weights' bytes a second, against a loop that only reads them, run in turn with the
kernel on other copies of the matrix. Many tokens are bound by arithmetic: multiply-adds a clock cycle and thread,
against the instruction set's own int8 multiply-add in registers, also run in turn. Figures are medians of the rounds,
percentages medians of the ratios within a round, because the neighbours of a virtual machine change by the minute. On a
machine that does other work at the same time medians say little: --best takes the best of each side instead.
Every result that is timed is compared bit for bit with the scalar kernel first.
"""

import argparse
import itertools
import statistics
import sys
from dataclasses import dataclass

import numpy as np

from cnllama import _core

# (rows, cols) of what one op multiplies; lm_head has the vocabulary of Chinese-Alpaca and 8 bits.
MODELS = {
    "7b": {"qkv": (12288, 4096), "o": (4096, 4096), "gate+up": (22016, 4096), "down": (4096, 11008)},
    "13b": {"qkv": (15360, 5120), "o": (5120, 5120), "gate+up": (27648, 5120), "down": (5120, 13824)},
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)},
}
ATTENTION = {"7b": (32, 32, 128), "13b": (40, 40, 128), "8b": (32, 8, 128)}  # heads, kv heads, head_dim
HEADS = {"7b": (49954, 4096), "13b": (49954, 5120), "8b": (128256, 4096)}
COLD_BYTES = 160 << 20  # copies of a matrix that together miss every cache
MEMORY_BOUND = 16  # tokens up to which the read loop is the limit


@dataclass(frozen=True)
class Matrix:
    """What one op multiplies."""

    label: str
    scheme: str
    rows: int
    cols: int

    @property
    def bytes(self):
        """Packed."""
        return _core.packed_bytes(self.scheme, self.rows, self.cols)


@dataclass(frozen=True)
class Run:
    """How it is measured."""

    threads: int
    rounds: int
    hertz: float
    best: bool


def check(bench, matrix, x, out):
    """The first 64 rows of `out` (copy 0) equal the scalar kernel's bits."""
    some = min(64, matrix.rows)
    packed = bench.packed(0)[: _core.packed_bytes(matrix.scheme, some, matrix.cols)]
    expected = _core.ops.matmul(x, [(packed, matrix.scheme, some, None)], isa="scalar", threads=2)[0]
    if not np.array_equal(out[:, :some].view(np.uint32), expected.view(np.uint32)):
        sys.exit(f"wrong result: {matrix}, {len(x)} tokens")


def measure(matrix, tokens, run):
    """(tokens, [(seconds, the limit's seconds) of each round]) of one matmul, for each number of tokens."""
    copies = max(2, -(-COLD_BYTES // matrix.bytes)) if min(tokens) <= MEMORY_BOUND else 1
    bench = _core.ops.MatmulBench(matrix.scheme, matrix.rows, matrix.cols, copies, run.threads)
    rng = np.random.default_rng(0)
    for m in tokens:
        x = rng.standard_normal((m, matrix.cols)).astype(np.float32)
        out = np.empty((m, matrix.rows), np.float32)
        bench.run(x, 0, out)
        check(bench, matrix, x, out)
        pairs = []
        for i in range(run.rounds):
            if m <= MEMORY_BOUND:
                limit = bench.read(i % copies)
                pairs.append((bench.run(x, (i + copies // 2) % copies, out), limit))
            else:
                limit = m * matrix.rows * matrix.cols / _core.ops.int8_peak(run.threads, 0.02)
                pairs.append((bench.run(x, i % copies, out), limit))
        yield m, pairs


def report(matrix, m, pairs, run):
    """One line of the table."""
    shares = [limit / s for s, limit in pairs]
    seconds, share = statistics.median(s for s, _ in pairs), statistics.median(shares)
    if run.best:
        seconds = min(s for s, _ in pairs)
        share = min(limit for _, limit in pairs) / seconds
    if m <= MEMORY_BOUND:
        rate = f"{matrix.bytes / seconds / 1e9:.1f} GB/s"
    else:
        rate = f"{m * matrix.rows * matrix.cols / seconds / run.hertz / run.threads:.1f} MAC/cycle"
    size = f"{matrix.rows} x {matrix.cols}"
    spread = f"{min(shares):.0%} - {max(shares):.0%}"
    print(f"| {matrix.label} | {matrix.scheme} | {size} | {m} | {rate} | {share:.0%} | {spread} |", flush=True)


def measure_attention(shape, kv_type, context, batch, run):
    """(tokens, [(seconds, the limit's seconds)], the limit's unit of work) of decode, then of the whole prompt."""
    heads, kv_heads, dim = shape
    kv_bytes = batch * context * kv_heads * dim * 2 * (2 if kv_type == "fp16" else 1)
    copies = max(2, -(-COLD_BYTES // kv_bytes))
    bench = _core.ops.AttentionBench(heads, kv_heads, dim, context, batch, kv_type, copies, run.threads)
    rng = np.random.default_rng(0)
    for m in (1, context):
        q = rng.standard_normal((batch * m, heads * dim)).astype(np.float32)
        out = np.empty_like(q)
        bench.run(q, 0, out)
        check_attention(bench, q, out, batch, m)
        pairs, work = [], bench.bytes
        for i in range(run.rounds):
            if m == 1:
                limit = bench.read(i % copies)
            else:
                work = batch * heads * dim * context * (context + 1)  # q k and p v, causal
                limit = work / _core.ops.float_peak(run.threads, 0.02)
            pairs.append((bench.run(q, (i + copies // 2) % copies, out), limit))
        yield m, pairs, work


def check_attention(bench, q, out, batch, m):
    """The last token of every sequence has the scalar kernel's bits, whatever came with it."""
    last = np.ascontiguousarray(q.reshape(batch, m, -1)[:, -1])
    expected = np.empty_like(last)
    before = _core.isa()
    _core.use_isa("scalar")
    bench.run(last, 0, expected)
    _core.use_isa(before)
    if not np.array_equal(out.reshape(batch, m, -1)[:, -1].view(np.uint32), expected.view(np.uint32)):
        sys.exit(f"wrong result: attention, {m} tokens, {batch} sequences")


def report_attention(label, m, pairs, work, run):
    """One line of the table."""
    shares = [limit / s for s, limit in pairs]
    seconds, share = statistics.median(s for s, _ in pairs), statistics.median(shares)
    if run.best:
        seconds = min(s for s, _ in pairs)
        share = min(limit for _, limit in pairs) / seconds
    rate = f"{work / seconds / 1e9:.1f} GB/s" if m == 1 else f"{work / seconds / run.hertz / run.threads:.1f} MAC/cycle"
    print(f"| {label} | {m} | {rate} | {share:.0%} | {min(shares):.0%} - {max(shares):.0%} |", flush=True)


def matmul_table(args, run):
    """All matrices of the models."""
    tokens = [int(t) for t in args.tokens.split(",")]
    print("| matrix | scheme | rows x cols | tokens | rate | of limit | spread |\n|---|---|---|---|---|---|---|")
    for model in args.models.split(","):
        shapes = {**MODELS[model], "lm_head": HEADS[model]}
        for name in args.shapes.split(",") if args.shapes else shapes:
            scheme = "q8-s64" if name == "lm_head" else args.scheme
            matrix = Matrix(f"{model} {name}", scheme, *shapes[name])
            for m, pairs in measure(matrix, tokens, run):
                report(matrix, m, pairs, run)


def attention_table(args, run):
    """Attention of the models at every context, with both kinds of cache."""
    print("\n| attention | context | sequences | cache | tokens | rate | of limit | spread |")
    print("|---|---|---|---|---|---|---|---|")
    contexts = [int(c) for c in args.contexts.split(",")]
    for model, context, kv_type in itertools.product(args.models.split(","), contexts, ("fp16", "int8")):
        label = f"{model} | {context} | {args.batch} | {kv_type}"
        for m, pairs, work in measure_attention(ATTENTION[model], kv_type, context, args.batch, run):
            report_attention(label, m, pairs, work, run)


def main():
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="7b", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--shapes", default="", help="comma-separated, of qkv, o, gate+up, down, lm_head; default: all")
    parser.add_argument("--tokens", default="1,2,4,8,128,512", help="comma-separated numbers of tokens")
    parser.add_argument("--contexts", default="512,2048", help="comma-separated numbers of positions, for attention")
    parser.add_argument("--batch", type=int, default=1, help="sequences of attention")
    parser.add_argument("--only", choices=["matmul", "attention"], help="default: both")
    parser.add_argument("--scheme", default="q4-a64", help=f"of {', '.join(_core.schemes())}")
    parser.add_argument("--isa", default="", help=f"of {', '.join(_core.isas())}; default: the best")
    parser.add_argument("--threads", type=int, default=0, help="default: as the engine chooses")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--best", action="store_true", help="best rounds instead of medians, for a busy machine")
    args = parser.parse_args()
    if args.isa:
        _core.use_isa(args.isa)
    threads = args.threads or _core.cpu_info()["default_threads"]
    run = Run(threads, args.rounds, _core.ops.clock_hz(), args.best)
    peak, float_peak = _core.ops.int8_peak(threads, 0.2), _core.ops.float_peak(threads, 0.2)
    print(
        f"{_core.cpu_info()['model']}, {_core.isa()}, {threads} threads, clock {run.hertz / 1e9:.2f} GHz, int8 peak "
        f"{peak / run.hertz / threads:.0f} MAC/cycle/thread ({peak / 1e9:.0f} G/s in all), float peak "
        f"{float_peak / run.hertz / threads:.0f}\n"
    )
    if args.only != "attention":
        matmul_table(args, run)
    if args.only != "matmul":
        attention_table(args, run)


if __name__ == "__main__":
    main()
