# SPDX-License-Identifier: Apache-2.0
"""C-Eval and CMMLU files and answers: the official layouts, every malformed line named, letters out of text."""

from pathlib import Path
from types import SimpleNamespace

import eval_data
import models
import numpy as np
import pytest

from cnllama.errors import InputError
from cnllama.eval.answers import choose, extract_letter, letter_logits, letter_tokens
from cnllama.eval.benchmarks import BENCHMARKS
from cnllama.eval.models import Rows
from cnllama.eval.prompts import Prompt
from cnllama.eval.questions import Question, Subject, read_questions, read_subjects
from cnllama.tokenizer import Tokenizer

CEVAL, CMMLU = BENCHMARKS["ceval"], BENCHMARKS["cmmlu"]


def question(number: int, answer: str = "B") -> Question:
    return Question(str(number), f"第{number}题", ("甲", "乙", "丙", "丁"), answer, "因为如此")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(eval_data.letter_tokenizer())


def test_subjects_are_those_of_the_benchmarks(shared_data: Path) -> None:
    official = models.json_of(shared_data / "eval" / "ceval_subjects.json")
    assert {k: [v.name, *v.groups] for k, v in CEVAL.subjects.items()} == {k: v[1:] for k, v in official.items()}
    official = models.json_of(shared_data / "eval" / "cmmlu_subjects.json")
    assert {k: [v.name, list(v.groups)] for k, v in CMMLU.subjects.items()} == official


def test_numbers_of_subjects() -> None:
    groups = [info.groups[0] for info in CEVAL.subjects.values()]
    assert [groups.count(g) for g in ("STEM", "Social Science", "Humanities", "Other")] == [20, 10, 11, 11]
    assert len(CMMLU.subjects) == 67


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("所以答案是A。…所以答案是D。B是正确的", "D"),
        ("所以答案是E。C是正确的", "C"),
        ("B是正确的，选项A正确", "B"),
        ("选项C正确，答案是A", "C"),
        ("答案是A，答案为D", "D"),
        ("答案B 选择C", "B"),
        ("选择C 答案：A", "C"),
        ("答案：A", "A"),
        ("我想 D 对，不是 A", "D"),
        ("应该是丙吧", "C"),
        ("天地玄黄", None),
        ("", None),
    ],
)
def test_letters_out_of_text(text: str, letter: str | None) -> None:
    assert extract_letter(text, question(1)) == letter


def test_letter_tokens_and_their_sum(tokenizer: Tokenizer) -> None:
    found = letter_tokens(tokenizer)
    assert [tokenizer.piece(i) for i in found.space] == ["▁A", "▁B", "▁C", "▁D"]
    assert [tokenizer.piece(i) for i in found.colon] == ["A", "B", "C", "D"]
    row = np.zeros(tokenizer.pieces, np.float32)
    row[list(found.space)] = [1, 2, 3, 4]
    row[list(found.colon)] = [4, 0, -1, -3.5]
    assert letter_logits(row, found) == [5, 2, 2, 0.5]
    assert letter_logits(row, letter_tokens(tokenizer, "space")) == [1, 2, 3, 4]
    assert letter_logits(row, letter_tokens(tokenizer, "colon")) == [4, 0, -1, -3.5]
    assert letter_logits(row, found, [found.colon[0], found.colon[2]], 2.0) == [3, 2, 1, 0.5]


def test_letters_by_their_own_pieces(tokenizer: Tokenizer) -> None:
    found = letter_tokens(tokenizer, "piece")
    assert [tokenizer.piece(i) for i in found.piece] == ["A", "B", "C", "D"]
    assert (found.variant, found.space, found.colon) == ("piece", (), ())
    row = np.zeros(tokenizer.pieces, np.float32)
    row[list(found.piece)] = [1, 5, 3, 4]
    assert letter_logits(row, found, [found.piece[1]], 2.0) == [1, 2.5, 3, 4]


def test_the_response_is_the_most_likely_token_after_the_penalty(tokenizer: Tokenizer) -> None:
    """As the scripts decode their processed scores."""
    letters = letter_tokens(tokenizer)
    row = np.zeros((1, tokenizer.pieces), np.float32)
    row[0, letters.colon[0]], row[0, letters.colon[1]] = 10, 9.5
    model = SimpleNamespace(rows=lambda items, progress: [Rows(0, 1, row)])
    subject = Subject("law", "法学", (), [], [])
    prompt = Prompt(subject, question(0), "", [5, letters.colon[0]], 0)
    for penalty, letter in ((1.0, "A"), (1.1, "B")):
        ((_, answer),) = choose(model, [prompt], letters, penalty=penalty, tokenizer=tokenizer)
        assert (answer.response, answer.letter) == (letter, letter)


def test_a_spelling_that_cannot_tell_letters_apart_is_left_out(tokenizer_model: bytes) -> None:
    plain = Tokenizer(tokenizer_model)
    assert len({plain.encode(letter)[0] for letter in "ABCD"}) < 4
    found = letter_tokens(plain)
    assert (found.space, found.variant) == ((), "colon")
    with pytest.raises(InputError, match="--generate"):
        letter_tokens(plain, "space")


# --- files


def test_official_layouts(tmp_path: Path) -> None:
    rows = eval_data.rows(6)
    rows[2] = ('有"引号"，\n和换行', "1,5", "", "乙\n丙", "丁", "C")
    for split in ("val", "dev", "test"):
        eval_data.write_ceval(tmp_path / "ceval", split, "law", rows)
    eval_data.write_cmmlu(tmp_path / "cmmlu", "test", "agronomy", rows)
    eval_data.write_cmmlu(tmp_path / "cmmlu", "dev", "agronomy", rows)
    ((law,), absent) = read_subjects(CEVAL, tmp_path / "ceval", "val", shots=5)
    assert (law.name, law.groups, len(law.shots), len(absent)) == ("法学", ("Humanities",), 5, 51)
    assert law.questions[2].choices == ("1,5", "", "乙\n丙", "丁")
    assert [q.answer for q in law.questions] == [row[5] for row in rows]
    assert law.shots[3].explanation == "因为3"
    ((law,), _) = read_subjects(CEVAL, tmp_path / "ceval", "test", only=("law",))
    assert {q.answer for q in law.questions} == {None}
    ((agronomy,), _) = read_subjects(CMMLU, tmp_path / "cmmlu", "test", shots=2)
    assert [q.id for q in agronomy.questions] == list("012345")
    assert agronomy.questions[2].text == rows[2][0]


GOOD = "id,question,A,B,C,D,answer\n0,问,甲,乙,丙,丁,A\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "the columns are ''"),
        ("id,question,A,B,C,answer\n", 1, "expected question, A, B, C, D"),
        (GOOD + "1,问,甲,乙,丙,A\n", 3, "the row has 6 fields, expected 7"),
        (GOOD + '1,"两\n行",甲,乙,丙,丁,B\n\n2,问,甲,乙,丙,丁,E\n', 6, "the answer is 'E', expected A, B, C or D"),
        (GOOD + "1,问,甲,乙,丙,丁,\n", 3, "the answer is ''"),
        (GOOD + "1, ,甲,乙,丙,丁,A\n", 3, "the question is empty"),
        (GOOD + "0,问,甲,乙,丙,丁,A\n", 3, "the id '0' occurs twice"),
        (GOOD + '1,"问,甲,乙,丙,丁,A\n', 3, "no row of a CSV file"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = CEVAL.path(tmp_path, "val", "law")
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_subjects(CEVAL, tmp_path, "val")
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert words in str(caught.value)


def test_bytes_that_are_not_utf_8_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(GOOD.encode() + "1,问,甲,乙,丙,丁,A\n".encode("gbk"))
    with pytest.raises(InputError, match=r"x\.csv:3: byte \d+ is not valid UTF-8"):
        list(read_questions(CEVAL, path))
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert [q.answer for _, q in read_questions(CEVAL, path)] == ["A"]


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    eval_data.write_ceval(tmp_path, "val", "law", eval_data.rows(3))
    eval_data.write_ceval(tmp_path, "dev", "law", eval_data.rows(2), ["有", ""])
    for arguments, words in (
        ({"split": "train"}, "no split 'train': choose one of val, test, dev"),
        ({"split": "dev", "shots": 2}, "the examples of --shots are the dev questions"),
        ({"shots": -1}, "--shots is -1"),
        ({"shots": 3}, "has 2 examples, expected at least 3"),
        ({"shots": 2, "cot": True}, "law_dev.csv:3: the explanation is empty"),
        ({"only": ("lau",)}, "no subject 'lau'"),
        ({"only": ("law", "logic")}, "logic_val.csv: there is no such file"),
        ({"split": "test"}, "test.csv: there is no such file"),
        ({"data": tmp_path / "none"}, "none: there is no such directory"),
        ({"benchmark": CMMLU, "split": "test", "shots": 2, "cot": True}, "CMMLU has no explanations"),
    ):
        given = {"benchmark": CEVAL, "data": tmp_path, "split": "val"} | arguments
        with pytest.raises(InputError) as caught:
            read_subjects(**given)
        assert words in str(caught.value)
    empty = eval_data.write_ceval(tmp_path, "val", "logic", [])
    with pytest.raises(InputError, match="no questions in it"):
        read_subjects(CEVAL, tmp_path, "val", only=("logic",))
    assert empty.exists()
