# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with our data order, our adapter files and a stop at the first loss that is not a number."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer

from cnllama.adapt.lora import WEIGHTS, Trained, adapter_config, adapter_tensors, load_adapter, save_adapter
from cnllama.adapt.schedule import rate, warmup_steps
from cnllama.errors import CnllamaError
from cnllama.files import write_file
from cnllama.paths import exists

Batch = dict[str, Any]
BAD_BATCH = "bad_batch.json"
_SHOWN_IDS = 64


@dataclass(frozen=True)
class LossSum:
    """Losses since the last line of the log, summed in each process, and the step of that line."""

    sums: list[float]
    last_logged: int


class Ordered(Dataset[Batch]):
    """A data set of data.py whose items know their index; the trainer's epochs choose its order."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Batch:
        return {**self._data[index], "index": index}

    def set_epoch(self, epoch: int) -> None:
        """Reshuffles, once for an epoch."""
        if self._data.epoch != epoch:
            self._data.set_epoch(epoch)


class Collator:
    """Items to a batch, with their indices; `pad` makes the batch of items of different lengths."""

    def __init__(self, pad: Callable[[Sequence[Mapping[str, Any]]], Batch] | None = None) -> None:
        self._pad = pad

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> Batch:
        """int64 tensors [batch, length]; index int64 [batch]."""
        index = torch.tensor([item["index"] for item in items])
        if self._pad is not None:
            return {**self._pad(items), "index": index}
        names = [name for name in items[0] if name != "index"]
        return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in names} | {"index": index}


class AdaptTrainer(Trainer):
    """trained: what is saved; describe: ids -> their text, for the report of a bad batch, which goes into `out`.

    warmup, schedule: see schedule.py. out: the result's directory, None in processes that do not write there.
    """

    def __init__(
        self,
        *args: Any,
        trained: Trained,
        base: str,
        describe: Callable[[list[int]], str],
        warmup: float,
        schedule: str,
        out: Path | None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._trained, self._base, self._describe = trained, base, describe
        self._warmup, self._schedule, self._out = warmup, schedule, out
        self._index: list[int] = []
        self._carried: LossSum | None = None
        self.loss_sum = LossSum([0.0], 0)

    def carry(self, loss: LossSum) -> None:
        """Begins with what a stopped run had not logged yet, so that the log is that of a run that never stopped."""
        self._carried = loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of schedule.py; every step has a rate."""
        scheduler: Any = getattr(self, "lr_scheduler", None)
        if scheduler is None:
            warmup = warmup_steps(self._warmup, num_training_steps)
            scheduler = self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda done: rate(done + 1, num_training_steps, warmup, self._schedule),
            )
            self._created_lr_scheduler = True
        return scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """The data set is shuffled already, so that (epoch, index) is a position to come back to."""
        return SequentialSampler(self.train_dataset)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the last batch: a held-out set may be smaller than one."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, without the indices, which are no input of the model."""
        index = inputs.pop("index", None)
        self._index = [] if index is None else index.tolist()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch forwards and backwards. Raises CnllamaError for a loss that is not finite, naming the batch."""
        if self._carried is not None:
            rank = self.args.process_index
            self._tr_loss += self._carried.sums[rank] if rank < len(self._carried.sums) else 0.0
            self._globalstep_last_logged = self._carried.last_logged
            self._carried = None
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            self._refuse_batch(float(loss), inputs)
        return loss

    def _refuse_batch(self, loss: float, inputs: Batch) -> None:
        ids = inputs["input_ids"].tolist()
        epoch, step = int(self.state.epoch or 0), self.state.global_step + 1
        record = {"step": step, "epoch": epoch, "loss": str(loss), "items": self._index, "input_ids": ids}
        file = Path(self.args.output_dir) / f"bad_batch-{self.args.process_index}.json"
        if self._out is not None:
            file = self._out / BAD_BATCH
        write_file(file, json.dumps(record).encode() + b"\n")
        text = self._describe(ids[0][:_SHOWN_IDS])
        items = ", ".join(map(str, self._index[:8])) + (", ..." if len(self._index) > 8 else "")
        raise CnllamaError(
            f"the loss is {loss} at step {step}, expected a finite number; the batch is items {items} of epoch "
            f"{epoch}, the first begins {text!r:.60} (all of it is in {file}); lower --lr, or begin from a sound model"
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, and then the processes meet: what comes after it moves what all of them have written."""
        super()._save_checkpoint(*args, **kwargs)
        sums = self.accelerator.gather(self._tr_loss.reshape(1))
        self.loss_sum = LossSum(sums.tolist(), self._globalstep_last_logged)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        if self._trained.mode == "full":
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            save_adapter(directory, adapter_tensors(self.model, state_dict), adapter_config(self._trained, self._base))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        directory = Path(resume_from_checkpoint)
        if self._trained.mode == "full" or not exists(directory / WEIGHTS) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter(self.model if model is None else model, directory)
