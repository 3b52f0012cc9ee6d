# SPDX-License-Identifier: Apache-2.0
"""Results that are kept: each is known by everything that decides it, and given back or gone on with only for the same.

An identity is made of JSON values. {"name", "contents"} in it is a file or a directory: what it holds counts, and the
name is for people.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cnllama.contents import contents, deciding_files
from cnllama.errors import CnllamaError, InputError
from cnllama.ownership import OwnedDirectory
from cnllama.paths import is_dir, same_file
from cnllama.space import check_space

_ABSENT = object()
_SHA256 = re.compile(r"[0-9a-f]{64}")


def described(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The part of an identity that stands for these files and directories. Raises InputError for unreadable ones.

    On a terminal a bar shows how far the reading is.
    """
    from tqdm import tqdm

    given = list(paths)
    total = sum(_size(path) for path in given)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="hash", delay=2, leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        return [{"name": str(path), "contents": contents(path, bar.update)} for path in given]


def _size(path: Path) -> int:
    with suppress(OSError):
        return sum((path / n).stat().st_size for n in deciding_files(path)) if is_dir(path) else path.stat().st_size
    return 0


def difference(before: Any, now: Any, where: str = "") -> str | None:
    """What an earlier identity had that the present one has not: the end of a sentence that begins "an earlier run"."""
    if isinstance(before, dict) and isinstance(now, dict):
        where = f"{where} {now['name']}".strip() if "name" in now else where
        for key in {**before, **now}:
            inner = where if key == "contents" else f"{where} {key}".strip()
            found = None if key == "name" else difference(before.get(key, _ABSENT), now.get(key, _ABSENT), inner)
            if found:
                return found
        return None
    if isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now) and any(isinstance(item, dict) for item in [*before, *now]):
            return f"had {len(before)} {where}, this one has {len(now)}"
        pairs = zip(before, now, strict=True) if len(before) == len(now) else []
        if any(isinstance(item, dict) for item in now):
            return next(filter(None, (difference(then, item, where) for then, item in pairs)), None)
    if before == now and type(before) is type(now):
        return None
    if all(isinstance(value, str) and _SHA256.fullmatch(value) for value in (before, now)):
        return f"had other contents in {where}"
    if _ABSENT in (before, now):
        return f"had no {where}, this one has" if before is _ABSENT else f"had {where}, this one has none"
    return f"had {where} {_shown(before)}, this one has {_shown(now)}"


def _shown(value: Any) -> str:
    try:
        return repr(value)[:80]
    except RecursionError:
        return "something nested deeply"


def as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file."""
    return json.loads(json.dumps(value))


@contextmanager
def result_directory(
    out: Path,
    made_by: str,
    *,
    inputs: Mapping[str, Sequence[Path]],
    options: Mapping[str, Any],
    last: str,
    needed: int,
    scratch: re.Pattern[str] | None = None,
) -> Iterator[OwnedDirectory | None]:
    """The directory of a command that fills it from the start to the end; None when it is finished, for the same input.

    last: the file that is written after all others; without it, what is there is a killed run's and is begun anew.
    needed: bytes that will be written. Leaving the block by an exception removes what was written. Raises InputError
    for a directory that is an input, that holds anything foreign, or a finished result of other inputs or options, and
    CnllamaError where there is no room.
    """
    for path in (path for paths in inputs.values() for path in paths):
        if same_file(out, path):
            raise InputError(f"{out}: this is one of the inputs and would be overwritten; choose another --output")
    with OwnedDirectory(out, made_by, alone=True, scratch=scratch) as own:
        if not own.is_ours(last):
            check_space(out / last, needed - own.size(), "the checkpoint")
        now = as_json({name: described(paths) for name, paths in inputs.items()} | {"options": options})
        if own.is_ours(last):
            found = difference(own.key or {}, now)
            if found:
                raise InputError(f"{out}: an earlier run {found}; choose another --output, or remove the directory")
            if not own.damaged():
                own.remove(own.SCRATCH)  # of a run that was killed after its last file
                yield None
                return
        own.clear()
        own.set_key(now)
        try:
            yield own
        except BaseException:
            with suppress(CnllamaError):
                own.clear()
            raise
