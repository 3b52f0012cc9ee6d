# SPDX-License-Identifier: Apache-2.0
"""The measuring stages of run.py, each in a process of its own.

    python bench/gpu/stages.py STAGE RESULT.json CEILINGS.json

Figures are medians of rounds. A kernel is timed by replaying a graph of many launches over copies of its weights that
together are several times the second cache, so that every one of them is read from memory.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MODEL_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 55296,
}
SCHEME, HEAD_SCHEME = "q4-a64", "q8-s64"
# name, scheme, rows, cols, epilogue
PRODUCTS = (
    ("qkv", SCHEME, 12288, 4096, "store"),
    ("o", SCHEME, 4096, 4096, "add"),
    ("gate+up", SCHEME, 11008, 4096, "swiglu"),
    ("down", SCHEME, 4096, 11008, "add"),
    ("lm_head", HEAD_SCHEME, 55296, 4096, "store"),
)
ROTATED_BYTES = 320 << 20

Row = dict[str, Any]


def row(name: str, value: float, unit: str, ceiling: float | None = None) -> Row:
    """A line of the table; `ceiling` in the same unit."""
    entry: Row = {"name": name, "value": round(value, 2 if value < 1000 else 0), "unit": unit}
    if ceiling:
        entry["percent"] = f"{100 * value / ceiling:.0f} %"
    return entry


def ceilings(cuda: Any, _: Row) -> Row:
    """What this card does at most, each as this program can reach it."""
    size = 2048
    read = (size << 20) / statistics.median(cuda.bench.read(size))
    copy = 2 * (size << 20) / statistics.median(cuda.bench.copy(size))
    result: Row = {"read": read, "copy": copy}
    rows = [row("reading", read / 1e9, "GB/s"), row("copying, both ways", copy / 1e9, "GB/s")]
    for mode in ("plain", "graph", "early"):
        gap = statistics.median(cuda.bench.launches(mode, 1000)) / 1000
        result[f"launch_{mode}"] = gap
        rows.append(row(f"a launch, {mode}", gap * 1e6, "us"))
    flops = torch_matmul_flops()
    if flops:
        result["bf16"] = flops
        rows.append(row("torch bf16 matmul 8192", flops / 1e12, "TFLOP/s"))
    return {**result, "rows": rows}


def torch_matmul_flops() -> float | None:
    """Of a large bf16 matmul; None without torch for CUDA."""
    torch = cuda_torch()
    if torch is None:
        return None
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / torch_seconds(torch, lambda: a @ b)


def cuda_torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def torch_seconds(torch: Any, work: Callable[[], object], rounds: int = 20) -> float:
    """Median seconds of one call, by events."""
    for _ in range(3):
        work()
    seconds = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def kernels(cuda: Any, ceiling: Row) -> Row:
    """Products over the shapes of a 7B model and attention, as percent of reading or of the bf16 matmul."""
    from cnllama import _core

    rows = []
    for name, scheme, n, k, epilogue in PRODUCTS:
        matrices = 2 if epilogue == "swiglu" else 1
        size = matrices * _core.packed_bytes(scheme, n, k)
        copies = max(2, -(-ROTATED_BYTES // size))
        for tokens in (1, 8, 16, 32):
            for kernel in ("auto", "dp4a") if tokens == 1 else ("auto",):
                seconds = (
                    statistics.median(cuda.bench.matmul(scheme, n, k, tokens, epilogue, kernel, copies, 7)) / copies
                )
                label = f"{name} {tokens} token{'s' * (tokens > 1)}{' dp4a' * (kernel == 'dp4a')}"
                rows.append(row(label, size / seconds / 1e9, "GB/s", ceiling.get("read", 0) / 1e9))
        for tokens in (512, 2048):
            seconds = statistics.median(cuda.bench.matmul(scheme, n, k, tokens, epilogue, "auto", 2, 5)) / 2
            flops = 2 * matrices * n * k * tokens / seconds
            rows.append(row(f"{name} {tokens} tokens", flops / 1e12, "TFLOP/s", ceiling.get("bf16", 0) / 1e12))
    for kv_type, element in (("fp16", 2), ("int8", 1)):
        for batch in (1, 8):
            positions = 2048
            seconds = statistics.median(cuda.bench.attention(32, 32, 128, positions, batch, kv_type, False, 16, 7)) / 16
            size = 2 * 32 * 128 * element * positions * batch
            label = f"attention 2048, {batch} sequence{'s' * (batch > 1)}, {kv_type}"
            rows.append(row(label, size / seconds / 1e9, "GB/s", ceiling.get("read", 0) / 1e9))
    seconds = statistics.median(cuda.bench.attention(32, 32, 128, 2048, 1, "fp16", True, 2, 3)) / 2
    rows.append(row("attention of a prompt of 2048", 4 * 32 * 128 * 2048 * 2049 / 2 / seconds / 1e12, "TFLOP/s"))
    return {"rows": rows}


def random_model(config: Row, layers: int) -> tuple[Row, dict[str, Any]]:
    """Tensors of the right sizes; one random layer is used for all of them, so that the host needs little memory."""
    from cnllama import _core

    config = {**config, "num_hidden_layers": layers}
    random = np.random.default_rng(0)
    known: dict[tuple[str, int, int], tuple[np.ndarray, str, int, int]] = {}

    def matrix(scheme: str, rows: int, cols: int) -> tuple[np.ndarray, str, int, int]:
        if (scheme, rows, cols) not in known:
            few = random.standard_normal((32, cols), np.float32) * np.float32(cols**-0.5)
            packed = _core.quantize(few, scheme)[0]
            known[scheme, rows, cols] = (np.tile(packed, -(-rows // 32)), scheme, rows, cols)
        # A copy for every tensor: equal data would be uploaded once and read from the cache.
        data, *rest = known[scheme, rows, cols]
        return (data.view(), *rest)  # type: ignore[return-value]

    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    norm = (np.ones(hidden, np.float32).view(np.uint8), "f32", hidden, 1)
    tensors: dict[str, Any] = {
        "model.embed_tokens.weight": matrix(HEAD_SCHEME, vocab, hidden),
        "lm_head.weight": matrix(HEAD_SCHEME, vocab, hidden),
        "model.norm.weight": norm,
    }
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, hidden),
        "v_proj": (hidden, hidden),
        "o_proj": (hidden, hidden),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for part, group in (("self_attn.", shapes), ("mlp.", mlp)):
            for name, (rows, cols) in group.items():
                data, *rest = matrix(SCHEME, rows, cols)
                tensors[f"{prefix}{part}{name}.weight"] = (data.copy(), *rest)
        tensors[prefix + "input_layernorm.weight"] = tensors[prefix + "post_attention_layernorm.weight"] = norm
    return config, tensors


def weights_bytes_of_a_token(tensors: dict[str, Any]) -> int:
    """Every matrix but the embedding is read once a step."""
    return sum(t[0].nbytes for name, t in tensors.items() if "embed_tokens" not in name)


def engine(cuda: Any, ceiling: Row) -> Row:
    """Decode and prefill of the 7B shape: random weights, greedy, tokens chosen on the device."""
    config, tensors = random_model(MODEL_7B, MODEL_7B["num_hidden_layers"])
    read, rows = weights_bytes_of_a_token(tensors), []
    begin = time.perf_counter()
    model = cuda.Engine(config, tensors, context=2304, max_sequences=32, max_step_tokens=2048)
    rows.append(row("loading", time.perf_counter() - begin, "s"))
    kv_token = model.memory()["kv_per_token"]
    prompt = np.random.default_rng(1).integers(3, config["vocab_size"], 2048).astype(np.int32)
    for tokens in (512, 2048):
        sequence = model.open()
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            model.step([(sequence, prompt[:tokens], False)])
            seconds.append(time.perf_counter() - begin)
            model.trim(sequence, 0)
        model.close(sequence)
        rows.append(row(f"prefill {tokens}", tokens / statistics.median(seconds), "tok/s"))
    for context, batches in ((0, (1, 8, 32)), (2048, (1, 8))):
        for batch in batches:
            sequences = [model.open() for _ in range(batch)]
            for sequence in sequences if context else ():
                model.step([(sequence, prompt[:context], False)])
            first, steps = np.full(batch, 5, np.int32), 64
            model.generate(sequences, first, 8)
            seconds = []
            for _ in range(3):
                begin = time.perf_counter()
                model.generate(sequences, first, steps)
                seconds.append((time.perf_counter() - begin) / steps)
            limit = (read + batch * (context + 100) * kv_token) / ceiling["read"] if ceiling.get("read") else 0
            rate = batch / statistics.median(seconds)
            rows.append(
                row(f"decode, {batch} at once, context {context}", rate, "tok/s", batch / limit if limit else None)
            )
            for sequence in sequences:
                model.close(sequence)
    return {"rows": rows, "replays": model.replays()}


def peers(_: Any, ceiling: Row) -> Row:
    """PyTorch on the same card: its int4 product, attention, and a bf16 decode of the same shape."""
    torch = cuda_torch()
    if torch is None:
        return {"skipped": "no torch with CUDA"}
    rows = []
    for name, n, k in (("qkv", 12288, 4096), ("o", 4096, 4096), ("gate+up", 22016, 4096), ("down", 4096, 11008)):
        try:
            rows.append(torch_int4(torch, name, n, k, ceiling))
        except (RuntimeError, AttributeError, TypeError) as error:
            rows.append(
                {"name": f"torch int4 {name}", "value": "-", "unit": "", "percent": str(error).splitlines()[0][:80]}
            )
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.float16)
    cache = [torch.randn(1, 32, 2048, 128, device="cuda", dtype=torch.float16) for _ in range(2)]
    seconds = torch_seconds(torch, lambda: torch.nn.functional.scaled_dot_product_attention(q, *cache))
    rows.append(
        row("torch SDPA 2048, 1 sequence", 2 * cache[0].nbytes / seconds / 1e9, "GB/s", ceiling.get("read", 0) / 1e9)
    )
    rows += transformers_decode(torch)
    return {"rows": rows}


def torch_int4(torch: Any, name: str, n: int, k: int, ceiling: Row) -> Row:
    """_weight_int4pack_mm, groups of 64, one token, rotated over copies."""
    copies = max(2, -(-ROTATED_BYTES // (n * k // 2)))
    packed = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    weights = [torch._convert_weight_to_int4pack(packed, 8).clone() for _ in range(copies)]
    scales = torch.ones(k // 64, n, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    torch._weight_int4pack_mm(x, weights[0], 64, scales)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for w in weights:
            torch._weight_int4pack_mm(x, w, 64, scales)
    seconds = torch_seconds(torch, graph.replay) / copies
    return row(
        f"torch int4 {name} 1 token", (n * k // 2 + n * k // 16) / seconds / 1e9, "GB/s", ceiling.get("read", 0) / 1e9
    )


def transformers_decode(torch: Any) -> list[Row]:
    """A bf16 7B of transformers, batch 1, its static cache and no compilation; nothing where it is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return []
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=55296
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 55296, (1, 16), device="cuda")
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
        torch.cuda.synchronize()
    return [row("transformers bf16 decode, 1 at once", 64 / (time.perf_counter() - begin), "tok/s")]


def small(cuda: Any, _: Row) -> Row:
    """Every kernel once, on small shapes, for compute-sanitizer."""
    from cnllama import _core

    random = np.random.default_rng(0)
    for tokens in (1, 9, 70):
        x = random.standard_normal((tokens, 320)).astype(np.float32)
        for scheme in _core.schemes():
            matrix = (_core.quantize(random.standard_normal((40, 320)).astype(np.float32), scheme)[0], scheme, 40, None)
            cuda.ops.matmul(x, [matrix])
            cuda.ops.matmul_swiglu(x, matrix, matrix)
            cuda.ops.embed(matrix[0], scheme, 40, 320, np.arange(tokens, dtype=np.int32) % 40)
    lengths = [(300, 1), (40, 20)]
    q, k, v = (random.standard_normal((n, 4 * 64)).astype(np.float32) for n in (21, 340, 340))
    for kv_type in ("fp16", "int8"):
        for kernel in ("decode", "prefill"):
            cuda.ops.attention(q, k, v, 4, 4, lengths, kv_type, kernel=kernel)
    cuda.ops.argmax(random.standard_normal((3, 1000)).astype(np.float32))
    return {}


STAGES = {"ceilings": ceilings, "kernels": kernels, "engine": engine, "peers": peers, "small": small}


def load() -> tuple[Any, str]:
    """(the module, why it cannot be used)."""
    from cnllama.device import cuda_problem

    problem = cuda_problem()
    if problem:
        return None, problem
    from cnllama import _cuda

    return _cuda, "a dry run measures nothing" if os.environ.get("CNLLAMA_GPU_DRY") else ""


def main() -> int:
    """Writes the result; 0 also when the stage was skipped."""
    stage, target, ceiling_file = sys.argv[1:4]
    cuda, problem = load()
    known = Path(ceiling_file)
    ceiling = json.loads(known.read_text()) if known.is_file() else {}
    result = {"skipped": problem} if problem else STAGES[stage](cuda, ceiling)
    if target != "-":
        Path(target).write_text(json.dumps(result, indent=1) + "\n")
    for entry in result.get("rows", []):
        print(f"{entry['name']:44} {entry['value']:>12} {entry['unit']:8} {entry.get('percent', '')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
