# SPDX-License-Identifier: Apache-2.0
"""JSON damaged as JSON: any type and any number anywhere, keys twice, no key, texts that no terminal should see.

A tree is what json.loads gives. `raw(text)` in it stands for JSON text that json.dumps cannot write, a key that ends in
TWIN for the same key once more.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

TWIN = "\x00twin"
_RAW = re.compile(r'"\\u0000raw:((?:[^"\\]|\\.)*?)\\u0000"')
_MANY = 10_000  # characters; what has more is not put in 500 times
Path = tuple[Any, ...]
Hints = Mapping[str, Sequence[Any]]  # keys that the product reads, with values that belong there


def raw(text: str) -> str:
    """`text` as it is, where a value belongs."""
    return f"\x00raw:{text}\x00"


def _is_raw(item: Any) -> bool:
    return isinstance(item, str) and item.startswith("\x00raw:")


def _text(tree: Any) -> str:
    return dump(tree).decode("utf-8", "surrogatepass")


def dump(tree: Any, indent: int | None = None) -> bytes:
    """The JSON of a tree. Lone surrogates are spelt as escapes inside strings and as bytes inside raw text."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(tree, separators=separators, indent=indent, ensure_ascii=True).replace("\\u0000twin", "")
    return _RAW.sub(lambda match: json.loads(f'"{match[1]}"'), text).encode("utf-8", "surrogatepass")


CONTROLS = (
    "\n",
    "\r",
    "\r\n",
    "\x1b[2J",
    "\x1b]0;x\x07",
    "\x00",
    "\x7f",
    "\x9b31m",
    "\u2028",
    "\u202e",
    "\ud800",
    "\t",
)
STRINGS: tuple[str, ...] = (
    *(
        "",
        " ",
        "0",
        "-1",
        "1",
        "true",
        "none",
        "null",
        "NaN",
        "a",
        "é",
        "中文",
        "👋",
        "\ufeff",
        "\u2581",
        "<s>",
        "<0x0A>",
    ),
    *("../x", "/dev/zero", ".", "..", "a/b", "~", "CON", "%s%n", "{0.__class__}", "${x}", "$(x)", "\\", '"', "'"),
    *("a\nb", "x\nwarning: y", "\x1b[31mred", "a\x00b", "\ud800", "a\udcffb", "\u202egnp.exe", "\x9b2J"),
    *("9" * 5000, "x" * 70_000, "纸" * 5000, "a." * 2000, "\n" * 300),
)
PATTERNS = (
    *("(", "[", "*", "\\", "(?P<x>a)(?P<x>b)", "(?<=a+)b", "a{99999999999}", "(?:" * 3000, "(" * 300, "x" * 9000, "\n"),
    *(
        "(a+)+$",
        "(.*)*x",
        "(.*.*.*.*.*.*.*.*.*.*)=",
        "(\\w+\\.?)+:",
        "(([a-z])+.)+[A-Z]([a-z])+$",
        "(x|x)*y",
        "(?i)(?s).*",
    ),
    *(".*", "q_proj", "layers\\.0\\..*", "^", "$", "", "|", ".", "a|b|", "\\1", "(?#", "(?R)", "\\Z\\A", "[\ud800]"),
)
NUMBERS: tuple[Any, ...] = (
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        15,
        16,
        63,
        64,
        65,
        255,
        256,
        65535,
        (1 << 31) - 1,
        1 << 31,
        -(1 << 31),
        (1 << 32) - 1,
        1 << 32,
    ),
    *(1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1, 10**20, 10**400, -(10**400)),
    *(0.0, -0.0, 0.1, -0.5, 1.0, 1.5, 5e-324, 1e-320, 1e-45, 1e38, 3.5e38, 1e308, -1e308),
    *map(raw, ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1E400", "-0", "1e-999", "1.0000000000000000000001")),
    *map(raw, ("9" * 5000, "-" + "9" * 5000, "0." + "9" * 5000, "1e" + "9" * 30)),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [{}], {"": 1}, {"a": {}}, [None], [0, 0], [1, "a"], {"\n": "\x1b[0m"}),
    *([0] * 3000, {str(i): i for i in range(3000)}, ["x"] * 2000),
    *map(raw, ("[" * 900 + "]" * 900, "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 100_000)),
)
_BROKEN = tuple(
    map(raw, ("tru", "'a'", "0x10", "01", "+1", "1.", ".5", '"\\x"', '"\n"', '"\\u12"', "{", "}", ",", "", "\ufeff"))
)


def value(rng: random.Random) -> Any:
    """Any value: of every type, huge, tiny, or no JSON at all."""
    pool = rng.choices((STRINGS, NUMBERS, OTHERS, PATTERNS, _BROKEN), (24, 36, 28, 8, 4))[0]
    return copy.deepcopy(rng.choice(pool))


def places(tree: Any, at: Path = ()) -> list[Path]:
    """The paths of every value below `tree`."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [path for key in keys for path in [(*at, key), *places(tree[key], (*at, key))]]


def get(tree: Any, path: Path) -> Any:
    """The value at a path."""
    for step in path:
        tree = tree[step]
    return tree


def mutate(rng: random.Random, tree: Any, hints: Hints | None = None, most: int = 3) -> tuple[Any, list[str]]:
    """(a changed copy of a tree, what was changed). hints: see Hints. most: changes."""
    holder = [copy.deepcopy(tree)]
    steps = []
    for _ in range(rng.choice([1, 1, 1, *range(1, most + 1)])):
        steps.append(_change(rng, holder, hints or {}))
    return holder[0], [step for step in steps if step]


def _change(rng: random.Random, holder: list[Any], hints: Hints) -> str:
    paths = [path for path in places(holder) if len(path) > 1]
    if hints and isinstance(holder[0], dict) and rng.random() < 0.35:
        return _hinted(rng, holder[0], hints)
    if not paths or rng.random() < 0.01:
        holder[0] = value(rng)
        return f"all := {short(holder[0])}"
    path = _shallow(rng, paths)
    parent, key = get(holder, path[:-1]), path[-1]
    where = "/".join(str(step)[:40] for step in path[1:])
    change = rng.choices((_replace, _remove, _rename, _twice, _spoil, _nudge, _retype, _copy, _wrap, _more), _WEIGHTS)[
        0
    ]
    return f"{where} {change(rng, parent, key, holder, paths)}"


_WEIGHTS = (36, 7, 6, 4, 10, 8, 10, 6, 5, 4)


def _shallow(rng: random.Random, paths: list[Path]) -> Path:
    """Any place; in half of the cases one near the root, for a long list would take nearly all of them."""
    if rng.random() < 0.5:
        near = [path for path in paths if len(path) == 2]
        return rng.choice(near or paths)
    return rng.choice(paths)


def _hinted(rng: random.Random, root: dict[Any, Any], hints: Hints) -> str:
    key = rng.choice(sorted(hints))
    fitting = hints[key]
    root[key] = copy.deepcopy(rng.choice(fitting)) if fitting and rng.random() < 0.6 else value(rng)
    return f"{key} := {short(root[key])}"


def _replace(rng: random.Random, parent: Any, key: Any, holder: list[Any], paths: list[Path]) -> str:
    parent[key] = value(rng)
    return f":= {short(parent[key])}"


def _remove(rng: random.Random, parent: Any, key: Any, holder: list[Any], paths: list[Path]) -> str:
    del parent[key]
    return "removed"


def _rename(rng: random.Random, parent: Any, key: Any, holder: list[Any], paths: list[Path]) -> str:
    if not isinstance(parent, dict):
        return _more(rng, parent, key, holder, paths)
    name = rng.choice([rng.choice(STRINGS), rng.choice(PATTERNS), f"{key}{rng.choice(CONTROLS)}x", key[:-1], key + "2"])
    parent[name] = parent.pop(key)
    return f"renamed {short(name)}"


def _twice(rng: random.Random, parent: Any, key: Any, holder: list[Any], paths: list[Path]) -> str:
    if not isinstance(parent, dict):
        return _more(rng, parent, key, holder, paths)
    parent[key + TWIN] = rng.choice([copy.deepcopy(parent[key]), value(rng)])
    return f"also {short(parent[key + TWIN])}"


def _spoil(rng: random.Random, parent: Any, key: Any, holder: list[Any], paths: list[Path]) -> str:
    text = parent[key]
    if not isinstance(text, str) or _is_raw(text):
        return _replace(rng, parent, key, holder, paths)
    at = rng.randrange(len(text) + 1)
    insert = rng.choice([*CONTROLS, " ", "纸", "x" * 5000, "/"])
    parent[key] = rng.choice([text[:at] + insert + text[at:], text[:at], text[:500] * 200, text.upper(), insert + text])
    return f":= {short(parent[key])}"


def _nudge(rng: random.Random, parent: Any, key: Any, holder: list[Any], paths: list[Path]) -> str:
    number = parent[key]
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return _replace(rng, parent, key, holder, paths)
    if isinstance(number, int):
        near: list[Any] = [number + 1, number - 1, number * 2, number // 2, -number, number + 64, number << 32 | 1]
        if abs(number) < 1 << 53:
            near += [float(number), number + 0.5, str(number)]
        parent[key] = rng.choice([*near, True, [number]])
    else:
        parent[key] = rng.choice([number * rng.choice([-1, 0, 2, 1e30, 1e-30, 1e300]), str(number), 1])
    return f":= {short(parent[key])}"


def _retype(rng: random.Random, parent: Any, key: Any, holder: list[Any], paths: list[Path]) -> str:
    """The same value as another type would say it."""
    old = parent[key]
    if _is_raw(old):
        return _replace(rng, parent, key, holder, paths)
    others: list[Any] = [[old], {"": old}, _none(old)]
    if isinstance(old, bool):
        others = [int(old), float(old), str(old).lower(), str(old)]
    elif isinstance(old, int) and abs(old) < 1 << 53:
        others = [float(old), str(old), bool(old), bool(old), raw(f"{old}e0"), raw(f"{old}.0"), [old]]
    elif isinstance(old, float):
        others = [str(old), [old], bool(old)]
    elif isinstance(old, str):
        others = [[old], list(old[:50]), {"content": old}, {old: old}]
    elif isinstance(old, dict):
        others = [list(old.items()), list(old), list(old.values()), _text(old)]
    elif isinstance(old, list):
        others = [{str(i): item for i, item in enumerate(old)}, _text(old), old[0] if old else None]
    parent[key] = rng.choice(others)
    return f":= {short(parent[key])}"


def _none(old: Any) -> Any:
    """What is as false as null, or null for anything else."""
    return "" if old is None else None


def _copy(rng: random.Random, parent: Any, key: Any, holder: list[Any], paths: list[Path]) -> str:
    source = rng.choice(paths)
    parent[key] = copy.deepcopy(get(holder, source))
    return f":= that of {'/'.join(str(step)[:40] for step in source[1:])}"


def _wrap(rng: random.Random, parent: Any, key: Any, holder: list[Any], paths: list[Path]) -> str:
    inner = parent[key]
    if _is_raw(inner):
        return _replace(rng, parent, key, holder, paths)
    parent[key] = rng.choice([[inner], [inner, inner], {"content": inner}, {str(key): inner}, _text(inner)])
    return "wrapped"


def _more(rng: random.Random, parent: Any, key: Any, holder: list[Any], paths: list[Path]) -> str:
    if isinstance(parent, list):
        item, times = rng.choice([copy.deepcopy(parent[key]), value(rng)]), rng.choice([1, 1, 2, 500])
        parent[key:key] = [item] * (times if len(_text(item)) < _MANY else 1)
        return "another before it"
    name = rng.choice([*STRINGS, *PATTERNS])
    parent[name] = value(rng)
    return f"and {short(name)} := {short(parent[name])}"


def short(item: Any) -> str:
    """A value for people, in ASCII."""
    text = ascii(item).replace("\\x00raw:", "raw ").replace("\\x00", "")
    return text if len(text) <= 70 else f"{text[:50]}... ({len(text)} characters)"
