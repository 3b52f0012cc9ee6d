# SPDX-License-Identifier: Apache-2.0
"""The facts that an adapter states twice: in its config, in the names and shapes of its tensors, and in the base's.

    fact                     stated by                                         compared
    kind of adapter          peft_type, task_type                              adapter_config.py
    scale                    r, rank_pattern | shapes of lora_A and lora_B     adapters.py
    halves                   lora_A | lora_B                                   adapters.py
    DoRA                     use_dora | lora_magnitude_vector                  adapters.py
    bias of lora_B           lora_bias | lora_B.bias                           adapters.py
    one name for one tensor  names with and without the adapter's name         adapters.py, twins
    targets                  target_modules ... layers_pattern | LoRA tensors  here; embeddings: tying.py
    saved modules            modules_to_save | whole tensors                   here; embeddings: tying.py
    biases                   bias | whole biases | the base's biases           here
    places                   every tensor | what PEFT would load               here; embeddings: tying.py
    sizes                    every shape | the base's                          here; rows: tying.py
    trained tokens           trainable_token_indices | rows of the delta       tying.py
    tying                    ensure_weight_tying | the two copies              tying.py

Each pair is equal, or PEFT's reading of it is taken with a warning, or the adapter is refused; what PEFT would fill
with random numbers or pass over in silence is always refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cnllama.config import EMBEDDING, LM_HEAD, Expected, expected_tensors

from .adapter_targets import EMBEDDING_MODULES, modules_of
from .adapters import Adapter
from .checkpoint import Checkpoint, FloatArray, SourceTensor
from .diagnosis import some
from .tensor_facts import fits
from .tying import COPY_PLACES, OWN_PLACES, Twins, lacking_lora, stray, tokens_by_module

# What stands in front of every name of a model that was wrapped when it was saved.
_WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile", "_fsdp_wrapped_module.": "FSDP"}
BIASED = (".self_attn.", ".mlp.")  # transformers has a setting for the biases of each: all or none
# What stands in a name where an adapter was trained on top of another that had not been merged.
_UNMERGED = (".base_layer.lora_", ".base_layer.base_layer.", ".lora_A.lora_", "base_layer.original_module.")


def check_adapters(adapters: Sequence[Adapter], checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Compares every fact that does not need the vocabulary; adds warnings. Raises InputError, naming both values."""
    modules = modules_of(config)
    expected = dict(expected_tensors({**config, "tie_word_embeddings": False}))
    biases = {name for name in checkpoint.tensors if name.endswith(".bias")}
    for adapter in adapters:
        adapter.settings.targets.check(modules)
        tokens_by_module(adapter)
        _check_places(adapter, expected, config)
        _check_shapes(adapter, checkpoint, expected, config)
        _check_modules(adapter, modules, biases)
        parts = {
            part for name, pair in adapter.pairs.items() if pair.bias is not None for part in BIASED if part in name
        }
        biases |= {name for name in expected if name.endswith(".bias") and any(part in name for part in parts)}


def layer_weights(adapter: Adapter) -> Iterator[tuple[str, SourceTensor, list[Twins]]]:
    """(name, tensor, what must equal it) of every whole tensor of a layer that the file puts in the base's place.

    Raises InputError for one that PEFT would pass over.
    """
    targets = adapter.settings.targets
    for name, forms in adapter.whole.items():
        module = name.rpartition(".")[0]
        if module in EMBEDDING_MODULES:
            continue
        saved = _within_saved(adapter, module)
        wanted = COPY_PLACES if saved else OWN_PLACES["lora" if targets.has_lora(module) else ""]
        # The weight beside a trained copy is the base's own; it is not used.
        known = (*wanted, *OWN_PLACES["saved"]) if saved else wanted
        strays = [tensor for form, tensor in forms.items() if form not in known]
        if strays:
            stray(adapter, strays[0])
        kept = [forms[form] for form in wanted if form in forms]
        if kept:
            yield name, kept[0], [Twins(kept[0], other) for other in kept[1:]]


def _within_saved(adapter: Adapter, module: str) -> bool:
    parts = module.split(".")
    return any(adapter.settings.targets.saves(".".join(parts[:i])) for i in range(len(parts), 1, -1))


def _check_places(adapter: Adapter, expected: Mapping[str, Expected], config: Mapping[str, Any]) -> None:
    """Every tensor is of a module that the base has."""
    lost = list(adapter.unmatched)
    lost += [pair.a.name for name, pair in adapter.pairs.items() if name not in expected]
    lost += [tensor.name for name, tensor in adapter.tokens.items() if name not in (EMBEDDING, LM_HEAD)]
    lost += [t.name for name, forms in adapter.whole.items() if name not in expected for t in forms.values()]
    if not lost:
        return
    if any(part in name for part in _UNMERGED for name in lost):
        adapter.refuse(
            f"{some(lost)} named as in an adapter on top of one that was not merged",
            "merge the first into the base (merge_and_unload) and train or save the second on that",
        )
    wrapper = next((prefix for prefix in _WRAPPERS if all(prefix in name for name in lost)), None)
    if wrapper is not None:
        adapter.refuse(
            f"{some(lost)} named with the prefix {wrapper!r} of {_WRAPPERS[wrapper]}, which PEFT does not know",
            "unwrap the model before saving the adapter (accelerator.unwrap_model)",
        )
    adapter.refuse(
        f"{some(lost)} in the adapter and in no LLaMA of {config['num_hidden_layers']} layers",
        "it was trained on another model",
    )


def _check_shapes(
    adapter: Adapter, checkpoint: Checkpoint, expected: Mapping[str, Expected], config: Mapping[str, Any]
) -> None:
    shapes: list[tuple[str, tuple[int, ...]]] = [(name, pair.shape) for name, pair in adapter.pairs.items()]
    shapes += [(name, tensor.shape) for name, forms in adapter.whole.items() for tensor in forms.values()]
    shapes += [(name, tensor.shape) for name, tensor in adapter.tokens.items()]
    for name, shape in shapes:
        if fits(name, shape, expected[name]):
            continue
        other = next((n for n, e in expected.items() if n not in (EMBEDDING, LM_HEAD) and e.shape == shape), None)
        adapter.refuse(
            f"its {name} is for shape {list(shape)} and the base has {list(expected[name].shape)} "
            f"({checkpoint.directory}, hidden size {config['hidden_size']})"
            + (f", whose {other} has that shape" if other else ""),
            "it was trained on a model of another size or its tensors have changed names; give the one of this size",
        )


def _check_modules(adapter: Adapter, modules: Mapping[str, str], biases: set[str]) -> None:
    """What the config lists is in the file, and the other way round."""
    settings, targets = adapter.settings, adapter.settings.targets
    layers = [name for name in modules if name not in EMBEDDING_MODULES]
    lacking = [name for name in layers if targets.has_lora(name) and f"{name}.weight" not in adapter.pairs]
    if lacking:
        adapter.warnings += lacking_lora(adapter, lacking)
    for name, pair in adapter.pairs.items():
        module = name.removesuffix(".weight")
        if module not in EMBEDDING_MODULES and (not targets.has_lora(module) or pair.embedding):
            stray(adapter, pair.a)
    replaced = {name: tensor for name, tensor, _ in layer_weights(adapter)}
    for module in layers:
        if modules[module] in ("linear", "norm") and _within_saved(adapter, module):
            for name in (f"{module}.weight", f"{module}.bias"):
                if name not in replaced and (name.endswith(".weight") or name in biases):
                    adapter.refuse(
                        f"{name} is not in the file, but {settings.where.name} has it in modules_to_save: it was lost "
                        "on saving"
                    )
    _check_biases(adapter, replaced, biases)
    unlisted = [n for n in replaced if n.endswith(".weight") and not _within_saved(adapter, n.rpartition(".")[0])]
    if unlisted:
        adapter.warnings.append(
            f"{adapter.file}: {some(unlisted)} in the file and not listed in {settings.where.name}: in the base's "
            "place, as in PEFT"
        )
    unused = list(targets.unused(modules))
    if unused:
        adapter.warnings.append(
            f"{settings.where}: {unused[0]}, which is no module of this base: passed over, as in PEFT"
        )


def _check_biases(adapter: Adapter, replaced: Mapping[str, SourceTensor], biases: set[str]) -> None:
    settings, targets = adapter.settings, adapter.settings.targets
    stored = [name for name in replaced if name.endswith(".bias")]
    for name in stored:
        if name not in biases:
            adapter.refuse(
                f"{replaced[name].name} is a trained bias, but the base's layers have none, so PEFT would pass over it",
                "give the base that it was trained on",
            )
    if stored and settings.bias == "none" and not all(_within_saved(adapter, n.rpartition(".")[0]) for n in stored):
        adapter.warnings.append(
            f"{adapter.file}: {some(stored)} in the file although bias is 'none' in {settings.where.name}: in the "
            "base's place, as in PEFT"
        )
    wanted = biases if settings.bias == "all" else set()
    if settings.bias == "lora_only":
        wanted = {name for name in biases if targets.has_lora(name.rpartition(".")[0])}
    lacking = sorted(name for name in wanted if name not in replaced)
    if lacking:
        adapter.warnings.append(
            f"{settings.where}: bias is {settings.bias!r}, but {some(lacking)} not in {adapter.file.name}: the base's "
            "stay, as in PEFT; were they lost on saving?"
        )


def refuse_different(adapter: Adapter, twins: Twins) -> None:
    """Reads both, some rows at a time; raises InputError where two tensors for the same values hold others."""
    shape = twins.other.shape[::-1] if twins.transposed else twins.other.shape
    rows, step = twins.one.shape[0], 1024
    if twins.one.shape != shape or any(
        (twins.one.read(row, row + step) != _rows_of(twins, row, row + step)).any() for row in range(0, rows, step)
    ):
        adapter.refuse(
            f"{twins.one.name} and {twins.other.name} stand for the same values and differ, expected them to be equal"
        )
    twins.one.release()
    twins.other.release()


def _rows_of(twins: Twins, begin: int, end: int) -> FloatArray:
    return twins.other.read()[:, begin:end].T if twins.transposed else twins.other.read(begin, end)
