# SPDX-License-Identifier: Apache-2.0
"""The lm-evaluation-harness adapter against the harness's own transformers model, and against our own numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import eval_data
import models
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
pytest.importorskip("transformers", reason="the oracle is transformers")

from lm_eval.api.instance import Instance

from cnllama import LLM
from cnllama.errors import InputError
from cnllama.eval.lm_eval import CnllamaLM
from cnllama.templates import TEMPLATES, encode_chat

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\n答案："
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(packed at 8 bits, the float32 checkpoint with exactly its weights) of a random model."""
    folder = tmp_path_factory.mktemp("lm_eval")
    base = models.make_llama(folder / "hf", eval_data.letter_tokenizer(), seed=4)
    cnl = models.convert(base, folder / "m.cnl", "--quant", "q8")
    return cnl, eval_data.dequantized_checkpoint(cnl, base, folder / "same")


@pytest.fixture(scope="module")
def ours(files: tuple[Path, Path]) -> CnllamaLM:
    return CnllamaLM(str(files[0]), max_length=256, batch_size=2)


def harness_model(checkpoint: Path, **options: Any) -> Any:
    """The harness's transformers model with the same tokenizer: slow SentencePiece, as the file has it."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=1, max_length=256, **options)


PAIRS = [
    ("从前有一个农夫", "他每天都去田里"),
    ("从前有一个农夫", "天空"),
    ("从前有一个农夫，", "大海"),
    ("天空和大海 ", "A"),
    ("天空和大海\n答案：", "A"),
    ("天空和大海\n答案：", "B"),
    ("", "天空和大海"),
    ("从前" * 200, "天空和大海"),
]


def test_log_likelihoods_are_those_of_transformers(ours: CnllamaLM, files: tuple[Path, Path]) -> None:
    found = ours.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    harness = harness_model(files[1])
    expected = harness.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for pair, (a, greedy), (b, expected_greedy) in zip(PAIRS, found, expected, strict=True):
        assert not pair[0] or ours._encode_pair(*pair) == harness._encode_pair(*pair)
        # of a token with probability e^-8 the engine's int8 activations move the logarithm by some hundredths
        assert a == pytest.approx(b, abs=0.1 * len(pair[1]) ** 0.5), pair
        assert greedy == expected_greedy


def test_rolling_is_transformers_and_our_own_perplexity(ours: CnllamaLM, files: tuple[Path, Path]) -> None:
    from cnllama.eval.models import EngineScorer
    from cnllama.eval.perplexity import perplexity
    from cnllama.eval.texts import windows

    texts = ["\n".join(models.chinese_lines()[:3]), "天空和大海", "\n".join(models.chinese_lines())]
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)), True)
    # with add_bos_token the harness's model would predict a BOS after the BOS that it starts from
    harness = harness_model(files[1], add_bos_token=False)
    expected = harness.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)), True)
    for text, a, b in zip(texts, found, expected, strict=True):
        assert a == pytest.approx(b, rel=5e-3), text[:20]
    with EngineScorer(ours.llm) as model:
        for text, value in zip(texts[:2], found, strict=False):
            mine = perplexity(model, windows(ours.llm.tokenizer, [text], 256, 128))
            assert -value == pytest.approx(mine.nll, rel=1e-9)


def test_greedy_text_is_that_of_transformers(ours: CnllamaLM, files: tuple[Path, Path]) -> None:
    asked = [
        ("从前有一个农夫", {"until": [], "max_gen_toks": 6, "do_sample": False}),
        ("天空和大海\n答案：", {"until": ["\n"], "max_gen_toks": 5}),
        ("他每天都去田里", {"max_new_tokens": 4, "temperature": 0.0}),
    ]
    found = ours.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    expected = harness_model(files[1]).generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert found == expected
    stop = found[0][2]
    cut = ours.generate_until(requests("generate_until", (asked[0][0], {"until": stop, "max_gen_toks": 6})), True)
    assert cut == [found[0].split(stop)[0]]


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_chat_becomes_the_ids_of_the_template(files: tuple[Path, Path], name: str) -> None:
    lm = CnllamaLM(str(files[0]), max_length=64)
    lm.llm.template = TEMPLATES[name]
    history = [
        {"role": "system", "content": "短"},
        {"role": "user", "content": "天空"},
        {"role": "assistant", "content": "大海"},
        {"role": "user", "content": "然后呢"},
    ]
    assert lm.tok_encode(lm.apply_chat_template(history)) == encode_chat(TEMPLATES[name], lm.llm.tokenizer, history)


def test_bits_do_not_depend_on_what_else_is_asked(ours: CnllamaLM) -> None:
    together = ours.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    alone = [ours.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)[0] for pair in PAIRS]
    assert together == alone


def test_a_local_task_gives_what_our_own_choice_gives(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A multiple-choice task of letters right after the colon, the planted model, the harness from its front door."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    base = eval_data.planted_llama(tmp_path / "hf", "C")
    cnl = models.convert(base, tmp_path / "m.cnl")
    rows = eval_data.rows(21)
    data = eval_data.write_ceval(tmp_path, "val", "law", rows).parent.parent
    lines = [
        {"question": f"{q}\nA. {a}\nB. {b}\nC. {c}\nD. {d}", "answer": "ABCD".index(answer)}
        for q, a, b, c, d, answer in rows
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "letters.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(
        model="cnllama", model_args=f"file={cnl},max_length=256", tasks=["letters"], task_manager=manager,
        bootstrap_iters=0, batch_size=4,
    )  # fmt: skip
    done = eval_data.evaluate("ceval", cnl, "--data", data, "--letters", "colon", "--json", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    mine = models.json_of(tmp_path / "r")
    assert results["results"]["letters"]["acc,none"] == mine["accuracy"]
    assert mine["correct"] == sum(row[5] == "C" for row in rows)


@pytest.mark.parametrize("bos", [True, False])
def test_words_and_bytes_divide_the_loss_of_all_of_their_text(tmp_path: Path, bos: bool) -> None:
    """Every token is predicted, the first one too, whether the model puts a BOS before a text or not."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    base = models.make_llama(tmp_path / "hf", eval_data.letter_tokenizer(), seed=4)
    models.write_json(base / "tokenizer_config.json", {"add_bos_token": bos})
    cnl = models.convert(base, tmp_path / "m.cnl", "--quant", "q8")
    texts = ["天空和大海", "从前 有一个农夫，\n他每天都去 田里", "A"]
    loss = 0.0
    with LLM(cnl, ctx=128) as llm:
        for text in texts:
            ids = [llm.tokenizer.bos_id, *llm.tokenize(text)]
            logits = llm.logits(ids).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            loss -= sum(float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "rolling.yaml").write_text(ROLLING.format(file=file), encoding="utf-8")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(
        model="cnllama", model_args=f"file={cnl},max_length=128", tasks=["rolling"], task_manager=manager,
        bootstrap_iters=0,
    )["results"]["rolling"]  # fmt: skip
    size = sum(len(text.encode()) for text in texts)
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(loss / size), rel=1e-6)
    assert found["bits_per_byte,none"] == pytest.approx(loss / size / math.log(2), rel=1e-6)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(loss / sum(len(t.split()) for t in texts)), rel=1e-6)


@pytest.mark.parametrize("value", [-1, True, "x", 1.5, [], "1e400"])
def test_lengths_that_are_no_numbers(ours: CnllamaLM, value: Any) -> None:
    asked = requests("generate_until", ("天空", {"max_gen_toks": value, "max_new_tokens": value}))
    with pytest.raises(InputError, match="tokens are to be generated, expected an integer, at least 0"):
        ours.generate_until(asked, disable_tqdm=True)


def test_the_command_line_knows_the_model(files: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "天空", "answer": 0}\n', encoding="utf-8")
    (tmp_path / "letters.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    done = models.command(
        "cnllama.eval.lm_eval", "--model", "cnllama", "--model_args", f"file={files[0]},max_length=128", "--tasks",
        "letters", "--include_path", tmp_path, "--output_path", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = (tmp_path / "out").rglob("results_*.json")
    assert models.json_of(result)["results"]["letters"]["acc,none"] in (0.0, 1.0)
