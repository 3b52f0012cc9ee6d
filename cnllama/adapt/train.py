# SPDX-License-Identifier: Apache-2.0
"""One training stage from its options to its result: plan, load, train or go on, save, check, plot."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cnllama.adapt import memory
from cnllama.adapt.lora import WEIGHTS, Trained, check_saved, count_parameters, fold, load_adapter, prepare
from cnllama.adapt.output import write_json
from cnllama.adapt.plots import loss_curve
from cnllama.adapt.progress import (
    LOG,
    Checkpoints,
    JsonLog,
    Progress,
    complete_checkpoints,
    quiet,
    read_records,
)
from cnllama.adapt.settings import Settings
from cnllama.adapt.tokenfile import Vocabulary, open_vocabulary
from cnllama.adapt.trainer import AdaptTrainer, Collator, Ordered
from cnllama.config import from_hf
from cnllama.container import read_json
from cnllama.convert.pack import make_plan
from cnllama.errors import InputError
from cnllama.stdio import say

RESULT, RUN = "result.json", "run.json"
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Data:
    """A stage's data: sets of data.py, how their items become batches, and what they are made of (for resuming).

    padded: batches have padding, which is not counted as tokens.
    """

    train: Any
    held_out: Any | None
    collator: Collator
    padded: bool
    identity: dict[str, object]
    report: list[str]


@dataclass(frozen=True)
class Stage:
    """label: what the bar says. prepare_data: called with the vocabulary once it is known that the model fits."""

    label: str
    model: Path
    adapters: list[Path]
    out: Path
    trained: Trained
    settings: Settings
    prepare_data: Callable[[Vocabulary], Data]
    restart: bool = False


def run_stage(stage: Stage) -> dict[str, Any]:
    """Trains, or goes on where a stopped run was, or returns the result of a finished one: result.json of `out`.

    out becomes a PEFT adapter directory, or a whole checkpoint for mode "full", with log.jsonl and loss.png. Raises
    InputError for wrong input, CnllamaError when the loss or a checkpoint goes bad.
    """
    main = int(os.environ.get("RANK", "0")) == 0
    quiet()
    stage.trained.check()
    _check_places(stage)
    if stage.restart:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError(f"--restart works with one process; remove {stage.out} and leave the option out")
        shutil.rmtree(stage.out, ignore_errors=True)
    config, vocabulary = _open_model(stage)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = _dtype(stage, device)
    _plan(stage, config, device, dtype, main)
    data = stage.prepare_data(vocabulary)
    say(*(data.report if main else []))
    identity = _identity(stage, vocabulary, data)
    finished = _finished(stage, identity)
    if finished is not None:
        return finished
    stage.out.mkdir(parents=True, exist_ok=True)
    if main:
        write_json(stage.out / RUN, identity)
    model = prepare(_load(stage, config, dtype), stage.trained)
    return _train(stage, model, vocabulary, data, device)


def _check_places(stage: Stage) -> None:
    out = stage.out.resolve()
    if out in {path.resolve() for path in (stage.model, *stage.adapters)}:
        raise InputError(f"{stage.out}: the result would replace what it is trained from; choose another --out")
    if stage.out.exists() and not stage.out.is_dir():
        raise InputError(f"{stage.out}: this is a file, expected a directory for the result")


def _open_model(stage: Stage) -> tuple[Any, Vocabulary]:
    """transformers' config with the vocabulary that base and adapters have together, and the tokenizer that goes on."""
    from transformers import LlamaConfig

    plan = make_plan(stage.model, stage.adapters)
    from_hf(read_json(stage.model / "config.json"), str(stage.model / "config.json"))
    config = LlamaConfig.from_pretrained(stage.model)
    config.vocab_size = plan.config["vocab_size"]
    config.tie_word_embeddings = plan.config["tie_word_embeddings"]
    config.use_cache = False
    return config, open_vocabulary(plan.vocabulary.tokenizer.file.parent, config.vocab_size)


def _dtype(stage: Stage, device: str) -> torch.dtype:
    name = stage.settings.dtype
    if stage.trained.mode == "full":
        if name not in ("auto", "float32"):
            raise InputError(f"--dtype is {name}, but --full trains every weight in float32; use --bf16 for speed")
        return torch.float32
    if name == "auto":
        return torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _plan(stage: Stage, config: Any, device: str, dtype: torch.dtype, main: bool) -> None:
    """Prints the memory plan. Where an engine shards the model, it is only printed."""
    settings = stage.settings
    shape = memory.Shape(
        settings.batch_size,
        settings.block_size,
        dtype.itemsize,
        settings.bf16,
        settings.gradient_checkpointing,
        settings.optimizer,
    )
    room, source = memory.available(device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cpu" and local > 1:
        room, source = room // local, f"{source}, {local} processes"
    sharded = bool(settings.deepspeed) or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded:
        found = memory.plan_memory(config, stage.trained, shape)
    else:
        found = memory.refuse_unless_fits(config, stage.trained, shape, room, source)
    say(*(found.lines(room, source) if main else []))


def _identity(stage: Stage, vocabulary: Vocabulary, data: Data) -> dict[str, Any]:
    """What a run that goes on, or one that is finished, must share with the present one."""
    config = hashlib.sha256((stage.model / "config.json").read_bytes()).hexdigest()
    return {
        "label": stage.label,
        "model": {"config": config, "adapters": [path.name for path in stage.adapters], "tokenizer": vocabulary.sha256},
        "trained": json.loads(json.dumps(asdict(stage.trained))),
        "settings": stage.settings.identity(),
        "data": data.identity,
        "devices": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _finished(stage: Stage, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run with the same options. Raises InputError when the options were others."""
    if not (stage.out / RUN).exists():
        return None
    before = read_json(stage.out / RUN)
    for group, values in identity.items():
        if before.get(group) == values:
            continue
        then = before.get(group)
        if isinstance(values, dict) and isinstance(then, dict):
            name = next(key for key in {**values, **then} if then.get(key) != values.get(key))
            what, then, now = f"{group} {name}", then.get(name), values.get(name)
        else:
            what, now = group, values
        raise InputError(
            f"{stage.out}: an earlier run had {what} {then!r:.80}, this one has {now!r:.80}; give the same options to "
            "go on, choose another --out, or discard the earlier run with --restart"
        )
    return read_json(stage.out / RESULT) if (stage.out / RESULT).exists() else None


def _load(stage: Stage, config: Any, dtype: torch.dtype) -> Any:
    from transformers import LlamaForCausalLM, set_seed

    set_seed(stage.settings.seed)
    rows = config.vocab_size
    if stage.adapters:
        config.vocab_size = read_rows(stage.model)
    model = LlamaForCausalLM.from_pretrained(stage.model, config=config, dtype=dtype)
    if stage.adapters:
        fold(model, stage.model, stage.adapters)
        assert model.get_input_embeddings().weight.shape[0] == rows
    return model


def read_rows(model: Path) -> int:
    """Rows of embed_tokens in a checkpoint: config.json may be out of date."""
    return int(make_plan(model).config["vocab_size"])


def _arguments(stage: Stage, data: Data, device: str, resume: bool) -> Any:
    from transformers import TrainingArguments

    s = stage.settings
    evaluates = data.held_out is not None
    optimizer = {"adamw": "adamw_torch_fused", "adamw-8bit": "adamw_8bit"}[s.optimizer]
    return TrainingArguments(
        output_dir=str(stage.out),
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=s.batch_size,
        gradient_accumulation_steps=s.grad_accum,
        num_train_epochs=s.epochs,
        max_steps=s.max_steps or -1,
        learning_rate=s.lr,
        lr_scheduler_type=s.schedule if s.schedule != "constant" else "constant_with_warmup",
        warmup_steps=s.warmup if s.warmup else 0,
        weight_decay=s.weight_decay,
        adam_beta2=s.beta2,
        max_grad_norm=s.max_grad_norm,
        optim=optimizer,
        seed=s.seed,
        data_seed=s.seed,
        bf16=s.bf16,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and "RANK" in os.environ else None,
        torch_compile=s.compile,
        deepspeed=s.deepspeed,
        logging_steps=s.log_every,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding" if data.padded else "all",
        save_strategy="steps" if s.save_every else "no",
        save_steps=s.save_every or 500,
        eval_strategy="steps" if evaluates and s.eval_every else "no",
        eval_steps=s.eval_every or None,
        eval_on_start=evaluates and not resume,
        prediction_loss_only=True,
        dataloader_drop_last=True,
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


def _train(stage: Stage, model: Any, vocabulary: Vocabulary, data: Data, device: str) -> dict[str, Any]:
    from transformers.trainer_callback import PrinterCallback

    settings = stage.settings
    found = complete_checkpoints(stage.out)
    resume = found[-1] if found else None
    args = _arguments(stage, data, device, resume is not None)
    batches = len(data.train) // (settings.batch_size * args.world_size)
    if not batches:
        raise InputError(
            f"{', '.join(data.report[:1])}: {len(data.train):,} sequences, fewer than one batch of "
            f"{settings.batch_size} on {args.world_size} devices; give more data or a smaller --batch-size"
        )
    steps = math.ceil(batches / settings.grad_accum)
    total = settings.max_steps or math.ceil(steps * settings.epochs)
    args.logging_steps = min(settings.log_every, total)
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    log = JsonLog(stage.out)
    trainer = AdaptTrainer(
        model=model,
        args=args,
        train_dataset=Ordered(data.train),
        eval_dataset=None if data.held_out is None else Ordered(data.held_out),
        data_collator=data.collator,
        trained=stage.trained,
        base=stage.model.name,
        describe=vocabulary.tokenizer.decode,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(log)
    trainer.add_callback(Progress(stage.label))
    items = settings.batch_size * settings.grad_accum * args.world_size
    trainer.add_callback(Checkpoints(stage.out, settings.keep, items, steps, lambda path: _check(stage, path, model)))
    if resume is not None and _step(resume) >= total:
        _restore(stage, trainer, log, resume)
    else:
        if resume is not None and args.should_save:
            say(f"{stage.label}: going on from step {_step(resume)} of {total}")
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return _finish(stage, trainer, log, data)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


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
    """What was saved is what was trained: of a whole checkpoint, transformers' own reader is the judge."""
    if stage.trained.mode != "full" and (directory / WEIGHTS).exists():
        check_saved(directory, model)


def _held_out_losses(stage: Stage, trainer: Any, data: Data) -> tuple[float | None, float | None]:
    """(before training, after it)."""
    if data.held_out is None:
        return None, None
    losses = {record["step"]: record["eval_loss"] for record in read_records(stage.out / LOG) if "eval_loss" in record}
    last = losses.get(trainer.state.global_step)
    return losses.get(0), trainer.evaluate()["eval_loss"] if last is None else last


def _finish(stage: Stage, trainer: Any, log: JsonLog, data: Data) -> dict[str, Any]:
    """Saves the result and what it cost; then the checkpoints, which hold the optimizer's state, can go."""
    state = trainer.state
    held_out = _held_out_losses(stage, trainer, data)
    trainer.save_model(str(stage.out))
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
    if not trainer.args.should_save:
        return result
    _check(stage, stage.out, trainer.model)
    for name in _TOKENIZER_FILES + (("generation_config.json",) if stage.trained.mode == "full" else ()):
        sources = [d / name for d in (*reversed(stage.adapters), stage.model)]
        source = next((path for path in sources if path.exists()), None)
        if source is not None and not (stage.out / name).exists():
            shutil.copyfile(source, stage.out / name)
    loss_curve({stage.label: stage.out / LOG}, stage.out / "loss.png", stage.label)
    write_json(stage.out / RESULT, result)
    for checkpoint in stage.out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return result
