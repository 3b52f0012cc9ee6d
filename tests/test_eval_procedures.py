# SPDX-License-Identifier: Apache-2.0
"""Every preset against the publication that it claims: prompts to the letter, options, and how answers are counted.

The texts of this file are the definitions, written down from the publications and not from the code under test:
Chinese-LLaMA-Alpaca scripts/ceval and Chinese-LLaMA-Alpaca-2 scripts/ceval and scripts/cmmlu (llama_evaluator.py,
llama2_evaluator.py), the README of C-Eval, and CMMLU src/mp_utils.py.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import eval_data
import models
import pytest
from eval_data import evaluate

from cnllama.errors import InputError
from cnllama.eval.benchmarks import BENCHMARKS
from cnllama.eval.columns import printed
from cnllama.eval.procedures import PRESETS, Choices, choose_preset, differences, procedure_of
from cnllama.eval.prompts import Prompter
from cnllama.eval.questions import Question, Subject, read_subjects
from cnllama.sampling import SamplingParams
from cnllama.templates import TEMPLATES
from cnllama.tokenizer import Tokenizer

Row = tuple[str, str, str, str, str, str]  # question, four choices, answer
SHOTS: list[Row] = [(f"第{i}题是什么？", f"甲{i}", f"乙 {i}", "丙{}", "1.50", "ABCDA"[i]) for i in range(5)]
QUESTION: Row = ("下列哪一项{subject}正确____。", "A选项", "B选项", "", "丁\n戊", "C")


def lines(row: Row) -> str:
    q, a, b, c, d, _ = row
    return q + "\nA. " + a + "\nB. " + b + "\nC. " + c + "\nD. " + d


def header(name: str) -> str:
    return "以下是中国关于" + name + "考试的单项选择题，请选出其中的正确答案。\n\n"


def solved(shots: list[Row]) -> str:
    return "".join(lines(row) + "\n答案：" + row[5] + "\n\n" for row in shots)


def base(benchmark: str, key: str, chinese: str, shots: list[Row]) -> str:
    """format_example and generate_few_shot_prompt of both generations, without the prompt: the file's key."""
    return (header(key) if shots else "") + solved(shots) + lines(QUESTION) + "\n答案："


def alpaca(benchmark: str, key: str, chinese: str, shots: list[Row]) -> str:
    """The first generation with its prompt: everything inside one instruction, spaces at the ends."""
    inside = (header(key) if shots else "") + solved(shots) + lines(QUESTION) + "\n答案是什么？ "
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n" + inside + "\n\n### Response: "
    )


def alpaca_2(benchmark: str, key: str, chinese: str, shots: list[Row]) -> str:
    """The second generation with its prompt: turns, acknowledged with the key; CMMLU's script has half the system."""
    system = {
        "ceval": "You are a helpful assistant. 你是一个乐于助人的助手。",
        "cmmlu": "你是一个乐于助人的助手。",
    }[benchmark]
    text = ""
    if shots:
        text = "[INST] <<SYS>>\n" + system + "\n<</SYS>>\n\n" + header(key) + " [/INST]"
        text += "好的，我会结合" + key + "相关知识回答"
    for row in shots:
        text += "[INST] " + lines(row) + "\n答案：[/INST]" + row[5] + "\n"
    return text + "[INST] <<SYS>>\n" + system + "\n<</SYS>>\n\n" + lines(QUESTION) + "\n答案： [/INST]"


def official(benchmark: str, key: str, chinese: str, shots: list[Row]) -> str:
    """The benchmarks' authors: the Chinese name, and a header without examples too."""
    if benchmark == "ceval":
        return header(chinese) + solved(shots) + lines(QUESTION) + "\n答案："
    text = "以下是关于" + chinese + "的单项选择题，请直接给出正确答案的选项。\n\n"
    for row in shots:
        text += "题目：" + lines(row) + "\n答案是：" + row[5] + "\n\n"
    return text + "题目：" + lines(QUESTION) + "\n答案是："


DEFINITIONS = {"base": base, "alpaca": alpaca, "alpaca-2": alpaca_2, "official": official}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(eval_data.letter_tokenizer())


def question(row: Row, number: int = 0) -> Question:
    return Question(str(number), row[0], row[1:5], row[5], "\n1. 因为如此 ")


def prompt_of(
    tokenizer: Tokenizer, preset: str, benchmark: str, key: str, shots: list[Row], cot: bool = False
) -> tuple[str, list[int], int]:
    info = BENCHMARKS[benchmark].subjects[key]
    examples = [question(row, i) for i, row in enumerate(shots)]
    subject = Subject(key, info.name, info.groups, examples, [question(QUESTION)])
    prompter = Prompter(preset, BENCHMARKS[benchmark], tokenizer, TEMPLATES["raw"], cot)
    made = prompter.prompt(subject, question(QUESTION), 2048 if preset == "official" else None)
    return made.text, list(made.ids), made.shots


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("benchmark", ["ceval", "cmmlu"])
@pytest.mark.parametrize("preset", DEFINITIONS)
def test_prompts_are_the_published_ones_for_every_subject(
    tokenizer: Tokenizer, preset: str, benchmark: str, shots: int
) -> None:
    """Of the tables in the package, which test_eval_questions.py compares with the official ones."""
    for key, info in BENCHMARKS[benchmark].subjects.items():
        text, ids, used = prompt_of(tokenizer, preset, benchmark, key, SHOTS[:shots])
        assert text == DEFINITIONS[preset](benchmark, key, info.name, SHOTS[:shots])
        assert (ids, used) == (tokenizer.encode(text, bos=True), shots)


@pytest.mark.parametrize("benchmark", ["ceval", "cmmlu"])
def test_one_subject_written_out(tokenizer: Tokenizer, benchmark: str) -> None:
    """Without a table at all: C-Eval's accountant is a key in the scripts' prompts, 注册会计师 in its own."""
    key = {"ceval": "accountant", "cmmlu": "agronomy"}[benchmark]
    chinese = {"ceval": "注册会计师", "cmmlu": "农学"}[benchmark]
    for preset, definition in DEFINITIONS.items():
        text = prompt_of(tokenizer, preset, benchmark, key, SHOTS)[0]
        assert text == definition(benchmark, key, chinese, SHOTS)
        assert ("中国关于" + key in text) == (preset != "official")
        assert (chinese in text) == (preset == "official")
    assert "好的，我会结合" + key + "相关知识回答[INST] " in prompt_of(tokenizer, "alpaca-2", benchmark, key, SHOTS)[0]


def test_prompts_that_go_step_by_step(tokenizer: Tokenizer) -> None:
    """cot of the scripts: explanations as they stand in the file, and turns of the second generation without any."""
    first = [SHOTS[0]]
    steps = "\n答案：让我们一步一步思考，\n"
    example = lines(SHOTS[0]) + steps + "\n1. 因为如此 " + "\n所以答案是A。\n\n"
    asked = lines(QUESTION) + "\n答案是什么？让我们一步一步思考，\n1."
    texts = {preset: prompt_of(tokenizer, preset, "ceval", "law", first, cot=True)[0] for preset in DEFINITIONS}
    assert texts["base"] == header("law") + example + lines(QUESTION) + steps + "1."
    assert texts["alpaca"].split("### Instruction:\n")[1] == header("law") + example + asked + "\n\n### Response: "
    turns = alpaca_2("ceval", "law", "", first)
    assert texts["alpaca-2"] == turns.replace(lines(QUESTION) + "\n答案： [/INST]", asked + " [/INST]")


def test_the_file_s_own_template(tokenizer: Tokenizer) -> None:
    """Nobody's procedure: the chat template, with the Chinese name."""
    subject = Subject("law", "法学", ("Humanities",), [question(SHOTS[0])], [question(QUESTION)])
    prompter = Prompter("template", BENCHMARKS["ceval"], tokenizer, TEMPLATES["chatml"])
    made = prompter.prompt(subject, question(QUESTION), 4096)
    assert made.ids[0] == tokenizer.bos_id
    assert made.text.count("<|im_start|>") == 7
    assert made.text.endswith(lines(QUESTION) + "\n答案：<|im_end|>\n<|im_start|>assistant\n")


# --- prompts that are too long


def long_subject(benchmark: str, lengths: list[int]) -> Subject:
    rows: list[Row] = [("天" * n + f"{i}", "甲", "乙", "丙", "丁", "A") for i, n in enumerate(lengths)]
    info = next(iter(BENCHMARKS[benchmark].subjects.items()))
    return Subject(info[0], info[1].name, (), [question(row, i) for i, row in enumerate(rows)], [])


@pytest.mark.parametrize("preset", ["base", "alpaca", "alpaca-2"])
def test_the_scripts_shorten_nothing(tokenizer: Tokenizer, preset: str) -> None:
    assert procedure_of(preset, BENCHMARKS["ceval"]).shortens == "never"
    subject = long_subject("ceval", [3000] * 5)
    prompter = Prompter(preset, BENCHMARKS["ceval"], tokenizer, TEMPLATES["raw"])
    made = prompter.prompt(subject, question(QUESTION), None)
    assert (made.shots, len(made.ids) > 5000) == (5, True)


@pytest.mark.parametrize("preset", ["base", "official"])
def test_examples_that_do_not_fit_are_dropped_from_the_end(tokenizer: Tokenizer, preset: str) -> None:
    subject = long_subject("ceval", [10, 90, 10, 10, 10])
    prompter = Prompter(preset, BENCHMARKS["ceval"], tokenizer, TEMPLATES["raw"])
    whole = prompter.prompt(subject, question(QUESTION), None)
    for shots in range(4, -1, -1):
        fitted = prompter.prompt(subject, question(QUESTION), len(whole.ids) - 1)
        assert fitted.shots == shots
        assert fitted.text.count("甲") == shots
        assert whole.text.startswith(fitted.text[: fitted.text.rindex(QUESTION[0])])
        whole = fitted if shots else whole
    with pytest.raises(InputError, match=rf"takes {len(fitted.ids)} tokens without examples .* room for 10"):
        prompter.prompt(subject, question(QUESTION), 10)


def cmmlu_fitted(tokenizer: Tokenizer, subject: Subject, limit: int) -> str:
    """gen_prompt of mp_utils.py: pieces are counted with their BOS, the longest examples go together."""

    def size(text: str) -> int:
        return len(tokenizer.encode(text, bos=True))

    start = "以下是关于" + subject.name + "的单项选择题，请直接给出正确答案的选项。\n\n"
    end = "题目：" + lines(QUESTION) + "\n答案是："
    if size(start) + size(end) > limit:
        return end
    examples = [
        "题目：" + lines((q.text, *q.choices, "")) + "\n答案是：" + str(q.answer) + "\n\n" for q in subject.shots
    ]
    while examples and sum(map(size, examples)) >= limit - size(start) - size(end):
        longest = max(map(size, examples))
        examples = [text for text in examples if size(text) != longest]
    return start + "".join(examples) + end


@pytest.mark.parametrize("lengths", [[10, 90, 10, 40, 20], [50, 50, 50, 50, 50], [5, 1, 60, 60, 2], [0, 0, 0, 0, 900]])
def test_cmmlu_drops_the_longest_examples(tokenizer: Tokenizer, lengths: list[int]) -> None:
    subject = long_subject("cmmlu", lengths)
    prompter = Prompter("official", BENCHMARKS["cmmlu"], tokenizer, TEMPLATES["raw"])
    seen = set()
    for limit in range(60, 1300, 7):
        expected = cmmlu_fitted(tokenizer, subject, limit)
        if len(tokenizer.encode(expected, bos=True)) > limit:
            continue
        made = prompter.prompt(subject, question(QUESTION), limit)
        assert made.text == expected
        seen.add((made.shots, made.text.startswith("以下")))
    assert {(5, True), (0, True)} <= seen
    assert (0, False) in seen
    assert procedure_of("official", BENCHMARKS["cmmlu"]).context == 2048


# --- options and reading


def test_presets_follow_the_file() -> None:
    names = {"raw": "base", "alpaca": "alpaca", "alpaca-2": "alpaca-2", "chatml": "template"}
    assert {template: choose_preset("auto", template) for template in names} == names
    assert set(TEMPLATES) == set(names)
    assert choose_preset("base", "alpaca") == "base"
    assert set(PRESETS) == {"auto", "template", *DEFINITIONS}
    with pytest.raises(InputError, match="no preset 'x'"):
        choose_preset("x", "raw")


@pytest.mark.parametrize("benchmark", ["ceval", "cmmlu"])
def test_options_of_every_preset(benchmark: str) -> None:
    for preset in ("base", "alpaca", "alpaca-2"):
        found = procedure_of(preset, BENCHMARKS[benchmark])
        assert (found.letters, found.penalty, found.steps_tokens, found.draws) == ("both", 1.1, 20, True)
        assert (found.mean_of, found.one_group, found.as_pandas) == ("questions", True, True)
        assert bool(found.source) == ((preset, benchmark) != ("alpaca", "cmmlu"))
    own = procedure_of("official", BENCHMARKS[benchmark])
    letters = {"ceval": "space", "cmmlu": "piece"}[benchmark]
    assert (own.letters, own.penalty, own.mean_of, own.generates) == (letters, 1.0, "subjects", False)
    assert not procedure_of("template", BENCHMARKS[benchmark]).source


def test_what_differs_is_named() -> None:
    procedure = procedure_of("base", BENCHMARKS["ceval"])

    def found(**changes: Any) -> str:
        given: dict[str, Any] = {
            "split": "val", "letters": "both", "penalty": 1.1, "params": None, "cot": False, "model": "q4-a64",
            "shortened": 0, "left_out": [],
        }  # fmt: skip
        return "; ".join(differences(procedure, Choices(**(given | changes))))

    assert found() == "the model is q4-a64 where the published ones are float16"
    written = SamplingParams(
        temperature=0.2, top_k=40, top_p=0.9, repeat_penalty=1.1, repeat_last_n=-1, max_tokens=20, seed=1
    )
    assert found(params=written, letters="").endswith("float16; random numbers are this program's own")
    for changes, words in (
        ({"penalty": 1.0}, "repetition penalty 1 instead of 1.1"),
        ({"letters": "colon"}, "letters 'colon' instead of 'both'"),
        ({"params": written.with_changes(max_tokens=512), "cot": True}, "max_tokens 512 instead of 20"),
        ({"params": written.with_changes(temperature=0.7)}, "temperature 0.7 instead of 0.2"),
        ({"shortened": 3}, "3 prompts had to be shortened, which the scripts never do"),
        ({"left_out": ["law"]}, "1 subjects are left out"),
        ({"split": "dev"}, "dev split"),
    ):
        assert words in found(**changes)
    procedure = procedure_of("alpaca", BENCHMARKS["cmmlu"])
    assert found() == "no publication has these prompts for this benchmark"


COLUMNS = pytest.mark.parametrize(
    ("column", "shown"),
    [
        (["1.50", "2", "-.5"], ["1.5", "2.0", "-0.5"]),
        (["007", " 5", "-3"], ["7", "5", "-3"]),
        (["1", "", "3"], ["1.0", "nan", "3.0"]),
        (["1", "甲", "3.0"], ["1", "甲", "3.0"]),
        (["NA", "甲", "None"], ["nan", "甲", "nan"]),
        (["True", "false"], ["True", "False"]),
        (["1e5", "inf"], ["100000.0", "inf"]),
        (["１", "1_0"], ["１", "1_0"]),
        (["9223372036854775808", "-0"], ["9223372036854775808", "-0"]),
        (["-0", ""], ["0.0", "nan"]),
        (["9" * 5000, "1"], ["9" * 5000, "1"]),
        (["", ""], ["nan", "nan"]),
    ],
)


@COLUMNS
def test_columns_as_pandas_prints_them(column: list[str], shown: list[str]) -> None:
    assert printed(column) == shown


@COLUMNS
def test_pandas_itself(column: list[str], shown: list[str]) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas, which these columns were printed with, is not installed")
    file = io.StringIO("id,A,B\n" + "".join(f'{i},"{value}",题\n' for i, value in enumerate(column)))
    assert [f"{row['A']}" for _, row in pandas.read_csv(file).iterrows()] == shown


def test_files_are_read_as_the_scripts_read_them(tmp_path: Path) -> None:
    """A column of numbers is numbers in the prompt; that of another file, or of dev, is of its own."""
    numbers = [("问", "1.50", "2", "x", "NA", "A"), ("又", "3", "4.25", "7", "8", "B")]
    eval_data.write_ceval(tmp_path, "val", "law", numbers)
    dev = [("例", f"{i}.0", str(i), "", "丁", "A") for i in range(5)] + [("例", "丙", "1.5", "", "丁", "A")]
    eval_data.write_ceval(tmp_path, "dev", "law", dev)
    ((law,), _) = read_subjects(BENCHMARKS["ceval"], tmp_path, "val", shots=5, as_pandas=True)
    assert [q.choices for q in law.questions] == [("1.5", "2.0", "x", "nan"), ("3.0", "4.25", "7", "8.0")]
    assert law.shots[1].choices == ("1.0", "1.0", "nan", "丁")
    ((law,), _) = read_subjects(BENCHMARKS["ceval"], tmp_path, "val", shots=5)
    assert law.questions[0].choices == ("1.50", "2", "x", "NA")


# --- from the command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for key, count in (("law", 5), ("logic", 3)):
        eval_data.write_ceval(folder, "val", key, eval_data.rows(count))
        eval_data.write_ceval(folder, "dev", key, eval_data.rows(5, 200))
    for key, count in (("chinese_history", 4), ("anatomy", 2)):
        eval_data.write_cmmlu(folder, "test", key, eval_data.rows(count))
        eval_data.write_cmmlu(folder, "dev", key, eval_data.rows(5, 300))
    return folder


@pytest.fixture(scope="module")
def cnl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    return models.convert(eval_data.planted_llama(folder / "hf", None), folder / "m.cnl", "--quant", "q8")


@pytest.mark.parametrize("benchmark", ["ceval", "cmmlu"])
@pytest.mark.parametrize("preset", list(DEFINITIONS))
def test_the_result_says_what_it_is(cnl: Path, data: Path, tmp_path: Path, preset: str, benchmark: str) -> None:
    words = (benchmark, cnl, "--data", data, "--preset", preset, "--shots", 5)
    done = evaluate(*words, "--json", tmp_path / "r", "--log", tmp_path / "log")
    assert done.returncode == 0, done.stderr
    result = models.json_of(tmp_path / "r")
    published = procedure_of(preset, BENCHMARKS[benchmark])
    assert result["procedure"]["source"] == (published.source or None)
    assert (result["letters"], result["repeat_penalty"]) == (published.letters, published.penalty)
    assert (published.source or "no publication") in done.stdout
    for difference in result["procedure"]["differences"]:
        assert difference in done.stdout
    if published.source:
        assert "q8-s64 with 8-bit activations and an fp16 cache where" in result["procedure"]["differences"][0]
        assert result["procedure"]["differences"][-1].endswith("subjects are left out")
    first = (tmp_path / "log").read_text(encoding="utf-8").splitlines()[0]
    key = result["subjects"] and next(iter(result["subjects"]))
    assert f"关于{key}考试" in first or preset == "official"
    right = [counts["correct"] / counts["questions"] for counts in result["subjects"].values()]
    assert result["subject_mean"] == pytest.approx(sum(right) / 2)


def test_groups_are_counted_as_published(cnl: Path, data: Path, tmp_path: Path) -> None:
    """The script of the second generation counts a subject in one group, CMMLU's authors in each of its groups."""
    groups = {}
    for preset in ("alpaca-2", "official"):
        done = evaluate("cmmlu", cnl, "--data", data, "--preset", preset, "--json", tmp_path / "r")
        assert done.returncode == 0, done.stderr
        found = models.json_of(tmp_path / "r")["groups"]
        groups[preset] = {name: counts["questions"] for name, counts in found.items()}
    assert groups["alpaca-2"] == {"STEM": 2, "China specific": 4}
    assert groups["official"] == {"STEM": 2, "China specific": 4, "Humanities": 4}


def test_official_reads_letters_only(cnl: Path, data: Path) -> None:
    for word in ("--generate", "--cot"):
        done = evaluate("ceval", cnl, "--data", data, "--preset", "official", word)
        assert done.returncode == 2
        assert "which is all that is published: leave out --generate and --cot" in done.stderr
