# SPDX-License-Identifier: Apache-2.0
"""Every combination of stage, types and options: one step of each, compared with the reference. Prints the table.

python tests/adapt_matrix.py            trains and compares every cell, with one and with two processes
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

import adapt_data  # noqa: E402
import models  # noqa: E402
import torch  # noqa: E402
import training_reference as reference  # noqa: E402

STAGES = {
    "stage 1": ("pretrain", "--stage", "1"),
    "stage 2": ("pretrain",),
    "sft": ("sft",),
    "sft --pack": ("sft", "--pack"),
    "full": ("pretrain", "--full"),
    "sft --full": ("sft", "--full"),
    "sft --full --pack": ("sft", "--full", "--pack"),
}
TYPES = [(dtype, bf16) for dtype in ("float32", "bfloat16", "float16") for bf16 in (False, True)]
OLD_ROWS = 300
OPTIONS = {
    "plain": (),
    "checkpointing": ("--gradient-checkpointing",),
    "new rows": ("--train-new-rows-only", str(OLD_ROWS)),
    "accumulation": ("--grad-accum", "2"),
}
BATCH, LR = 4, 1e-3
LENGTHS = {"pretrain": 64, "sft": 640}
EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Cell:
    """One run."""

    stage: str
    dtype: str
    bf16: bool
    option: str
    processes: int = 1

    def __str__(self) -> str:
        autocast = " --bf16" if self.bf16 else ""
        return f"{self.stage}, {self.dtype}{autocast}, {self.option}, {self.processes} processes"

    @property
    def name(self) -> str:
        """For a directory."""
        return "".join(c if c.isalnum() else "-" for c in str(self))

    @property
    def possible(self) -> bool:
        """--full has nothing that could be kept in 16 bits, and no old rows."""
        return "full" not in self.stage or (self.dtype == "float32" and self.option != "new rows")

    def words(self, place: Path) -> list[str]:
        """The command line; a step has BATCH sequences however they are divided."""
        verb, *more = STAGES[self.stage]
        data = place / "data" / ("zh.txt" if verb == "pretrain" else "sft.jsonl")
        divided = self.processes * (2 if self.option == "accumulation" else 1)
        words = ["adapt", verb, place / "base", "-o", place / self.name, "--data", data, *more, *OPTIONS[self.option]]
        words += ["--max-steps", 1, "--batch-size", BATCH // divided, "--block-size", LENGTHS[verb], "--lr", LR]
        words += ["--save-every", 0, "--warmup", 0, "--dropout", 0, "--dtype", self.dtype, "--cache", place / "tokens"]
        return [*map(str, words), *(["--bf16"] if self.bf16 else [])]


def all_cells(processes: Iterable[int] = (1, 2)) -> list[Cell]:
    """Every combination that is possible."""
    cells = [
        Cell(stage, dtype, bf16, option, count)
        for count in processes
        for stage in STAGES
        for dtype, bf16 in TYPES
        for option in OPTIONS
    ]
    return [cell for cell in cells if cell.possible]


def some_cells(processes: int) -> list[Cell]:
    """Of every stage with every type, one option in turn: a diagonal of the matrix."""
    whole = all_cells([processes])
    found = []
    for i, stage in enumerate(STAGES):
        for j, (dtype, bf16) in enumerate(TYPES):
            row = [cell for cell in whole if (cell.stage, cell.dtype, cell.bf16) == (stage, dtype, bf16)]
            found += row[(i + j + processes) % len(row) :][:1] if row else []
    return found


def write_place(place: Path) -> Path:
    """A base in float32 whose values are not those of any 16-bit type, and the data."""
    data = adapt_data.write_data(place / "data")
    tokenizer = models.train_tokenizer((data / "zh.txt").read_text().splitlines(), 340)
    config = models.small_config(models.piece_count(tokenizer), hidden_size=32, intermediate_size=48)
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    models.make_llama(place / "base", tokenizer, tensors=models.random_tensors(config), dtype="float32", **config)
    return place


def inside(words: Sequence[str]) -> None:
    """Runs the command line in this process; without the picture, which takes as long as the rest."""
    from unittest.mock import patch

    from cnllama.cli.main import main

    torch.set_num_threads(1)
    written = io.StringIO()
    with (
        contextlib.redirect_stderr(written),
        contextlib.redirect_stdout(io.StringIO()),
        patch("cnllama.adapt.train.loss_curve"),
    ):
        code = main(list(words))
    if code:
        raise AssertionError(f"{' '.join(words)}\n{written.getvalue()}")


def launch(place: Path, commands: Sequence[Sequence[object]]) -> None:
    """Runs command lines, one after the other, in the two processes of one torchrun, which run `worker`."""
    from test_adapt_pipeline import free_port

    listed = place / "commands.json"
    listed.write_text(json.dumps([[str(word) for word in words] for words in commands]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), __file__, str(listed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]


def worker(listed: Path) -> None:
    """One of the processes of `launch`."""
    for words in json.loads(listed.read_text()):
        inside(words)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@cache
def samples(place: Path, verb: str) -> list[reference.Sample]:
    """The first BATCH items of the first epoch, samples of packed blocks one by one."""
    from cnllama.adapt.data import Source, prepare_chat, prepare_text
    from cnllama.adapt.tokenfile import open_vocabulary

    vocabulary = open_vocabulary(place / "base")
    if verb == "pretrain":
        data: Any = prepare_text(
            [Source(place / "data/zh.txt")], vocabulary, place / "tokens", block_size=LENGTHS[verb]
        )
        items = [data[i] for i in range(BATCH)]
        return [(item["input_ids"].tolist(), item["labels"].tolist()) for item in items]
    sources, step_items = [Source(place / "data/sft.jsonl")], 0 if verb == "sft --pack" else BATCH
    chat = prepare_chat(sources, vocabulary, place / "tokens", max_length=LENGTHS["sft"], step_items=step_items)
    if verb == "sft":
        return [(chat[i]["input_ids"].tolist(), chat[i]["labels"].tolist()) for i in range(BATCH)]
    from cnllama.adapt.datasets import PackedChat

    packed = PackedChat(chat, LENGTHS["sft"], vocabulary.pad_id)
    return [sample for i in range(BATCH) for sample in unpacked(packed[i])]


def unpacked(block: dict[str, Any]) -> list[reference.Sample]:
    """The samples of a block, by the positions, which begin again at each."""
    starts = [i for i, position in enumerate(block["position_ids"].tolist()) if position == 0]
    ids, labels = block["input_ids"].tolist(), block["labels"].tolist()
    return [(ids[a:b], labels[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


@cache
def lora_at_first(place: Path) -> dict[str, torch.Tensor]:
    """The matrices A that a stage begins with: those it saves after a step that is too small to change them."""
    out = place / "first"
    words = replace(Cell("stage 2", "float32", False, "plain")).words(place)
    words[words.index("-o") + 1] = str(out)
    words[words.index("--lr") + 1] = "1e-12"
    inside(words)
    return {name: value for name, value in saved(out).items() if "lora_A" in name}


def saved(out: Path) -> dict[str, torch.Tensor]:
    """What a run saved, by the names of the model."""
    from safetensors.torch import load_file

    file = next(path for path in (out / "adapter_model.safetensors", out / "model.safetensors") if path.exists())
    return {name.removeprefix("base_model.model."): value for name, value in load_file(file).items()}


@cache
def expected(place: Path, stage: str, old_rows: int, frozen: str) -> reference.Run:
    """What the reference makes of a cell."""
    verb = "pretrain" if STAGES[stage][0] == "pretrain" else "sft --pack" if "--pack" in stage else "sft"
    mode = "full" if "full" in stage else "embeddings" if stage == "stage 1" else "lora"
    config, base = reference.read_weights(place / "base")
    recipe = reference.Recipe(mode, LR, 1, old_rows=old_rows, frozen=getattr(torch, frozen))
    lora = lora_at_first(place) if mode == "lora" else None
    return reference.train(config, base, [samples(place, verb)], recipe, lora)


@dataclass(frozen=True)
class Difference:
    """Of a cell from the reference, relative: of the loss, of the norm of the gradient, of the update.

    begun: how far a trained value lies outside of what one step can reach from the checkpoint's float32 value.
    old: values that were not trained and are not those of the checkpoint, bit for bit.
    """

    loss: float
    norm: float
    update: float
    begun: float
    old: int


def compare(place: Path, cell: Cell, frozen: str | None = None) -> Difference:
    """frozen: the type that the reference rounds what does not train to, the cell's own if None."""
    out = place / cell.name
    (record,) = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    old_rows = OLD_ROWS if cell.option == "new rows" else 0
    run = expected(place, cell.stage, old_rows, frozen or cell.dtype)
    found = saved(out)
    _, base = reference.read_weights(place / "base")
    before = base | {name: value.double() for name, value in lora_at_first(place).items()}
    reached = 0.0
    for name, value in found.items():
        start = before.get(name, torch.zeros_like(value, dtype=torch.float64))
        slack = LR * (1 + 0.01 * start.abs()) + 2.0**-23 * start.abs()
        reached = max(reached, float(((value.double() - start).abs() - slack).max()))
    untouched = sum(
        int((found[name][:old_rows] != base[name][:old_rows].float()).sum())
        for name in (reference.EMBED, reference.HEAD)
    )
    return Difference(
        abs(record["loss"] / run.losses[0] - 1),
        abs(record["grad_norm"] / run.norms[0] - 1),
        reference.update_error(found, run.weights, before),
        reached,
        untouched,
    )


def wrong(place: Path, cell: Cell) -> str | None:
    """What is outside of the cell's precision, or None.

    Products in float32 are held to float32, with the frozen weights rounded; in bfloat16 to bfloat16. AdamW's first
    step is the sign of the gradient, so the update of a bfloat16 product differs where the gradient is near zero.
    """
    found = compare(place, cell)
    limits = (1e-3, 5e-3, 0.2) if cell.bf16 else (1e-6, 1e-5, 2e-3)
    checks: list[tuple[str, float, float]] = [
        ("loss", found.loss, limits[0]),
        ("gradient", found.norm, limits[1]),
        ("update", found.update, limits[2]),
        ("values outside of one step", found.begun, 1e-9),
        ("old values changed", found.old, 0),
        ("loss without rounding", compare(place, cell, "float64").loss, max(limits[0], 4 * EPSILON[cell.dtype])),
    ]
    bad = [f"{name} {value:.2g}, at most {limit:.2g}" for name, value, limit in checks if not value <= limit]
    return "; ".join(bad) or None


def table(place: Path, cells: Sequence[Cell], progress: Callable[[str], None] = print) -> int:
    """Prints a line for every cell; returns how many are wrong."""
    heads = f"{'stage':<18} {'dtype':<9} {'products':<9} {'option':<14} {'processes':>9}"
    progress(heads + f" {'loss':>8} {'gradient':>8} {'update':>8}")
    bad = 0
    for cell in cells:
        found, fault = compare(place, cell), wrong(place, cell)
        products = "bfloat16" if cell.bf16 else "float32"
        numbers = f"{found.loss:>8.1e} {found.norm:>8.1e} {found.update:>8.1e}"
        progress(
            f"{cell.stage:<18} {cell.dtype:<9} {products:<9} {cell.option:<14} {cell.processes:>9} {numbers}"
            + (f"  WRONG: {fault}" if fault else "")
        )
        bad += fault is not None
    return bad


def main() -> int:
    """Trains and compares every cell."""
    place = write_place(Path(tempfile.mkdtemp()))
    one, two = all_cells([1]), all_cells([2])
    for cell in one:
        inside(cell.words(place))
    launch(place, [cell.words(place) for cell in two])
    bad = table(place, one + two)
    print(f"{len(one + two)} cells, {bad} wrong")
    return int(bad > 0)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        worker(Path(sys.argv[1]))
    else:
        sys.exit(main())
