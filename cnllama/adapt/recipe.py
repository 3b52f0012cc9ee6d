# SPDX-License-Identifier: Apache-2.0
"""`cnllama adapt run`: a TOML file that describes a whole run, replayed stage by stage and gone on with after a kill.

A stage is one command of cnllama: its keys are the command's options by their long names. `${name}` stands for a
variable, for the output of an earlier stage, for `${data}` (--data) or for `${recipe}` (the directory of the recipe).
A list where the command takes one value makes a variant for each of its items, and of every stage that follows from it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cnllama.adapt.checkpoints import SCRATCH_FILES
from cnllama.adapt.kept import as_json, described, difference
from cnllama.adapt.plots import comparison_plot, format_table, need_matplotlib
from cnllama.adapt.progress import LOG
from cnllama.adapt.recipe_file import MARK, SCRIPT, TRAINING, Recipe, Task, expand, read_recipe
from cnllama.adapt.train import PLOT, RESULT, RUN
from cnllama.adapt.trainer import BAD_BATCH
from cnllama.arguments import add_list_option, add_output_option
from cnllama.container import read_json
from cnllama.contents import file_sha256
from cnllama.errors import CnllamaError, InputError
from cnllama.files import write_json
from cnllama.ownership import OwnedDirectory
from cnllama.paths import exists, is_dir, is_file
from cnllama.stdio import say, show

_IDENTITY = 2  # raised when the same recipe comes to mean something else
_SUMMARY = "summary.json"
# Of a stage's files, those in which times stand, or which only say how it went.
_ASIDE = {MARK, LOG, PLOT, RESULT, RUN, BAD_BATCH}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a TOML file")
    add_output_option(parser, "DIR", "where all stages go (default: RECIPE's name)", required=False)
    parser.add_argument("--data", metavar="DIR", type=Path, help="what ${data} stands for")
    add_list_option(parser, "--set", metavar="NAME=VALUE", help="changes a variable")
    parser.add_argument("--redo", metavar="STAGE", help="run this stage, and what follows from it, again")


def run(args: argparse.Namespace) -> int:
    """Replays the recipe, when all that can be checked before is in order. Returns the exit code."""
    recipe = read_recipe(args.recipe, args.data, args.set)
    out: Path = args.output or Path(args.recipe.stem)
    tasks = expand(recipe, out)
    if any(task.stage.do in TRAINING for task in tasks):
        need_matplotlib()
    _check_outside(tasks, recipe)
    if args.redo:
        _check_redo(tasks, args.redo)
    pictures = [_picture(task.stage.name) for task in tasks if task.variant]
    with OwnedDirectory(out, "adapt run", names=[_SUMMARY, *pictures]) if _first() else nullcontext() as own:
        if own is not None:
            own.set_key({"recipe": str(args.recipe)})
            stale = _followers(tasks, args.redo) if args.redo else []
            for task in tasks:
                _check_directory(task, again=task in stale)
            _forget(stale)
        for number, task in enumerate(tasks, 1):
            _say(f"[{number}/{len(tasks)}] {task.label}: {task.stage.do}")
            run_task(task, recipe)
        _summarize(tasks, out)
    return 0


def _first() -> bool:
    """Whether this is the process that writes: under torchrun the one with rank 0."""
    return not int(os.environ.get("RANK", "0"))


def _check_outside(tasks: Sequence[Task], recipe: Recipe) -> None:
    """Raises InputError for a file that a later stage would not find."""
    for task in tasks:
        script = [] if task.script is None or is_file(task.script) else [str(task.script)]
        missing = [*task.missing, *script]
        if missing:
            raise InputError(f"{recipe.path}: stage {task.stage.name} names {missing[0]}, and there is no such file")


def _check_directory(task: Task, again: bool) -> None:
    """Raises InputError for a directory that is not this recipe's, and for a finished stage that is no longer the same.

    again: it is to be removed and made again.
    """
    directory = task.directory
    if not exists(directory):
        return
    if not is_dir(directory):
        raise InputError(f"{directory}: this is a file, where the stage's directory would be; choose another --output")
    own = OwnedDirectory(directory, "adapt run", scratch=SCRATCH_FILES).read()
    if again or not (own.names() or own.directories() or own.key):
        own.refuse_strangers()
    if not again and exists(directory / MARK):
        _check_mark(task, read_json(directory / MARK, names=True), None)


def run_task(task: Task, recipe: Recipe) -> None:
    """Runs a stage unless it is finished; training goes on where it was. Raises the stage's errors with its name."""
    mark = task.directory / MARK
    if exists(mark):
        if _first():
            before = read_json(mark, names=True)
            _check_mark(task, before, {name: _outputs(given.directory) for name, given in task.inputs.items()})
            _check_outputs(task, before.get("outputs"))
        return
    if not _first() and task.stage.do not in TRAINING:
        return _wait(mark)
    started = time.monotonic()
    try:
        _run_command(task, recipe)
    except CnllamaError as error:
        raise type(error)(f"stage {task.label}: {error}", error.details) from None
    if not _first():
        return _wait(mark)
    inputs = {name: _outputs(given.directory) for name, given in task.inputs.items()}
    result = read_json(task.directory / RESULT, names=True) if exists(task.directory / RESULT) else {}
    record = {
        "identity": _identity(task) | {"inputs": inputs},
        "outputs": _outputs(task.directory),
        "do": task.stage.do,
        "arguments": task.words,
        "seconds": result.get("seconds", round(time.monotonic() - started, 1)),
    }
    with OwnedDirectory(task.directory, "adapt run", names=[MARK]):
        write_json(mark, record)
    return None


def _run_command(task: Task, recipe: Recipe) -> None:
    """A command that fills a directory keeps its record itself; for others it is kept here."""
    stage, directory = task.stage, task.directory
    if stage.do == SCRIPT:
        with OwnedDirectory(directory, "adapt run") as own:
            own.set_key({"stage": stage.name})
            before = own.snapshot()
        _execute(task, recipe)
        with OwnedDirectory(directory, "adapt run") as own:
            own.adopt(before)
    elif stage.output:
        with OwnedDirectory(directory, "adapt run", names=[stage.output]) as own:
            own.set_key({"stage": stage.name})
            _execute(task, recipe)
    else:
        _execute(task, recipe)


def _identity(task: Task) -> dict[str, Any]:
    """What decides a stage's result beside its inputs."""
    outside = described(path for _, path in task.outside)
    return {
        "format": _IDENTITY,
        "do": task.stage.do,
        "options": task.options,
        "variant": task.variant,
        "output": task.stage.output,
        "files": [item | {"name": name} for item, (name, _) in zip(outside, task.outside, strict=True)],
    }


def _check_mark(task: Task, before: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> None:
    """Raises InputError when a finished stage was made by other settings, files or, with `inputs`, inputs."""
    then = before.get("identity")
    if not isinstance(then, dict) or then.get("format") != _IDENTITY:
        raise InputError(f"{task.directory}: was made by another version of cnllama; {_mend(task)}")
    now = _identity(task) | {"inputs": then.get("inputs") if inputs is None else inputs}
    found = difference(then, as_json(now))
    if found:
        raise InputError(f"{task.directory}: was made by a stage that {found}; {_mend(task)}")


def _check_outputs(task: Task, made: Any) -> None:
    """Raises InputError when a finished stage's files are no longer those that it made."""
    now = _outputs(task.directory)
    for name, digest in (made if isinstance(made, dict) else {"": ""}).items():
        if name not in now:
            raise InputError(f"{task.directory / name}: is gone, which the stage had made; {_mend(task)}")
        if now[name] != digest:
            raise InputError(
                f"{task.directory / name}: was changed after the stage had made it; put it back, or move "
                f"{task.directory} away to have it made again"
            )


def _mend(task: Task) -> str:
    return f"run it again with --redo {task.stage.name}, or choose another --output"


def _outputs(directory: Path) -> dict[str, str]:
    """Name -> hash of what a stage made, as far as it is still there."""
    names = sorted(set(OwnedDirectory(directory, "").read().names()) - _ASIDE)
    return {name: file_sha256(directory / name) for name in names if is_file(directory / name)}


def _wait(mark: Path) -> None:
    """Other processes of torchrun wait for the first, which does what one process can."""
    while not exists(mark):
        time.sleep(0.2)


def _execute(task: Task, recipe: Recipe) -> None:
    if task.stage.do == SCRIPT:
        code = subprocess.run([sys.executable, str(task.script), *task.words], check=False).returncode
    else:
        from cnllama.cli.parser import Parser

        command, _, verb = task.stage.do.partition(" ")
        module = importlib.import_module(f"cnllama.cli.{command}")
        parser = Parser(prog=f"cnllama {command}", allow_abbrev=False)
        module.add_arguments(parser)
        code = module.run(parser.parse_args([verb, *task.words] if verb else task.words))
    if code:
        raise CnllamaError(f"{task.stage.do} ended with code {code}")


def _check_redo(tasks: Sequence[Task], name: str) -> None:
    names = dict.fromkeys(task.stage.name for task in tasks)
    if name not in names:
        raise InputError(f"--redo {name}: there is no such stage, expected one of {', '.join(names)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--redo works with one process; run that first, then all of them without it")


def _followers(tasks: Sequence[Task], name: str) -> list[Task]:
    """The stage's tasks and all that follow from them."""
    stale: list[Task] = []
    for task in tasks:
        if task.stage.name == name or any(given in stale for given in task.inputs.values()):
            stale.append(task)
    return stale


def _forget(stale: Sequence[Task]) -> None:
    """Removes what these stages made; nothing foreign is among it, as has been checked."""
    for task in reversed(stale):
        if exists(task.directory):
            with OwnedDirectory(task.directory, "adapt run", alone=True, scratch=SCRATCH_FILES) as own:
                own.delete()


def _summarize(tasks: Sequence[Task], out: Path) -> None:
    """summary.json and a table of all training; where a list made variants, comparison.png for each such stage."""
    if not _first():
        return
    rows = []
    for task in tasks:
        if exists(task.directory / RESULT):
            rows.append({"stage": task.stage.name, **task.variant, **read_json(task.directory / RESULT, names=True)})
    if not rows:
        return
    write_json(out / _SUMMARY, rows)
    swept = list(dict.fromkeys(key for task in tasks for key in task.variant))
    columns = ["stage", *swept, "trained_parameters", "held_out_loss_before", "held_out_loss", "tokens", "seconds"]
    show(*format_table(columns, [["" if row.get(c) is None else row[c] for c in columns] for row in rows]).split("\n"))
    for name in dict.fromkeys(row["stage"] for row in rows if swept):
        runs = [row for row in rows if row["stage"] == name and any(key in row for key in swept)]
        if len(runs) > 1:
            key = next(key for key in swept if key in runs[0])
            values = ["trained_parameters", "held_out_loss", "seconds"]
            comparison_plot(runs, key, values, out / _picture(name), name)


def _picture(name: str) -> str:
    return f"comparison-{name}.png"


def _say(text: str) -> None:
    if _first():
        say(text)
