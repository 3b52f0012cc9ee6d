# SPDX-License-Identifier: Apache-2.0
"""PyTorch and transformers on the same card: what others reach, and the bf16 matmul as a ceiling."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from measures import Result

ROTATED_BYTES = 320 << 20  # several times the second cache
MATRICES = (("qkv", 12288, 4096), ("o", 4096, 4096), ("gate+up", 22016, 4096), ("down", 4096, 11008))


def cuda_torch() -> Any:
    """torch, None where it is not there or has no GPU."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: a library of it cannot be loaded
        return None
    return torch if torch.cuda.is_available() else None


def seconds_of(torch: Any, work: Callable[[], object], rounds: int = 20) -> float:
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


def matmul_flops() -> float | None:
    """Operations a second of a large bf16 matmul; None without torch for CUDA."""
    torch = cuda_torch()
    if torch is None:
        return None
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds_of(torch, lambda: a @ b)


def measure(result: Result, config: dict[str, Any]) -> None:
    """Each peer that is there; those that are not, or fail, with the reason."""
    torch = cuda_torch()
    if torch is None:
        result.note("skipped", "no torch with CUDA")
        return
    parts: dict[str, Callable[[], None]] = {
        f"torch int4 {name} 1 token": lambda name=name, n=n, k=k: int4(torch, result, name, n, k)  # type: ignore[misc]
        for name, n, k in MATRICES
    }
    parts["torch SDPA 2048, 1 sequence"] = lambda: attention(torch, result, config)
    parts["transformers bf16 decode, 1 at once"] = lambda: transformers_decode(torch, result, config)
    for name, part in parts.items():
        try:
            part()
        except Exception as error:  # somebody else's program: whatever it raises, the next one is worth a try
            result.gap(name, error)


def int4(torch: Any, result: Result, name: str, n: int, k: int) -> None:
    """_weight_int4pack_mm, groups of 64, one token, rotated over copies."""
    copies = max(2, -(-ROTATED_BYTES // (n * k // 2)))
    packed = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    weights = [torch._convert_weight_to_int4pack(packed, 8).clone() for _ in range(copies)]
    scales = torch.ones(k // 64, n, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
    torch._weight_int4pack_mm(x, weights[0], 64, scales)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            torch._weight_int4pack_mm(x, weight, 64, scales)
    rate = (n * k // 2 + n * k // 16) * copies / seconds_of(torch, graph.replay)
    result.row(f"torch int4 {name} 1 token", rate, "GB/s", 1e9, result.ceiling("read"))


def attention(torch: Any, result: Result, config: dict[str, Any]) -> None:
    """One query over 2048 keys, all heads."""
    heads, d = config["num_attention_heads"], config["head_dim"]
    q = torch.randn(1, heads, 1, d, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(1, heads, 2048, d, device="cuda", dtype=torch.float16) for _ in range(2))
    seconds = seconds_of(torch, lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    result.row("torch SDPA 2048, 1 sequence", 2 * k.nbytes / seconds, "GB/s", 1e9, result.ceiling("read"))


def transformers_decode(torch: Any, result: Result, config: dict[str, Any]) -> None:
    """A bf16 model of transformers with the same shape, one sequence, no compilation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**{name: config[name] for name in names})).eval()
    ids = torch.randint(3, config["vocab_size"], (1, 16), device="cuda")

    def seconds(tokens: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    with torch.inference_mode():
        seconds(8)
        first = seconds(1)  # the prompt and the token that it gives: no decoding
        result.row("transformers bf16 decode, 1 at once", 64 / (seconds(65) - first), "tok/s")
