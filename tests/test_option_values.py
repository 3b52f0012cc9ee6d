# SPDX-License-Identifier: Apache-2.0
"""Whatever a caller gives, an answer or one sentence comes: options of any size, prompts of any type."""

import array
import collections
import decimal
import fractions
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cnllama import LLM, CnllamaError, InputError, SamplingParams
from cnllama.cli.main import main
from cnllama.cli.parser import Parser
from cnllama.textio import decode_argument

SHORT = {"max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def llm(tiny_cnl: Path) -> Iterator[LLM]:
    with LLM(tiny_cnl, ctx=128, threads=1) as llm:
        yield llm


class _Text(str):
    def __str__(self) -> str:
        raise AssertionError("a subclass decides nothing")


class _Rude:
    def __repr__(self) -> str:
        raise ValueError("I print nothing")


# ---- the command line

HUGE = ["1" + "0" * 30, "-1" + "0" * 30, str(2**64), str(-(2**63) - 1), "9" * 5000, "10^30", "1e30", "", "٣" * 70]
INTEGERS = ["--ctx", "--threads", "-n", "--min-tokens", "--top-k", "--repeat-last-n", "--seed", "--logprobs"]
NUMBERS = ["--temp", "--top-p", "--min-p", "--repeat-penalty"]


def one_sentence(capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert "bug" not in err
    assert len(err) < 400, err
    return err


@pytest.mark.parametrize(
    ("option", "value"),
    [*itertools.product(INTEGERS, HUGE), *itertools.product(NUMBERS, ["10^30", "", "9" * 5000])],
)
def test_numbers_of_any_size_are_one_sentence(
    option: str, value: str, tiny_cnl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-m", str(tiny_cnl), "-p", "x", "--json", option, value]) == 2
    one_sentence(capsys)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, value) for option in NUMBERS for value in ("nan", "inf", "-inf", "1e400", "1e-400", "-1", "warm")),
        ("--seed", "-1"), ("--ctx", "0"), ("--ctx", str(2**62)), ("--ctx", str(2**24 + 1)), ("--threads", "1000000000"),
        ("--threads", "-1"), ("--threads", str(2**63)), ("--logprobs", "1000000000000"), ("--logprobs", "1000"),
        ("--top-k", "-2"), ("--top-k", str(2**63)), ("--repeat-last-n", "-2"), ("-n", "-2"),
        ("--min-tokens", str(2**63)),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_one_sentence(
    option: str, value: str, tiny_cnl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-m", str(tiny_cnl), "-p", "x", "--json", option, value]) == 2
    one_sentence(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--temp", "5e-324"), ("--temp", "1e308"), ("--temp", "0"), ("--top-p", "5e-324"), ("--min-p", "5e-324"),
        ("--repeat-penalty", "5e-324"), ("--repeat-penalty", "1e308"), ("--top-k", str(2**63 - 1)),
        ("--repeat-last-n", str(2**63 - 1)), ("-n", str(2**63 - 1)), ("--seed", str(2**64 - 1)),
    ],
)  # fmt: skip
def test_the_smallest_and_largest_numbers_work(
    arguments: tuple[str, str], tiny_cnl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = () if "-n" in arguments else ("-n", "5")
    command = ["run", "-m", str(tiny_cnl), "-p", "从前", "--ctx", "128", "--temp", "0.7", *number, *arguments]
    assert main(command) == 0
    capsys.readouterr()


def test_what_the_smallest_and_largest_numbers_mean(llm: LLM) -> None:
    def tokens(**params: float) -> list[int]:
        return llm.generate("从前", max_tokens=20, ignore_eos=True, seed=1, **params)[0].token_ids

    greedy = tokens(temperature=0)
    assert tokens(temperature=5e-324) == greedy
    assert tokens(temperature=1.0, top_p=5e-324) == greedy
    assert len(set(tokens(temperature=1e308))) > 15  # every token is as likely as any other
    assert len(set(tokens(temperature=0, repeat_penalty=1e308))) == 20
    assert len(set(tokens(temperature=0, repeat_penalty=5e-324))) < 20


VERBS = {
    "bench": ["--threads", "--rounds", "--prefill", "--decode", "--batch"],
    "plan": ["--ctx", "--sequences"],
    "eval": ["--ctx", "--threads", "--stride", "--chars"],
    "convert": ["--threads", "--calibrate-tokens"],
}


@pytest.mark.parametrize("value", ["9" * 30, "9" * 5000, str(2**63), "-1", "nan"])
@pytest.mark.parametrize(("verb", "option"), [(verb, option) for verb, options in VERBS.items() for option in options])
def test_options_of_the_other_verbs(
    verb: str,
    option: str,
    value: str,
    tiny_cnl: Path,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("春天来了。" * 50)
    rest = {
        "bench": [str(tiny_cnl), "--quick"],
        "plan": [str(tiny_cnl)],
        "eval": ["ppl", str(tiny_cnl), str(file)],
        "convert": [str(tiny_llama), "-o", str(tmp_path / "x.cnl"), "--calibrate", str(file)],
    }[verb]
    code = main([verb, *rest, option, value])
    if option == "--chars" and value == str(2**63):
        assert code == 0  # as many as there are
        return
    assert code == 2
    one_sentence(capsys)


@pytest.mark.parametrize("text", ["-1+1", "-5", "--", "-", "-fun", "-1 + 1", "--x=1", "- 一", "-n", "--temp=0", "-1=2"])
@pytest.mark.parametrize("option", ["-p", "--prompt"])
def test_a_prompt_that_begins_with_a_dash(option: str, text: str) -> None:
    parser = Parser(prog="x", allow_abbrev=False)
    parser.add_argument("-p", "--prompt", type=decode_argument)
    parser.add_argument("-n", "--number", type=int)
    parser.add_argument("-f", "--file")
    parser.add_argument("--temp", type=float)
    if text != "--":  # which argparse of Python 3.12 and earlier drops
        assert parser.parse_args([f"--prompt={text}"]).prompt == text
    if text in ("--", "-fun", "-n", "--temp=0"):
        with pytest.raises(InputError, match=f"as the text it is --prompt={text}"):
            parser.parse_args([option, text])
    else:
        assert parser.parse_args([option, text, "--temp", "1"]).prompt == text


# ---- sampling parameters

FIELDS = {
    "temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.5, "repeat_last_n": 7, "seed": 3,
    "max_tokens": 4, "min_tokens": 1, "logprobs": 2,
}  # fmt: skip
SCALARS = (np.float16, np.float32, np.float64, np.longdouble, np.int8, np.int32, np.int64, np.uint8, np.uint64)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("scalar", SCALARS)
def test_numpy_scalars_are_numbers(name: str, scalar: Any) -> None:
    value = scalar(FIELDS[name] if isinstance(FIELDS[name], int) or np.issubdtype(scalar, np.floating) else 1)
    if isinstance(FIELDS[name], int) and np.issubdtype(scalar, np.floating):
        with pytest.raises(InputError, match=f"{name} is .*, expected an integer"):
            SamplingParams(**{name: value})
    else:
        found = getattr(SamplingParams(**{name: value}), name)
        assert found == value
        assert type(found) is type(FIELDS[name])


def test_other_numbers_are_none() -> None:
    for value in (
        True,
        np.True_,
        fractions.Fraction(1, 2),
        decimal.Decimal("0.5"),
        1j,
        "1",
        b"1",
        np.array(1),
        [1],
        None,
    ):
        for name in ("temperature", "top_k"):
            with pytest.raises(InputError, match=f"{name} is "):
                SamplingParams(**{name: value})
    assert SamplingParams(ignore_eos=np.True_).ignore_eos is True  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=np.array([1, 2])).stop_token_ids == (1, 2)  # type: ignore[arg-type]
    assert SamplingParams(stop=(c for c in "ab")).stop == ("a", "b")  # type: ignore[arg-type]


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.sampled_from(
        [
            np.int64(3), np.float32(2), np.bool_(True), np.array(5), np.array([1, 2]), np.array([[1], [2]]),
            np.str_("春"), np.array(["a"]), math.nan, object(), object, len, _Text("春"), range(3), Path("x"), 1j,
            array.array("i", [1, 2]), array.array("f", [1.5]), collections.deque([1]), collections.OrderedDict(a=1),
            fractions.Fraction(1, 2), {"role": "user", "content": "春"}, {"role": "user"}, {"role": 1, "content": 2},
            {"role": "assistant", "content": "x"}, frozenset([1]), memoryview(b"ab"), bytearray(b"ab"), ...,
        ]
    ),
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=2)
    | st.lists(inner, max_size=2).map(iter),
    max_leaves=4,
)  # fmt: skip


def answered(work: Callable[[], object]) -> None:
    """It works, or says why not in one sentence."""
    sentence = "an answer"
    try:
        work()
    except CnllamaError as error:
        sentence = str(error)
    assert sentence
    assert "\n" not in sentence
    assert "verify" not in sentence  # the file is not to blame


CALLS: dict[str, Callable[[LLM, Any], object]] = {
    "generate": lambda llm, value: llm.generate(value, **SHORT),
    "generate several": lambda llm, value: llm.generate([value, "春"], **SHORT),
    "generate with": lambda llm, value: llm.generate("春", value, **SHORT),
    "stream": lambda llm, value: list(llm.stream(value, **SHORT)),
    "stream with": lambda llm, value: list(llm.stream("春", value, **SHORT)),
    "progress": lambda llm, value: list(llm.stream("春", progress=None if callable(value) else value, **SHORT)),
    "chat": lambda llm, value: llm.chat(value, **SHORT),
    "logits": lambda llm, value: llm.logits(value),
    "tokenize": lambda llm, value: llm.tokenize(value),
    "detokenize": lambda llm, value: llm.detokenize(value),
    "prompt_ids": lambda llm, value: llm.prompt_ids(value),
    **{
        f"{name}": lambda llm, value, name=name: llm.generate("春", **{**SHORT, name: value})
        for name in SamplingParams.__dataclass_fields__
    },
}


@pytest.mark.parametrize("call", CALLS)
@settings(max_examples=60, deadline=None)
@given(junk)
@example(b"\x01\x02")
@example(bytearray(b"ab"))
@example({1, 2})
def test_a_value_of_any_type_is_an_answer_or_one_sentence(call: str, llm: LLM, value: Any) -> None:
    answered(lambda: CALLS[call](llm, value))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", [_Rude(), 10**5000, [_Rude()], [10**5000]], ids=["rude", "long", "rudes", "longs"])
def test_a_value_that_does_not_print(call: str, value: Any, llm: LLM) -> None:
    answered(lambda: CALLS[call](llm, value))


@pytest.mark.parametrize(
    "name", ["path", "ctx", "threads", "kv_type", "max_sequences", "template", "speculate", "device"]
)
@settings(max_examples=60, deadline=None)
@given(junk)
@example(10**30)
@example(-1)
@example(np.int64(2))
def test_opening_with_a_value_of_any_type(name: str, tiny_cnl: Path, value: Any) -> None:
    if name != "path" or value is not None:
        answered(lambda: LLM(**{"path": tiny_cnl, "ctx": 64, "threads": 1, name: value}).close())


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (b"ab", "text, not bytes: decode them first"),
        (np.bytes_(b"ab"), "not bytes"),
        ({"role": "user", "content": "x"}, "not one message: put it into a list"),
        ({1, 2}, "text, messages or token ids"),
        ([True, False], "True stands among them"),
        ([[1, 2]], "stands among them"),
        ([{"role": "user", "content": "x"}, "y"], "'y' stands among the messages"),
        ([{"role": "user"}], "message 1 has no text"),
        (Path("x"), "text, messages or token ids"),
    ],
)
def test_what_is_no_prompt(prompt: Any, words: str, llm: LLM) -> None:
    for call in (llm.stream, llm.prompt_ids, llm.chat):
        with pytest.raises(InputError, match=words):
            call(prompt)


def test_iterables_of_prompts_work(llm: LLM) -> None:
    expected = [answer.token_ids for answer in llm.generate(["春", "秋"], **SHORT)]
    two, ids = ["春", "秋"], [llm.prompt_ids("春"), llm.prompt_ids("秋")]
    given_as: list[Any] = [
        tuple(two), iter(two), (text for text in two), collections.deque(two), np.array(two), iter(dict.fromkeys(two)),
        [_Text("春"), np.str_("秋")], [[{"role": "user", "content": "春"}], "秋"], ids, map(iter, ids),
    ]  # fmt: skip
    for prompts in given_as:
        assert [answer.token_ids for answer in llm.generate(prompts, **SHORT)] == expected
    assert len(llm.generate(np.array(ids[0]), **SHORT)) == 1


def test_a_path_of_bytes(tiny_cnl: Path) -> None:
    with LLM(str(tiny_cnl).encode(sys.getfilesystemencoding()), ctx=64) as llm:  # type: ignore[arg-type]
        assert llm.path == tiny_cnl
