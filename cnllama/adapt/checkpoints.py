# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: written by the training library in a scratch directory, there in one step, removed when old."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from cnllama.adapt.batches import Order
from cnllama.container import is_count, read_json
from cnllama.errors import CnllamaError, InputError
from cnllama.files import write_json
from cnllama.ownership import OwnedDirectory
from cnllama.paths import is_file, is_link
from cnllama.stdio import say

MARK = "complete.json"
LEFT = ("training_args.bin",)  # of no use to anybody without the process that wrote it
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE = r"optimizer\.(pt|bin)|(scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|trainer_state\.json|training_args\.bin"
_WEIGHTS = (
    r"(config|generation_config|adapter_config)\.json|adapter_model\.safetensors|model\.safetensors\.index\.json"
    r"|model(-\d+-of-\d+)?\.safetensors"
)
_ENGINES = (
    r"(global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+)(/.+)?|latest|zero_to_fp32\.py|pytorch_model_fsdp\.bin"
)
_HALF = r"\.tmp[0-9A-Za-z]{6}"  # what safetensors writes before it has its name
# What transformers, safetensors, DeepSpeed and FSDP call the files that they write in a scratch directory.
SCRATCH_FILES = re.compile(
    rf"(checkpoint-\d+|model)(/({_STATE}|{_WEIGHTS}|{_HALF}|{_ENGINES}|{re.escape(MARK)}))?|bad_batch-\d+\.json",
    re.DOTALL,
)


def scratch_directory(out: Path) -> Path:
    """Where the training library writes; all processes of a run share it."""
    return out / OwnedDirectory.SCRATCH


class Checkpoints(TrainerCallback):
    """Checks every checkpoint by reading it back, gives it its name when it is whole, then removes the oldest.

    own: the result's directory, None in processes that do not write. check: directory -> None, raises when what was
    saved is not what was trained. order: of the run's steps. more: what else to keep.
    """

    def __init__(
        self,
        own: OwnedDirectory | None,
        *,
        keep: int,
        order: Order,
        check: Callable[[Path], None],
        more: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._own, self._keep, self._check, self._more = own, keep, check, more
        self._order = order

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After all processes have written their part."""
        if self._own is None:
            return
        directory = scratch_directory(self._own.path) / f"checkpoint-{state.global_step}"
        self._check(directory)
        epoch, step = self._order.position(state.global_step)[:2]
        sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if is_file(path)}
        position = {"epoch": epoch, "index": step * self._order.split.items}
        mark = {"step": state.global_step, "data_position": position, "files": sizes}
        write_json(directory / MARK, mark | self._more())
        self._own.publish(directory, directory.name)
        for old in complete_checkpoints(self._own)[: -self._keep]:
            drop(self._own, old.name)


def drop(own: OwnedDirectory, name: str) -> None:
    """Removes a checkpoint, unless there is something in it that is not ours: that is no reason to stop training."""
    try:
        own.remove(name)
    except InputError as error:
        say(f"warning: a checkpoint stays: {error}")


def complete_checkpoints(own: OwnedDirectory) -> list[Path]:
    """Checkpoints of this directory's runs that still have all their files, oldest first."""
    found = []
    for name in own.directories():
        path = own.path / name
        if not _CHECKPOINT.fullmatch(name) or is_link(path):
            continue
        try:
            mark = read_json(path / MARK, names=True)
            sizes = mark["files"]
            whole = is_count(mark["step"]) and all((path / n).stat().st_size == size for n, size in sizes.items())
        except (OSError, CnllamaError, KeyError, TypeError, ValueError, AttributeError):
            continue
        if whole:
            found.append((int(mark["step"]), path))
    return [path for _, path in sorted(found)]


def discard_incomplete(own: OwnedDirectory) -> None:
    """Removes what a killed process left of checkpoints. Raises InputError, before anything, for what is foreign."""
    whole = {path.name for path in complete_checkpoints(own)}
    broken = [name for name in own.directories() if _CHECKPOINT.fullmatch(name) and name not in whole]
    for name in broken:
        own.refuse_strangers(name)
    for name in broken:
        own.remove(name)
