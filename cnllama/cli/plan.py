# SPDX-License-Identifier: Apache-2.0
"""cnllama plan: the memory a model needs against what there is."""

from __future__ import annotations

import argparse

from cnllama.arguments import add_model_file
from cnllama.stdio import show
from cnllama.textio import tr

HELP = tr("memory that a model needs, against what there is", "模型需要的内存与现有内存")
DOES_NOT_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cnllama plan`."""
    add_model_file(parser, "model", tr("a .cnl file", ".cnl 文件"))
    parser.add_argument("--ctx", type=int, metavar="N", help=tr("positions of the context", "上下文长度"))
    parser.add_argument(
        "--kv", default="fp16", metavar="TYPE", help=tr("type of the cache: fp16 or int8", "缓存类型：fp16 或 int8")
    )
    parser.add_argument(
        "--sequences", type=int, default=1, metavar="N", help=tr("how many run at once", "同时运行的序列数")
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 when it fits, 1 when it does not."""
    from cnllama.format import open_cnl
    from cnllama.plan import KV_TYPES, PROCESS_BYTES, make_plan, trained_length

    file = open_cnl(args.model)
    weights = sum(entry[0].nbytes for entry in file.engine_tensors().values())
    plan = make_plan(file.config, weights, context=args.ctx, kv_type=args.kv, sequences=args.sequences)
    positions = f"{plan.sequences} x {plan.context}" if plan.sequences > 1 else str(plan.context)
    source = tr(plan.available.source, "空闲内存" if plan.available.source == "free memory" else "cgroup 限制")
    rows = [
        (
            tr("weights", "权重"),
            plan.weights,
            tr(
                f"{file.quantization.get('scheme', '')}; in the file's map, or once in large pages (--weights)",
                f"{file.quantization.get('scheme', '')}；在文件映射中，或移入大页，只占一份（--weights）",
            ),
        ),
        (
            tr("cache", "缓存"),
            plan.kv,
            tr(
                f"{positions} positions, {plan.kv_per_token:,} bytes each, {plan.kv_type}",
                f"{positions} 个位置，每个 {plan.kv_per_token:,} 字节，{plan.kv_type}",
            ),
        ),
        (tr("buffers", "缓冲区"), plan.scratch, ""),
        (tr("process", "进程"), PROCESS_BYTES, ""),
        (tr("needed", "需要"), plan.total, ""),
        (tr("available", "可用"), plan.available.bytes, source),
    ]
    for name, size, note in rows:
        show(f"{name:<12}{_size(size):>12}  {note}".rstrip())
    print(tr("it fits", "放得下") if plan.fits else tr("it does not fit", "放不下"))
    for kv_type in KV_TYPES:
        other = make_plan(file.config, weights, kv_type=kv_type, sequences=args.sequences, available=plan.available)
        print(
            tr(
                f"largest context with {kv_type}: {other.fitting_context}",
                f"{kv_type} 时最大上下文：{other.fitting_context}",
            )
        )
    trained = trained_length(file.config)
    print(tr(f"trained for {trained} positions", f"训练长度为 {trained}"))
    return 0 if plan.fits else DOES_NOT_FIT


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 30 else f"{count / 2**20:.2f} MiB"
