# SPDX-License-Identifier: Apache-2.0
"""LLM end to end on a small converted model: streams, stops, limits and options; test_scheduler.py has the rest."""

import gc
import io
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from generation import HOT, PROMPTS, user

from cnllama import LLM, CnllamaError, InputError, SamplingParams
from cnllama.cli.run import prefill_progress
from cnllama.request import StopMatcher


@pytest.fixture(scope="module")
def llm(tiny_cnl: Path) -> Iterator[LLM]:
    with LLM(tiny_cnl, ctx=512, threads=1) as opened:
        yield opened


def test_greedy_is_the_argmax_of_logits(llm: LLM) -> None:
    ids = llm.tokenize("从前有一个", bos=True)
    (answer,) = llm.generate([ids], SamplingParams(max_tokens=12, ignore_eos=True))
    rows = llm.logits(ids + answer.token_ids)
    assert rows.shape == (len(ids) + 12, llm.vocab_size)
    assert rows.dtype == np.float32
    assert rows[len(ids) - 1 : -1].argmax(axis=1).tolist() == answer.token_ids


def test_logits_do_not_depend_on_where_they_are_cut(llm: LLM) -> None:
    ids = llm.tokenize("天空是蓝色的" * 60, bos=True)
    assert len(ids) > llm.engine.max_step_tokens
    rows = llm.logits(ids)
    np.testing.assert_array_equal(rows[:300], llm.logits(ids[:300]))
    np.testing.assert_array_equal(rows[-1:], llm.logits(ids)[-1:])


def test_stream_and_generate_give_the_same_text(llm: LLM) -> None:
    for prompt in PROMPTS:
        stream = llm.stream(prompt, max_tokens=40, **HOT)
        text = "".join(stream)
        (answer,) = llm.generate([prompt], max_tokens=40, **HOT)
        assert text == answer.text == stream.completion.text
        assert stream.completion.token_ids == answer.token_ids
        decoder = llm.tokenizer.stream(continues=True)
        assert text == "".join(decoder.feed(i) for i in answer.token_ids)
        assert answer.seed == 7


def test_one_set_of_parameters_for_each_prompt(llm: LLM) -> None:
    short, long = llm.generate(["好", "好"], [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 9)])
    assert len(short.token_ids) == 3
    assert long.token_ids[:3] == short.token_ids
    assert len(long.token_ids) == 9
    with pytest.raises(InputError, match="2 prompts and 1 sampling"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_usage_and_logprobs(llm: LLM) -> None:
    ids = llm.tokenize("深度学习", bos=True)
    (answer,) = llm.generate([ids], SamplingParams(max_tokens=5, logprobs=3, ignore_eos=True))
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == 5
    assert answer.logprobs is not None
    rows = llm.logits(ids + answer.token_ids).astype(np.float64)[len(ids) - 1 :]
    for token, entry, row in zip(answer.token_ids, answer.logprobs, rows, strict=False):
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert entry.token == token
        assert entry.logprob == pytest.approx(expected[token], abs=1e-6)
        assert [i for i, _ in entry.top] == np.argsort(-row, kind="stable")[:3].tolist()
    assert llm.generate(["好"], SamplingParams(max_tokens=2))[0].logprobs is None


def test_random_seeds_differ_and_are_reported(llm: LLM) -> None:
    first, second = llm.generate(["好", "好"], temperature=1.5, max_tokens=30)
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    (again,) = llm.generate(["好"], temperature=1.5, max_tokens=30, seed=first.seed)
    assert again.token_ids == first.token_ids


def test_temperature_zero_alone_means_the_most_likely_token(llm: LLM) -> None:
    """The model's default penalty and truncation are dropped, unless they are asked for."""
    plain = llm.generate(["好"], SamplingParams(max_tokens=20, ignore_eos=True))[0].token_ids
    assert llm.generate(["好"], temperature=0, max_tokens=20, ignore_eos=True)[0].token_ids == plain
    penalized = llm.generate(["好"], temperature=0, max_tokens=20, repeat_penalty=1.5, ignore_eos=True)[0].token_ids
    assert len(set(penalized)) >= len(set(plain))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_strings_are_cut_and_never_partly_shown(llm: LLM, length: int) -> None:
    params = {"max_tokens": 60, "ignore_eos": True, **HOT}
    (whole,) = llm.generate(["从前"], **params)
    at = len(whole.text) // 2
    stop = whole.text[at : at + length]
    expected = whole.text[: whole.text.index(stop)]
    stream = llm.stream("从前", stop=["没有这个", stop], **params)
    shown = ""
    for piece in stream:
        shown += piece
        assert expected.startswith(shown)
    answer = stream.completion
    assert (shown, answer.text, answer.finish_reason) == (expected, expected, "stop")
    assert whole.token_ids[: len(answer.token_ids)] == answer.token_ids


def test_text_that_only_begins_a_stop_string_is_shown_in_the_end(llm: LLM) -> None:
    params = {"max_tokens": 20, "ignore_eos": True, **HOT}
    (whole,) = llm.generate(["从前"], **params)
    (answer,) = llm.generate(["从前"], stop=[whole.text[-1] + "?!"], **params)
    assert (answer.text, answer.finish_reason) == (whole.text, "length")


def test_stop_matcher_against_a_search_in_the_whole_text() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        text = "".join(rng.choice(list("ab"), 12))
        stops = ["".join(rng.choice(list("ab"), rng.integers(1, 6))) for _ in range(rng.integers(1, 3))]
        matcher = StopMatcher(stops)
        shown, stopped, at = "", False, 0
        while at < len(text) and not stopped:
            size = int(rng.integers(1, 4))
            piece, stopped = matcher.feed(text[at : at + size])
            shown += piece
            at += size
        if not stopped:
            shown += matcher.flush()
        # A string that completes first stops first: look at the shortest beginning that holds one.
        ends = [end for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)]
        assert stopped == bool(ends)
        cuts = {min(text[:end].index(s) for s in stops if s in text[:end]) for end in ends[:3]}
        assert shown == text if not ends else len(shown) in cuts, (text, stops, shown)


def test_end_tokens(llm: LLM) -> None:
    (free,) = llm.generate(["从前"], SamplingParams(max_tokens=30, ignore_eos=True))
    end = free.token_ids[6]
    first = free.token_ids.index(end)
    (cut,) = llm.generate(["从前"], SamplingParams(max_tokens=30, stop_token_ids=(end,), ignore_eos=True))
    assert (cut.token_ids, cut.finish_reason) == (free.token_ids[:first], "stop")
    (held,) = llm.generate(
        ["从前"], SamplingParams(max_tokens=12, min_tokens=10, stop_token_ids=(end,), ignore_eos=True)
    )
    assert len(held.token_ids) >= 10
    assert end not in held.token_ids[:10]


def test_max_tokens_zero_gives_nothing(llm: LLM) -> None:
    (answer,) = llm.generate(["好"], max_tokens=0)
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [], "length")
    assert list(llm.stream("好", max_tokens=0)) == []


def test_the_context_is_a_limit_with_both_numbers(llm: LLM) -> None:
    ids = llm.tokenize("天" * 600, bos=True)
    with pytest.raises(InputError, match=rf"{len(ids)} tokens .* {llm.context}"):
        llm.stream(ids)
    with pytest.raises(InputError, match=rf"{len(ids)} tokens .* {llm.context}"):
        llm.logits(ids)
    (full,) = llm.generate([ids[:512]], max_tokens=None, ignore_eos=True)
    assert (len(full.token_ids), full.finish_reason) == (1, "length")
    (nearly,) = llm.generate([ids[:500]], max_tokens=None, ignore_eos=True)
    assert (len(nearly.token_ids), nearly.finish_reason) == (13, "length")


def test_empty_prompts(llm: LLM) -> None:
    assert llm.prompt_ids("") == [1]
    assert llm.generate([""], max_tokens=3, ignore_eos=True)[0].usage.prompt_tokens == 1
    with pytest.raises(InputError, match="prompt is empty"):
        llm.stream([])
    with pytest.raises(InputError, match="no token ids"):
        llm.logits([])


def test_one_prompt_alone_and_what_is_none(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    ids = llm.prompt_ids("从前")
    answers = [llm.generate(prompt, params) for prompt in ("从前", ids, np.array(ids), [user("从前")], [np.array(ids)])]
    assert all(len(a) == 1 and a[0].token_ids == answers[0][0].token_ids for a in answers)
    assert llm.generate([]) == []
    for wrong in (None, 1.5, [["从前"]], [1.5, 2.5]):
        with pytest.raises(InputError, match="text, messages or token ids"):
            llm.generate([wrong])


def test_ids_outside_the_vocabulary(llm: LLM) -> None:
    for bad in (-1, llm.vocab_size):
        with pytest.raises(InputError, match=f"{bad} is outside the vocabulary, 0 to {llm.vocab_size - 1}"):
            llm.generate([[1, bad]])


def test_a_model_that_nobody_uses_is_freed_at_once(tiny_cnl: Path) -> None:
    llm = LLM(tiny_cnl, ctx=64, threads=1)
    llm.generate("好", max_tokens=2)
    freed = weakref.ref(llm.file)
    gc.disable()
    try:
        del llm
        assert freed() is None
    finally:
        gc.enable()


def test_two_models_at_once(tiny_cnl: Path) -> None:
    with LLM(tiny_cnl, ctx=128, threads=1) as first, LLM(tiny_cnl, ctx=64, threads=2, kv_type="int8") as second:
        a, b = first.stream("从前", max_tokens=10, **HOT), second.stream("从前", max_tokens=10, **HOT)
        texts = [next(a, "") + next(b, "") for _ in range(20)]
        assert any(texts)
        assert first.engine.kv_type == "fp16"
        assert second.engine.kv_type == "int8"


def test_closed_means_closed(tiny_cnl: Path) -> None:
    llm = LLM(tiny_cnl, ctx=128)
    stream = llm.stream("从前", max_tokens=50, ignore_eos=True)
    next(stream)
    llm.close()
    llm.close()
    for use in (lambda: llm.generate(["好"]), lambda: llm.logits([1]), lambda: list(stream)):
        with pytest.raises(CnllamaError, match="closed"):
            use()


def test_a_context_over_the_trained_length_warns(tiny_cnl: Path) -> None:
    with pytest.warns(UserWarning, match="2048 .* 1024"), LLM(tiny_cnl, ctx=2048) as llm:
        assert llm.context == 2048
    with LLM(tiny_cnl) as llm:
        assert llm.context == 1024


def test_wrong_options(tiny_cnl: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"ctx": 0}, "0"),
        ({"kv_type": "fp8"}, "fp8"),
        ({"template": "vicuna"}, "vicuna"),
        ({"threads": -1}, "threads is -1"),
        ({"max_sequences": 0}, "0"),
    ):
        with pytest.raises(InputError, match=words):
            LLM(tiny_cnl, **options)
    with pytest.raises(InputError, match="no such file"):
        LLM(tmp_path / "没有.cnl")


def test_a_damaged_weight_is_one_sentence(tiny_cnl: Path, tmp_path: Path) -> None:
    data = bytearray(tiny_cnl.read_bytes())
    size = int.from_bytes(data[:8], "little")
    begin = 8 + size + json.loads(data[8 : 8 + size])["lm_head.weight"]["data_offsets"][0]
    data[begin : begin + 2] = np.float16("nan").tobytes()  # the scale of the first group of token 0
    damaged = tmp_path / "damaged.cnl"
    damaged.write_bytes(data)
    with LLM(damaged, ctx=128) as llm:
        for use in (lambda: llm.generate("从前"), lambda: list(llm.stream("从前"))):
            with pytest.raises(CnllamaError, match=r"damaged\.cnl: the logit of token 0 is not a number.*verify"):
                use()


def test_templates_end_an_answer_at_the_next_instruction(tiny_cnl: Path) -> None:
    with LLM(tiny_cnl, ctx=512, template="alpaca") as llm:
        assert llm.defaults.repeat_penalty == 1.1
        ids = llm.prompt_ids("好")
        assert llm.prompt_ids([user("好")]) == ids
        assert ids[0] == 1
        assert "### Response" in llm.detokenize(ids)
        assert llm.prompt_ids([5, 6]) == [5, 6]


@pytest.mark.parametrize("module", ["cnllama", "cnllama.llm", "cnllama.cli.main", "cnllama.cli.run"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "transformers", "peft", "accelerate", "safetensors", "cnllama.convert"}
    if module == "cnllama":
        assert not loaded & {"numpy", "sentencepiece"}


def test_a_short_answer_loads_no_progress_bar(tiny_cnl: Path) -> None:
    code = (
        "import sys; from cnllama.cli.main import main; main(['run', '-m', sys.argv[1], '-p', '好', '-n', '3']); "
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_cnl)], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "cnllama.llm" in loaded
    assert not loaded & {"tqdm", "traceback", "secrets", "statistics"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_prompt_that_takes_long_has_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    for patience, shown in ((0.0, True), (60.0, False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr("cnllama.cli.run.PATIENCE", patience)
        with prefill_progress() as update:
            for done in (100, 300, 400):
                update(done, 400)
        assert ("prompt" in terminal.getvalue()) == shown


def test_public_names_exist() -> None:
    import cnllama

    for name in cnllama.__all__:
        assert getattr(cnllama, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LLn'"):
        _ = cnllama.LLn
