# SPDX-License-Identifier: Apache-2.0
"""cnllama bench: how fast a file runs here, and how close that is to what the machine allows."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnllama.arguments import add_comma_option, add_model_file
from cnllama.cli.options import add_weights_option
from cnllama.errors import InputError
from cnllama.resident import resident_memory
from cnllama.stdio import say, show, to_json
from cnllama.textio import tr
from cnllama.weights import describe

if TYPE_CHECKING:
    from cnllama.bench import LLMRunner, Measure

HELP = tr("how fast a file runs here, beside the machine's limits", "测试文件在本机的速度，并与机器上限对比")
ROUNDS, QUICK_ROUNDS = 5, 1
MAX_POSITIONS, MAX_BATCH, MAX_ROUNDS = 1 << 20, 64, 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cnllama bench`."""
    add = parser.add_argument
    text = tr("a .cnl file; default: the bundled model", ".cnl 文件；默认：自带模型")
    add_model_file(parser, "file", text, required=False)
    add_comma_option(
        parser,
        "--prefill",
        default="128,512",
        metavar="N,...",
        help=tr("tokens of the prompts; default: 128,512", "提示的词元数；默认 128,512"),
    )
    add_comma_option(
        parser,
        "--decode",
        default="0,2048",
        metavar="N,...",
        help=tr("tokens before decoding; default: 0,2048", "解码前上下文的词元数；默认 0,2048"),
    )
    add_comma_option(
        parser,
        "--batch",
        default="4,8",
        metavar="N,...",
        help=tr("sequences decoded at once; default: 4,8", "同时解码的序列数；默认 4,8"),
    )
    add("--threads", type=int, default=0, metavar="N", help=tr("0: physical cores", "0：物理核数"))
    add("--kv", default="fp16", metavar="TYPE", help=tr("type of the cache: fp16 or int8", "缓存类型：fp16 或 int8"))
    add_weights_option(parser)
    add("--rounds", type=int, metavar="N", help=tr(f"default: {ROUNDS}", f"默认 {ROUNDS}"))
    add("--quick", action="store_true", help=tr("one short round of each", "每项只测一个短轮次"))
    add("--json", action="store_true", help=tr("one JSON object instead of the table", "输出一个 JSON 对象"))


def run(args: argparse.Namespace) -> int:
    """Prints line by line, or one JSON object. Raises InputError."""
    from cnllama.bench import LLMRunner
    from cnllama.plan import trained_length

    rounds = args.rounds if args.rounds is not None else QUICK_ROUNDS if args.quick else ROUNDS
    if not 1 <= rounds <= MAX_ROUNDS:
        raise InputError(
            tr(
                f"--rounds is {rounds}, expected an integer from 1 to {MAX_ROUNDS}",
                f"--rounds 的值是 {rounds}，应为 1 到 {MAX_ROUNDS} 的整数",
            )
        )
    measures = _measures(args)
    runner = LLMRunner(args.file, threads=args.threads, kv_type=args.kv, weights=args.weights)
    trained = trained_length(runner.llm.file.config)
    too_long = [m for m in measures if m.size > trained]  # speed does not mind the few steps after it
    tell = _quiet if args.json else _show
    head = _head(runner, args.kv)
    tell(_describe(head))
    result = head | {"start": _start(runner, args, rounds)}
    tell(_describe_start(result["start"]))
    result["measures"] = []
    for measure in [m for m in measures if m not in too_long]:
        figures = _run(runner, measure, args, rounds)
        if "memory" not in result:
            result["memory"] = _memory(runner, measure)
        if figures.get("weights") and "weights" not in result:
            result["weights"] = figures["weights"]
            tell(tr("weights: ", "权重：") + describe(figures["weights"]))
        result["measures"].append(figures)
        tell(_describe_measure(measure, figures))
    result["left_out"] = [m.name for m in too_long]
    for name in result["left_out"]:
        tell(tr(f"{name}: left out, the model was made for {trained}", f"{name}：跳过，模型的长度只有 {trained}"))
    if result.get("memory"):
        tell(_describe_memory(result["memory"]))
    runner.close()
    if args.json:
        print(to_json(result))
    return 0


def parse_counts(text: str, option: str, low: int, high: int) -> list[int]:
    """The integers of a comma-separated option. Raises InputError that names the option and the range."""
    counts = []
    for item in filter(None, text.split(",")):
        if not item.strip().isdecimal() or len(item) > 20 or not low <= int(item) <= high:
            raise InputError(
                tr(
                    f"{option} has {item!r:.60}, expected integers from {low} to {high:,}, separated by commas",
                    f"{option} 中有 {item!r:.60}，应为 {low} 到 {high:,} 的整数，以逗号分隔",
                )
            )
        counts.append(int(item))
    return list(dict.fromkeys(counts))


def _measures(args: argparse.Namespace) -> list[Measure]:
    from cnllama.bench import Measure

    prefill = parse_counts(args.prefill, "--prefill", 1, MAX_POSITIONS)
    decode = parse_counts(args.decode, "--decode", 0, MAX_POSITIONS)
    batch = parse_counts(args.batch, "--batch", 1, MAX_BATCH)
    measures = [Measure("prefill", tokens) for tokens in prefill]
    measures += [Measure("decode", context) for context in decode]
    measures += [Measure("decode", 0, batch=size) for size in batch if size > 1]
    if not measures:
        raise InputError(tr("there is nothing to measure: give --prefill, --decode or --batch", "没有要测的项目"))
    return measures


def _head(runner: LLMRunner, kv_type: str) -> dict[str, Any]:
    from cnllama import _core, bench

    llm = runner.llm
    return {
        "file": str(llm.path),
        "size": llm.file.size,
        "scheme": llm.file.quantization.get("scheme"),
        "cpu": _core.cpu_info()["model"],
        "isa": _core.isa(),
        "threads": llm.threads,
        "kv_type": kv_type,
        "chars_per_token": runner.chars_per_token,
        "read_bytes_per_s": bench.read_limit(llm.threads),
        "int8_macs_per_s": bench.peak_limit(llm.threads),
    }


def _start(runner: LLMRunner, args: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """Seconds of loading, and from the start of a process to its first token, the file being in the page cache."""
    from cnllama import bench

    prompt = bench.first_prompt(runner.llm)
    options = ["--kv", args.kv, "--threads", str(args.threads), "--weights", args.weights]
    runner.prepare(0, 2, 1)
    runner.step(bench.token_ids(1, runner.vocab_size))  # one step reads the whole file
    loads = []
    for _ in range(rounds):
        runner.prepare(0, 2, 1)
        loads.append(runner.llm.load_seconds)
    runner.close()
    return {
        "load_s": statistics.median(loads),
        "prompt_tokens": len(runner.llm.prompt_ids(prompt)),
        "first_token_s": [bench.first_token_seconds(runner.llm.path, prompt, options) for _ in range(rounds)],
    }


def _run(runner: LLMRunner, measure: Measure, args: argparse.Namespace, rounds: int) -> dict[str, Any]:
    from cnllama import bench

    seconds = 0.0 if args.quick else bench.MIN_SECONDS
    bench.fill(runner, measure.context, measure.room, measure.batch)

    def once() -> float:
        if measure.kind == "prefill":
            return bench.time_prefill(runner, measure.size, seconds)
        return bench.time_decode(runner, measure.steps, measure.batch, seconds)

    def read() -> float:
        return 1 / float(runner.llm.engine.read_bandwidth())

    limit = bench.limit_of(measure)
    decodes = measure.kind == "decode"
    runs = {"cnllama": once, "weights": read} if decodes else {"cnllama": once}
    samples = bench.interleave(runs, lambda: limit(runner.threads), rounds)
    work = bench.work_of(runner.llm)
    figures = bench.summarize(measure, samples["cnllama"], work, runner.chars_per_token)
    if decodes:  # the same bytes, read where the weights lie
        pairs = zip(samples["cnllama"], samples["weights"], strict=True)
        own = [measure.share(seconds, 1 / of_a_byte, work) for (seconds, _), (of_a_byte, _) in pairs]
        figures["share_of_weights_loop"] = statistics.median(own)
        memory = runner.llm.weight_memory
        figures["weights"] = memory.figures() if memory else None
    return figures


def _memory(runner: LLMRunner, measure: Measure) -> dict[str, int] | None:
    """What this process holds after a measure, as JSON; `besides` is all but the mapped file and the cache in use."""

    found = resident_memory(Path(runner.llm.path), runner.llm.file)
    if found is None:
        return None
    kv = runner.llm.plan.kv_per_token * (measure.context + measure.room) * measure.batch
    return found | {"kv": kv, "besides": max(0, found["resident"] - found["mapped"] - kv)}


def _show(line: str) -> None:
    show(*line.split("\n"))


def _quiet(line: str) -> None:
    if sys.stderr.isatty():
        say(*line.split("\n"))


def _describe(head: dict[str, Any]) -> str:
    size, name = head["size"] / 1e9, Path(head["file"]).name
    bandwidth, peak = head["read_bytes_per_s"] / 1e9, head["int8_macs_per_s"] / 1e9
    return tr(
        f"{name}: {size:.2f} GB, {head['scheme']}; {head['cpu']}, {head['isa']}, {head['threads']} threads\n"
        f"limits: read {bandwidth:.1f} GB/s, int8 {peak:.0f} G multiply-adds/s; "
        f"{head['chars_per_token']:.2f} Chinese characters per token",
        f"{name}：{size:.2f} GB，{head['scheme']}；{head['cpu']}，{head['isa']}，{head['threads']} 线程\n"
        f"上限：读 {bandwidth:.1f} GB/s，int8 每秒 {peak:.0f} G 次乘加；每词元 {head['chars_per_token']:.2f} 个汉字",
    )


def _describe_start(start: dict[str, Any]) -> str:
    from cnllama.bench import spread

    first, load, tokens = spread(start["first_token_s"], 2), start["load_s"], start["prompt_tokens"]
    return tr(
        f"load: {load:.3f} s; process start to first token of a {tokens}-token prompt: {first} s",
        f"加载：{load:.3f} 秒；从进程启动到 {tokens} 词元提示的第一个词元：{first} 秒",
    )


def _describe_measure(measure: Measure, figures: dict[str, Any]) -> str:
    f = figures
    rate = f"{f['tokens_per_s']:.1f} tok/s ({f['tokens_per_s_min']:.1f}-{f['tokens_per_s_max']:.1f})"
    prefill = measure.kind == "prefill"
    limit = tr("int8 peak", "int8 峰值") if prefill else tr("read bandwidth", "读带宽")
    share = tr(f"{f['share']:.0%} of the {limit}", f"{limit}的 {f['share']:.0%}")
    if not prefill:
        own = f["share_of_weights_loop"]
        share += tr(f", {own:.0%} of a loop over the weights", f"，逐字节读权重的 {own:.0%}")
    chars = tr("chars/s", "字/秒")
    return f"{_label(measure):<22} {rate:<32} {f['chars_per_s']:8.1f} {chars}   {share}"


def _label(measure: Measure) -> str:
    if measure.kind == "prefill":
        return tr(measure.name, f"预填充 {measure.size}")
    batch = f"，{measure.batch} 路" if measure.batch > 1 else ""
    return tr(measure.name, f"解码，上文 {measure.size}{batch}")


def _describe_memory(memory: dict[str, int]) -> str:
    mib = {name: size / 2**20 for name, size in memory.items()}
    return tr(
        f"memory: {mib['mapped']:.0f} MiB of the file, {mib['kv']:.0f} MiB of cache, {mib['besides']:.0f} MiB besides",
        f"内存：文件 {mib['mapped']:.0f} MiB，缓存 {mib['kv']:.0f} MiB，其余 {mib['besides']:.0f} MiB",
    )
