# SPDX-License-Identifier: Apache-2.0
"""The training itself: load, train or go on, check what was saved, give it its names."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cnllama.adapt.batches import Order, Ordered, Split
from cnllama.adapt.checkpoints import LEFT, MARK, Checkpoints, complete_checkpoints, drop, scratch_directory
from cnllama.adapt.lora import (
    CONFIG,
    WEIGHTS,
    MergedBase,
    check_finite,
    check_saved,
    count_parameters,
    load_adapter,
    prepare,
)
from cnllama.adapt.plots import loss_curve, read_log
from cnllama.adapt.precision import Precision
from cnllama.adapt.progress import LOG, JsonLog, Progress, read_records
from cnllama.adapt.trainer import BAD_BATCH, AdaptTrainer, LossSum
from cnllama.container import read_json
from cnllama.convert.pack import make_plan
from cnllama.errors import InputError
from cnllama.files import write_file, write_json
from cnllama.ownership import OwnedDirectory
from cnllama.paths import exists
from cnllama.stdio import say

if TYPE_CHECKING:
    from cnllama.adapt.stage import Data, Stage
    from cnllama.adapt.tokenfile import Vocabulary

RESULT, RUN, PLOT = "result.json", "run.json", "loss.png"
FILES = (RUN, LOG, PLOT, RESULT, BAD_BATCH, CONFIG, WEIGHTS)  # what a run writes beside the tokenizer
WHOLE = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")  # with --full


@dataclass(frozen=True)
class Job:
    """A stage whose input has been checked. order: of its steps. tokenizer: name -> bytes, of the result.

    own: its directory, None in processes that do not write.
    """

    stage: Stage
    data: Data
    vocabulary: Vocabulary
    config: Any
    device: str
    precision: Precision
    order: Order
    tokenizer: dict[str, bytes]
    own: OwnedDirectory | None


def train(job: Job) -> dict[str, Any]:
    """Trains, or goes on from the newest checkpoint; returns the result."""
    from transformers.trainer_callback import PrinterCallback

    stage, settings, data, order = job.stage, job.stage.settings, job.data, job.order
    if job.own is not None:
        job.own.make_scratch()
    base = MergedBase(stage.model, stage.adapters)
    narrow = job.precision.frozen != torch.float32
    model = _load(stage, job.config, job.precision.frozen, base)
    model = prepare(model, stage.trained, base.values if narrow else None)
    found = complete_checkpoints(job.own or OwnedDirectory(stage.out, "").read())
    resume = found[-1] if found else None
    args = _arguments(job, resume is not None)
    args.logging_steps = min(settings.log_every, order.steps)
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    log = JsonLog(stage.out, job.own)
    trainer = AdaptTrainer(
        model=model,
        args=args,
        train_dataset=Ordered(data.train),
        eval_dataset=data.held_out,
        data_collator=data.collator,
        order=order,
        held_out=_held_out(job),
        precision=job.precision,
        trained=stage.trained,
        values=base.values,
        base=stage.model.name,
        describe=job.vocabulary.tokenizer.decode,
        warmup=settings.warmup,
        schedule=settings.schedule,
        out=None if job.own is None else stage.out,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(log)
    trainer.add_callback(Progress(stage.label))
    trainer.add_callback(
        Checkpoints(
            job.own,
            keep=settings.keep,
            order=order,
            check=lambda directory: _check(stage, directory, model),
            more=lambda: {"loss": asdict(trainer.loss_sum)},
        )
    )
    if resume is not None and _step(resume) >= order.steps:
        _restore(stage, trainer, log, resume)
    else:
        if resume is not None:
            trainer.carry(_loss_sum(resume))
            if args.should_save:
                say(f"{stage.label}: going on from step {_step(resume)} of {order.steps}")
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return _finish(job, trainer, log)


def _held_out(job: Job) -> tuple[Ordered, Order] | None:
    """The held-out data, and this device's batches of it."""
    if job.data.held_out is None:
        return None
    split = Split(job.stage.settings.batch_size, devices=job.order.split.devices)
    return Ordered(job.data.held_out), Order(job.data.held_out, split, device=job.order.device)


def _load(stage: Stage, config: Any, dtype: torch.dtype, base: MergedBase) -> Any:
    from transformers import LlamaForCausalLM, set_seed

    set_seed(stage.settings.seed)
    rows = config.vocab_size
    if stage.adapters:
        config.vocab_size = read_rows(stage.model)
    model = LlamaForCausalLM.from_pretrained(stage.model, config=config, dtype=dtype)
    if stage.adapters:
        base.fold(model)
        assert model.get_input_embeddings().weight.shape[0] == rows
    return model


def read_rows(model: Path) -> int:
    """Rows of embed_tokens in a checkpoint, padding included: config.json may be out of date."""
    return int(make_plan(model).vocabulary.rows)


def _arguments(job: Job, resume: bool) -> Any:
    from transformers import TrainingArguments

    s, data, device = job.stage.settings, job.data, job.device
    evaluates = data.held_out is not None
    optimizer = {"adamw": "adamw_torch_fused", "adamw-8bit": "adamw_8bit"}[s.optimizer]
    arguments = TrainingArguments(
        output_dir=str(scratch_directory(job.stage.out)),
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=s.batch_size,
        gradient_accumulation_steps=s.grad_accum,
        max_steps=job.order.steps,
        learning_rate=s.lr,
        weight_decay=s.weight_decay,
        adam_beta2=s.beta2,
        max_grad_norm=s.max_grad_norm,
        optim=optimizer,
        seed=s.seed,
        data_seed=s.seed,
        bf16=job.precision.products == torch.bfloat16,
        fp16=job.precision.products == torch.float16,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and "RANK" in os.environ else None,
        torch_compile=s.compile,
        deepspeed=s.deepspeed,
        logging_steps=s.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if s.save_every else "no",
        save_steps=s.save_every or 500,
        eval_strategy="steps" if evaluates and s.eval_every else "no",
        eval_steps=s.eval_every or None,
        eval_on_start=evaluates and not resume,
        prediction_loss_only=True,
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        **(
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
            if s.gradient_checkpointing
            else {}
        ),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # more of them are torchrun's: no DataParallel inside a process
    return arguments


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _loss_sum(checkpoint: Path) -> LossSum:
    """What the run had not logged yet when it saved. Raises InputError for a checkpoint that does not say."""
    loss = read_json(checkpoint / MARK, names=True).get("loss")
    try:
        return LossSum([float(value) for value in loss["sums"]], int(loss["last_logged"]))  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{checkpoint / MARK}: loss is {loss!r:.60}; the file was changed, remove {checkpoint}"
        ) from None


def _restore(stage: Stage, trainer: Any, log: JsonLog, checkpoint: Path) -> None:
    """The weights and the counts of a run that was killed after its last step."""
    from transformers.trainer_callback import TrainerState

    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    log.on_train_begin(trainer.args, trainer.state, trainer.control)
    if stage.trained.mode != "full":
        load_adapter(trainer.model, checkpoint)
        return
    from safetensors.torch import load_model

    load_model(trainer.model, checkpoint / "model.safetensors")


def _check(stage: Stage, directory: Path, model: Any) -> None:
    """What was saved is what was trained; of a whole checkpoint, that it has no value that is not finite."""
    if stage.trained.mode == "full":
        check_finite(directory)
    elif exists(directory / WEIGHTS):
        check_saved(directory, model)


def _held_out_losses(job: Job, trainer: Any) -> tuple[float | None, float | None]:
    """(before training, after it)."""
    if job.data.held_out is None:
        return None, None
    records = read_records(job.stage.out / LOG)
    losses = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    last = losses.get(trainer.state.global_step)
    return losses.get(0), trainer.evaluate()["eval_loss"] if last is None else last


def _finish(job: Job, trainer: Any, log: JsonLog) -> dict[str, Any]:
    """Saves the result and what it cost; then the checkpoints, which hold the optimizer's state, can go."""
    stage, state, own = job.stage, trainer.state, job.own
    held_out = _held_out_losses(job, trainer)
    saved = scratch_directory(stage.out) / "model"
    trainer.save_model(str(saved))
    trained, total = count_parameters(trainer.model)
    result: dict[str, Any] = {
        "steps": state.global_step,
        "tokens": state.num_input_tokens_seen,
        "trained_parameters": trained,
        "parameters": total,
        "held_out_loss_before": held_out[0],
        "held_out_loss": held_out[1],
        "seconds": round(log.seconds, 1),
    }
    if own is None:
        return result
    _check(stage, saved, trainer.model)
    for name, data in job.tokenizer.items():
        write_file(stage.out / name, data)
    own.publish_files(saved, WHOLE[0] if stage.trained.mode == "full" else CONFIG, LEFT)
    own.settle(LOG)
    if "loss" in read_log(stage.out / LOG):
        loss_curve({stage.label: stage.out / LOG}, stage.out / PLOT, stage.label)
    write_json(stage.out / RESULT, result)
    for checkpoint in complete_checkpoints(own):
        drop(own, checkpoint.name)
    own.remove(own.SCRATCH)
    return result
