# SPDX-License-Identifier: Apache-2.0
"""A recipe, checked as far as it can be without running it, and the tasks and command lines that come of it.

The file may be a stranger's: every value of it may be of any type.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from cnllama.adapt.recipe_toml import is_scalar, read_toml
from cnllama.adapt.script_files import script_files
from cnllama.arguments import ListAction
from cnllama.errors import InputError
from cnllama.ownership import RECORD
from cnllama.paths import check_name, exists

MARK = "stage.json"
SCRIPT = "script"
TRAINING = ("adapt pretrain", "adapt sft")
_COMMANDS = ("tokenizer", "adapt", "convert", SCRIPT)
_REFERENCE = re.compile(r"\$\{([A-Za-z0-9_.-]+)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_OWN_KEYS = ("name", "do", "output", "file")
_PLAIN = re.compile(r"[A-Za-z0-9._+-]{1,40}")  # values that stand in a directory's name as they are
_MAX_OPTIONS = 200
_MAX_TASKS, _MAX_COMBINATIONS = 400, 100_000
_MAX_TEXT = 1 << 17  # characters of a value with what its variables stand for; a command line has room for no more
# Options that name what a command writes, not what it reads.
_WRITTEN = {"report", "cache", "plot", "json", "output", "save_reference"}
_READ_AS_TEXT = {"data", "eval", "deepspeed"}  # options of other types that name files all the same

Options = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A [[stage]] of the file. output: name of a file in its directory, for commands that write one."""

    name: str
    do: str
    options: Options
    output: str | None = None
    file: str | None = None


@dataclass
class Recipe:
    """A recipe that has been checked as far as possible without running it."""

    path: Path
    variables: dict[str, str]
    stages: list[Stage]


@dataclass
class Task:
    """A stage with one choice of values. variant: "stage.option" -> value, empty without lists.

    outside: what its options name on the disk, and a script's files: (as it stands in the recipe, where it is).
    missing: what they name under ${data} or ${recipe} and is not there.
    """

    stage: Stage
    variant: Options
    inputs: dict[str, Task]
    directory: Path
    words: list[str] = field(default_factory=list)
    options: Options = field(default_factory=dict)
    outside: list[tuple[str, Path]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    script: Path | None = None

    @property
    def label(self) -> str:
        """For people."""
        return self.directory.name


def read_recipe(path: Path, data: Path | None, changes: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe. Raises InputError naming the stage and the key."""
    content = read_toml(path)
    variables = {name: _text(value) for name, value in content["variables"].items()}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or name not in variables:
            raise InputError(
                f"--set {change}: expected NAME=VALUE with a name of {', '.join(variables) or 'no variable'}"
            )
        try:
            check_name(value)  # a file's or not, it becomes a word of a command line
        except InputError as error:
            raise InputError(f"--set {name}={error}") from None
        variables[name] = value
    variables["recipe"] = str(path.parent)
    if data is not None:
        variables["data"] = str(data)
    stages: list[Stage] = []
    for number, table in enumerate(content["stage"], 1):
        stages.append(_read_stage(path, table, number, {stage.name for stage in stages}, variables))
    return Recipe(path, variables, stages)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_stage(
    path: Path, table: Mapping[str, Any], number: int, before: set[str], variables: Mapping[str, str]
) -> Stage:
    name, do = table.get("name", ""), table.get("do", "")
    where = f"{path}: stage {name if isinstance(name, str) and _NAME.fullmatch(name) else number}"
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in before or name in variables:
        raise InputError(
            f"{where}: the name is {name!r:.60}, expected letters and digits that no stage or variable has yet"
        )
    if not isinstance(do, str) or do.partition(" ")[0] not in _COMMANDS:
        raise InputError(f"{where}: do is {do!r:.60}, expected a command of {', '.join(_COMMANDS)}")
    options = {key: value for key, value in table.items() if key not in _OWN_KEYS}
    if len(options) > _MAX_OPTIONS:
        raise InputError(f"{where}: has {len(options):,} options, expected at most {_MAX_OPTIONS}")
    for key, value in options.items():
        items = value if isinstance(value, list) else [value]
        if not items or not all(map(is_scalar, items)):
            raise InputError(
                f"{where}: {key!r:.60} is {value!r:.60}, expected text, a number, a boolean or a list of these"
            )
    stage = Stage(name, do, options, _own_name(where, table, do), table.get("file"))
    if do == SCRIPT and not (stage.file and isinstance(stage.file, str) and is_scalar(stage.file)):
        raise InputError(f"{where}: a script has no file, expected the name of a Python file")
    for reference in _references([*stage.options.values(), stage.file]):
        if reference not in before and reference not in variables:
            mend = "give --data DIR" if reference == "data" else f"known are {', '.join([*variables, *sorted(before)])}"
            raise InputError(f"{where}: ${{{reference}}} stands for nothing; {mend}")
    return stage


def _own_name(where: str, table: Mapping[str, Any], do: str) -> str | None:
    """The stage's `output`: a plain file name, for commands that write a file and not a directory."""
    output = table.get("output")
    if output is None:
        return None
    plain = isinstance(output, str) and "\0" not in output and Path(output).name == output
    if not plain or output in (RECORD, MARK, ".."):
        raise InputError(f"{where}: output is {output!r:.60}, expected the name of a file in the stage's directory")
    if do.startswith("adapt") or (do.startswith("tokenizer") and not str(output).endswith(".model")):
        raise InputError(f"{where}: {do} writes a directory; leave output out")
    return str(output)


def _references(values: Sequence[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, list):
            yield from _references(value)
        elif isinstance(value, str):
            yield from _REFERENCE.findall(value)


def expand(recipe: Recipe, out: Path) -> list[Task]:
    """Every stage once, or once for each variant, in an order in which they can run. Raises InputError.

    Every command line has been parsed and checked: what a command refuses by its options alone is refused here.
    """
    tasks: dict[str, list[Task]] = {}
    parsers: dict[str, argparse.ArgumentParser | None] = {SCRIPT: None}
    for stage in recipe.stages:
        where = f"{recipe.path}: stage {stage.name}"
        if stage.do not in parsers:
            parsers[stage.do] = _leaf_parser(stage.do, where)
        parser = parsers[stage.do]
        swept = {} if parser is None else _swept(stage, parser)
        needed = [name for name in dict.fromkeys(_references([*stage.options.values()])) if name in tasks]
        tasks[stage.name] = []
        if math.prod(len(tasks[name]) for name in needed) > _MAX_COMBINATIONS:
            raise InputError(f"{where}: the lists of its inputs make too many combinations; shorten them")
        for combination in product(*(tasks[name] for name in needed)):
            shared = _join(combination)
            if shared is None:
                continue
            for values in product(*swept.values()):
                chosen = dict(zip(swept, values, strict=True))
                variant = shared | {f"{stage.name}.{key}": value for key, value in chosen.items()}
                inputs = dict(zip(needed, combination, strict=True))
                task = Task(stage, variant, inputs, out / _directory(stage, variant))
                _complete(task, recipe, chosen, parser, where)
                tasks[stage.name].append(task)
                if sum(map(len, tasks.values())) > _MAX_TASKS:
                    raise InputError(f"{where}: with it, lists make more than {_MAX_TASKS} variants; shorten them")
        directories = [task.directory for task in tasks[stage.name]]
        if len(set(directories)) < len(directories):
            raise InputError(f"{where}: a list has a value twice")
    return [task for group in tasks.values() for task in group]


def _join(tasks: Sequence[Task]) -> Options | None:
    """The variants of all inputs together, None when they are of different ones."""
    joined: Options = {}
    for task in tasks:
        if any(joined.get(key, value) != value for key, value in task.variant.items()):
            return None
        joined |= task.variant
    return joined


def _directory(stage: Stage, variant: Options) -> str:
    """The name of a task's directory: one of a value's own where that is plain, or of what it is made into."""

    def plain(value: object) -> str:
        text = str(value)
        if _PLAIN.fullmatch(text):
            return text
        return re.sub(r"[^A-Za-z0-9]+", "_", text)[:20] + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]

    choices = ",".join(f"{key.rpartition('.')[2]}={plain(value)}" for key, value in variant.items())
    if len(choices) > 120:
        choices = choices[:100] + "-" + hashlib.sha256(choices.encode()).hexdigest()[:8]
    return stage.name + (f"@{choices}" if choices else "")


def _leaf_parser(do: str, where: str) -> argparse.ArgumentParser:
    """The parser of a command, of its verb's verb where it has any."""
    from cnllama.cli.parser import Parser

    command, _, verb = do.partition(" ")
    parser: argparse.ArgumentParser = Parser(prog=f"cnllama {command}", allow_abbrev=False)
    importlib.import_module(f"cnllama.cli.{command}").add_arguments(parser)
    verbs = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    if verbs is None and not verb:
        return parser
    if verbs is None or verb not in verbs.choices or do == "adapt run":
        names = [f"{command} {name}" for name in verbs.choices if name != "run"] if verbs else [command]
        raise InputError(f"{where}: do is {do!r:.60}, expected one of {', '.join(names)}")
    leaf: argparse.ArgumentParser = verbs.choices[verb]
    declare = getattr(leaf, "declare", None)
    if declare is not None:
        declare()
    return leaf


def _action(parser: argparse.ArgumentParser, key: str) -> argparse.Action | None:
    """The action of an option that a recipe may set: neither the help nor the output, which is the recipe's."""
    option = "--" + key.replace("_", "-")
    found = (a for a in parser._actions if option in a.option_strings or (not a.option_strings and a.dest == key))
    return next((a for a in found if a.dest != "output" and "--help" not in a.option_strings), None)


def _swept(stage: Stage, parser: argparse.ArgumentParser) -> dict[str, list[Any]]:
    """Options that were given a list and take one value."""
    found = {}
    for key, value in stage.options.items():
        action = _action(parser, key)
        takes_many = action is not None and (action.nargs in ("+", "*") or isinstance(action, ListAction))
        if isinstance(value, list) and not takes_many:
            found[key] = value
    return found


def _complete(task: Task, recipe: Recipe, chosen: Options, parser: argparse.ArgumentParser | None, where: str) -> None:
    """The command line, what decides the result beside its inputs, and the files that it names."""
    stage = task.stage
    outputs = {name: str(given.directory) for name, given in task.inputs.items()}
    values = {**recipe.variables, **outputs}
    settled = {n: v for n, v in recipe.variables.items() if n not in ("data", "recipe")}
    options: list[str] = []
    positionals: dict[str, list[str]] = {}
    for key, raw in {**stage.options, **chosen}.items():
        action = None if parser is None else _action(parser, key)
        if parser is not None and action is None:
            raise InputError(f"{where}: {stage.do} has no option {key!r:.60}; see cnllama {stage.do} --help")
        listed = raw if isinstance(raw, list) else [raw]
        items = [_fill(item, values, f"{where}: {key}") for item in listed]
        # Where files lie does not count, what is in them does.
        task.options[key] = [_fill(item, settled, f"{where}: {key}") for item in listed]
        for item, name, text in zip(listed, task.options[key], items, strict=True):
            if not any(reference in outputs for reference in _references([item])):
                _note_file(task, action, name, text)
        if action is not None and not action.option_strings:
            positionals[key] = items
        else:
            options += _words(where, key, action, items)
    order = [] if parser is None else [a.dest for a in parser._actions if not a.option_strings]
    output = task.directory / stage.output if stage.output else task.directory
    last = [item for dest in order for item in positionals.get(dest, [])]
    task.words = [*options, "-o", str(output), *["--"][: any(item.startswith("-") for item in last)], *last]
    if stage.file:
        task.script = Path(_fill(stage.file, recipe.variables, f"{where}: file"))
        for path in script_files(task.script):
            task.outside.append((stage.file if path == task.script else f"{stage.file} ({path.name})", path))
    if parser is not None:
        try:
            parsed = parser.parse_args(task.words)
            check = getattr(parsed, "check_options", None)
            if check is not None:
                check(parsed)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def _words(where: str, key: str, action: argparse.Action | None, items: list[str]) -> list[str]:
    """The words of one option on a command line."""
    name = key.replace("_", "-")
    if action is None:  # a script's
        return [f"--{name}", *items]
    if action.nargs == 0:
        flag = items[0].lower()
        if flag not in ("true", "false"):
            raise InputError(f"{where}: {key} is {items[0]!r:.60}, expected true or false")
        negative = [f"--no-{name}"] if isinstance(action, argparse.BooleanOptionalAction) else []
        return [f"--{name}"] if flag == "true" else negative
    return [f"--{name}={item}" for item in items]


def _note_file(task: Task, action: argparse.Action | None, name: str, text: str) -> None:
    """Adds the file or directory that an option's value names, to be read, to what the task depends on."""
    read = action is None or action.type is Path or action.dest in _READ_AS_TEXT
    if not read or (action is not None and action.dest in _WRITTEN):
        return
    try:
        found = next((Path(t) for t in (text, text.rpartition(":")[0]) if t and exists(t)), None)
    except InputError:  # a text that is no name, or too long for one
        return
    if found is not None:
        task.outside.append((name, found))
    elif action is not None and name.startswith(("${data}", "${recipe}")):
        task.missing.append(text)


def _fill(value: Any, values: Mapping[str, str], where: str) -> str:
    """An option's value as text, with what its references stand for. Raises InputError where that has no end."""
    if not isinstance(value, str):
        return _text(value)
    size = len(value) + sum(len(values.get(name, "")) for name in _REFERENCE.findall(value))
    if size > _MAX_TEXT:
        raise InputError(f"{where} is a text of {size:,} characters, expected at most {_MAX_TEXT:,}")
    return _REFERENCE.sub(lambda match: values.get(match[1], match[0]), value)
