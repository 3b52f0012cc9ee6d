# SPDX-License-Identifier: Apache-2.0
"""Command lines: options of every verb, as the parsers declare them, with values of any kind; text on standard input.

Nothing may reach outside of the input's folder: some commands replace or remove what their options name. So no value
here is an absolute path or leads upwards, and recipes, which run scripts, are not run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
from pathlib import Path
from typing import Any, ClassVar

import models

from fuzz import engine, mutate_json, mutate_safetensors, seeds
from fuzz.case import Case, Content, Special
from fuzz.engine import FindingError, Target
from fuzz.targets.text_inputs import QUESTIONS

# What works on the seeds and ends soon. Training is only given data that are not there.
SOUND: tuple[tuple[int, str], ...] = (
    (30, "run -m model.cnl -p a -n 2"),
    (6, "run -m model.cnl -f data.txt -n 1 --stats"),
    (12, "chat -m model.cnl -n 2"),
    (10, "convert base -o new.cnl --quantizer rtn"),
    (8, "convert base --lora lora -o new.cnl --quantizer rtn --report report.json"),
    (6, "info model.cnl"),
    (6, "verify model.cnl"),
    (6, "plan model.cnl"),
    (8, "export model.cnl -o new.gguf"),
    (4, "bench nope.cnl --quick"),
    (4, "tokenizer train nope.txt --vocab-size 400 -o newtok"),
    (6, "tokenizer merge tok lora -o newtok"),
    (4, "tokenizer report tok tok data.txt"),
    (4, "adapt create -o new --tokenizer nope --hidden-size 32 --layers 1 --heads 2"),
    (5, "adapt resize base --tokenizer tok -o new"),
    (5, "adapt pretrain base -o new --data nope.txt --max-steps 1"),
    (5, "adapt sft base -o new --data nope.jsonl --max-steps 1"),
    (5, "adapt merge base --lora lora -o new"),
    (6, "eval ppl model.cnl data.txt --ctx 16 --chars 100"),
    (6, "eval kl model.cnl data.txt --reference-logits reference.safetensors --ctx 16 --stride 8"),
    (5, "eval ceval model.cnl --data ceval"),
    (2, "eval cmmlu model.cnl --data ceval"),
)
_INTEGERS = (
    *(
        "0",
        "1",
        "2",
        "3",
        "7",
        "-1",
        "-2",
        "100",
        str(1 << 31),
        str(-(1 << 31) - 1),
        str(1 << 32),
        str((1 << 63) - 1),
        str(1 << 63),
    ),
    *(
        str(1 << 64),
        str(-(1 << 63) - 1),
        "1" + "0" * 40,
        "9" * 5000,
        "1.0",
        "1e3",
        "0x10",
        "１２",
        "1_0",
        " 5",
        "",
        "nan",
        "x",
        "+4",
    ),
)
_FLOATS = (
    *(
        "0",
        "0.0",
        "-0.0",
        "1",
        "0.5",
        "-1",
        "1e-320",
        "1e308",
        "1e309",
        "-1e309",
        "nan",
        "inf",
        "-inf",
        "infinity",
        "1e-45",
        "3.5e38",
    ),
    *("", "x", "0x1p3", "１.5", "1_0.5", "9" * 5000, "1," * 3),
)
_NAMES = (
    *(
        "model.cnl",
        "base",
        "lora",
        "tok",
        "data.txt",
        "data.jsonl",
        "ceval",
        "reference.safetensors",
        "nope",
        "nope/x/y",
        "new",
    ),
    *(
        "base/config.json",
        "",
        ".",
        "a\nb",
        "\x1b[2Jx",
        "\udcff.cnl",
        "中文.cnl",
        "x" * 300,
        "a/b/c",
        "fifo",
        "zero",
        "link",
        "n" * 5000,
    ),
)
_WORDS = tuple(
    text
    for text in (*mutate_json.STRINGS, "fp16", "int8", "lookup", "raw", "chatml", "auto", "q4", "q9", "cpu", "*=q8")
    if not text.startswith(("/", "..", "~"))
)  # fmt: skip
_LINES = (
    *(
        b"a\n",
        "从前\n".encode(),
        b"/exit\n",
        b"/reset\n",
        b"/help\n",
        b"\n",
        b"\xff\xfe\n",
        "从前".encode("gb18030") + b"\n",
        b"\x00\n",
    ),
    *(
        b"x" * 5000 + b"\n",
        b"\x1b[200~a\nb\x1b[201~\n",
        b"\r\n",
        "\ufeffa\n".encode(),
        "\u2028\n".encode(),
        b"<s></s>[INST]\n",
        b"a",
    ),
)
_NEVER = ("adapt run",)


class Arguments(Target):
    name: ClassVar[str] = "args"
    share: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = (
        "cnllama.llm", "cnllama.convert.parity", "cnllama.convert.gguf.export", "cnllama.adapt.pretrain",
        "cnllama.adapt.sft", "cnllama.adapt.create", "cnllama.adapt.merge", "cnllama.adapt.resize", "cnllama.cli.eval",
        "cnllama.cli.bench", "cnllama.eval.text_scores", "cnllama.eval.multiple_choice", "cnllama.stats", "models",
        "matplotlib.figure", "matplotlib.backends.backend_agg",  # half imported at a time limit they never work again
    )  # fmt: skip
    copied: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.options = {leaf: _options(leaf) for leaf in {leaf_of(line) for _, line in SOUND}}
        self.reference = (folder / "all" / "reference.safetensors").read_bytes()

    @staticmethod
    def make_seeds(folder: Path) -> None:
        from cnllama.convert.pack import convert

        place = folder / "all"
        base = seeds.checkpoint(place / "base")
        seeds.adapter(place / "lora", seeds.layer_pairs())
        convert(base, [], place / "model.cnl", quant="q8")
        (place / "tok").mkdir()
        models.write_tokenizer(place / "tok", seeds.grown_tokenizer())
        text = "\n".join(models.english_lines()[:3]) + "\n"
        (place / "data.txt").write_text(text, encoding="utf-8")
        (place / "data.jsonl").write_bytes(
            b"".join(mutate_json.dump({"text": line}) + b"\n" for line in text.splitlines())
        )
        (place / "ceval" / "val").mkdir(parents=True)
        (place / "ceval" / "val" / "accountant_val.csv").write_text("\n".join(QUESTIONS[:2]) + "\n", encoding="utf-8")
        os.chdir(place)
        made = "eval kl model.cnl data.txt --ctx 16 --stride 8 --chars 100 --reference base --save-reference"
        code, _, err = engine.command([*made.split(), "reference.safetensors"])
        assert code == 0, err

    def mutant(self, rng: random.Random) -> Case:
        line = rng.choices([line for _, line in SOUND], [weight for weight, _ in SOUND])[0]
        words = line.split()
        steps = []
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            change = rng.choices((self._option, self._value, self._order), (12, 4, 2))[0]
            steps.append(change(rng, words, leaf_of(line)))
        if " ".join(words[:2]) in _NEVER:
            words[1] = "merge"
        if words[0] == "bench" and "nope.cnl" not in words:  # it would measure the bundled model
            words.append("nope.cnl")
        stdin = b"".join(rng.choice(_LINES) for _ in range(rng.choice([0, 1, 2, 5]))) if words[:1] == ["chat"] else b""
        files: dict[str, Content] = {
            "fifo": Special("fifo"),
            "zero": Special("zero device"),
            "link": Special("dangling link"),
        }
        if "reference.safetensors" in words and rng.random() < 0.6:
            files["reference.safetensors"], done = mutate_safetensors.mutate(
                rng, self.reference, ["logprobs", "target_logprobs"]
            )
            steps += [f"reference: {step}" for step in done]
        shown = " ".join(
            mutate_json.short(word) if not word.isprintable() or len(word) > 70 else word for word in words
        )
        call = {"argv": words, "stdin": stdin.hex(), "sound": words == line.split()}
        return Case(
            "all",
            files,
            call,
            [f"cnllama {shown}", *([f"stdin {stdin!r:.200}"] if stdin else []), *filter(None, steps)],
        )

    def run(self, case: Case, folder: Path) -> str:
        before = Path.cwd()
        os.chdir(folder)
        try:
            code, _, err = engine.command(case.call["argv"], bytes.fromhex(case.call["stdin"]))
        finally:
            os.chdir(before)
        if code and case.call["sound"] and case.call["argv"][0] == "chat":
            raise FindingError("wrong", f"rc {code}: {err[-300:]}", "a turn that ends the conversation")
        return f"rc {code}"

    def names(self, case: Case, folder: Path) -> tuple[str, ...]:
        return ()

    def _option(self, rng: random.Random, words: list[str], leaf: str) -> str:
        """One more option of the verb."""
        action = rng.choice(self.options[leaf])
        name = rng.choice(action.option_strings) if action.option_strings else ""
        given = (
            [] if action.nargs == 0 else [_any_value(rng, action) for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 1, 2]))]
        )
        if name and given and rng.random() < 0.3:
            words += [f"{name}={given[0]}", *given[1:]]
        else:
            words += [*([name] if name else []), *given]
        return ""

    def _value(self, rng: random.Random, words: list[str], leaf: str) -> str:
        """Another value of an option that is there, or another positional."""
        which = rng.randrange(len(leaf.split()), len(words)) if len(words) > len(leaf.split()) else 0
        option = words[which - 1]
        action = next((a for a in self.options[leaf] if option in a.option_strings), None)
        words[which] = _any_value(rng, action) if action else rng.choice(_NAMES)
        return ""

    def _order(self, rng: random.Random, words: list[str], leaf: str) -> str:
        """A word goes, comes twice or changes its place; words that mean something to parsers are put in."""
        which = rng.randrange(len(words))
        kind = rng.randrange(4)
        if kind == 0:
            del words[which]
        elif kind == 1:
            words.insert(which, words[which])
        elif kind == 2:
            other = rng.randrange(len(words))
            words[which], words[other] = words[other], words[which]
        else:
            words.insert(
                which,
                rng.choice(["--", "-", "@x", "-h", "--help", "--debug", "--nope", "-p", "--no-check", "", "--lora"]),
            )
        if not words:
            words.append("")
        return ""


def leaf_of(line: str) -> str:
    """The verb of a command line, with its verb's verb where it has any."""
    words = line.split()
    return " ".join(words[:2]) if words[0] in ("tokenizer", "adapt", "eval") else words[0]


def _options(leaf: str) -> list[argparse.Action]:
    """What the parser of a verb declares."""
    verb, _, inner = leaf.partition(" ")
    parser = argparse.ArgumentParser(allow_abbrev=False)
    importlib.import_module(f"cnllama.cli.{verb}").add_arguments(parser)
    if inner:
        choices: Any = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = choices[inner]
        getattr(parser, "declare", lambda: None)()
    return [action for action in parser._actions if action.dest != "help"]


def _any_value(rng: random.Random, action: argparse.Action) -> str:
    """A value of the kind that an option takes, mostly."""
    if rng.random() < 0.1:
        return rng.choice(_WORDS)
    if action.choices:
        return str(rng.choice([*action.choices, "nope"]))
    if action.type is int:
        return rng.choice(_INTEGERS)
    if action.type is float:
        return rng.choice(_FLOATS)
    return rng.choice([*_NAMES, *_WORDS] if action.type is not Path else _NAMES)
