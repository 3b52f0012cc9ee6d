# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of adapter configurations: Python's answers, in bounded time for any expression."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import time

import pytest
from cnllama.convert.patterns import MAX_LENGTH, Budget, Pattern

from cnllama.errors import InputError

NAMES = [
    *(f"model.layers.{i}.{name}" for i in (0, 1, 10, 31) for name in ("self_attn.q_proj", "mlp.up_proj", "self_attn")),
    *("lm_head", "model.embed_tokens", "model.norm", "model.layers.7.input_layernorm"),
]
ATOMS = (
    *("q_proj", "layers", r"\.", ".", "[a-z]", "[^.]", r"\d", "1", "model", r"\w", "lm_head", "(q|k)", "_proj", r"\D"),
    *("self_attn", "mlp", r"[\d_]", "[^0-9.]", "x", r"\s", "é"),
)
ANCHORS = ("^", "$", r"\b", r"\B", r"\A", r"\Z")
REPEATS = ("", "", "", "*", "+", "?", "*?", "+?", "{1,2}", "{0,3}", "{2}", "{2,}")
BOUNDED = ("", "", "?", "??", "{1,2}", "{2}")
# What transformers' users and other trainers write, PEFT's own writer included.
WRITTEN = (
    r".*layers\.[12]\..*(v|up)_proj",
    r"(?:.*(q_proj|embed_tokens)|^model\.embed_tokens$)",
    r"^model\.layers\.0\.self_attn\.k_proj",
    r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.up_proj)",
    "q_proj|v_proj",
    "q_proj)|(lm_head",
)


def pattern(text: str) -> Pattern:
    return Pattern(text, text, "adapter_config.json: target_modules", Budget())


def random_expression(draw: random.Random, depth: int = 0) -> str:
    """Groups have no endless repeats: Python, which is the judge, must come to an end itself."""
    parts = []
    for _ in range(draw.randint(1, 3)):
        if draw.random() < 0.2:
            parts.append(draw.choice(ANCHORS))
        elif depth < 2 and draw.random() < 0.3:
            parts.append(f"({random_expression(draw, depth + 1)}){draw.choice(BOUNDED)}")
        else:
            parts.append(f"(?:{draw.choice(ATOMS)}){draw.choice(REPEATS)}")
    text = "".join(parts)
    return f"{text}|{random_expression(draw, depth + 1)}" if depth < 2 and draw.random() < 0.2 else text


def test_random_expressions_match_as_in_python() -> None:
    draw, matched = random.Random(0), 0
    for _ in range(400):
        inner = random_expression(draw)
        for text in (inner, rf"(.*\.)?({inner})$", rf".*{inner}"):
            ours, theirs = pattern(text), re.compile(text)
            for name in draw.sample(NAMES, 4):
                found = theirs.match(name) is not None, theirs.fullmatch(name) is not None
                assert (ours.match(name), ours.fullmatch(name)) == found, (text, name)
                matched += found[0]
    assert matched > 500


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("around", [r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", "{}"])
def test_expressions_that_are_written_match_as_in_python(text: str, around: str) -> None:
    whole = around.replace("{}", text)
    try:
        theirs = re.compile(whole)
    except re.error:
        with pytest.raises(InputError, match="is no regular expression"):
            Pattern(whole, text, "here", Budget())
        return
    ours = Pattern(whole, text, "here", Budget())
    for name in NAMES:
        assert ours.match(name) == bool(theirs.match(name))
        assert ours.fullmatch(name) == bool(theirs.fullmatch(name))


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+b",
        "(.*)*(.*)*(.*)*x",
        "(" * 30 + "(.*)+" + ")+" * 30 + "x",
        ".*" * 1900,
        "(a|b|c|d)" * 400,
        "(.{0,60}){0,60}x",
        "(" + "|".join(["model.layers.*"] * 250) + ")",
        "(.*a|.*b|.*c)*" * 250,
        "a{60000}",
        "(a{500}){500}",
        "((a{50}){50}){50}",
        "a" * MAX_LENGTH,
        "(?:" * 900 + ")" * 900,
    ],
    ids=lambda text: text[:20],
)
def test_no_expression_takes_long(text: str) -> None:
    """Each of a 32-layer model's names against it: the answer, or one sentence."""
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i, p in itertools.product(range(32), "qkvo")]
    started = time.process_time()
    with contextlib.suppress(InputError):
        found = pattern(text)
        assert not any(found.match(name + ".") and found.fullmatch(name + "?") for name in names)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(?=x)y", "look-around"),
        ("(?<!x)y", "look-around"),
        (r"(a)\1", "references to groups"),
        ("(?i)x", "flags"),
        ("x(?i:y)", "flags"),
        ("[", "is no regular expression"),
        ("*", "is no regular expression"),
        ("(" * 1500, "is no regular expression (nested too deeply)"),
        ("a{99999999999}", "is no regular expression"),
        ("a" * (MAX_LENGTH + 1), "has 4,001 characters, expected at most 4,000"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_refused(text: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        pattern(text)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_budget_is_of_all_patterns_together() -> None:
    budget = Budget(2000)
    found = [Pattern(f"(.*a|.*b)*{i}", str(i) + "*", "here", budget) for i in range(50)]
    with pytest.raises(InputError, match="takes too long to compare; list the names of the modules"):
        [one.match("model.layers.0.self_attn.q_proj") for one in found]
