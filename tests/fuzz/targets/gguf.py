# SPDX-License-Identifier: Apache-2.0
"""Headers of GGUF files, which the comparison with llama.cpp reads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

from fuzz import mutate_bytes, mutate_gguf, seeds
from fuzz.case import Case, Special
from fuzz.engine import FindingError, Target

FILE = "model.gguf"


class Gguf(Target):
    name: ClassVar[str] = "gguf"
    share: ClassVar[int] = 6
    needs: ClassVar[tuple[str, ...]] = ("cnllama.eval.gguf_header", "models")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.bases = {path.name: (path / FILE).read_bytes() for path in sorted(folder.iterdir())}

    @staticmethod
    def make_seeds(folder: Path) -> None:
        from cnllama.convert.gguf.from_checkpoint import write_checkpoint
        from cnllama.convert.pack import make_plan

        for variant, options in (("plain", {}), ("tied", {"tie_word_embeddings": True, "rope_scaling": seeds.YARN})):
            base = seeds.checkpoint(folder / variant / "base", **options)
            write_checkpoint(make_plan(base), folder / variant / FILE)
            for path in base.iterdir():
                path.unlink()
            base.rmdir()

    def mutant(self, rng: random.Random) -> Case:
        variant = rng.choice(sorted(self.bases))
        made: bytes | Special
        if rng.random() < 0.01:
            made = mutate_bytes.special(rng)
            return Case(variant, {FILE: made}, {}, [made.kind])
        made, steps = mutate_gguf.mutate(rng, self.bases[variant])
        return Case(variant, {FILE: made}, {}, steps)

    def run(self, case: Case, folder: Path) -> str:
        from cnllama.eval.gguf_header import read_gguf

        file = read_gguf(folder / FILE)
        size = len(content) if isinstance(content := case.files[FILE], bytes) else 0
        numbers = [*file.tensors.values(), file.step_bytes, sum(file.tensors.values())]
        if not all(type(number) is int and 0 <= number <= size for number in numbers):
            raise FindingError(
                "wrong", f"tensors have {numbers!r:.100} bytes in a file of {size}", "sizes beyond the file"
            )
        if file.kv_bytes < 1 or type(file.kv_bytes) is not int:
            raise FindingError("wrong", f"kv_bytes is {file.kv_bytes!r:.60}", "no size of the cache")
        if not file.type_name.isprintable():
            raise FindingError("printed", f"{file.type_name!r:.100}", "the name of a type with control characters")
        if not all(type(kind) is int and type(count) is int and count >= 0 for kind, count in file.kinds.values()):
            raise FindingError("wrong", f"kinds are {file.kinds!r:.100}", "types that are no numbers")
        return "read"
