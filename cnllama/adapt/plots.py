# SPDX-License-Identifier: Apache-2.0
"""Tables for the terminal and PNG plots: the loss of a training log, the runs of a recipe side by side.

Labels are English: a machine without Chinese fonts would draw boxes.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnllama.errors import InputError, printable
from cnllama.files import write_file
from cnllama.paths import read_bytes

_DPI = 120
_TREND_WINDOWS = 50
_MAX_LOG = 1 << 30


def format_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of aligned text: numbers to the right, floats with four digits, the rest to the left and printable."""
    columns = list(map(printable, columns))
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    right = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        parts = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(columns), "  ".join("-" * width for width in widths), *map(line, cells)])


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return printable(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def read_log(path: Path) -> dict[str, dict[int, float]]:
    """The numbers of a JSONL training log: name -> {step: value}.

    Lines without "step" and a torn last line are passed over; where a resumed run wrote a step again, the later one
    counts. Raises InputError when the file cannot be read.
    """
    series: dict[str, dict[int, float]] = {}
    for line in read_bytes(path, _MAX_LOG).splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(step, int):
            continue
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                series.setdefault(name, {})[step] = float(value)
    return series


def loss_curve(logs: Mapping[str, Path], out: Path, title: str = "Training loss") -> None:
    """Draws "loss" and "eval_loss" of each labelled JSONL log over its steps as a PNG file.

    Raises InputError when no log holds a loss, and when matplotlib is missing.
    """
    series = {label: read_log(path) for label, path in logs.items()}
    if not any("loss" in values or "eval_loss" in values for values in series.values()):
        raise InputError(f"{', '.join(map(str, logs.values()))}: the log holds no loss; train first")
    figure, axes = _figure(1)
    axis = axes[0]
    for number, (label, values) in enumerate(series.items()):
        prefix, color = f"{label}: " if len(series) > 1 else "", f"C{number}"
        loss, held_out = values.get("loss", {}), values.get("eval_loss", {})
        if loss:
            steps = sorted(loss)
            axis.plot(steps, [loss[s] for s in steps], color=color, alpha=0.35, linewidth=0.8)
            axis.plot(steps, _trend([loss[s] for s in steps]), color=color, label=f"{prefix}training")
        if held_out:
            steps = sorted(held_out)
            axis.plot(steps, [held_out[s] for s in steps], "o--", color=color, markersize=4, label=f"{prefix}held out")
    axis.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, out)


def _trend(values: Sequence[float]) -> list[float]:
    """An exponential moving average over a fiftieth of the run, without the bias towards its start."""
    keep = 1 - 1 / max(1.0, len(values) / _TREND_WINDOWS)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def comparison_plot(rows: Sequence[Mapping[str, Any]], x: str, ys: Sequence[str], out: Path, title: str = "") -> None:
    """Draws runs side by side as a PNG file: one panel for each name in `ys`, the value of `x` under each point.

    rows: one mapping for each run; a run that lacks a value has no point in that panel. Raises InputError when there
    are no rows, and when matplotlib is missing.
    """
    if not rows or not ys:
        raise InputError(f"{out}: there are no runs to compare")
    figure, axes = _figure(len(ys))
    labels = [_cell(row[x]) for row in rows]
    for number, (axis, y) in enumerate(zip(axes, ys, strict=True)):
        points = [(i, row[y]) for i, row in enumerate(rows) if isinstance(row.get(y), int | float)]
        axis.plot([i for i, _ in points], [value for _, value in points], "o-", color=f"C{number}")
        for i, value in points:
            axis.annotate(_cell(value), (i, value), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
        axis.set_xticks(range(len(labels)), labels)
        axis.set(xlabel=x, ylabel=y)
        axis.margins(0.15, 0.2)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    save_figure(figure, out)


def encoding_plot(
    names: Sequence[str], per_character: Sequence[float], lengths: Sequence[Sequence[int]], out: Path
) -> None:
    """Draws tokens per character as bars and the distribution of sequence lengths, one colour a tokenizer, as PNG."""
    figure, (bars, histogram) = _figure(2)
    positions = range(len(names))
    colors = [f"C{i}" for i in positions]
    bars.bar(positions, per_character, color=colors)
    for i, value in enumerate(per_character):
        bars.annotate(f"{value:.3f}", (i, value), xytext=(0, 3), textcoords="offset points", ha="center")
    bars.set_xticks(positions, names)
    bars.margins(y=0.1)
    bars.set(ylabel="tokens per character", title="Encoding efficiency")
    edges = _edges(max((max(series, default=1) for series in lengths), default=1))
    for name, series, color in zip(names, lengths, colors, strict=True):
        histogram.hist(series, bins=edges, alpha=0.55, label=name, color=color)
    histogram.set(xlabel="tokens in a line", ylabel="lines", title="Sequence length")
    histogram.legend()
    save_figure(figure, out)


def _edges(longest: int) -> list[float]:
    width = max(1, -(-longest // 40))
    return [i * width + 0.5 for i in range(longest // width + 2)]


def need_matplotlib() -> None:
    """Raises InputError when matplotlib is missing: before the work whose plot it would draw."""
    _figure(1)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure on the Agg canvas, which needs no display, and its axes from left to right."""
    try:
        agg = importlib.import_module("matplotlib.backends.backend_agg")
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise InputError("plots need matplotlib; run: pip install 'cnllama[adapt]'") from None
    figure = figures.Figure(figsize=(7.0 if panels == 1 else 4.8 * panels, 4.2), layout="constrained")
    agg.FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def save_figure(figure: Any, out: Path) -> None:
    """Writes a figure as PNG, under its name only when complete. Raises InputError for a place without write access."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=_DPI)
    write_file(out, data.getvalue())
