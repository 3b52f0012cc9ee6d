# SPDX-License-Identifier: Apache-2.0
"""What the evaluation tests share: official files in small, and models whose answers are known."""

from __future__ import annotations

import csv
import functools
import io
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import models
import numpy as np

from cnllama.errors import CnllamaError
from cnllama.tokenizer import Tokenizer

LETTERS = "ABCD"
MARKERS = "春夏秋冬"  # a question with the n-th of them has the n-th letter as its answer

Row = tuple[str, str, str, str, str, str]  # question, four choices, answer


def evaluate(*args: object) -> subprocess.CompletedProcess[str]:
    """Runs `cnllama eval ...` in this process: importing torch again for every case would take minutes."""
    from cnllama.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    words = ["eval", *map(str, args)]
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def refusal(action: Callable[[], object]) -> str:
    """What an action refuses its input with, one printable line; "" when it does not. Anything else is a fault."""
    try:
        action()
        return ""
    except CnllamaError as error:
        text = str(error)
    assert text.isprintable(), text
    return text


@functools.cache
def letter_tokenizer() -> bytes:
    """A vocabulary in which each letter has a piece with a space, one without, and each marker is one piece."""
    extra = ["A B C D", *(f"答案：{letter}" for letter in LETTERS)] * 20 + ["春 夏 秋 冬", "春夏秋冬"] * 5
    return models.train_tokenizer(models.sample_lines() + extra, 900)


def rows(count: int, first: int = 0, marked: bool = True) -> list[Row]:
    """Questions of different lengths; where `marked`, the marker in them tells the right answer."""
    result = []
    for i in range(first, first + count):
        number = (i * 7 + i // 3) % 4
        marker = MARKERS[number] if marked else ""
        text = f"从前有一个农夫，{marker}他每天都去田里" + "，天空和大海" * (i % 5) + f"，第{i}题？"
        result.append((text, f"天{i}", "地", f"人{i % 3}", "海", LETTERS[number]))
    return result


def write_ceval(
    data: Path, split: str, subject: str, questions: Iterable[Row], explanations: Sequence[str] = ()
) -> Path:
    """A C-Eval file in the official layout: val with answers, test without, dev with explanations."""
    path = data / split / f"{subject}_{split}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = ["id", "question", *LETTERS]
    header += {"val": ["answer"], "dev": ["answer", "explanation"], "test": []}[split]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for i, (question, a, b, c, d, answer) in enumerate(questions):
            values = [str(i), question, a, b, c, d, answer, explanations[i] if explanations else f"因为{i}"]
            writer.writerow(values[: len(header)])
    return path


def write_cmmlu(data: Path, split: str, subject: str, questions: Iterable[Row]) -> Path:
    """A CMMLU file in the official layout."""
    path = data / split / f"{subject}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "Question", *LETTERS, "Answer"])
        for i, row in enumerate(questions):
            writer.writerow([str(i), *row])
    return path


def letter_ids(tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """(with a space, after a colon) for every letter."""
    return [(tokenizer.encode(letter)[0], tokenizer.encode("：" + letter)[-1]) for letter in LETTERS]


def planted_tensors(config: dict[str, Any], tokenizer: Tokenizer, letter: str | None) -> models.Tensors:
    """A model that always answers `letter`, or with None the one that the marker in the prompt stands for.

    Nothing but the embedding reaches the output of the first kind. In the second, attention is uniform: it averages the
    markers of all positions into four dimensions that the output matrix reads.
    """
    tensors = {name: np.zeros_like(value) for name, value in models.random_tensors(config).items()}
    tensors |= {name: value + 1 for name, value in tensors.items() if "norm" in name}
    tensors["model.embed_tokens.weight"][:, 0] = 1
    head = tensors["lm_head.weight"]
    for number, ids in enumerate(letter_ids(tokenizer)):
        for i in ids:
            if letter is None:
                head[i, 5 + number] = 8
            elif LETTERS[number] == letter:
                head[i, 0] = 8
    if letter is None:
        for number, marker in enumerate(MARKERS):
            tensors["model.embed_tokens.weight"][tokenizer.encode("天" + marker)[-1], 1 + number] = 20
            tensors["model.layers.0.self_attn.v_proj.weight"][number, 1 + number] = 1
            tensors["model.layers.0.self_attn.o_proj.weight"][5 + number, number] = 1
    return tensors


def planted_llama(directory: Path, letter: str | None) -> Path:
    """The Hugging Face checkpoint of `planted_tensors`."""
    model = letter_tokenizer()
    config = models.small_config(models.piece_count(model))
    tensors = planted_tensors(config, Tokenizer(model), letter)
    return models.make_llama(directory, model, dtype="float32", tensors=tensors)


def dequantized_checkpoint(cnl: Path, source: Path, directory: Path) -> Path:
    """A float32 checkpoint with exactly the weights of a packed file that was made from `source`."""
    from cnllama.format import open_cnl

    file = open_cnl(cnl)
    tensors = {name: models.dequantize(entry) for name, entry in file.engine_tensors().items()}
    config = {key: value for key, value in models.json_of(source / "config.json").items() if key != "torch_dtype"}
    return models.make_llama(directory, file.tokenizer_model, dtype="float32", tensors=tensors, **config)
