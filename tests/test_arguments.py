# SPDX-License-Identifier: Apache-2.0
"""Every parser of the program: a list is spelled in one way, and one thing has one name."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="the parsers of adapt need the training libraries")
pytest.importorskip("peft", reason="the parsers of adapt need the training libraries")

from cnllama.arguments import CommaAction, ListAction
from cnllama.cli.main import VERBS, main
from cnllama.cli.parser import Parser
from cnllama.errors import InputError


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(command, parser) of every verb and of every verb's verb."""
    for verb in VERBS:
        parser = Parser(prog=f"cnllama {verb}", allow_abbrev=False)
        importlib.import_module(f"cnllama.cli.{verb}").add_arguments(parser)
        yield from leaves(verb, parser)


def leaves(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    verbs = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    if verbs is None:
        yield name, parser
        return
    for verb, leaf in verbs.choices.items():
        if hasattr(leaf, "declare"):
            leaf.declare()
        yield from leaves(f"{name} {verb}", leaf)


PARSERS = dict(parsers())
OPTIONS = [(name, action) for name, parser in PARSERS.items() for action in parser._actions if action.option_strings]
LISTS = [(name, action) for name, action in OPTIONS if isinstance(action, ListAction)]
COMMAS = [(name, action) for name, action in OPTIONS if isinstance(action, CommaAction)]


def ids(options: list[tuple[str, argparse.Action]]) -> list[str]:
    return [f"{name} {action.option_strings[-1]}" for name, action in options]


def parsed(name: str, *words: str) -> argparse.Namespace:
    """The command line with all that the parser requires besides."""
    parser = PARSERS[name]
    given = {word.partition("=")[0] for word in words}
    more: list[str] = []
    positionals: list[str] = []
    for action in parser._actions:
        if not action.option_strings and action.nargs != "?":
            positionals.append("place")
        elif action.required and not set(action.option_strings) & given:
            more += [action.option_strings[-1], "1" if action.type is int else "place"]
    for group in parser._mutually_exclusive_groups:
        flags = {option for action in group._group_actions for option in action.option_strings}
        if group.required and not flags & given:
            more += [group._group_actions[-1].option_strings[-1], "place"]
    return parser.parse_args([*positionals, *more, *words])


def test_every_option_that_takes_several_values_is_a_list() -> None:
    """argparse's own ways of taking several, which lose some of them in one spelling or the other, are used nowhere."""
    ways = (argparse._AppendAction, argparse._ExtendAction, argparse._AppendConstAction)
    odd = [
        f"{name} {action.option_strings[-1]}"
        for name, action in OPTIONS
        if isinstance(action, ways) or (action.nargs in ("+", "*") and not isinstance(action, ListAction))
    ]
    assert odd == []
    commas = [(name, action) for name, action in OPTIONS if "," in str(action.metavar)]
    assert commas == COMMAS
    assert {action.dest for _, action in LISTS} >= {"lora", "adapter", "data", "eval", "targets", "stop", "subject"}
    assert {action.dest for _, action in COMMAS} >= {"schemes", "quantizer", "gguf", "prefill", "decode", "batch"}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(LISTS), st.lists(st.lists(st.sampled_from("abcde"), min_size=1), min_size=1, max_size=4))
def test_every_spelling_of_a_list_means_the_same(option: tuple[str, argparse.Action], groups: list[list[str]]) -> None:
    name, action = option
    wanted = [action.type(v) if callable(action.type) else v for group in groups for v in group]
    before = list(action.default or ())
    for flag in action.option_strings:
        found = parsed(name, *(word for group in groups for word in (flag, *group)))
        assert list(getattr(found, action.dest)) == wanted
        once = parsed(name, flag, *(v for group in groups for v in group))
        assert list(getattr(once, action.dest)) == wanted
        each = parsed(name, *(f"{flag}={v}" for group in groups for v in group))
        assert list(getattr(each, action.dest)) == wanted
    assert list(action.default or ()) == before, "the default is nobody's to change"
    if not action.required:
        assert list(getattr(parsed(name), action.dest) or ()) == before


@pytest.mark.parametrize(("name", "action"), COMMAS, ids=ids(COMMAS))
def test_a_list_with_commas_loses_nothing_when_repeated(name: str, action: argparse.Action) -> None:
    for flag in action.option_strings:
        assert getattr(parsed(name, flag, "a,b", flag, "c"), action.dest) == "a,b,c"
        assert getattr(parsed(name, flag, "a,b,c"), action.dest) == "a,b,c"
    assert getattr(parsed(name), action.dest) == action.default


@pytest.mark.parametrize("name", PARSERS)
def test_outputs_have_one_name(name: str) -> None:
    """-o and --output wherever a command writes what it is for; --out, its name in some, is still understood."""
    actions = PARSERS[name]._actions
    outputs = [action for action in actions if "-o" in action.option_strings]
    if not outputs:
        assert not [action for action in actions if "--out" in action.option_strings]
        return
    assert outputs[0].option_strings == ["-o", "--output"]
    for flag in ("-o", "--output", "--out"):
        assert parsed(name, flag, "result").output == Path("result")
    help_text = PARSERS[name].format_help()
    assert "--output" in help_text
    assert "--out " not in help_text


MODEL = ("run", "chat", "plan", "bench", "info", "verify", "export", "eval ceval", "eval cmmlu")


@pytest.mark.parametrize("name", MODEL)
def test_the_packed_file_is_named_in_two_ways_everywhere(name: str) -> None:
    dest = next(a.dest for a in PARSERS[name]._actions if "-m" in a.option_strings)
    for words in (["x.cnl"], ["-m", "x.cnl"], ["--model", "x.cnl"], ["--model=x.cnl"]):
        for more in ([], ["--data", "d"] if name.startswith("eval") else []):
            full = [*more, *words] if name.startswith("eval") else words
            full += ["--data", "d"] if name.startswith("eval") and not more else []
            full += ["-o", "y"] if name == "export" else []
            assert str(getattr(PARSERS[name].parse_args(full), dest)) == "x.cnl"
    with pytest.raises(InputError, match="not allowed with"):
        PARSERS[name].parse_args(["a.cnl", "-m", "b.cnl", *(["-o", "y"] if name == "export" else [])])


def test_what_a_list_has_swallowed_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--lora", "a", "base", "-o", "x.cnl"]) == 2
    message = capsys.readouterr().err
    assert "BASE" in message
    assert "--lora and the like take every value after them" in message


def test_repeated_adapters_reach_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """`adapt merge --lora A --lora B` merged only B, and `--adapter` and `--data` lost all but the last."""
    import cnllama.adapt.merge
    import cnllama.adapt.pretrain

    seen: dict[str, Any] = {}
    merge = lambda base, loras, *_, **__: seen.update(loras=loras) or 0  # noqa: E731
    monkeypatch.setattr(cnllama.adapt.merge, "merge_checkpoint", merge)
    monkeypatch.setattr(cnllama.adapt.pretrain, "run_stage", lambda stage: seen.update(stage=stage) or {})
    assert main(["adapt", "merge", "base", "--lora", "A", "--lora", "B", "-o", "out"]) == 0
    assert seen["loras"] == [Path("A"), Path("B")]
    words = ["--data", "a.txt", "--data", "b.txt:2", "c.txt", "--adapter", "1", "--adapter", "2", "--eval", "e.txt"]
    assert main(["adapt", "pretrain", "model", *words, "-o", "out"]) == 0
    stage = seen["stage"]
    assert [(str(s.path), s.repeat) for s in stage.data] == [("a.txt", 1), ("b.txt", 2), ("c.txt", 1)]
    assert stage.adapters == [Path("1"), Path("2")]
    assert [str(s.path) for s in stage.held_out] == ["e.txt"]
