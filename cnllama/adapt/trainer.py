# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with our steps, losses and adapter files, and a stop at the first loss that is no number."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader
from transformers import Trainer

from cnllama.adapt.batches import NONE, Batch, Order, Ordered
from cnllama.adapt.datasets import IGNORED
from cnllama.adapt.lora import WEIGHTS, Trained, Values, adapter_config, adapter_tensors, load_adapter, save_adapter
from cnllama.adapt.precision import Precision
from cnllama.adapt.schedule import rate, warmup_steps
from cnllama.errors import CnllamaError
from cnllama.files import write_file
from cnllama.paths import exists

BAD_BATCH = "bad_batch.json"
_SHOWN_IDS = 64


@dataclass(frozen=True)
class LossSum:
    """Losses since the last line of the log, summed in each process, and the step of that line."""

    sums: list[float]
    last_logged: int


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Losses of the tokens that follow, float32 [batch * length], 0 where labels are IGNORED.

    logits: [batch, length, rows] of any float type; labels: int64 [batch, length], not shifted.
    """
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(
        logits.view(-1, logits.shape[-1]).float(), following, ignore_index=IGNORED, reduction="none"
    )


def _learned(labels: torch.Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum())


class AdaptTrainer(Trainer):
    """The loss of a step is that of its mean token, whatever batches and devices it is divided among.

    order: of the training data. held_out: None, or the batches of this device. precision: of both. trained: what is
    saved, rows that did not train as `values` has them. describe: ids -> their text, for the report of a bad batch,
    which goes into `out`: the result's directory, None in processes that do not write there. warmup, schedule: see
    schedule.py.
    """

    def __init__(
        self,
        *args: Any,
        order: Order,
        held_out: tuple[Ordered, Order] | None,
        precision: Precision,
        trained: Trained,
        values: Values,
        base: str,
        describe: Callable[[list[int]], str],
        warmup: float,
        schedule: str,
        out: Path | None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self._order, self._held_out, self._precision = order, held_out, precision
        self._trained, self._values, self._base, self._describe = trained, values, base, describe
        self._warmup, self._schedule, self._out = warmup, schedule, out
        self._sum = torch.zeros(1, device=self.args.device)
        self._last_logged = 0
        self.loss_sum = LossSum([0.0], 0)

    def carry(self, loss: LossSum) -> None:
        """Begins with what a stopped run had not logged yet, so that the log is that of a run that never stopped."""
        rank = self.args.process_index
        self._sum += loss.sums[rank] if rank < len(loss.sums) else 0.0
        self._last_logged = loss.last_logged

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

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """All batches of this device, from the first step to the last: for the Trainer, one epoch."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._order,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator().manual_seed(self.args.seed),  # else it draws from that of dropout
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The batches of a step on this device, and how many tokens the step learns on all of them."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        here = [sum(_learned(batch["labels"]) for batch in batches), sum(int(batch["tokens"]) for batch in batches)]
        learned, seen = self.accelerator.reduce(torch.tensor(here, device=device), "sum")
        self.state.num_input_tokens_seen += int(seen)
        return batches, learned

    def training_step(
        self, model: Any, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One batch forwards and backwards. Raises CnllamaError for a loss that is not finite, naming the batch."""
        model.train()
        losses = self._losses(model, inputs)
        # gradients and logged losses are averaged over the devices
        loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        if not torch.isfinite(loss):
            self._refuse_batch(float(loss), inputs)
        engine = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if engine else {}))
        self._sum += loss.detach()
        return loss.detach()

    def _losses(self, model: Any, batch: Batch) -> torch.Tensor:
        inputs = self._prepare_inputs({name: value for name, value in batch.items() if name not in ("keys", "tokens")})
        labels = inputs.pop("labels")
        return token_losses(model(**inputs).logits, labels)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The held-out loss: the sum of all losses over the number of tokens that have one, over all devices.

        Neither the weights nor the state of any random numbers change.
        """
        assert self._held_out is not None
        data, order = self._held_out
        model = self.model_wrapped
        training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self._precision.autocast(self.args.device.type):
            for keys in order:
                batch = self.data_collator([data[key] for key in keys])
                losses = self._losses(model, batch)
                total += torch.stack((losses.double().sum(), total.new_tensor(_learned(batch["labels"]))))
        model.train(training)
        loss, count = self.accelerator.reduce(total, "sum").tolist()
        if not math.isfinite(loss):
            raise CnllamaError(
                f"the held-out loss is {loss} after {self.state.global_step} steps, expected a finite number; lower "
                "--lr, or begin from a sound model"
            )
        metrics = {"eval_loss": loss / count}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # none of ours changes control
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with our epochs, of which it knows none, and our losses, which a run that goes on begins with."""
        step = self.state.global_step
        epoch, done, steps = self._order.position(step)
        self.state.epoch = epoch + done / steps
        if "loss" in logs:
            logs["loss"] = float(self.accelerator.gather(self._sum).mean()) / (step - self._last_logged)
            self._sum.zero_()
            self._last_logged = step
        super().log(logs, start_time)

    def _refuse_batch(self, loss: float, inputs: Batch) -> None:
        ids = inputs["input_ids"].tolist()
        keys = [key for key in inputs["keys"].tolist() if key[1] != NONE]
        epoch, step = keys[0][0] if keys else 0, self.state.global_step + 1
        indices = [index for _, index in keys]
        record = {"step": step, "epoch": epoch, "loss": str(loss), "items": indices, "input_ids": ids}
        file = Path(self.args.output_dir) / f"bad_batch-{self.args.process_index}.json"
        if self._out is not None:
            file = self._out / BAD_BATCH
        write_file(file, json.dumps(record).encode() + b"\n")
        text = self._describe(ids[0][:_SHOWN_IDS])
        items = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        raise CnllamaError(
            f"the loss is {loss} at step {step}, expected a finite number; the batch is items {items} of epoch "
            f"{epoch}, the first begins {text!r:.60} (all of it is in {file}); lower --lr, or begin from a sound model"
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, and then the processes meet: what comes after it moves what all of them have written."""
        super()._save_checkpoint(*args, **kwargs)
        self.loss_sum = LossSum(self.accelerator.gather(self._sum).tolist(), self._last_logged)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        if self._trained.mode == "full":
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            tensors = adapter_tensors(self.model, state_dict, self._values)
            save_adapter(directory, tensors, adapter_config(self._trained, self._base))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        directory = Path(resume_from_checkpoint)
        if self._trained.mode == "full" or not exists(directory / WEIGHTS) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter(self.model if model is None else model, directory)
