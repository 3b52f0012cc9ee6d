# SPDX-License-Identifier: Apache-2.0
"""End tokens and sampling values: what several files say, every form of "off", and files nobody should write."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from cnllama.convert.generation import generation_metadata
from cnllama.convert.pack import convert, make_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import write_json
from test_format import metadata, read, write

from cnllama import LLM, SamplingParams
from cnllama.errors import CnllamaError, InputError
from cnllama.format import open_cnl
from cnllama.sampling import GENERATION_NAMES, file_defaults, read_defaults

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5)
    | st.sampled_from([10**400, -(10**400), "1e400", "0.5", "-1", 5e-324, 1.7e308, -0.0]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)  # fmt: skip


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint, free to be changed."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*GENERATION_NAMES]), ANY, max_size=6))
def test_whatever_a_file_says_there_are_defaults(said: dict[str, Any]) -> None:
    values, problems = read_defaults(said)
    params, same = file_defaults({"temperature": 0.2, "top_k": 40}, said)
    assert problems == same
    assert set(values) <= set(GENERATION_NAMES)
    assert all(type(value) in (int, float) and math.isfinite(value) for value in values.values())
    for key, value in values.items():
        assert getattr(params, GENERATION_NAMES[key]) == value
    assert read_defaults(values) == (values, {})
    for name, sentence in problems.items():
        assert name in SamplingParams.__dataclass_fields__
        assert sentence.endswith(": ignored")
        assert len(sentence) < 200


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *((key, None, {key: neutral}) for key, neutral in NEUTRAL.items()),
        *((key, neutral, {key: neutral}) for key, neutral in NEUTRAL.items()),
        ("top_k", -1, {"top_k": 0}),
        ("top_k", 40.0, {"top_k": 40}),
        ("top_k", 2**40, {"top_k": 0}),
        ("top_k", "40", {"top_k": 40}),
        ("top_p", 0, {"top_k": 1}),
        ("top_p", "0.9", {"top_p": 0.9}),
        ("repetition_penalty", 0, {"repetition_penalty": 1.0}),
        ("repetition_penalty", "1.1", {"repetition_penalty": 1.1}),
        ("temperature", 0, {"temperature": 0}),
        ("max_new_tokens", None, {}),
        ("max_new_tokens", -1, {}),
        ("max_new_tokens", 0, {}),
        ("max_new_tokens", 2**40, {}),
        ("max_new_tokens", 300, {"max_new_tokens": 300}),
    ],
)
def test_every_form_of_off_is_understood(key: str, value: Any, expected: dict[str, Any]) -> None:
    assert read_defaults({key: value}) == (expected, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("top_k", -7), ("top_k", 4.5), ("top_k", True), ("top_k", [40]), ("top_p", 1.5), ("top_p", -0.1), ("min_p", 2),
        ("temperature", -1), ("temperature", 1e30), ("temperature", "warm"), ("temperature", {}),
        ("repetition_penalty", -1.1), ("max_new_tokens", 2.5), ("max_new_tokens", -9),
    ],
)  # fmt: skip
def test_what_is_no_value_is_said_and_left_out(base: Path, key: str, value: Any) -> None:
    write_json(base / "generation_config.json", {"do_sample": True, key: value})
    found, notices = generation_metadata(make_plan(base))
    assert found == {"eos_token_ids": [2], "bos_token_id": 1}
    (notice,) = notices
    assert notice.startswith(f"{base / 'generation_config.json'}: {key} is ")


def test_the_values_of_a_conversion(base: Path, tmp_path: Path) -> None:
    """The issue's example, which converted into a file that nothing could open."""
    write_json(
        base / "generation_config.json",
        {"do_sample": True, "top_k": -1, "top_p": None, "temperature": 0.7, "max_new_tokens": 64, "eos_token_id": 2,
         "typical_p": 0.9, "num_beams": 4, "no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "suppress_tokens": None},
    )  # fmt: skip
    report = convert(base, [], tmp_path / "x.cnl")
    assert [w for w in report.warnings if w.endswith("cnllama does not have num_beams, typical_p: ignored")]
    with LLM(tmp_path / "x.cnl", ctx=64) as llm:
        assert (llm.defaults.top_k, llm.defaults.top_p, llm.defaults.temperature) == (0, 1.0, 0.7)
        assert llm.defaults.max_tokens == 64
        assert llm.unusable_defaults == {}
    write_json(base / "generation_config.json", {"do_sample": True, "top_k": 50_000})
    assert generation_metadata(make_plan(base))[0]["top_k"] == 0
    for samples in (False, None, "false", 0, 1):
        write_json(base / "generation_config.json", {"do_sample": samples, "top_k": 5, "repetition_penalty": 1.2})
        found, notices = generation_metadata(make_plan(base))
        assert "top_k" not in found
        assert found["repetition_penalty"] == 1.2
        assert any("do_sample is" in notice for notice in notices) == (samples not in (False, None) or samples is 0)  # noqa: F632


# --- a file that somebody else wrote


@pytest.fixture(scope="module")
def odd(tiny_cnl: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """odd(**generation) -> the small model with these values in its header."""
    folder = tmp_path_factory.mktemp("odd")

    def make(**values: Any) -> Path:
        header, body = read(tiny_cnl)
        metadata("generation", lambda g: g.update(values))(header)
        return write(folder / "odd.cnl", header, body)

    return make


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from([*GENERATION_NAMES, "stranger"]), ANY, max_size=4))
def test_any_default_opens_and_runs(odd: Any, values: dict[str, Any]) -> None:
    said = json.loads(json.dumps(values), parse_constant=lambda _: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with LLM(odd(**said), ctx=64, threads=1) as llm:
            assert len(llm.generate([1, 300], max_tokens=1, temperature=0.5)) == 1
            assert len(llm.generate([1, 300], max_tokens=1)) == 1


def test_an_option_wins_over_an_unusable_default(odd: Any) -> None:
    with LLM(odd(top_k=-7, top_p="x", max_new_tokens=0.5), ctx=64, threads=1) as llm:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            llm.generate([1, 300], max_tokens=1, top_k=5, top_p=0.5)
            llm.generate([1, 300], SamplingParams(max_tokens=1))
            llm.generate([1, 300], max_tokens=1, temperature=0)
        with pytest.warns(UserWarning, match=r"odd\.cnl: among the file's sampling defaults top_k is -7") as caught:
            llm.generate([1, 300], max_tokens=1)
        assert len(caught) == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            llm.generate([1, 300], max_tokens=1)


def test_a_file_with_unusable_defaults_cannot_be_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cnllama.convert.pack.generation_metadata", lambda plan: ({"eos_token_ids": [2], "top_k": -7}, [])
    )
    with pytest.raises(CnllamaError, match="no run could use its sampling defaults: top_k is -7"):
        convert(base, [], tmp_path / "x.cnl")
    assert not list(tmp_path.glob("*x.cnl*"))


# --- end tokens


IDS: list[Any] = [None, 2, 7, [2], [7, 2], [7, 8], [], 10**9, -1, 2.0, True, "2", [2, "x"], {"a": 1}]


def valid(value: Any) -> list[int]:
    items = value if isinstance(value, list) else [value]
    return [i for i in items if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 900]


def test_end_tokens_of_every_combination(base: Path, tokenizer_model: bytes) -> None:
    """The first file that has one counts, the tokenizer's own always ends, what differs is said."""
    config = json.loads((base / "config.json").read_text())
    (base / "special_tokens_map.json").unlink()
    plans = {}
    for name, own in (("</s>", 2), ("<s>", 1)):
        write_json(base / "tokenizer_config.json", {"legacy": True, "eos_token": name})
        plans[own] = make_plan(base)
    for (own, plan), first, second in itertools.product(plans.items(), IDS, IDS):
        write_json(base / "generation_config.json", {"eos_token_id": first, "bos_token_id": 1})
        plan.checkpoint.config.update(config | {"eos_token_id": second})
        found, notices = generation_metadata(plan)
        stated = valid(first) or valid(second)
        assert found["eos_token_ids"] == list(dict.fromkeys([*stated, own]))
        assert any("each of them ends an answer" in n for n in notices) == (bool(stated) and own not in stated)
        for value in (first, second):
            given_ = value if isinstance(value, list) else [] if value is None else [value]
            assert any(f"{value!r}" in n and "ignored" in n for n in notices) or len(valid(value)) == len(given_)
        assert any("says otherwise and counts" in n for n in notices) == bool(set(valid(second)) - {*stated, own})


def test_ids_of_another_tokenizer(base: Path, tmp_path: Path) -> None:
    """The most used conversion of LLaMA-1: bos 0, eos 1, pad -1, and a tokenizer that says 1 and 2."""
    write_json(
        base / "config.json",
        json.loads((base / "config.json").read_text()) | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1},
    )
    write_json(base / "generation_config.json", {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1})
    report = convert(base, [], tmp_path / "x.cnl")
    assert open_cnl(tmp_path / "x.cnl").generation == {"eos_token_ids": [1, 2], "bos_token_id": 1}
    assert any("its eos_token_id is 1 '<s>', the tokenizer's eos token 2 '</s>'" in w for w in report.warnings)
    assert any("its bos_token_id is 0 '<unk>', but the tokenizer puts 1 '<s>'" in w for w in report.warnings)
    with LLM(tmp_path / "x.cnl", ctx=64) as llm:
        assert set(llm._ends) == {1, 2}


def test_generation_config_of_another_type(base: Path) -> None:
    (base / "generation_config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"generation_config\.json"):
        generation_metadata(make_plan(base))
