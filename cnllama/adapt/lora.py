# SPDX-License-Identifier: Apache-2.0
"""What a stage trains: embeddings, LoRA beside them, or everything; and the adapter directory it is saved as.

Adapters are PEFT's in every name, so that PEFT and `cnllama convert` read them. The embeddings are trained in place
instead of in a second copy (PEFT's modules_to_save wrapper), which is a gigabyte less for a 7B model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from cnllama.adapt.hf_checkpoint import OutTensor, write_safetensors
from cnllama.adapt.precision import freeze_linears, frozen_linear
from cnllama.config import EMBEDDING, LM_HEAD
from cnllama.errors import CnllamaError, InputError
from cnllama.files import make_directory, write_json

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODES = ("embeddings", "lora", "full")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_NO_TARGETS = "dummy-target-modules"  # PEFT's own name for an adapter that has saved modules only

Tensors = dict[str, torch.Tensor]
State = Mapping[str, torch.Tensor]
T = TypeVar("T")
Values = Callable[[str], torch.Tensor]  # of a tensor of the merged base, float32, on the CPU


@dataclass(frozen=True)
class Trained:
    """Which parameters a stage trains.

    mode: "embeddings" (embed_tokens and lm_head), "lora" (these and LoRA on `targets`) or "full". old_rows: with a
    number, rows of the embeddings before it stay as they are and cost neither gradient nor optimizer state.
    """

    mode: str = "lora"
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = TARGETS
    old_rows: int | None = None

    def check(self) -> None:
        """Raises InputError for settings that cannot be."""
        if self.mode == "full" and self.old_rows is not None:
            raise InputError("--train-new-rows-only and --full exclude each other: choose one")
        if not 1 <= self.rank <= 1 << 12:
            raise InputError(f"--rank is {self.rank}, expected 1 to {1 << 12}")
        if not (math.isfinite(self.alpha) and self.alpha):
            raise InputError(f"--alpha is {self.alpha:g}, expected a finite number that is not 0: LoRA is scaled by it")
        if not 0 <= self.dropout < 1:
            raise InputError(f"--dropout is {self.dropout:g}, expected 0 to less than 1")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise InputError(f"--targets has {', '.join(unknown) or 'no name'}, expected some of {', '.join(TARGETS)}")


class GrownEmbedding(nn.Module):
    """embed_tokens whose first rows are frozen: only `new`, [rows - old rows, hidden], is a parameter that trains."""

    def __init__(self, old: torch.Tensor, new: nn.Parameter) -> None:
        super().__init__()
        self.old = nn.Parameter(old, requires_grad=False)
        self.new = new

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [...] -> [..., hidden]."""
        rows = self.old.shape[0]
        old = nn.functional.embedding(ids.clamp(max=rows - 1), self.old)
        new = nn.functional.embedding((ids - rows).clamp(min=0), self.new)
        return torch.where((ids >= rows)[..., None], new, old.to(new.dtype))


class GrownHead(nn.Module):
    """lm_head whose first rows are frozen."""

    def __init__(self, old: nn.Parameter, new: nn.Parameter) -> None:
        super().__init__()
        self.old, self.new = old, new

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., rows]."""
        new = nn.functional.linear(hidden, self.new.to(hidden.dtype))
        return torch.cat((frozen_linear(hidden, self.old), new), -1)


def prepare(model: Any, trained: Trained, values: Values | None = None) -> Any:
    """The model with exactly the chosen parameters requiring gradients, these in float32; returns what to train.

    values: where the model's weights are kept in 16 bits, the embeddings that train are taken from here.
    """
    if trained.mode == "full":
        model.requires_grad_(True)
        return model.float()
    model.requires_grad_(False)
    core = model
    if trained.mode == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, _lora_config(trained))
    _open_embeddings(core, trained.old_rows)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if trained.mode == "lora":
        _draw_lora(model)
    if values is not None:
        _copy_embeddings(model, values)
    freeze_linears(model)
    return model


def _draw_lora(model: nn.Module) -> None:
    """New matrices A in float32: PEFT rounds what it draws to the type of the weights beside it."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", True)


def _copy_embeddings(model: nn.Module, values: Values) -> None:
    with torch.no_grad():
        for full_name, parameter in model.named_parameters():
            name = _saved_name(full_name).removeprefix(_PREFIX)
            if parameter.requires_grad and name in (EMBEDDING, LM_HEAD):
                parameter.copy_(values(name))
            elif name.endswith(".new"):
                parameter.copy_(values(name.removesuffix("new") + "weight")[-parameter.shape[0] :])


def _lora_config(trained: Trained) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=trained.rank,
        lora_alpha=trained.alpha,
        lora_dropout=trained.dropout,
        target_modules=list(trained.targets),
    )


def _open_embeddings(core: Any, old_rows: int | None) -> None:
    embedding, head = core.get_input_embeddings(), core.get_output_embeddings()
    tied = head.weight is embedding.weight
    if old_rows is None:
        embedding.weight.requires_grad_(True)
        head.weight.requires_grad_(True)
        return
    rows = embedding.weight.shape[0]
    if not 0 < old_rows < rows:
        raise InputError(
            f"--train-new-rows-only {old_rows}: the model has {rows} rows, expected a number from 1 to {rows - 1}: the "
            "rows that the model had before cnllama adapt resize"
        )
    grown = GrownEmbedding(embedding.weight.data[:old_rows], nn.Parameter(embedding.weight.data[old_rows:].clone()))
    if tied:
        grown_head = GrownHead(grown.old, grown.new)
    else:
        old = nn.Parameter(head.weight.data[:old_rows], requires_grad=False)
        grown_head = GrownHead(old, nn.Parameter(head.weight.data[old_rows:].clone()))
    core.set_input_embeddings(grown)
    core.set_output_embeddings(grown_head)


def adapter_tensors(model: nn.Module, state: State | None = None, values: Values | None = None) -> Tensors:
    """The trained part of a prepared model by its name in an adapter file: float32, on the CPU.

    state: a gathered state dict, where the model's own parameters are sharded. Rows that do not train are included:
    embed_tokens and lm_head are whole. values: where these rows come from; the model may hold them in 16 bits.
    """
    shapes, tensors = adapter_shapes(model), {}
    for name, parts in _parts(model.state_dict() if state is None else state).items():
        old_rows, blocks = shapes[name][0] - parts[-1].shape[0], parts
        if old_rows and values is not None:
            blocks = [values(name.removeprefix(_PREFIX))[:old_rows], parts[-1]]
        # copies: tied matrices share memory, which a safetensors file cannot express
        tensors[name] = torch.cat([block.detach().to("cpu", torch.float32, copy=True) for block in blocks])
    return tensors


def adapter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that adapter_tensors gives, without copying any."""
    # where DeepSpeed keeps a part of a parameter, it tells the shape of the whole
    shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters(remove_duplicate=False)}
    return {name: (sum(part[0] for part in parts), *parts[0][1:]) for name, parts in _parts(shapes).items()}


def _parts(parameters: Mapping[str, T]) -> dict[str, list[T]]:
    """Of every saved tensor the blocks of rows that it is joined from; old rows may be missing in a gathered state."""
    named = {_saved_name(name): value for name, value in parameters.items()}
    out: dict[str, list[T]] = {}
    for name, value in named.items():
        stem = name.removesuffix(".new")
        if stem != name:
            out[stem + ".weight"] = [*([named[stem + ".old"]] if stem + ".old" in named else []), value]
        elif ".lora_" in name or name.endswith(("embed_tokens.weight", "lm_head.weight")):
            out[name] = [value]
    return out


def _saved_name(name: str) -> str:
    return _PREFIX + name.removeprefix(_PREFIX).replace(".default.", ".")


def adapter_config(trained: Trained, base: str) -> dict[str, Any]:
    """adapter_config.json of what adapter_tensors gives."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": trained.rank,
        "lora_alpha": trained.alpha,
        "lora_dropout": trained.dropout,
        "target_modules": list(trained.targets) if trained.mode == "lora" else _NO_TARGETS,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def save_adapter(directory: Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
    """Writes the two files of a PEFT adapter, the one without which it is none last. tensors: float32, on the CPU."""
    make_directory(directory)
    written = {name: _out_tensor(tensor) for name, tensor in tensors.items()}
    write_safetensors(directory / WEIGHTS, written, finite=False)
    write_json(directory / CONFIG, config)


def _out_tensor(tensor: torch.Tensor) -> OutTensor:
    return OutTensor("F32", tuple(tensor.shape), lambda begin, end: tensor[begin:end].numpy(), lambda: None)


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Copies a saved adapter into a model prepared in the same way. Raises InputError when names or shapes differ."""
    from safetensors.torch import load_file

    saved = load_file(directory / WEIGHTS)
    wanted = adapter_shapes(model)
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if found != wanted:
        odd = min(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise InputError(
            f"{directory / WEIGHTS}: {odd} is {_shape(found.get(odd))}, the model has {_shape(wanted.get(odd))}; the "
            "checkpoint was made with other settings, start again with --restart"
        )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            name = _saved_name(parameter_name)
            stem, kind = name[:-4], name[-4:]
            if kind in (".old", ".new"):
                rows, count = saved[stem + ".weight"], parameter.shape[0]
                parameter.copy_(rows[:count] if kind == ".old" else rows[-count:])
            elif name in saved:
                parameter.copy_(saved[name])


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def check_saved(directory: Path, model: nn.Module) -> None:
    """Reads an adapter back and compares it with the model: names, shapes, finite values, matrices that are not zero.

    An adapter whose every LoRA matrix B is zero has learned nothing, or was not saved. Raises CnllamaError.
    """
    from safetensors import safe_open

    file = directory / WEIGHTS
    expected = adapter_shapes(model)
    largest: dict[str, float] = {}
    try:
        with safe_open(file, "pt") as saved:
            names = set(saved.keys())
            if not names:
                _refuse(file, "holds no tensors")
            for name in sorted(names | set(expected)):
                if name not in names or name not in expected:
                    _refuse(file, f"tensor {name} is {'missing' if name in expected else 'unexpected'}")
                tensor = saved.get_tensor(name)
                if tuple(tensor.shape) != expected[name]:
                    _refuse(file, f"{name} is {list(tensor.shape)}, the model has {list(expected[name])}")
                largest[name] = float(tensor.abs().max())
    except (OSError, ValueError, RuntimeError) as error:
        raise CnllamaError(f"{file}: the saved adapter cannot be read back ({error}); is the disk full?") from None
    for name, value in largest.items():
        if not value < float("inf"):
            _refuse(file, f"{name} holds NaN or infinity")
        if value == 0 and "lora_B" not in name:
            _refuse(file, f"{name} is all zero")
    learned = [value for name, value in largest.items() if "lora_B" in name]
    if learned and not any(learned):
        _refuse(file, "every LoRA matrix B is zero, so the adapter changes nothing: is the learning rate 0?")


def check_finite(directory: Path) -> None:
    """Reads a whole checkpoint back. Raises CnllamaError for a value that is not finite."""
    from safetensors import safe_open

    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as saved:
            for name in saved.keys():  # noqa: SIM118 (it is no mapping)
                if not bool(saved.get_tensor(name).isfinite().all()):
                    _refuse(file, f"{name} holds NaN or infinity")


def _refuse(file: Path, found: str) -> None:
    raise CnllamaError(f"{file}: read back after saving, {found}; the checkpoint is not usable and training stops here")


class MergedBase:
    """A base with earlier adapters on it, merged by the converter's own code, read from the files tensor by tensor.

    Raises InputError as `cnllama convert` does.
    """

    def __init__(self, base: Path, adapters: Sequence[Path] = ()) -> None:
        from cnllama.convert.pack import make_plan

        self._plan = make_plan(base, adapters)

    def values(self, name: str) -> torch.Tensor:
        """A tensor with all its rows, float32; lm_head is embed_tokens where they are tied."""
        tied = name == LM_HEAD and name not in self._plan.tensors
        tensor = self._plan.tensors[EMBEDDING if tied else name].padded()
        values = torch.from_numpy(tensor.read())
        tensor.release()
        return values

    def fold(self, model: Any) -> None:
        """Puts all that the adapters change into a model of the base.

        model: made with the configuration of the plan: tied embeddings and biases as the adapters leave them.
        """
        from cnllama.convert.merge import changed_names

        if self._plan.vocabulary.rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(self._plan.vocabulary.rows, mean_resizing=False)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in changed_names(self._plan.checkpoint, self._plan.tensors):
                parameters[name].copy_(self.values(name))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all)."""
    # where DeepSpeed keeps a part of a parameter, it tells the size of the whole
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in model.parameters()]
    return sum(n for n, grad in sizes if grad), sum(n for n, _ in sizes)
