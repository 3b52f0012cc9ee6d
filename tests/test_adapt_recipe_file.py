# SPDX-License-Identifier: Apache-2.0
"""A recipe may be a stranger's: any type anywhere is one sentence, and nothing leaves the output directory."""

from __future__ import annotations

import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="recipes need the training libraries")
pytest.importorskip("peft", reason="recipes need the training libraries")

from test_adapt_pipeline import inside

from cnllama.adapt.recipe_file import _leaf_parser, expand, read_recipe
from cnllama.errors import InputError

TEXTS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x7f"), max_size=12)
SCALARS = st.one_of(
    TEXTS, st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.just(datetime.date(2024, 2, 29)),
    st.sampled_from(["${data}", "${a}/x", "${", "../../x", "/etc/passwd", "--help", "-o", "a\0b", "", "x" * 300, "\n"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda v: st.one_of(st.lists(v, max_size=3), st.dictionaries(TEXTS, v, max_size=3)), max_leaves=6
)
COMMANDS = ("convert", "adapt create", "adapt pretrain", "adapt sft", "adapt merge", "adapt resize", "tokenizer train",
            "tokenizer merge", "tokenizer report", "adapt run", "script", "adapt", "convert x")  # fmt: skip
KEYS = st.sampled_from(
    ["name", "do", "output", "file", "base", "lora", "model", "data", "files", "vocab_size", "template", "help", "out",
     "restart", "byte_fallback", "lr", "quant", "debug", "o", "tokenizer", "hidden_size", "targets", "full"]
)  # fmt: skip
STAGES = st.builds(
    lambda table, known: table | known,
    st.dictionaries(st.one_of(KEYS, TEXTS), VALUES, max_size=5),
    st.one_of(
        st.just({}), st.fixed_dictionaries({"do": st.sampled_from(COMMANDS), "name": st.sampled_from(["a", "b", "c"])})
    ),
)
VARIABLES = st.one_of(st.dictionaries(TEXTS, VALUES, max_size=2), VALUES)
DOCUMENTS = st.fixed_dictionaries(
    {"stage": st.one_of(st.lists(STAGES, max_size=3), VALUES)},
    optional={"variables": VARIABLES, "description": VALUES, "x": VALUES},
)


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
    return value.isoformat() if isinstance(value, datetime.date) else repr(value)


def read(path: Path, text: str) -> list[Any]:
    path.write_text(text, encoding="utf-8")
    return expand(read_recipe(path, path.parent), path.parent / "out")


@settings(max_examples=300, deadline=None)
@given(DOCUMENTS)
@example({"stage": [{"name": "a", "do": "adapt create", "tokenizer": ["../../x", "y"]}]})
@example({"stage": [{"name": "a", "do": "convert", "base": "b", "template": ["../x", "/y"], "output": "x.cnl"}]})
@example({"stage": [{"name": "a", "do": "script", "file": "x.py", "v": 10**400}]})
def test_any_type_anywhere_is_one_sentence(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("r") / "r.toml"
    text = "".join(f"{key} = {toml(value)}\n" for key, value in document.items())
    refusal, tasks = "", []
    try:
        tasks = read(path, text)
    except InputError as error:
        refusal = str(error)
    assert len(refusal.splitlines()) <= 1
    assert len(refusal) < 2000
    out = path.parent / "out"
    for task in tasks:
        assert task.directory.parent == out
        assert Path(os.path.normpath(task.directory)).parent == out
        assert len(os.fsencode(task.directory.name)) < 240
        written = Path(task.words[task.words.index("-o") + 1])
        assert written == task.directory or Path(os.path.normpath(written)).parent == task.directory


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[stage]\nname = "a"\n', "has [stage], expected [[stage]]: double brackets"),
        ("stage = 3\n", "stage is 3, expected tables"),
        ("stage = [1]\n", "stage is [1], expected tables"),
        ("", "has no [[stage]]"),
        ("variables = 3\n", "variables is 3, expected a table"),
        ("[variables]\nx = [1]\n", "the variable 'x' is [1], expected text"),
        ("[variables]\nx = nan\n", "the variable 'x' is nan, expected text, a number"),
        ("a = " + "[" * 5000 + "]" * 5000, "is not valid TOML"),
        ("a = " + "9" * 5000, "is not valid TOML"),
        ("[[stage]]\nname = 3\n", "stage 1: the name is 3"),
        ('[[stage]]\nname = "a"\ndo = 3\n', "do is 3, expected a command"),
        ('[[stage]]\nname = "a"\ndo = "convert"\nbase = 2024-01-01\n', "'base' is datetime.date(2024, 1, 1)"),
        ('[[stage]]\nname = "a"\ndo = "convert"\nbase = []\n', "'base' is [], expected text"),
        ('[[stage]]\nname = "a"\ndo = "convert"\nbase = {a = 1}\n', "'base' is {'a': 1}"),
        ('[[stage]]\nname = "a"\ndo = "convert"\nbase = "b"\noutput = "../x.cnl"\n', "output is '../x.cnl'"),
        ('[[stage]]\nname = "a"\ndo = "convert"\nbase = "b"\noutput = "stage.json"\n', "output is 'stage.json'"),
        ('[[stage]]\nname = "a"\ndo = "adapt create"\ntokenizer = "b"\noutput = "x"\n', "leave output out"),
        ('[[stage]]\nname = "a"\ndo = "convert"\nbase = "b"\nhelp = true\n', "no option 'help'"),
        ('[[stage]]\nname = "a"\ndo = "convert"\nbase = "b"\nout = "x"\n', "no option 'out'"),
        ('[[stage]]\nname = "a"\ndo = "adapt create"\ntokenizer = "b"\ntie = "yes"\n', "expected true or false"),
        ('[[stage]]\nname = "a"\ndo = "adapt create"\ntokenizer = "b"\nlayers = [1, 1]\n', "a list has a value twice"),
        ('[[stage]]\nname = "a"\ndo = "script"\nfile = 3\n', "a script has no file"),
    ],
)
def test_wrong_types_and_places_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path / "r.toml", text)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_that_would_make_too_many_runs_are_refused(tmp_path: Path) -> None:
    many = list(range(1, 40))
    lists = "".join(f"{name} = {many}\n" for name in ("layers", "seed", "context"))
    with pytest.raises(InputError, match="more than 400 variants"):
        read(tmp_path / "r.toml", f'[[stage]]\nname = "a"\ndo = "adapt create"\ntokenizer = "t"\n{lists}')


HEX = "0x" + "f" * 5000
SCRIPT = '[[stage]]\nname = "a"\ndo = "script"\nfile = "x"\n'
DOTTED = " . ".join(["a", '"#"', "'\"'"] * 10_000)
ENDLESS = {
    "a hexadecimal variable": f"[variables]\nx = {HEX}\n{SCRIPT}",
    "a hexadecimal option": f"{SCRIPT}n = {HEX}\n",
    "a hexadecimal name": f"[[stage]]\nname = {HEX}\n",
    "a binary item": f"{SCRIPT}n = [1, 0b{'1' * 20_000}]\n",
    "an octal one elsewhere": f"description = {{a = [{{b = 0o{'7' * 9000}}}]}}\n{SCRIPT}",
    "lists": f"{SCRIPT}n = {'[' * 200}{']' * 200}\n",
    "dotted keys": f"{SCRIPT}{'.'.join('a' * 50_000)} = 1\n",
    "dotted tables": f"[{DOTTED}]\n{SCRIPT}",
    "dotted keys between texts": SCRIPT + 'n = {b = """\n""", ' + DOTTED + ' = "\\\\", c = "\\""}\n',
    "many stages": "".join(SCRIPT.replace('"a"', f'"a{i}"') for i in range(3000)),
    "many options": SCRIPT + "".join(f"k{i} = [{i}]\n" for i in range(15_000)),
    "a text of texts": f'[variables]\nv = "{"x" * 100_000}"\n{SCRIPT}n = "{"${v}" * 20_000}"\n',
    "a file of texts": f'[variables]\nv = "{"x" * 100_000}"\n{SCRIPT.replace("x", "${v}" * 20_000)}',
    "many combinations": "".join(
        f'[[stage]]\nname = "{name}"\ndo = "adapt create"\ntokenizer = "t"\nseed = {list(range(90))}\n'
        for name in "abc"
    )
    + '[[stage]]\nname = "d"\ndo = "convert"\nbase = "${a}"\nlora = ["${b}", "${c}"]\n',
    "a long file": "#" * (1 << 21),
}


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_what_has_no_end_is_refused_soon(tmp_path: Path, text: str) -> None:
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        read(tmp_path / "r.toml", text)
    assert time.process_time() - started < 4
    assert str(caught.value).startswith(str(tmp_path / "r.toml"))
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("late", "sentence"),
    [
        ('do = "convert"\nbase = "${base}"\ntemplate = "nope"\noutput = "x.cnl"\n', "--template 'nope' is unknown"),
        ('do = "convert"\nbase = "${base}"\nquant = "q9"\noutput = "x.cnl"\n', "the scheme 'q9' is unknown"),
        ('do = "adapt sft"\nmodel = "${base}"\ndata = ["${data}/sft.jsonl"]\nrank = 0\n', "--rank is 0"),
        ('do = "adapt sft"\nmodel = "${base}"\ndata = ["${data}/sft.jsonl"]\ntemplate = "raw"\n', "does not tell"),
        (
            'do = "adapt sft"\nmodel = "${base}"\ndata = ["${data}/none.jsonl"]\n',
            "none.jsonl, and there",
        ),
        ('do = "adapt create"\ntokenizer = "${base}"\nheads = 3\n', "do not divide"),
        ('do = "adapt merge"\nbase = "${base}"\n', "required: --lora"),
        ('do = "script"\nfile = "${recipe}/none.py"\n', "none.py, and there is no such file"),
    ],
)
def test_a_late_stage_is_checked_before_the_first_runs(tmp_path: Path, late: str, sentence: str) -> None:
    (tmp_path / "sft.jsonl").write_text("{}")
    (tmp_path / "r.toml").write_text(
        '[[stage]]\nname = "base"\ndo = "adapt create"\ntokenizer = "${data}"\n\n[[stage]]\nname = "late"\n' + late
    )
    message = inside("adapt", "run", tmp_path / "r.toml", "--data", tmp_path, "-o", tmp_path / "out", expect=2)
    assert sentence in message
    assert "stage late" in message
    assert not (tmp_path / "out").exists()


def test_values_that_begin_with_a_dash_are_values(tmp_path: Path) -> None:
    text = '[[stage]]\nname = "a"\ndo = "tokenizer train"\nvocab_size = 9\n'
    text += 'files = ["-x.txt", "--y.txt"]\ntemplate = "-{a}"\n'
    (task,) = read(tmp_path / "r.toml", text)
    parsed = _leaf_parser("tokenizer train", "").parse_args(task.words)
    assert [str(path) for path in parsed.files] == ["-x.txt", "--y.txt"]
    assert parsed.template == "-{a}"


@pytest.mark.parametrize(("value", "said"), [("a\0b", "NUL"), ("a\ud800", "cannot be written in utf-8")])
def test_a_value_that_no_command_line_has_is_refused(tmp_path: Path, value: str, said: str) -> None:
    (tmp_path / "r.toml").write_text(f'[variables]\nx = "1"\n{SCRIPT}n = "${{x}}"\n')
    with pytest.raises(InputError, match=f"^--set x=.*{said}"):
        read_recipe(tmp_path / "r.toml", None, [f"x={value}"])
