# SPDX-License-Identifier: Apache-2.0
"""What bench/compare.py found, as Markdown and as a picture. Both are made from its JSON alone."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import machine

from cnllama.bench import spread

OURS, RIVAL = "cnllama", "llama.cpp"
LIMITS = {"int8_macs_per_s": ("int8 peak", "G/s"), "read_bytes_per_s": ("read bandwidth", "GB/s")}


def markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    parts = [head(result)]
    if result["start"]:
        parts.append(start_table(result))
    parts += [measure_table(result, entry) for entry in result["measures"]]
    skipped = [f"* {s['name']}{': ' + s['measure'] if s['measure'] else ''}: {s['reason']}" for s in result["skipped"]]
    if skipped:
        parts.append("## Skipped\n\n" + "\n".join(skipped))
    return "\n\n".join(parts) + "\n"


def head(result: dict[str, Any]) -> str:
    """The machine and what each row is."""
    rows = [
        [
            e["name"],
            e["version"] or "",
            e["settings"] or "",
            f"{e['file_bytes'] / 1e9:.2f}",
            _optional(e["chars_per_token"], "{:.2f}"),
        ]
        for e in result["engines"]
    ]
    text = result["settings"]["text_characters"]
    return "\n".join(
        [
            "# Engines side by side",
            "",
            *machine.lines(result["machine"], result["limits"]),
            f"* Chinese characters per token: of each engine's own tokenizer on {text} characters of text",
            "",
            _table(["engine", "version", "settings", "file, GB", "characters/token"], rows),
        ]
    )


def start_table(result: dict[str, Any]) -> str:
    """Loading, first token and memory."""
    prompt, memory_prompt = result["settings"]["first_prompt"], result["settings"]["memory_prompt"]
    rows = []
    for r in result["start"]:
        memory = r["memory"] or {}
        rows.append(
            [
                r["engine"],
                spread(r["load_s"], 2),
                spread(r["open_to_first_s"], 2),
                spread(r["process_to_first_s"], 2),
                _optional(memory.get("peak"), "{:.0f}", 2**20),
                _optional(memory.get("besides"), "{:.0f}", 2**20),
                _optional(r["divergence"], "{:.2g}"),
            ]
        )
    names = ["engine", "load, s", "open to first token, s", "process start to first token, s", "peak memory, MiB"]
    names += ["besides mapped file and cache, MiB", f"KL from {OURS}"]
    return (
        f"## Start\n\nFile in the page cache, prompt of {prompt} tokens; memory after a prompt of {memory_prompt}. "
        "Every engine starts alone, in a Python process that imports its binding.\n\n" + _table(names, rows)
    )


def measure_table(result: dict[str, Any], entry: dict[str, Any]) -> str:
    """One measure over all engines."""
    limit, unit = LIMITS[entry["limit"]]
    measured = [value for row in entry["results"] for value in row["limits"]]
    rounds = max((len(row["seconds"]) for row in entry["results"]), default=0)
    rows = []
    for r in entry["results"]:
        ratio = r["ours_to_this"]
        rows.append(
            [
                r["engine"],
                f"{r['tokens_per_s']:.2f} ({r['tokens_per_s_min']:.2f}-{r['tokens_per_s_max']:.2f})",
                _optional(r["chars_per_s"], "{:.1f}"),
                f"{r['share']:.0%} ({r['share_min']:.0%}-{r['share_max']:.0%})",
                f"{r['against']} is {ratio:.2f}x ({r['ours_to_this_min']:.2f}-{r['ours_to_this_max']:.2f})"
                if ratio
                else "",
            ]
        )
    text = f"## {entry['measure'].capitalize()}\n\n"
    if not entry["results"]:
        return text + "No engine could be measured."
    if measured:
        median = statistics.median(measured) / 1e9
        text += f"Up to {rounds} interleaved rounds; {limit} measured between them: {median:.1f} {unit}.\n\n"
    text += _table(["engine", "tokens/s", "Chinese characters/s", f"of the {limit}", "compared"], rows)
    best = best_rival(entry)
    if best is not None:
        ratio = f"{best['against']} is **{best['ours_to_this']:.2f}x**"
        text += f"\n\nAgainst the best {RIVAL} configuration, {best['engine']}: {ratio}."
    return text


def best_rival(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest row of llama.cpp in a measure that ours can be compared with."""
    rows = [r for r in entry["results"] if r["engine"].startswith(RIVAL) and r["ours_to_this"]]
    rows = [r for r in rows if r["against"] == OURS] or rows
    return max(rows, key=lambda r: r["tokens_per_s"], default=None)


def picture(result: dict[str, Any], path: Path) -> None:
    """Bars with spread, one panel for each measure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [entry for entry in result["measures"] if entry["results"]]
    bars = max((len(entry["results"]) for entry in entries), default=1)
    columns = min(3, max(1, len(entries)))
    lines = max(1, -(-len(entries) // columns))
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.5 * columns, (1 + 0.35 * bars) * lines), squeeze=False)
    for axis in axes.flat[len(entries) :]:
        axis.set_visible(False)
    for axis, entry in zip(axes.flat, entries, strict=False):
        rows = entry["results"][::-1]
        rates = [r["tokens_per_s"] for r in rows]
        low = [r["tokens_per_s"] - r["tokens_per_s_min"] for r in rows]
        high = [r["tokens_per_s_max"] - r["tokens_per_s"] for r in rows]
        colors = ["#c0392b" if r["engine"].startswith(OURS) else "#7f8c8d" for r in rows]
        axis.barh([r["engine"] for r in rows], rates, xerr=[low, high], color=colors, ecolor="#2c3e50", capsize=2)
        axis.set_title(f"{entry['measure']}, tokens/s", fontsize=10)
        axis.tick_params(labelsize=8)
        for place, r in enumerate(rows):
            text = f"  {r['tokens_per_s']:.1f} · {r['share']:.0%}"
            axis.annotate(text, (r["tokens_per_s_max"], place), fontsize=7, va="center")
        axis.margins(x=0.3)
    figure.suptitle(f"{result['machine']['cpu']}, {result['machine']['threads']} threads; % of the machine's limit")
    figure.tight_layout()
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=130, format="png")
    part.replace(path)
    pyplot.close(figure)


def _optional(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit)


def _table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
