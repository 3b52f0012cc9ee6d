# SPDX-License-Identifier: Apache-2.0
"""One training stage up to its first step: what is asked for, everything that could go wrong, what was done before."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cnllama.adapt import memory
from cnllama.adapt.batches import Collator, Order, Split
from cnllama.adapt.checkpoints import (
    SCRATCH_FILES,
    complete_checkpoints,
    discard_incomplete,
    drop,
)
from cnllama.adapt.data import Source
from cnllama.adapt.datasets import Items
from cnllama.adapt.kept import as_json, described, difference
from cnllama.adapt.lora import Trained
from cnllama.adapt.plots import need_matplotlib
from cnllama.adapt.precision import Precision, choose_precision
from cnllama.adapt.progress import quiet
from cnllama.adapt.reading import check_files
from cnllama.adapt.settings import Settings
from cnllama.adapt.tokenfile import Vocabulary, open_vocabulary
from cnllama.adapt.train import FILES, RESULT, RUN, WHOLE, Job, train
from cnllama.container import read_json
from cnllama.convert.merge import bias_settings
from cnllama.convert.pack import make_plan
from cnllama.errors import InputError
from cnllama.files import write_json
from cnllama.ownership import OwnedDirectory
from cnllama.paths import exists, is_dir, read_bytes, real_path
from cnllama.space import check_space
from cnllama.stdio import say

_IDENTITY = 3  # raised when the same options come to mean something else
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_MAX_TOKENIZER = 1 << 28
_SMALL = 1 << 20  # bytes of all small files of a result


@dataclass(frozen=True)
class Data:
    """A stage's data sets, how their items become batches, and what reading the files gave, in sentences."""

    train: Items
    held_out: Items | None
    collator: Collator
    report: list[str]


@dataclass(frozen=True)
class Stage:
    """What is asked for. label: what the bar says.

    data_options: what decides, beside the files, how `data` and `held_out` are read. prepare_data: called with the
    vocabulary once all else is known to be in order.
    """

    label: str
    model: Path
    adapters: list[Path]
    out: Path
    trained: Trained
    settings: Settings
    data: list[Source]
    held_out: list[Source]
    prepare_data: Callable[[Vocabulary], Data]
    data_options: dict[str, Any] = field(default_factory=dict)
    restart: bool = False


def run_stage(stage: Stage) -> dict[str, Any]:
    """Trains, or goes on where a stopped run was, or returns the result of a finished one: result.json of `out`.

    out becomes a PEFT adapter directory, or a whole checkpoint for mode "full", with log.jsonl and loss.png. Nothing is
    read for long, trained or removed before all that the run needs has been checked. Raises InputError for wrong input,
    CnllamaError when the loss or a checkpoint goes bad.
    """
    main = int(os.environ.get("RANK", "0")) == 0
    quiet()
    stage.trained.check()
    _check_places(stage)
    need_matplotlib()
    check_files([source.path for source in (*stage.data, *stage.held_out)])
    config, vocabulary = _open_model(stage)
    tokenizer = _read_tokenizer(stage)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = stage.settings
    precision = choose_precision(settings.dtype, settings.bf16, stage.trained.mode == "full", device)
    plan = _plan(stage, config, device, precision, main)
    names = (*FILES, *WHOLE, *_TOKENIZER_FILES)
    owned = OwnedDirectory(stage.out, f"adapt {stage.label}", names=names, alone=stage.restart, scratch=SCRATCH_FILES)
    with owned if main else nullcontext() as own:
        if own is not None:
            _check_disk(stage, plan, 1, own)  # at least; how many steps there are is known when the data are
        identity = _identity(stage, vocabulary, precision)
        finished = None if stage.restart else _finished(stage, identity, own)
        if finished is not None:
            return finished
        data = stage.prepare_data(vocabulary)
        say(*(data.report if main else []))
        order = _order(stage, data)
        if own is not None:
            _check_disk(stage, plan, order.steps, own)
            if stage.restart:
                own.clear()
            discard_incomplete(own)
            write_json(stage.out / RUN, identity)
        return train(Job(stage, data, vocabulary, config, device, precision, order, tokenizer, own))


def _check_places(stage: Stage) -> None:
    out = real_path(stage.out)
    if out in {real_path(path) for path in (stage.model, *stage.adapters)}:
        raise InputError(f"{stage.out}: the result would replace what it is trained from; choose another --output")
    if exists(stage.out) and not is_dir(stage.out):
        raise InputError(f"{stage.out}: this is a file, expected a directory for the result")
    if stage.restart and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"--restart works with one process; remove {stage.out} and leave the option out")


def _open_model(stage: Stage) -> tuple[Any, Vocabulary]:
    """transformers' config with the vocabulary that base and adapters have together, and the tokenizer that goes on."""
    from transformers import LlamaConfig

    plan = make_plan(stage.model, stage.adapters)
    config = LlamaConfig.from_pretrained(stage.model)
    config.vocab_size = plan.vocabulary.rows
    config.tie_word_embeddings = plan.config["tie_word_embeddings"]
    config.update(bias_settings(plan.tensors))
    config.use_cache = False
    return config, open_vocabulary(plan.vocabulary.tokenizer.file.parent, config.vocab_size)


def _read_tokenizer(stage: Stage) -> dict[str, bytes]:
    """The tokenizer files that the result gets: each from the last adapter that has it, else from the model."""
    found = {}
    for name in _TOKENIZER_FILES:
        sources = [directory / name for directory in (*reversed(stage.adapters), stage.model)]
        source = next((path for path in sources if exists(path)), None)
        if source is not None:
            found[name] = read_bytes(source, _MAX_TOKENIZER)
    return found


def _plan(stage: Stage, config: Any, device: str, precision: Precision, main: bool) -> memory.MemoryPlan:
    """Prints the memory plan. Where an engine shards the model, it is only printed."""
    settings = stage.settings
    shape = memory.Shape(
        settings.batch_size,
        settings.block_size,
        precision.frozen.itemsize,
        precision.products != torch.float32,
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
    return found


def divided(settings: Settings) -> Split:
    """How the items of a step are divided among the processes of this run."""
    return Split(settings.batch_size, settings.grad_accum, int(os.environ.get("WORLD_SIZE", "1")))


def _order(stage: Stage, data: Data) -> Order:
    """Raises InputError where every step would have batches that nothing is left for."""
    settings = stage.settings
    if settings.grad_accum > data.train.count(0):
        raise InputError(
            f"--grad-accum is {settings.grad_accum}, but an epoch of the data has {data.train.count(0):,} sequences; "
            "give more data or a smaller --grad-accum"
        )
    return Order(
        data.train,
        divided(settings),
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        device=int(os.environ.get("RANK", "0")),
        full_batches=settings.compile,
    )


def _check_disk(stage: Stage, plan: memory.MemoryPlan, steps: int, own: OwnedDirectory) -> None:
    """Raises CnllamaError when checkpoints, one more than are kept while it is written, and the result do not fit."""
    settings = stage.settings
    saves = math.ceil(steps / settings.save_every) if settings.save_every else 0
    needed = min(saves, settings.keep + 1) * (plan.saved + plan.optimizer) + plan.saved + _SMALL
    check_space(stage.out / RESULT, needed - own.size(), "checkpoints and result")


def _identity(stage: Stage, vocabulary: Vocabulary, precision: Precision) -> dict[str, Any]:
    """What a run that goes on, or one that is finished, must share with the present one.

    The version of cnllama is no part of it: a finished result stays what it is.
    """
    settings = stage.settings.identity() | {
        "dtype": str(precision.frozen).removeprefix("torch."),
        "products": str(precision.products).removeprefix("torch."),
    }
    engine = described([Path(stage.settings.deepspeed)]) if stage.settings.deepspeed else []
    data = described(source.path for source in stage.data)
    identity = {
        "format": _IDENTITY,
        "label": stage.label,
        "trained": asdict(stage.trained),
        "settings": settings,
        "options": stage.data_options,
        "devices": int(os.environ.get("WORLD_SIZE", "1")),
        "deepspeed": engine,
        "tokenizer": vocabulary.sha256,
        "model": described([stage.model]),
        "adapters": described(stage.adapters),
        "data": [item | {"repeat": source.repeat} for item, source in zip(data, stage.data, strict=True)],
        "held-out data": described(source.path for source in stage.held_out),
    }
    result: dict[str, Any] = as_json(identity)
    return result


def _finished(stage: Stage, identity: dict[str, Any], own: OwnedDirectory | None) -> dict[str, Any] | None:
    """The result of a finished run of the same identity. Raises InputError when it is another's."""
    out = stage.out
    if not exists(out / RUN):
        return None
    before = read_json(out / RUN, names=True)
    if before.get("format") != _IDENTITY:
        raise InputError(
            f"{out}: was made by another version of cnllama, which did not record what it was made from; choose "
            "another --output, or remove the directory"
        )
    found = difference(before, identity)
    if found:
        raise InputError(
            f"{out}: an earlier run {found}; give the same to go on, choose another --output, or discard the earlier "
            "run with --restart"
        )
    if not exists(out / RESULT):
        return None
    damaged = [name for name in OwnedDirectory(out, "").read().damaged() if name in WHOLE or name in _TOKENIZER_FILES]
    if damaged:
        raise InputError(
            f"{out / damaged[0]}: was changed or removed after the run had finished; train again with --restart, or "
            "choose another --output"
        )
    if own is not None:  # of a run that was killed after its last file
        for checkpoint in complete_checkpoints(own):
            drop(own, checkpoint.name)
        discard_incomplete(own)
        own.remove(own.SCRATCH)
    return read_json(out / RESULT, names=True)
