# SPDX-License-Identifier: Apache-2.0
"""A table of eval/table.py as Markdown and as a picture, both from its JSON alone."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from cnllama.eval.table import OURS, REFERENCE, RIVAL

Row = dict[str, Any]

_COLUMNS = (
    "form", "file, MB", "bits per weight", "in the layers", "embeddings / output", "perplexity per token",
    "per character", "change", "KL, mean", "median", "99 %", "same top token",
)  # fmt: skip
_SPEEDS = ("prefill, tokens/s", "decode, tokens/s")


def markdown(result: dict[str, Any]) -> str:
    """The report: what was measured on what, a row for each form, and how 4 bits stand beside 4 bits."""
    head = [
        f"# {result['model']} in every form",
        "",
        f"{result['parameters']:,} weights, vocabulary {result['vocab_size']:,}. Text: {result['text']}, "
        f"{result['characters']:,} characters, {result['tokens']:,} tokens, context {result['context']}, stride "
        f"{result['stride']}. KL(fp32 ‖ form) in nats per token, mean with its standard error. Bits per weight: the "
        "bytes of all tensors, and of the layers' matrices alone.",
        "",
        f"{result['cpu']}, {result['isa']}, threads: {result['threads']}"
        + (f"; llama-cpp-python {result['llama_cpp']}" if result.get("llama_cpp") else "")
        + f"; cnllama {result['cnllama']}.",
        "",
        "```",
        str(result["command"]),
        "```",
        "",
        "",
    ]
    parts = ["\n".join(head) + table(result["rows"]), comparison(result["rows"])]
    return "\n\n".join(filter(None, parts)) + "\n"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; columns for speeds where they were measured."""
    timed = any("prefill" in row for row in rows)
    lines = [[*_COLUMNS, *_SPEEDS * timed]]
    lines.append(["---"] * len(lines[0]))
    lines += [_cells(row, timed) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row, timed: bool) -> list[str]:
    name = row["name"] if row["program"] == REFERENCE else f"{row['program']} {row['name']}"
    cells = [
        name,
        f"{row['bytes'] / 1e6:,.2f}",
        f"{row['bits_per_weight']:.3f}",
        f"{row['layer_bits_per_weight']:.3f}",
    ]
    outer = [row.get("embeddings"), row.get("output")]
    cells.append(" / ".join(dict.fromkeys(filter(None, outer))))
    cells += [f"{row['perplexity_per_token']:.3f}", f"{row['perplexity_per_character']:.3f}"]
    if row["program"] == REFERENCE:
        cells += [""] * 5
    else:
        cells.append(f"{row['perplexity_change']:+.2%}")
        cells.append(f"{row['kl_mean']:.6f} ±{row['kl_mean_standard_error']:.6f}")
        cells += [f"{row['kl_median']:.6f}", f"{row['kl_p99']:.5f}", f"{row['top1_agreement']:.2%}"]
    for kind in ("prefill", "decode") if timed else ():
        cells.append(_rate(row[kind]) if kind in row else "")
    return cells


def _rate(found: dict[str, float]) -> str:
    return f"{found['tokens_per_s']:,.0f} ({found['tokens_per_s_min']:,.0f}-{found['tokens_per_s_max']:,.0f})"


def comparison(rows: Sequence[Row]) -> str:
    """The mean KL of every 4-bit form of ours relative to each of llama.cpp's 4-bit types, as Markdown; "" without."""
    ours = [row for row in rows if row["program"] == OURS and row["kind"].startswith("q4-")]
    theirs = [row for row in rows if row["program"] == RIVAL and "Q4_" in row["kind"]]
    if not ours or not theirs:
        return ""
    lines = [["mean KL of", *(f"beside {_with_bits(row)}" for row in theirs)], ["---"] * (len(theirs) + 1)]
    for row in ours:
        ratios = [row["kl_mean"] / other["kl_mean"] - 1 for other in theirs]
        lines.append([_with_bits(row), *(f"{ratio:+.0%}" for ratio in ratios)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _with_bits(row: Row) -> str:
    return f"{row['name']} ({row['bits_per_weight']:.2f} bits, {row['layer_bits_per_weight']:.2f} in the layers)"


def picture(result: dict[str, Any]) -> bytes:
    """A PNG: KL on a logarithmic scale against the bits of all weights, and of the layers' alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    panels = (("bits_per_weight", "bits per weight, all tensors"), ("layer_bits_per_weight", "in the layers' matrices"))
    for axis, (key, label) in zip(axes, panels, strict=True):
        for title, rows, color, marker in _series(result["rows"]):
            bits, kl = [row[key] for row in rows], [max(row["kl_mean"], 1e-9) for row in rows]
            errors = [row["kl_mean_standard_error"] for row in rows]
            axis.errorbar(bits, kl, errors, fmt=marker, color=color, label=title, markersize=5, capsize=2)
            ours = rows[0]["program"] == OURS  # their names stand on the other side of the points
            style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 6.5, "color": color, "va": "center"}
            style |= {"ha": "right" if ours else "left", "xytext": (-5 if ours else 5, 0)}
            for row, x, y in zip(rows, bits, kl, strict=True):
                axis.annotate(row["name"].replace(f" {row['quantizer']}", ""), (x, y), **style)
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.margins(x=0.14)
    axes[0].set_ylabel("KL(fp32 ‖ form), nats per token")
    axes[0].legend(fontsize=8)
    # No names here: they may be Chinese, which the usual font lacks.
    figure.suptitle(f"{result['parameters']:,} weights, {result['tokens']:,} tokens of text", fontsize=10)
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, dpi=130, format="png")
    pyplot.close(figure)
    return data.getvalue()


def _series(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row], str, str]]:
    """(title, rows, colour, marker) of ours by quantizer, then of llama.cpp's; unquantized files are left out."""
    colors = iter(("#c0392b", "#2471a3", "#229954", "#af7ac5"))
    quantized = [row for row in rows if row["program"] == OURS]
    for quantizer in dict.fromkeys(row["quantizer"] for row in quantized):
        chosen = [row for row in quantized if row["quantizer"] == quantizer]
        yield f"{OURS} {quantizer}", chosen, next(colors, "#000000"), "o"
    theirs = [row for row in rows if row["program"] == RIVAL and row["bits_per_weight"] < 16]
    if theirs:
        yield RIVAL, theirs, "#7f8c8d", "s"
