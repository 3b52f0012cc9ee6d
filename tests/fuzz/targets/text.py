# SPDX-License-Identifier: Apache-2.0
"""Texts that people give: training data, recipes, questions, prompts and what earlier runs of ours left beside them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fuzz import engine, mutate_bytes, seeds
from fuzz.case import Case
from fuzz.engine import FindingError, Target
from fuzz.targets.text_inputs import KINDS, QUESTIONS, VOCABULARY, WINDOWS


class Text(Target):
    name: ClassVar[str] = "text"
    share: ClassVar[int] = 5
    needs: ClassVar[tuple[str, ...]] = (
        "cnllama.adapt.data", "cnllama.adapt.recipe", "cnllama.adapt.pretrain", "cnllama.adapt.sft",
        "cnllama.adapt.create", "cnllama.cli.tokenizer", "cnllama.convert.quantize.calibration",
        "cnllama.eval.questions", "cnllama.eval.stored", "cnllama.eval.texts", "models",
    )  # fmt: skip

    @staticmethod
    def make_seeds(folder: Path) -> None:
        import models

        (folder / "all").mkdir()
        models.write_tokenizer(folder / "all", seeds.tokenizer())

    def mutant(self, rng: random.Random) -> Case:
        kind = engine.choose(rng, KINDS)
        name, content, call, steps = kind(rng)
        if rng.random() < 0.01:
            special = mutate_bytes.special(rng)
            content, steps = special, [special.kind]
        return Case("all", {name: content}, call | {"file": name}, steps)

    def run(self, case: Case, folder: Path) -> str:
        how = case.call["how"]
        return _RUNS[how](folder / case.call["file"], folder, case.call)

    def names(self, case: Case, folder: Path) -> tuple[str, ...]:
        return (str(folder), "--set", "the template")


def _documents(path: Path, folder: Path, call: dict[str, Any]) -> str:
    from cnllama.adapt.reading import ReadLog, read_documents

    log = ReadLog()
    documents = list(read_documents(path, log, **({"template": call["template"]} if "template" in call else {})))
    _check_texts(documents, log.lines())
    return f"{bool(documents)} {bool(log.count)}"


def _chat(path: Path, folder: Path, call: dict[str, Any]) -> str:
    from cnllama.adapt.reading import ReadLog, read_conversations

    log = ReadLog()
    found = [message["content"] for _, messages in read_conversations(path, log) for message in messages]
    _check_texts(found, log.lines())
    return f"{bool(found)} {bool(log.count)}"


def _check_texts(texts: Sequence[str], lines: Sequence[str]) -> None:
    for text in texts:
        text.encode("utf-8")
    for line in lines:
        if not line.isprintable():
            raise FindingError(
                "printed", f"a problem: {line!r:.300}", "a problem of a data file with control characters"
            )


def _prepared(chat: bool) -> Callable[[Path, Path, dict[str, Any]], str]:
    def run(path: Path, folder: Path, call: dict[str, Any]) -> str:
        from cnllama.adapt.data import Source, prepare_chat, prepare_text
        from cnllama.adapt.tokenfile import open_vocabulary

        vocabulary = open_vocabulary(folder)
        sources = [Source(path)]
        data: Any
        if chat:
            data = prepare_chat(sources, vocabulary, folder / "cache", max_length=64)
        else:
            data = prepare_text(sources, vocabulary, folder / "cache", block_size=8)
        for index in range(min(3, len(data))):
            ids = data[index]["input_ids"]
            if not len(ids) or ids.min() < 0 or ids.max() >= vocabulary.size:
                raise FindingError("wrong", f"ids are {ids!r:.80}", "training data outside the vocabulary")
        for report in data.reports:
            _check_texts([], report.lines())
        return "prepared"

    return run


def _recipe_run(path: Path, folder: Path, call: dict[str, Any]) -> str:
    from cnllama.adapt.recipe import expand, read_recipe

    recipe = read_recipe(path, folder if call["data"] else None, call["set"])
    tasks = expand(recipe, folder / "out")  # never run: a stage may be a script
    return f"{len(tasks)} tasks"


def _questions(path: Path, folder: Path, call: dict[str, Any]) -> str:
    from cnllama.eval.benchmarks import BENCHMARKS
    from cnllama.eval.questions import read_subjects

    for split in ("val", "dev"):
        other = folder / split / f"accountant_{split}.csv"
        if other != path:
            other.parent.mkdir(exist_ok=True)
            other.write_text("\n".join(QUESTIONS) + "\n", encoding="utf-8")
    subjects, _ = read_subjects(BENCHMARKS["ceval"], folder, "val", shots=call["shots"], cot=call["cot"])
    for question in (*subjects[0].questions, *subjects[0].shots):
        if not question.text.strip() or question.answer not in ("A", "B", "C", "D", None):
            raise FindingError("wrong", f"{question!r:.100}", "a question without text or with another answer")
    return "questions"


def _prompt(path: Path, folder: Path, call: dict[str, Any]) -> str:
    from cnllama.textio import read_text_file

    read_text_file(path).encode("utf-8")
    return "prompt"


def _eval_text(path: Path, folder: Path, call: dict[str, Any]) -> str:
    from cnllama.eval.texts import read_text

    text, problems = read_text(path, split=True, characters=1000)
    _check_texts(text.documents, problems)
    return "text"


def _calibration(path: Path, folder: Path, call: dict[str, Any]) -> str:
    from cnllama.convert.quantize.calibration import read_calibration

    from cnllama.adapt.tokenfile import open_vocabulary

    vocabulary = open_vocabulary(folder)
    found = read_calibration(path, vocabulary.tokenizer, {"max_position_embeddings": 512}, (4, 16))
    if found.samples.min() < 0 or found.samples.max() >= vocabulary.size:
        raise FindingError("wrong", f"ids are {found.samples!r:.80}", "calibration data outside the vocabulary")
    return "calibration"


def _reference(path: Path, folder: Path, call: dict[str, Any]) -> str:
    from cnllama.eval.stored import StoredScorer
    from cnllama.eval.texts import Window

    parts = [Window(ids, begin, targets, len(targets)) for ids, begin, targets in WINDOWS]
    rows = list(StoredScorer(path, parts, VOCABULARY).rows(parts))
    if [len(found.logits) for found in rows] != [len(part.targets) for part in parts]:
        raise FindingError("wrong", f"{len(rows)} rows", "a stored reference with other rows")
    return "reference"


def _check_owned(own: Any, folder: Path) -> None:
    """A record names nothing outside of its directory, and no file that is not as it says."""
    for name in (*own.names(), *own.directories()):
        if not (folder / "out" / name).resolve().is_relative_to(folder):
            raise FindingError("wrong", f"{name!r:.100} is outside", "a record of files elsewhere")
        if own.is_ours(name) and not (folder / "out" / name).is_file():
            raise FindingError("wrong", f"{name!r:.100} is ours", "a record of what is no file")
    own.damaged(), own.size(), own.strangers()


def _report(path: Path, folder: Path, call: dict[str, Any]) -> str:
    code, _, _ = engine.command(["tokenizer", "report", str(folder), str(folder), str(path)])
    return f"report {code}"


def _left_run(path: Path, folder: Path, call: dict[str, Any]) -> str:
    from cnllama.adapt.checkpoints import complete_checkpoints
    from cnllama.adapt.progress import read_records
    from cnllama.ownership import OwnedDirectory

    for record in read_records(folder / "log.jsonl"):
        json.dumps(record["step"] <= 3)
    (folder / "out").mkdir(exist_ok=True)
    own = OwnedDirectory(folder / "out", "fuzz")
    if path.name == ".cnllama.json":
        own.read()
        _check_owned(own, folder)
    else:
        own._directories = ["checkpoint-5"]
        complete_checkpoints(own)
    if path.name == "cache.json":
        from cnllama.adapt.tokenfile import TokenFile

        (folder / "cache.ends").write_bytes(b"\x03" + bytes(7))
        (folder / "cache.tokens").write_bytes(b"\x01\x00\x02\x00\x03\x00")
        try:
            file = TokenFile(folder / "cache")
        except (OSError, ValueError, KeyError, TypeError):  # by which token_file knows that it must be made again
            return "made again"
        len(file.tokens) + len(file.starts)
    return "left"


_RUNS: dict[str, Callable[[Path, Path, dict[str, Any]], str]] = {
    "documents": _documents, "chat": _chat, "pretrain": _prepared(chat=False), "chat data": _prepared(chat=True),
    "report": _report, "prompt": _prompt, "eval text": _eval_text, "recipe": _recipe_run, "questions": _questions,
    "template": _documents, "left": _left_run,
    "calibration": _calibration, "reference": _reference,
}  # fmt: skip
