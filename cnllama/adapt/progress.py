# SPDX-License-Identifier: Apache-2.0
"""What a user sees of training, and what is kept of it: a bar and a JSONL log."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from cnllama.errors import printable
from cnllama.files import append, write_file
from cnllama.ownership import OwnedDirectory
from cnllama.paths import exists, read_bytes

LOG = "log.jsonl"
_MAX_LOG = 1 << 30


class Progress(TrainerCallback):
    """A bar with loss, tokens per second and time left on a terminal, a line at each evaluation anywhere."""

    def __init__(self, label: str) -> None:
        self._label, self._bar = label, None
        self._started = self._tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begins at the step that a resumed run had reached."""
        from tqdm import tqdm

        self._started, self._tokens = time.monotonic(), state.num_input_tokens_seen
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=printable(self._label),
                unit="step",
                disable=not sys.stderr.isatty(),
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Shows the newest numbers."""
        if self._bar is None or not logs:
            return
        if "loss" in logs:
            rate = (state.num_input_tokens_seen - self._tokens) / max(1e-9, time.monotonic() - self._started)
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}, {rate:,.0f} tokens/s", refresh=False)
        if "eval_loss" in logs:
            line = (
                f"{self._label}: step {state.global_step} of {state.max_steps}, held-out loss {logs['eval_loss']:.4f}"
            )
            self._bar.write(line, file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()


class JsonLog(TrainerCallback):
    """log.jsonl: {"step", "epoch", "tokens", "seconds", "loss", "lr", "grad_norm"} or "eval_loss" a line.

    seconds counts training over all runs. A run that goes on removes the lines that it is about to write again.
    """

    def __init__(self, directory: Path, own: OwnedDirectory | None) -> None:
        self._path, self._own = directory / LOG, own
        self._before, self._started = 0.0, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Cuts the log at the step that training goes on from."""
        if self._own is None:
            return
        kept = [record for record in read_records(self._path) if record["step"] <= state.global_step]
        if not state.global_step:
            kept = []
        write_file(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._own.let_grow(LOG)
        self._before = max((record.get("seconds", 0.0) for record in kept), default=0.0)
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, earlier runs included."""
        return self._before + time.monotonic() - self._started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Appends a line."""
        logs = logs or {}
        if self._own is None or not {"loss", "eval_loss"} & set(logs):
            return
        record = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        record |= {"tokens": state.num_input_tokens_seen, "seconds": round(self.seconds, 2)}
        for name, given in (("loss", "loss"), ("lr", "learning_rate"), ("grad_norm", "grad_norm")):
            if given in logs:
                record[name] = logs[given]
        if "eval_loss" in logs:
            record["eval_loss"] = logs["eval_loss"]
        append(self._path, json.dumps(record).encode() + b"\n")


def quiet() -> None:
    """Silences transformers: what a user should know, we say."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Lines of a log that are whole."""
    records = []
    for line in read_bytes(path, _MAX_LOG).splitlines() if exists(path) else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the process was killed while it wrote
        if isinstance(record, dict) and isinstance(record.get("step"), int) and all(map(_is_number, record.values())):
            records.append(record)
    return records


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
