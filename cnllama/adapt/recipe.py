# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt run`: a TOML file that describes a whole run, replayed stage by stage and gone on with after a kill.

A stage is one command of cnllama: its keys are the command's options by their long names. `${name}` stands for a
variable, for the output of an earlier stage, for `${data}` (--data) or for `${recipe}` (the directory of the recipe).
A list where the command takes one value makes a variant for each of its items, and of every stage that follows from it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from cnllama.adapt.output import write_json
from cnllama.adapt.plots import comparison_plot, format_table
from cnllama.adapt.train import RESULT
from cnllama.container import read_json
from cnllama.errors import CnllamaError, InputError, from_os_error
from cnllama.stdio import say, show

MARK = "stage.json"
SCRIPT = "script"
_COMMANDS = ("tokenizer", "adapt", "convert", SCRIPT)
_TRAINING = ("adapt pretrain", "adapt sft")
_REFERENCE = re.compile(r"\$\{([A-Za-z0-9_.-]+)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_OWN_KEYS = ("name", "do", "output", "file")

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
    """A stage with one choice of values. variant: "stage.option" -> value, empty without lists."""

    stage: Stage
    variant: Options
    inputs: dict[str, Task]
    directory: Path
    key: str = ""
    words: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """For people."""
        return self.directory.name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a TOML file")
    parser.add_argument("-o", "--out", metavar="DIR", type=Path, help="where all stages go (default: RECIPE's name)")
    parser.add_argument("--data", metavar="DIR", type=Path, help="what ${data} stands for")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="changes a variable")
    parser.add_argument("--redo", metavar="STAGE", help="run this stage, and what follows from it, again")


def run(args: argparse.Namespace) -> int:
    """Replays the recipe. Returns the exit code."""
    recipe = read_recipe(args.recipe, args.data, args.set)
    out: Path = args.out or Path(args.recipe.stem)
    tasks = expand(recipe, out)
    if args.redo:
        _forget(tasks, args.redo)
    for number, task in enumerate(tasks, 1):
        _say(f"[{number}/{len(tasks)}] {task.label}: {task.stage.do}")
        run_task(task, recipe)
    _summarize(tasks, out)
    return 0


def read_recipe(path: Path, data: Path | None, changes: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe. Raises InputError naming the stage and the key."""
    content = _read_toml(path)
    variables = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in content.get("variables", {}).items()
    }
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or name not in variables:
            raise InputError(
                f"--set {change}: expected NAME=VALUE with a name of {', '.join(variables) or 'no variable'}"
            )
        variables[name] = value
    variables["recipe"] = str(path.parent)
    if data is not None:
        variables["data"] = str(data)
    stages: list[Stage] = []
    for number, table in enumerate(content.get("stage", []), 1):
        stages.append(_read_stage(path, table, number, {stage.name for stage in stages}, variables))
    if not stages:
        raise InputError(f"{path}: has no [[stage]], expected at least one")
    return Recipe(path, variables, stages)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            tomllib = importlib.import_module("tomli")
        except ModuleNotFoundError:
            raise InputError("recipes need tomli on this Python; run: pip install 'cnllama[adapt]'") from None
    try:
        content: dict[str, Any] = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise from_os_error(path, error) from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid TOML ({error})") from None
    unknown = set(content) - {"variables", "stage", "description"}
    if unknown:
        raise InputError(f"{path}: has {min(unknown)!r}, expected only description, [variables] and [[stage]]")
    return content


def _read_stage(
    path: Path, table: Mapping[str, Any], number: int, before: set[str], variables: Mapping[str, str]
) -> Stage:
    name, do = str(table.get("name", "")), str(table.get("do", ""))
    where = f"{path}: stage {name or number}"
    if not _NAME.fullmatch(name) or name in before or name in variables:
        raise InputError(
            f"{where}: the name is {name!r}, expected letters and digits that no stage or variable has yet"
        )
    if do.partition(" ")[0] not in _COMMANDS:
        raise InputError(f"{where}: do is {do!r}, expected a command of {', '.join(_COMMANDS)}")
    stage = Stage(
        name,
        do,
        {key: value for key, value in table.items() if key not in _OWN_KEYS},
        table.get("output"),
        table.get("file"),
    )
    if do == SCRIPT and not stage.file:
        raise InputError(f"{where}: a script has no file, expected the name of a Python file")
    for reference in _references([*stage.options.values(), stage.file or ""]):
        if reference not in before and reference not in variables:
            mend = "give --data DIR" if reference == "data" else f"known are {', '.join([*variables, *sorted(before)])}"
            raise InputError(f"{where}: ${{{reference}}} stands for nothing; {mend}")
    return stage


def _references(values: Sequence[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, list):
            yield from _references(value)
        elif isinstance(value, str):
            yield from _REFERENCE.findall(value)


def expand(recipe: Recipe, out: Path) -> list[Task]:
    """Every stage once, or once for each variant, in an order in which they can run."""
    tasks: dict[str, list[Task]] = {}
    for stage in recipe.stages:
        parser = None if stage.do == SCRIPT else _leaf_parser(stage.do, f"{recipe.path}: stage {stage.name}")
        swept = {} if parser is None else _swept(stage, parser)
        needed = [name for name in dict.fromkeys(_references([*stage.options.values()])) if name in tasks]
        tasks[stage.name] = []
        for combination in product(*(tasks[name] for name in needed)):
            shared = _join(combination)
            if shared is None:
                continue
            for values in product(*swept.values()):
                chosen = dict(zip(swept, values, strict=True))
                variant = shared | {f"{stage.name}.{key}": value for key, value in chosen.items()}
                task = Task(
                    stage, variant, dict(zip(needed, combination, strict=True)), out / _directory(stage, variant)
                )
                _complete(task, recipe, chosen, parser)
                tasks[stage.name].append(task)
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
    choices = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in variant.items())
    return stage.name + (f"@{choices}" if choices else "")


def _leaf_parser(do: str, where: str) -> argparse.ArgumentParser:
    """The parser of a command, of its verb's verb where it has any."""
    from cnllama.cli.parser import Parser

    command, _, verb = do.partition(" ")
    parser: argparse.ArgumentParser = Parser(prog=f"cnllama {command}", allow_abbrev=False)
    importlib.import_module(f"cnllama.cli.{command}").add_arguments(parser)
    verbs = next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    if verbs is None:
        return parser
    if verb not in verbs.choices or do == "adapt run":
        names = ", ".join(f"{command} {name}" for name in verbs.choices if name != "run")
        raise InputError(f"{where}: do is {do!r}, expected one of {names}")
    leaf: argparse.ArgumentParser = verbs.choices[verb]
    declare = getattr(leaf, "declare", None)
    if declare is not None:
        declare()
    return leaf


def _action(parser: argparse.ArgumentParser, key: str) -> argparse.Action | None:
    option = "--" + key.replace("_", "-")
    return next(
        (a for a in parser._actions if option in a.option_strings or (not a.option_strings and a.dest == key)), None
    )


def _swept(stage: Stage, parser: argparse.ArgumentParser) -> dict[str, list[Any]]:
    """Options that were given a list and take one value."""
    found = {}
    for key, value in stage.options.items():
        action = _action(parser, key)
        takes_many = action is not None and (action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction))
        if isinstance(value, list) and not takes_many:
            found[key] = value
    return found


def _complete(task: Task, recipe: Recipe, chosen: Options, parser: argparse.ArgumentParser | None) -> None:
    """The command line and the key, by which a finished stage is known to be the one that is asked for."""
    stage, where = task.stage, f"{recipe.path}: stage {task.stage.name}"
    values = {**recipe.variables, **{name: str(given.directory) for name, given in task.inputs.items()}}
    options: list[str] = []
    positionals: dict[str, list[str]] = {}
    for key, raw in {**stage.options, **chosen}.items():
        action = None if parser is None else _action(parser, key)
        if parser is not None and (action is None or "-o" in action.option_strings):
            raise InputError(f"{where}: {stage.do} has no option {key!r}; see cnllama {stage.do} --help")
        items = [_fill(item, values) for item in (raw if isinstance(raw, list) else [raw])]
        option = "--" + key.replace("_", "-")
        if action is not None and not action.option_strings:
            positionals[key] = items
        elif isinstance(action, argparse.BooleanOptionalAction):
            options += [option if raw else "--no-" + key.replace("_", "-")]
        elif action is not None and action.nargs == 0:
            options += [option] if items[0].lower() == "true" else []
        elif isinstance(action, argparse._AppendAction):
            options += [word for item in items for word in (option, item)]
        else:
            options += [option, *items]
    order = [] if parser is None else [a.dest for a in parser._actions if not a.option_strings]
    output = task.directory / stage.output if stage.output else task.directory
    task.words = [*options, "-o", str(output), *(item for dest in order for item in positionals.get(dest, []))]
    identity = [stage.do, stage.options, stage.output, stage.file, task.variant]
    identity += [{name: given.key for name, given in task.inputs.items()}]
    identity += [
        {
            name: recipe.variables[name]
            for name in _references(list(stage.options.values()))
            if name in recipe.variables and name not in ("data", "recipe")
        }
    ]
    task.key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _fill(value: Any, values: Mapping[str, str]) -> str:
    return _REFERENCE.sub(lambda match: values[match[1]], value) if isinstance(value, str) else str(value)


def run_task(task: Task, recipe: Recipe) -> None:
    """Runs a stage unless it is finished; training goes on where it was. Raises the stage's errors with its name."""
    mark = task.directory / MARK
    if mark.exists():
        before = read_json(mark).get("key")
        if before != task.key:
            raise InputError(
                f"{task.directory}: was made by a stage with other settings (key {before}, now {task.key}); run it "
                f"again with --redo {task.stage.name}, or choose another --out"
            )
        return
    if int(os.environ.get("RANK", "0")) and task.stage.do not in _TRAINING:
        return _wait(mark)
    started = time.monotonic()
    if task.stage.do not in _TRAINING:
        shutil.rmtree(task.directory, ignore_errors=True)
        task.directory.parent.mkdir(parents=True, exist_ok=True)
    if task.stage.output:
        task.directory.mkdir(exist_ok=True)
    try:
        _execute(task, recipe)
    except CnllamaError as error:
        raise type(error)(f"stage {task.label}: {error}", error.details) from None
    if int(os.environ.get("RANK", "0")):
        return _wait(mark)
    task.directory.mkdir(exist_ok=True)
    result = read_json(task.directory / RESULT) if (task.directory / RESULT).exists() else {}
    seconds = result.get("seconds", round(time.monotonic() - started, 1))
    write_json(mark, {"key": task.key, "do": task.stage.do, "arguments": task.words, "seconds": seconds})
    return None


def _wait(mark: Path) -> None:
    """Other processes of torchrun wait for the first, which does what one process can."""
    while not mark.exists():
        time.sleep(0.2)


def _execute(task: Task, recipe: Recipe) -> None:
    if task.stage.do == SCRIPT:
        script = Path(_fill(task.stage.file, recipe.variables))
        code = subprocess.run([sys.executable, str(script), *task.words], check=False).returncode
    else:
        from cnllama.cli.parser import Parser

        command, _, verb = task.stage.do.partition(" ")
        module = importlib.import_module(f"cnllama.cli.{command}")
        parser = Parser(prog=f"cnllama {command}", allow_abbrev=False)
        module.add_arguments(parser)
        code = module.run(parser.parse_args([verb, *task.words] if verb else task.words))
    if code:
        raise CnllamaError(f"{task.stage.do} ended with code {code}")


def _forget(tasks: Sequence[Task], name: str) -> None:
    if name not in {task.stage.name for task in tasks}:
        raise InputError(
            f"--redo {name}: there is no such stage, expected one of {', '.join(t.stage.name for t in tasks)}"
        )
    stale = {id(task) for task in tasks if task.stage.name == name}
    for task in tasks:
        if id(task) in stale or any(id(given) in stale for given in task.inputs.values()):
            stale.add(id(task))
            shutil.rmtree(task.directory, ignore_errors=True)


def _summarize(tasks: Sequence[Task], out: Path) -> None:
    """summary.json and a table of all training; where a list made variants, comparison.png for each such stage."""
    if int(os.environ.get("RANK", "0")):
        return
    rows = []
    for task in tasks:
        if (task.directory / RESULT).exists():
            rows.append({"stage": task.stage.name, **task.variant, **read_json(task.directory / RESULT)})
    if not rows:
        return
    write_json(out / "summary.json", rows)
    swept = list(dict.fromkeys(key for task in tasks for key in task.variant))
    columns = ["stage", *swept, "trained_parameters", "held_out_loss_before", "held_out_loss", "tokens", "seconds"]
    show(*format_table(columns, [["" if row.get(c) is None else row[c] for c in columns] for row in rows]).split("\n"))
    for name in dict.fromkeys(row["stage"] for row in rows if swept):
        runs = [row for row in rows if row["stage"] == name and any(key in row for key in swept)]
        if len(runs) > 1:
            key = next(key for key in swept if key in runs[0])
            values = ["trained_parameters", "held_out_loss", "seconds"]
            comparison_plot(runs, key, values, out / f"comparison-{name}.png", name)


def _say(text: str) -> None:
    if not int(os.environ.get("RANK", "0")):
        say(text)
