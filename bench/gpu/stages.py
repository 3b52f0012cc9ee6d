# SPDX-License-Identifier: Apache-2.0
"""The measuring stages of run.py, each in a process of its own.

    python bench/gpu/stages.py STAGE --result FILE [--ceilings FILE] [--dry]

Figures are medians of rounds. A kernel is timed by replaying a graph of many launches over copies of its weights that
together are several times the second cache, so that every one of them is read from memory. The result is written after
every figure, so that a stage whose time is up leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from engine_stage import engine, random_model
from measures import DRY, FULL, MODEL_7B, SMALL_MODEL, Product, Result, Sizes

ROOT = Path(__file__).resolve().parents[2]


def device(cuda: Any, result: Result, _: Sizes) -> None:
    """What it is."""
    for name, value in cuda.device().items():
        result.note(name, value)


def ceilings(cuda: Any, result: Result, sizes: Sizes) -> None:
    """What this card does at most, each as this program can reach it."""
    size = sizes.mebibytes << 20
    read = size / statistics.median(cuda.bench.read(sizes.mebibytes, sizes.rounds))
    result.note("read", read)
    result.row("reading", read, "GB/s", 1e9)
    copy = 2 * size / statistics.median(cuda.bench.copy(sizes.mebibytes, sizes.rounds))
    result.note("copy", copy)
    result.row("copying, both ways", copy, "GB/s", 1e9)
    for mode in ("plain", "graph", "early"):
        gap = statistics.median(cuda.bench.launches(mode, sizes.launches, sizes.rounds)) / sizes.launches
        result.note(f"launch_{mode}", gap)
        result.row(f"a launch, {mode}", gap, "us", 1e-6)
    import peers

    flops = peers.matmul_flops()
    if flops is None:
        result.gap("torch bf16 matmul 8192", "no torch with CUDA")
    else:
        result.note("bf16", flops)
        result.row("torch bf16 matmul 8192", flops, "TFLOP/s", 1e12)


def kernels(cuda: Any, result: Result, sizes: Sizes) -> None:
    """Products over the shapes of a model and attention, as percent of reading or of the bf16 matmul."""
    for product in sizes.products():
        try:
            measure_product(cuda, result, sizes, product)
        except RuntimeError as error:
            result.gap(product.name, error)
    heads, kv_heads, d = (sizes.config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    positions, layers = sizes.positions, sizes.layers
    for kv_type, element in (("fp16", 2), ("int8", 1)):
        for batch in (1, 8):
            label = f"attention {positions}, {batch} sequence{'s' * (batch > 1)}, {kv_type}"
            times = cuda.bench.attention(heads, kv_heads, d, positions, batch, kv_type, False, layers, sizes.rounds)
            size = 2 * kv_heads * d * element * positions * batch
            result.row(label, layers * size / statistics.median(times), "GB/s", 1e9, result.ceiling("read"))
    times = cuda.bench.attention(heads, kv_heads, d, positions, 1, "fp16", True, 2, sizes.rounds)
    flops = 2 * 4 * heads * d * positions * (positions + 1) / 2
    result.row(f"attention of a prompt of {positions}", flops / statistics.median(times), "TFLOP/s", 1e12)


def measure_product(cuda: Any, result: Result, sizes: Sizes, product: Product) -> None:
    """Bytes a second for few tokens, multiply-adds for many."""
    from cnllama import _core

    name, scheme, rows, cols, epilogue = product
    matrices = 2 if epilogue == "swiglu" else 1
    size = matrices * _core.packed_bytes(scheme, rows, cols)
    copies = max(2, -(-sizes.rotated_bytes // size))

    def seconds(tokens: int, kernel: str, copies: int) -> float:
        times = cuda.bench.matmul(scheme, rows, cols, tokens, epilogue, kernel, copies, sizes.rounds)
        return statistics.median(times) / copies

    for tokens in sizes.few_tokens:
        for kernel in ("auto", "dp4a") if tokens == 1 else ("auto",):
            label = f"{name} {tokens} token{'s' * (tokens > 1)}{' dp4a' * (kernel == 'dp4a')}"
            result.row(label, size / seconds(tokens, kernel, copies), "GB/s", 1e9, result.ceiling("read"))
    for tokens in sizes.many_tokens:
        flops = 2 * matrices * rows * cols * tokens / seconds(tokens, "auto", 2)
        result.row(f"{name} {tokens} tokens", flops, "TFLOP/s", 1e12, result.ceiling("bf16"))


def small(cuda: Any, _: Result, __: Sizes) -> None:
    """Every kernel once, on small shapes, for compute-sanitizer."""
    from cnllama import _core

    random = np.random.default_rng(0)
    for tokens in (1, 9, 20, 70):
        x = random.standard_normal((tokens, 320)).astype(np.float32)
        cuda.ops.gather_rows(x, np.arange(tokens, dtype=np.int32))
        cuda.ops.quantize_activations(x, np.ones(320, np.float32))
        for scheme in cuda.SCHEMES:
            matrix = (_core.quantize(random.standard_normal((40, 320)).astype(np.float32), scheme)[0], scheme, 40, None)
            for kernel in ("auto", "dp4a") if tokens == 1 else ("auto",):
                cuda.ops.matmul(x, [matrix], kernel=kernel)
                cuda.ops.matmul_swiglu(x, matrix, matrix, kernel=kernel)
            cuda.ops.embed(matrix[0], scheme, 40, 320, np.arange(tokens, dtype=np.int32) % 40)
    lengths = [(300, 1), (40, 20)]
    q, k, v = (random.standard_normal((n, 4 * 64)).astype(np.float32) for n in (21, 340, 340))
    for kv_type in ("fp16", "int8"):
        for kernel in ("decode", "prefill"):
            cuda.ops.attention(q, k, v, 4, 4, lengths, kv_type, kernel=kernel)
    logits = random.standard_normal((3, 3000)).astype(np.float32)
    cuda.ops.argmax(logits)
    cuda.ops.top(logits, 50)
    tensors = random_model(SMALL_MODEL)
    model = cuda.Engine(SMALL_MODEL, tensors, context=64)
    model.generate([model.open()], np.array([5], np.int32), 4)


def peers_stage(_: Any, result: Result, __: Sizes) -> None:
    import peers

    peers.measure(result, MODEL_7B)


STAGES: dict[str, Callable[[Any, Result, Sizes], None]] = {
    "device": device,
    "ceilings": ceilings,
    "kernels": kernels,
    "engine": engine,
    "peers": peers_stage,
    "small": small,
}


def load(dry: bool) -> tuple[Any, str]:
    """(the module, why it cannot be used)."""
    if dry:
        sys.path.insert(0, str(ROOT / "tests" / "cuda"))
        import build

        try:
            return build.load(Path(os.environ["CNLLAMA_EMULATION"])), ""
        except (FileNotFoundError, ImportError) as error:
            return None, f"the emulation cannot be built: {error}"
    try:
        from cnllama.device import cuda_problem
    except ImportError as error:
        return None, f"cnllama is not installed: {error}"
    problem = cuda_problem()
    if problem:
        return None, problem
    from cnllama import _cuda

    return _cuda, ""


def main() -> int:
    """Writes the result; 0 also when the stage was skipped."""
    parser = argparse.ArgumentParser(description="One stage of run.py.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--ceilings", type=Path)
    parser.add_argument("--dry", action="store_true", help="small shapes in the host emulation")
    arguments = parser.parse_args()
    known = arguments.ceilings
    result = Result(arguments.result, json.loads(known.read_text()) if known and known.is_file() else {})
    cuda, problem = load(arguments.dry)
    if problem:
        result.note("skipped", problem)
        print(problem)
        return 0
    STAGES[arguments.stage](cuda, result, DRY if arguments.dry else FULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
