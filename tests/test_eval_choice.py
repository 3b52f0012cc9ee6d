# SPDX-License-Identifier: Apache-2.0
"""C-Eval and CMMLU on planted models whose score is known, and on the checkpoint through transformers."""

import json
from pathlib import Path
from typing import Any

import eval_data
import models
import pytest
from eval_data import evaluate

from cnllama import LLM
from cnllama.eval.answers import Answer, choose, letter_tokens
from cnllama.eval.benchmarks import BENCHMARKS
from cnllama.eval.models import EngineScorer
from cnllama.eval.prompts import Prompter
from cnllama.eval.questions import read_subjects
from cnllama.eval.results import compare_choices, count
from cnllama.tokenizer import Tokenizer

ROWS = {"law": eval_data.rows(13), "logic": eval_data.rows(9, 40), "physician": eval_data.rows(7, 80)}
SHOTS = eval_data.rows(5, 200, marked=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """C-Eval files of three subjects in two groups."""
    folder = tmp_path_factory.mktemp("ceval")
    for key, rows in ROWS.items():
        eval_data.write_ceval(folder, "val", key, rows)
        eval_data.write_ceval(folder, "test", key, rows)
        eval_data.write_ceval(folder, "dev", key, SHOTS)
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, packed file) of the model that reads the marker."""
    folder = tmp_path_factory.mktemp("planted")
    base = eval_data.planted_llama(folder / "hf", None)
    return base, models.convert(base, folder / "planted.cnl", "--quant", "q8")


def result_of(tmp_path: Path, *args: object) -> dict[str, Any]:
    done = evaluate(*args, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = models.json_of(tmp_path / "result.json")
    return result


@pytest.mark.parametrize("letter", list("ABCD"))
def test_a_model_that_always_answers_one_letter_scores_its_share(tmp_path: Path, data: Path, letter: str) -> None:
    base = eval_data.planted_llama(tmp_path / "hf", letter)
    cnl = models.convert(base, tmp_path / "m.cnl")
    result = result_of(tmp_path, "ceval", cnl, "--data", data)
    share = {key: sum(row[5] == letter for row in rows) for key, rows in ROWS.items()}
    assert {key: counts["correct"] for key, counts in result["subjects"].items()} == share
    assert result["groups"]["Humanities"]["correct"] == share["law"] + share["logic"]
    assert result["groups"]["Other"] == {
        "questions": 7,
        "unanswered": 0,
        "correct": share["physician"],
        "accuracy": share["physician"] / 7,
        "subject_mean": share["physician"] / 7,
    }
    assert (result["correct"], result["questions"]) == (sum(share.values()), 29)
    assert result["accuracy"] == sum(share.values()) / 29
    assert result["subject_mean"] == pytest.approx(sum(share[key] / len(rows) for key, rows in ROWS.items()) / 3)


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("preset", ["base", "alpaca", "alpaca-2", "template"])
def test_a_model_that_reads_the_question_is_right_everywhere(
    planted: tuple[Path, Path], data: Path, tmp_path: Path, preset: str, shots: int
) -> None:
    result = result_of(tmp_path, "ceval", planted[1], "--data", data, "--preset", preset, "--shots", shots)
    assert (result["correct"], result["questions"], result["preset"]) == (29, 29, preset)
    assert result["shots"] == shots
    assert result["questions_with_fewer_shots"] == 0


@pytest.mark.parametrize("variant", ["space", "colon"])
def test_variants_of_the_letters(planted: tuple[Path, Path], data: Path, tmp_path: Path, variant: str) -> None:
    result = result_of(tmp_path, "ceval", planted[1], "--data", data, "--letters", variant, "--penalty", 1.1)
    assert (result["correct"], result["letters"], result["repeat_penalty"]) == (29, variant, 1.1)


def test_the_engine_and_transformers_choose_the_same(planted: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for shots in (0, 5):
        result = result_of(tmp_path, "ceval", planted[1], "--data", data, "--shots", shots, "--reference", planted[0])
        reference = result["reference"]
        assert (result["correct"], reference["correct"]) == (29, 29)
        assert (reference["same_choice"], reference["difference"], reference["p_value"]) == (1, 0, 1)
        assert (reference["only_ours_right"], reference["only_reference_right"]) == (0, 0)
        assert reference["dtype"] == "float32"


def test_random_weights_give_the_same_accuracy_in_both(data: Path, tmp_path: Path) -> None:
    """The 8-bit file against the float32 checkpoint with exactly its weights: a choice with a margin over twice the
    difference of the logits, which the engine's int8 activations make, must be the same.
    """
    pytest.importorskip("transformers")
    from cnllama.eval.reference import open_reference

    base = models.make_llama(tmp_path / "hf", eval_data.letter_tokenizer(), seed=4)
    cnl = models.convert(base, tmp_path / "m.cnl", "--quant", "q8")
    same = eval_data.dequantized_checkpoint(cnl, base, tmp_path / "same")
    subjects, _ = read_subjects(BENCHMARKS["ceval"], data, "val", shots=2)
    with LLM(cnl, ctx=1024) as llm:
        tokens = letter_tokens(llm.tokenizer)
        prompter = Prompter("official", BENCHMARKS["ceval"], llm.tokenizer, llm.template)
        prompts = [prompter.prompt(subject, question, 1024) for subject in subjects for question in subject.questions]
        ours = dict(choose(EngineScorer(llm), prompts, tokens))
    theirs = dict(choose(open_reference(same), prompts, tokens))
    error = max(abs(a - b) for i in theirs for a, b in zip(ours[i].logits, theirs[i].logits, strict=True))
    assert 0 < error < 0.5
    sure = [i for i, answer in theirs.items() if sorted(answer.logits)[3] - sorted(answer.logits)[2] > 2 * error]
    assert len(sure) > 20
    assert len({theirs[i].letter for i in sure}) > 1
    both = compare_choices([ours[i] for i in sure], [theirs[i] for i in sure])
    assert (both["same_choice"], both["difference"], both["p_value"]) == (1, 0, 1)
    assert count([ours[i] for i in sure]) == count([theirs[i] for i in sure])


def test_the_examples_are_run_once_for_each_subject(planted: tuple[Path, Path], data: Path) -> None:
    subjects, _ = read_subjects(BENCHMARKS["ceval"], data, "val", shots=5)
    with LLM(planted[1], ctx=1024) as llm:
        prompter = Prompter("base", BENCHMARKS["ceval"], llm.tokenizer, llm.template)
        expected = 0
        prompts = []
        for subject in subjects:
            made = [list(prompter.prompt(subject, question, 1024).ids) for question in subject.questions]
            examples = min(len(ids) for ids in made)
            while len({tuple(ids[:examples]) for ids in made}) > 1:
                examples -= 1
            assert examples > 300
            expected += examples + sum(len(ids) - examples for ids in made)
            prompts += [prompter.prompt(subject, question, 1024) for question in subject.questions]
        model = EngineScorer(llm)
        answers = list(choose(model, prompts, letter_tokens(llm.tokenizer)))
        assert len(answers) == 29
        # the header of the next subject and beginnings that two questions share are not run again either
        assert model.tokens_run <= expected
        assert model.tokens_run > expected - 29 * 25


def test_the_log_has_every_prompt_and_the_result_its_command(
    planted: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    args = ("ceval", planted[1], "--data", data, "--shots", 1, "--subject", "law", "--log", tmp_path / "log.jsonl")
    result = result_of(tmp_path, *args)
    assert result["command"].startswith("cnllama eval ceval ")
    assert "--shots 1 --subject law" in result["command"]
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["id"] for record in records] == [str(i) for i in range(13)]
    tokenizer = Tokenizer(eval_data.letter_tokenizer())
    for record, row in zip(records, ROWS["law"], strict=True):
        assert record["prompt"].startswith("以下是中国关于law考试的单项选择题")
        assert record["prompt"].endswith(f"{row[0]}\nA. {row[1]}\nB. {row[2]}\nC. {row[3]}\nD. {row[4]}\n答案：")
        assert record["prompt_tokens"] == len(tokenizer.encode(record["prompt"], bos=True))
        assert (record["shots"], record["letter"], record["answer"]) == (1, row[5], row[5])
        assert max(record["logits"], key=record["logits"].__getitem__) == row[5]
        assert record["correct"] is True


def test_the_test_split_becomes_a_submission(planted: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "submission.json"
    result = result_of(
        tmp_path, "ceval", planted[1], "--data", data, "--split", "test", "--submission", path,
        "--reference", planted[0],
    )  # fmt: skip
    assert "accuracy" not in result
    assert "p_value" not in result["reference"]
    assert result["reference"]["same_choice"] == 1
    expected = {key: {str(i): row[5] for i, row in enumerate(rows)} for key, rows in ROWS.items()}
    assert models.json_of(path) == expected
    assert list(models.json_of(path)) == ["logic", "law", "physician"]


def test_cmmlu(planted: tuple[Path, Path], tmp_path: Path) -> None:
    eval_data.write_cmmlu(tmp_path, "test", "chinese_history", eval_data.rows(8))
    eval_data.write_cmmlu(tmp_path, "test", "virology", eval_data.rows(3, 20))
    eval_data.write_cmmlu(tmp_path, "dev", "chinese_history", SHOTS)
    eval_data.write_cmmlu(tmp_path, "dev", "virology", SHOTS)
    done = evaluate("cmmlu", planted[1], "--data", tmp_path, "--shots", 5, "--json", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    result = models.json_of(tmp_path / "r")
    assert {group: counts["correct"] for group, counts in result["groups"].items()} == {
        "STEM": 3,
        "China specific": 8,
    }
    assert "| chinese_history | 8 | 8 | 100.0% |" in done.stdout
    assert "| **all** | 11 | 11 | 100.0% |" in done.stdout
    assert "65 of the 67 subjects have no file" in done.stderr


@pytest.mark.parametrize("extra", [[], ["--sequences", 3], ["--shots", 2], ["--cot", "--max-tokens", 12]])
def test_generated_answers(planted: tuple[Path, Path], data: Path, tmp_path: Path, extra: list[object]) -> None:
    log = tmp_path / "log.jsonl"
    result = result_of(tmp_path, "ceval", planted[1], "--data", data, "--generate", "--log", log, *extra)
    assert (result["method"], result["correct"], result["unanswered"]) == ("generate", 29, 0)
    assert result["sampling"] == {
        "temperature": 0.2, "top_k": 40, "top_p": 0.9, "repeat_penalty": 1.1, "repeat_last_n": -1, "seed": 1,
        "max_tokens": 12 if "--cot" in extra else 20,
    }  # fmt: skip
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert all(record["answer"] in record["response"] for record in records)
    assert "logits" not in records[0]


def test_an_answer_without_a_letter_is_counted(data: Path, tmp_path: Path) -> None:
    model = eval_data.letter_tokenizer()
    config = models.small_config(models.piece_count(model))
    tensors = eval_data.planted_tensors(config, Tokenizer(model), "A")
    head = tensors["lm_head.weight"]
    head[:] = 0
    head[Tokenizer(model).encode("天地")[-1], 0] = 8
    base = models.make_llama(tmp_path / "hf", model, dtype="float32", tensors=tensors)
    cnl = models.convert(base, tmp_path / "m.cnl")
    rows = [(row[0], "子", "丑", "寅", "卯", row[5]) for row in ROWS["law"]]
    eval_data.write_ceval(tmp_path, "val", "law", rows)
    common = ("ceval", cnl, "--data", tmp_path, "--generate", "--json", tmp_path / "r", "--log", tmp_path / "log")
    done = evaluate(*common, "--preset", "template")
    assert done.returncode == 0, done.stderr
    result = models.json_of(tmp_path / "r")
    assert (result["correct"], result["unanswered"], result["drawn"]) == (0, 13, 0)
    assert "13 answers held no letter and count as wrong" in done.stdout
    # The scripts draw a letter at random: so do the presets that claim them, and say how many.
    found = []
    for seed in (1, 1, 2):
        done = evaluate(*common, "--preset", "base", "--seed", seed)
        assert done.returncode == 0, done.stderr
        result = models.json_of(tmp_path / "r")
        assert (result["unanswered"], result["drawn"]) == (13, 13)
        assert "13 answers held no letter and were drawn at random, as the scripts do" in done.stdout
        records = [json.loads(line) for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
        assert all(record["drawn"] for record in records)
        assert result["correct"] == sum(record["letter"] == record["answer"] for record in records)
        found.append([record["letter"] for record in records])
    assert found[0] == found[1] != found[2]
    assert set(found[0]) == set("ABCD")


def test_prompts_that_do_not_fit_lose_examples_and_say_so(
    planted: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    args = ("ceval", planted[1], "--data", data, "--shots", 5, "--subject", "law")
    done = evaluate(*args, "--ctx", 300, "--json", tmp_path / "r", "--log", tmp_path / "log")
    assert done.returncode == 0, done.stderr
    assert "law: 13 prompts did not fit with 5 examples and have fewer, at least" in done.stderr
    result = models.json_of(tmp_path / "r")
    assert (result["questions_with_fewer_shots"], result["correct"]) == (13, 13)
    records = [json.loads(line) for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
    assert all(record["shots"] < 5 and record["prompt_tokens"] <= 300 for record in records)
    assert all(record["prompt"].count("\n答案：") == record["shots"] + 1 for record in records)
    refused = evaluate(*args, "--ctx", 20)
    assert refused.returncode == 2
    assert "raise the context (--ctx)" in refused.stderr


def test_the_bundled_model_is_the_default(data: Path, tmp_path: Path) -> None:
    import cnllama

    done = evaluate("ceval", "--data", data, "--subject", "law", "--json", tmp_path / "r")
    bundled = sorted((Path(cnllama.__file__).parent / "demo").glob("*.cnl"))
    assert done.returncode == (0 if bundled else 2), done.stderr
    if bundled:
        assert models.json_of(tmp_path / "r")["model"]["file"] == str(bundled[0])
    else:
        assert "no model was given" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data", "{data}", "--generate", "--reference", "x"], "leave out --generate"),
        (["--data", "{data}", "--shots", "9"], "has 5 examples, expected at least 9"),
        (["--data", "nowhere"], "nowhere: there is no such directory"),
        (["--data", "{data}", "--split", "train"], "train"),
        (["--data", "{data}", "--penalty", "0"], "--penalty is 0"),
        (["--data", "{data}", "--generate", "--sequences", "0"], "--sequences is 0"),
        (["--data", "{data}", "--generate", "--temp", "-1"], "temperature is -1"),
        (["--data", "{data}", "--json", "{tmp}/no/r"], "there is no such file or directory"),
        (["--data", "{data}", "--json", "{tmp}/r", "--log", "{tmp}/r"], "two results are to go into one file"),
        ([], "--data"),
    ],
)
def test_bad_requests_are_one_sentence(
    planted: tuple[Path, Path], data: Path, tmp_path: Path, args: list[str], words: str
) -> None:
    done = evaluate("ceval", planted[1], *(arg.format(data=data, tmp=tmp_path) for arg in args))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_file_ends_the_command_with_its_line(planted: tuple[Path, Path], tmp_path: Path) -> None:
    path = eval_data.write_ceval(tmp_path, "val", "law", ROWS["law"])
    path.write_text(path.read_text(encoding="utf-8").replace(",海,", ",", 3), encoding="utf-8")
    done = evaluate("ceval", planted[1], "--data", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"cnllama: {path}:2: the row has 6 fields")


def test_unanswered_questions_never_count_as_right() -> None:
    prompt = type("Prompt", (), {"question": type("Question", (), {"answer": "A"})()})()
    assert Answer(prompt, None).correct is False
