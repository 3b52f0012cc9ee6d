# SPDX-License-Identifier: Apache-2.0
"""Answers written as the published scripts write them: transformers' order of steps, beside transformers itself."""

from __future__ import annotations

from pathlib import Path

import eval_data
import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnllama import LLM, SamplingParams
from cnllama._core import Sampler
from cnllama.eval.answers import letter_logits, letter_tokens, penalized
from cnllama.eval.generation import _Draw, write
from cnllama.eval.procedures import SAMPLING
from cnllama.eval.prompts import Prompt
from cnllama.eval.questions import Question, Subject
from cnllama.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FLOATS = st.floats(-20, 20, width=32)


def kept_by_transformers(row: np.ndarray, tokens: list[int], params: SamplingParams) -> dict[int, float]:
    """{token: probability} of what is left to draw from, by the library's own processors in its own order."""
    scores, ids = torch.from_numpy(row)[None], torch.tensor([tokens])
    steps = [
        transformers.RepetitionPenaltyLogitsProcessor(params.repeat_penalty),
        transformers.TemperatureLogitsWarper(params.temperature),
        transformers.TopKLogitsWarper(params.top_k),
        transformers.TopPLogitsWarper(params.top_p),
    ]
    for step in steps:
        scores = step(ids, scores.clone())
    chances = torch.softmax(scores.double(), dim=-1)[0].numpy()
    return {i: float(chances[i]) for i in range(len(row)) if chances[i] > 0}


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_what_can_be_drawn_is_what_transformers_draws_from(data: st.DataObject) -> None:
    row = np.array(data.draw(st.lists(FLOATS, min_size=12, max_size=12, unique=True)), np.float32)
    tokens = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=6))
    params = SAMPLING.with_changes(
        temperature=data.draw(st.sampled_from([0.2, 0.7, 1.0, 1.7])),
        top_k=data.draw(st.sampled_from([2, 5, 40])),
        top_p=data.draw(st.sampled_from([0.3, 0.9, 0.99])),
    )
    expected = kept_by_transformers(row, tokens, params.with_changes(top_k=min(params.top_k, 12)))
    draw = _Draw(params, 1, [])
    counts = np.bincount([draw.choose(row, tokens) for _ in range(400)], minlength=12)
    assert set(np.flatnonzero(counts)) <= expected.keys()
    for token, chance in expected.items():
        spread = (400 * chance * (1 - chance)) ** 0.5
        assert abs(counts[token] - 400 * chance) <= 6 * spread + 3


def test_the_order_matters() -> None:
    """After a temperature of 0.2 the most likely of these has over 0.9 alone; before it three are needed for that."""
    row = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    draw = _Draw(SAMPLING, 3, [])
    assert {draw.choose(row, []) for _ in range(300)} == {0}
    plain = Sampler(temperature=0.2, top_k=40, top_p=0.9, seed=3)
    assert {plain.sample(row, [], 0)[0] for _ in range(300)} > {0}


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-300, 1.7e308])
def test_the_smallest_and_the_largest_temperature(temperature: float) -> None:
    row = np.array([-3, 2, 1.5, 90], np.float32)
    draw = _Draw(SAMPLING.with_changes(temperature=temperature, top_p=1.0), 3, [])
    drawn = {draw.choose(row, [1]) for _ in range(60)}
    assert drawn == ({3} if temperature < 1 else {0, 1, 2, 3})


@given(penalty=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False), values=st.data())
@settings(max_examples=200)
def test_any_penalty_leaves_numbers(penalty: float, values: st.DataObject) -> None:
    row = np.array(values.draw(st.lists(FLOATS, min_size=4, max_size=4)), np.float32)
    found = penalized(row, [0, 1, 1], penalty)
    assert np.isfinite(found).all()
    assert (found[2:] == row[2:]).all()
    tokens = letter_tokens(Tokenizer(eval_data.letter_tokenizer()))
    letters = [*tokens.space, *tokens.colon]
    wide = np.zeros(max(letters) + 1, np.float32)
    wide[letters] = [*row, *row]
    assert np.isfinite(letter_logits(wide, tokens, letters, penalty)).all()


def prompts_of(tokenizer: Tokenizer, texts: list[str]) -> list[Prompt]:
    subject = Subject("law", "法学", (), [], [])
    asked = Question("0", "", ("甲", "乙", "丙", "丁"), "A")
    return [Prompt(subject, asked, text, tokenizer.encode(text, bos=True), 0) for text in texts]


@pytest.mark.parametrize("sequences", [1, 3])
def test_the_tokens_are_those_of_transformers(tmp_path: Path, sequences: int) -> None:
    """With one token to draw from nothing is left to chance: what stays is the model, the penalty and the end."""
    base = models.make_llama(tmp_path / "hf", eval_data.letter_tokenizer(), seed=4)
    cnl = models.convert(base, tmp_path / "m.cnl", "--quant", "q8")
    same = eval_data.dequantized_checkpoint(cnl, base, tmp_path / "same")
    plain = transformers.LlamaForCausalLM.from_pretrained(same, dtype=torch.float32).eval()
    texts = ["从前有一个农夫", "从前有一个农夫，他每天都去田里", "天空和大海\n答案：", "大海", "天空" * 150]
    params = SAMPLING.with_changes(top_k=1, max_tokens=12)
    with LLM(cnl, ctx=400, max_sequences=sequences) as llm:
        prompts = prompts_of(llm.tokenizer, texts)
        found = [answer.response for _, answer in sorted(write(llm, prompts, params), key=lambda pair: pair[0])]
        decode = llm.tokenizer.decode
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([list(prompt.ids)])
        with torch.inference_mode():
            out = plain.generate(
                ids, do_sample=True, num_beams=1, max_new_tokens=12, eos_token_id=2, pad_token_id=0,
                temperature=0.2, top_k=1, top_p=0.9, repetition_penalty=1.1,
            )  # fmt: skip
        expected = [i for i in out[0, ids.shape[1] :].tolist() if i != 2]
        assert text == decode(expected)


def test_only_the_tokenizer_s_end_token_ends_an_answer(tmp_path: Path) -> None:
    """A model that says A and then its end token: the end is not text, and nothing comes after it."""
    base = eval_data.planted_llama(tmp_path / "hf", "A")
    cnl = models.convert(base, tmp_path / "m.cnl", "--quant", "q8")
    with LLM(cnl, ctx=64) as llm:
        letters = {llm.tokenizer.encode("A")[0], llm.tokenizer.encode("：A")[-1]}
        ((_, answer),) = write(llm, prompts_of(llm.tokenizer, ["天空"]), SAMPLING.with_changes(max_tokens=5))
        assert answer.letter == "A"
        assert {llm.tokenizer.encode(answer.response)[0]} <= letters
        (empty,) = [a for _, a in write(llm, prompts_of(llm.tokenizer, ["天空"]), SAMPLING.with_changes(max_tokens=0))]
        assert (empty.response, empty.letter) == ("", None)
