# SPDX-License-Identifier: Apache-2.0
"""Questions from the official CSV files; what is malformed is refused with its file and line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cnllama.errors import InputError, os_errors_explained
from cnllama.eval.benchmarks import Benchmark
from cnllama.eval.columns import printed
from cnllama.eval.inputs import read_text_bytes
from cnllama.paths import exists, is_dir

LETTERS = ("A", "B", "C", "D")
_SHOT_SPLIT = "dev"


@dataclass(frozen=True)
class Question:
    """answer: a letter, None where the file has none. explanation: of a solved example, else empty."""

    id: str
    text: str
    choices: tuple[str, ...]
    answer: str | None
    explanation: str = ""


@dataclass(frozen=True)
class Subject:
    """key: the name in the files; name: the Chinese one of the prompts."""

    key: str
    name: str
    groups: tuple[str, ...]
    shots: Sequence[Question]
    questions: Sequence[Question]


def read_subjects(
    benchmark: Benchmark,
    data: Path,
    split: str,
    *,
    shots: int = 0,
    cot: bool = False,
    only: Sequence[str] = (),
    as_pandas: bool = False,
) -> tuple[list[Subject], list[str]]:
    """(subjects in the official order, keys of those whose file is missing).

    shots: solved examples from the dev split, with explanations where `cot` is on. only: keys, all when empty.
    as_pandas: choices as columns.printed makes them, not as they stand. Raises InputError for unknown names, a
    directory without files and files that are not what the benchmark publishes.
    """
    _check_request(benchmark, split, shots, cot, only)
    with os_errors_explained(data):
        if not is_dir(data):
            found = "this is a file" if exists(data) else "there is no such directory"
            raise InputError(f"{data}: {found}, expected the {benchmark.title} directory with {split}/ in it")
        wanted = [key for key in benchmark.subjects if not only or key in only]
        present = [key for key in wanted if exists(benchmark.path(data, split, key))]
    absent = [key for key in wanted if key not in present]
    if not present or (only and absent):
        missing = benchmark.path(data, split, absent[0])
        raise InputError(
            f"{missing}: there is no such file, expected the {benchmark.title} files as they are published"
        )
    show = _printed if as_pandas else list
    return [_read_subject(benchmark, data, split, key, shots=shots, cot=cot, show=show) for key in present], absent


def _check_request(benchmark: Benchmark, split: str, shots: int, cot: bool, only: Sequence[str]) -> None:
    if split not in benchmark.splits:
        raise InputError(f"{benchmark.title} has no split {split!r}: choose one of {', '.join(benchmark.splits)}")
    if shots < 0:
        raise InputError(f"--shots is {shots}, expected 0 or more")
    if shots and split == _SHOT_SPLIT:
        raise InputError("the examples of --shots are the dev questions: use --shots 0 or another --split")
    if shots and cot and benchmark.explanation is None:
        raise InputError(f"{benchmark.title} has no explanations for examples: use --shots 0 with --cot")
    unknown = [key for key in only if key not in benchmark.subjects]
    if unknown:
        raise InputError(
            f"{benchmark.title} has no subject {unknown[0]!r}: choose from {', '.join(sorted(benchmark.subjects))}"
        )


def _read_subject(
    benchmark: Benchmark,
    data: Path,
    split: str,
    key: str,
    *,
    shots: int,
    cot: bool,
    show: Callable[[Sequence[Question]], list[Question]],
) -> Subject:
    """show: what becomes of the questions of a whole file."""
    info = benchmark.subjects[key]
    path = benchmark.path(data, split, key)
    questions = [question for _, question in read_questions(benchmark, path)]
    if not questions:
        raise InputError(f"{path}: there are no questions in it; get the file again")
    examples: list[Question] = []
    if shots:
        path = benchmark.path(data, _SHOT_SPLIT, key)
        for line, example in read_questions(benchmark, path, solved=True, explained=cot):
            if cot and not example.explanation.strip():
                raise InputError(f"{path}:{line}: the explanation is empty, which --cot needs; get the file again")
            examples.append(example)
        if len(examples) < shots:
            raise InputError(f"{path}: has {len(examples)} examples, expected at least {shots}; use a smaller --shots")
    return Subject(key, info.name, info.groups, show(examples)[:shots], show(questions))


def _printed(questions: Sequence[Question]) -> list[Question]:
    """The questions of one file with their choices as the published scripts print them."""
    columns = [printed(column) for column in zip(*(question.choices for question in questions), strict=True)]
    return [
        replace(question, choices=choices)
        for question, choices in zip(questions, zip(*columns, strict=True), strict=True)
    ]


def read_questions(
    benchmark: Benchmark, path: Path, solved: bool = False, explained: bool = False
) -> Iterator[tuple[int, Question]]:
    """(line number, question) of a CSV file. solved: every row must have an answer. Raises InputError."""
    lines = _read_rows(path)
    _, header = next(lines, (1, []))
    names = [name.strip() for name in header]
    twice = next((name for name in names if names.count(name) > 1 and name), None)
    if twice is not None:
        raise InputError(f"{path}:1: the column {twice!r:.40} occurs twice; get the file again")
    needed = [benchmark.question, *LETTERS]
    needed += [benchmark.answer] if solved else []
    needed += [benchmark.explanation] if explained and benchmark.explanation else []
    missing = [name for name in needed if name not in names]
    if missing:
        raise InputError(
            f"{path}:1: the columns are {', '.join(names)!r:.120}, expected {', '.join(needed)} among "
            "them; get the file again"
        )
    seen: set[str] = set()
    for number, (line, values) in enumerate(lines):
        if len(values) != len(names):
            raise InputError(f"{path}:{line}: the row has {len(values)} fields, expected {len(names)}; mend the line")
        row = dict(zip(names, values, strict=True))
        question = _question(benchmark, row, number, f"{path}:{line}")
        if question.id in seen:
            raise InputError(f"{path}:{line}: the id {question.id!r:.40} occurs twice; get the file again")
        seen.add(question.id)
        yield line, question


def _question(benchmark: Benchmark, row: dict[str, str], number: int, where: str) -> Question:
    text = row[benchmark.question]
    if not text.strip():
        raise InputError(f"{where}: the question is empty; get the file again")
    answer = row[benchmark.answer].strip() if benchmark.answer in row else None
    if answer is not None and answer not in LETTERS:
        raise InputError(f"{where}: the answer is {answer!r:.40}, expected A, B, C or D; mend the line")
    return Question(
        id=row.get(benchmark.id, str(number)).strip(),
        text=text,
        choices=tuple(row[letter] for letter in LETTERS),
        answer=answer,
        explanation=row.get(benchmark.explanation or "", ""),
    )


def _read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, fields) of every row that is not blank."""
    data = read_text_bytes(path, "a CSV file of questions")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: byte {error.start} is not valid UTF-8; get the file again") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{path}:{line}: this is no row of a CSV file ({error}); mend the line") from None
        if row is None:
            return
        if row:
            yield line, row
