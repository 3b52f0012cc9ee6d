# SPDX-License-Identifier: Apache-2.0
"""The commands that are killed, their inputs, and what lies in their place before they begin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import adapt_data
import models

RECIPE = """
[[stage]]
name = "tokenizer"
do = "tokenizer merge"
base = "${recipe}/base"
new = "${recipe}/english.model"

[[stage]]
name = "resized"
do = "adapt resize"
base = "${recipe}/base"
tokenizer = "${tokenizer}"

[[stage]]
name = "trained"
do = "adapt pretrain"
model = "${resized}"
data = ["${data}/zh.txt"]
block_size = 48
batch_size = 2
max_steps = 1
eval_every = 0
rank = [2, 4]

[[stage]]
name = "packed"
do = "convert"
base = "${resized}"
quantizer = "rtn"
output = "x.cnl"

[[stage]]
name = "noted"
do = "script"
file = "${recipe}/note.py"
"""
SCRIPT = """
import sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("-o") + 1])
(out / "deep").mkdir(parents=True, exist_ok=True)
for name in ("one.txt", "deep/two.txt"):
    (out / name).write_text(name)
"""
TRAINING = (
    "--batch-size 2 --max-steps 3 --log-every 2 --eval-every 2 --save-every 1 --keep 1 "
    "--cache {work}/tokens --block-size "
)
# Names that are nearly those of temporary files, and others, in every directory that a command writes to.
FOREIGN = {
    "notes.txt": b"mine", "photos/1.jpg": b"mine, too", ".x.cnl.part": b"mine", ".out.cnllama-12-0123ABCD.part": b"m",
    "model.safetensors.tmp": b"mine", "x.cnl.bak": b"mine",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command. Its words hold {inputs} and {work}, a directory that it and the files before it have to themselves.

    other: options of an earlier result. refuses: it is not overwritten. discards: the command says that it is to go.
    folder: the directory that it fills, "" for none. shared: whether other files may lie there. kills: how many of 300
    random kills.
    """

    name: str
    line: str
    other: str
    refuses: bool = False
    discards: bool = False
    folder: str = ""
    shared: bool = False
    kills: int = 0

    def words(self, inputs: Path, work: Path, more: str = "") -> list[str]:
        """The command line."""
        return [word.format(inputs=inputs, work=work) for word in f"{self.line} {more}".split()]

    def put_foreign_files(self, work: Path) -> None:
        """Other people's files, beside what the command writes and, where they may be, among it."""
        for folder in (work, *([work / self.folder] if self.folder and self.shared else [])):
            for name, data in FOREIGN.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)


_ALL = [
    Case("tokenizer-train", "tokenizer train {inputs}/zh.txt -o {work}/out --vocab-size 400 --no-hard-vocab-limit",
         "--user-defined-symbols 春天", folder="out", shared=True, kills=30),
    Case("tokenizer-train-file", "tokenizer train {inputs}/zh.txt -o {work}/new/x.model --vocab-size 400 "
         "--no-hard-vocab-limit", "--user-defined-symbols 春天", kills=20),
    Case("tokenizer-merge", "tokenizer merge {inputs}/base {inputs}/english.model -o {work}/out", "--pad",
         folder="out", shared=True, kills=40),
    Case("create", "adapt create {inputs}/base -o {work}/out --hidden-size 32 --heads 2 --layers 1", "--seed 1",
         refuses=True, folder="out", kills=15),
    Case("resize", "adapt resize {inputs}/base {inputs}/merged -o {work}/out", "--init zeros", refuses=True,
         folder="out", kills=40),
    Case("merge", "adapt merge {inputs}/base --lora {inputs}/lora -o {work}/out", "--dtype float32", refuses=True,
         folder="out", kills=40),
    Case("pretrain", f"adapt pretrain {{inputs}}/base -o {{work}}/out --data {{inputs}}/zh.txt --eval "
         f"{{inputs}}/zh_eval.txt {TRAINING}48", "--rank 4", refuses=True, folder="out", shared=True, kills=12),
    Case("pretrain-full", f"adapt pretrain {{inputs}}/base -o {{work}}/out --data {{inputs}}/zh.txt --full "
         f"{TRAINING}48", "--lr 1e-3", refuses=True, folder="out", shared=True, kills=12),
    Case("sft", f"adapt sft {{inputs}}/base -o {{work}}/out --data {{inputs}}/sft.jsonl --eval "
         f"{{inputs}}/sft_eval.jsonl {TRAINING}400 --template chatml", "--rank 4", refuses=True, folder="out",
         shared=True, kills=12),
    Case("convert", "convert {inputs}/base --lora {inputs}/lora -o {work}/x.cnl --quantizer rtn --report "
         "{work}/report.json", "--quant q8",
         kills=40),
    Case("convert-gptq", "convert {inputs}/base -o {work}/x.cnl --quantizer gptq --calibrate-tokens 4x64", "--quant q8",
         kills=12),
    Case("export", "export {inputs}/x.cnl -o {work}/x.gguf", "--type f16", kills=20),
    Case("pretrain-restart", f"adapt pretrain {{inputs}}/base -o {{work}}/out --data {{inputs}}/zh.txt --restart "
         f"{TRAINING}48 --save-every 0", "--rank 4", discards=True, folder="out"),
    Case("recipe", "adapt run {inputs}/recipe.toml --data {inputs} -o {work}/out", "", folder="out", shared=True,
         kills=7),
    Case("recipe-redo", "adapt run {inputs}/recipe.toml --data {inputs} -o {work}/out --redo resized", "",
         discards=True, folder="out", shared=True),
]  # fmt: skip
CASES = {case.name: case for case in _ALL}


def make_inputs(folder: Path) -> Path:
    """What all cases read: a base of two layers, an adapter, tokenizers, texts, a packed file, a recipe."""
    import torch
    from cnllama.convert.pack import convert
    from transformers import LlamaForCausalLM

    from cnllama.adapt.progress import quiet
    from cnllama.adapt.tokenizer_merge import merge_tokenizers, open_model, write_tokenizer_files

    torch.set_num_threads(1)
    quiet()
    adapt_data.write_data(folder)
    base = adapt_data.small_base(folder / "base", folder)
    english = models.train_tokenizer((folder / "en.txt").read_text().splitlines(), 340)
    (folder / "english.model").write_bytes(english)
    model = LlamaForCausalLM.from_pretrained(base)
    models.make_adapter(model, folder / "lora", (base / "tokenizer.model").read_bytes(), r=4)
    (folder / "merged").mkdir()
    merged = merge_tokenizers(open_model(base), open_model(folder / "english.model"), pad=True)
    write_tokenizer_files(folder / "merged", merged.model)
    convert(base, [], folder / "x.cnl", threads=1)
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    (folder / "note.py").write_text(SCRIPT, encoding="utf-8")
    return folder
