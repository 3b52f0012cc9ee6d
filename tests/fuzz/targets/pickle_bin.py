# SPDX-License-Identifier: Apache-2.0
"""PyTorch's .bin files, of a base and of an adapter: the archive, the opcodes of its pickle, the format before 1.6."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

from fuzz import mutate_bytes, mutate_pickle, seeds
from fuzz.case import Case, Special
from fuzz.engine import Target
from fuzz.targets.checkpoint import damaged_json, run_conversion

BASE, LORA = "base", "lora"
_WHOLE, _ADAPTER = f"{BASE}/pytorch_model.bin", f"{LORA}/adapter_model.bin"
_INDEX = f"{BASE}/pytorch_model.bin.index.json"
_ODD = (
    "nested",
    "parameters",
    "strided",
    "expanded",
    "integers",
    "sparse",
    "meta",
    "empty",
    "list",
    "complex",
    "double",
)


class PickleBin(Target):
    name: ClassVar[str] = "pickle"
    share: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("cnllama.llm", "cnllama.convert.pack", "cnllama.cli.convert", "models", "torch")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.files = {
            (variant.name, name): path.read_bytes()
            for variant in sorted(folder.iterdir())
            for name in (_WHOLE, _ADAPTER, _INDEX, f"{BASE}/pytorch_model-00002-of-00002.bin")
            if (path := variant / name).exists()
        }

    @staticmethod
    def make_seeds(folder: Path) -> None:
        import torch

        for variant in ("zip", "legacy", *_ODD):
            base = seeds.checkpoint(folder / variant / BASE, kind="bin")
            if variant == "legacy":
                state = torch.load(base / "pytorch_model.bin")
                torch.save(state, base / "pytorch_model.bin", _use_new_zipfile_serialization=False)
            elif variant in _ODD:
                torch.save(_odd(torch, variant, torch.load(base / "pytorch_model.bin")), base / "pytorch_model.bin")
        seeds.checkpoint(folder / "shards" / BASE, kind="bin", shards=2)
        for variant in ("lora", "lora-legacy"):
            seeds.checkpoint(folder / variant / BASE)
            adapter = seeds.adapter(folder / variant / LORA, {})
            (adapter / "adapter_model.safetensors").unlink()
            state = {name: torch.from_numpy(value) for name, value in seeds.layer_pairs().items()}
            zipped = variant == "lora"
            torch.save(state, adapter / "adapter_model.bin", _use_new_zipfile_serialization=zipped)

    def mutant(self, rng: random.Random) -> Case:
        variant, name = rng.choice(sorted(self.files))
        if rng.random() < 0.4:  # the odd ones are many
            variant, name = rng.choice(
                [("zip", _WHOLE), ("legacy", _WHOLE), ("lora", _ADAPTER), ("lora-legacy", _ADAPTER)]
            )
        how = rng.choices(("plan", "convert", "command", "values"), (76, 6, 6, 12))[0]
        made: bytes | Special | None
        if variant in _ODD and rng.random() < 0.1:
            return Case(variant, {}, {"how": how}, [f"as it is: {variant}"])
        if rng.random() < 0.02:
            made = rng.choice([None, mutate_bytes.special(rng)])
            steps = [made.kind if made else "removed"]
        elif name == _INDEX:
            made, steps = damaged_json(rng, self.files[variant, name], {})
        else:
            made, steps = mutate_pickle.mutate(rng, self.files[variant, name])
        return Case(variant, {name: made}, {"how": how}, [f"{variant}: {step}" for step in steps])

    def run(self, case: Case, folder: Path) -> str:
        loras = [folder / LORA] if (folder / LORA).exists() else []
        return run_conversion(case.call["how"], folder / BASE, loras, folder)


def _odd(torch: Any, kind: str, state: dict[str, Any]) -> Any:
    """What torch.save takes and no checkpoint should be."""
    name = "model.embed_tokens.weight"
    value = state[name]
    changed = {
        "parameters": lambda: {key: torch.nn.Parameter(item.float()) for key, item in state.items()},
        "nested": lambda: {"model": state, "optimizer": {}},
        "list": lambda: list(state.items()),
        "empty": dict,
        "strided": lambda: state | {name: value.t().contiguous().t()},
        "expanded": lambda: state | {name: value[:1].expand(1 << 40, value.shape[1])},
        "integers": lambda: state | {name: value.to(torch.int8)},
        "sparse": lambda: state | {name: value.float().to_sparse()},
        "meta": lambda: state | {name: value.to("meta")},
        "complex": lambda: state | {name: value.to(torch.complex64)},
        "double": lambda: state | {name: value.double(), 3: value},
    }
    return changed[kind]()
