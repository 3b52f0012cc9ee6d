# SPDX-License-Identifier: Apache-2.0
"""Damaged texts for the target `text`: each function gives (file name, content, how the product is called, steps)."""

from __future__ import annotations

import csv
import hashlib
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from fuzz import mutate_bytes, mutate_json, mutate_safetensors
from fuzz.case import Content

_TURNS = [
    {"role": "system", "content": "你是诗人。"},
    {"role": "user", "content": "写诗"},
    {"role": "assistant", "content": "好"},
]
_RECORDS: list[dict[str, Any]] = [
    {"text": "床前明月光，\n疑是地上霜。"},
    {"title": "静夜思", "dynasty": "唐代", "author": "李白", "paragraphs": ["床前明月光，", "疑是地上霜。"]},
    {"instruction": "写一首诗", "input": "", "output": "春眠不觉晓"},
    {"messages": _TURNS},
]
_RECORD_HINTS: mutate_json.Hints = {
    "text": ["a", "", ["a", "b"], []],
    "instruction": ["a", None],
    "input": ["b", None],
    "output": ["c", ""],
    "messages": [[], _TURNS, _TURNS[1:], _TURNS[:1], [{}]],
    "paragraphs": [[], ["a"], "a"],
}
_RECIPE: dict[str, Any] = {
    "description": "all of it",
    "variables": {"vocab": 400, "lr": 0.001, "fast": True, "name": "x"},
    "stage": [
        {"name": "tok", "do": "tokenizer train", "files": ["${data}/a.txt"], "vocab-size": "${vocab}"},
        {"name": "base", "do": "adapt create", "tokenizer": "${tok}", "hidden-size": 64, "layers": 2, "heads": 2},
        {"name": "pre", "do": "adapt pretrain", "model": "${base}", "data": ["${data}/a.jsonl:2"], "lr": [0.1, 0.01]},
        {
            "name": "sft",
            "do": "adapt sft",
            "model": "${base}",
            "adapter": ["${pre}"],
            "data": ["${data}/b.json"],
            "full": False,
        },
        {"name": "out", "do": "convert", "base": "${base}", "lora": ["${sft}"], "output": "model.cnl", "quant": "q4"},
        {"name": "own", "do": "script", "file": "${recipe}/x.py", "n": 3},
    ],
}
_RECIPE_HINTS: mutate_json.Hints = {
    "variables": [{}, {"data": "x"}, {"a": [1]}],
    "stage": [
        [],
        [{"name": "a", "do": "script"}],
        [{"name": "a", "do": "adapt run"}],
        [{"name": "a", "do": "convert"}],
    ],
    "description": ["x"],
}
# What TOML has and JSON has not.
_TOML_LINES = (
    b"x = 0x" + b"f" * 5000, b"x = 0b" + b"1" * 20_000, b"x = [0o" + b"7" * 9000 + b"]", b"x = [" * 3000,
    b".".join([b"a"] * 3000) + b" = 1", b"[" + b".".join([b'"a"'] * 3000) + b"]", b"x.y = 1", b'x = """', b"# \x00",
    b"x = 2024-02-29T23:59:60Z", b"x = 07:32:00", b"x = {a.b = 1, a.c = 2}", b"[[stage]]",
    b"[stage]", b"n = '${vocab}'",
)  # fmt: skip
_SETTINGS = ([], [], ["lr=1"], ["x"], ["lr=\n"], ["vocab=${vocab}"], ["=", "lr="], ["lr=a\0"], ["lr=\ud800"])
QUESTIONS = [
    "id,question,A,B,C,D,answer,explanation",
    "0,什么？,一,二,三,四,A,因为",
    '1,"多\n行？",1,2,3,4,B,',
    "2,q,a,b,c,d,D,e",
]
_PROMPTS = [
    "从前有 a river,\n👋",
    "《静夜思》\r\n床前明月光",
    "### Instruction:\n\nx\n\n### Response:",
    "{system}{user}<s></s>[INST]",
]
_CELLS = (*mutate_json.STRINGS, "A", "B", "E", "a", "AB", "x" * 200_000, '"', "\r", "a,b")

Made = tuple[str, Content, dict[str, Any], list[str]]


def _jsonl(rng: random.Random) -> Made:
    """Lines of records, some of them changed."""
    form = rng.choice(["jsonl", "jsonl", "json"])
    records = [rng.choice(_RECORDS) for _ in range(rng.choice([1, 2, 8]))]
    steps: list[str] = []
    changed = []
    for record in records:
        tree: Any = record
        if rng.random() < 0.7:
            tree, done = mutate_json.mutate(rng, record, _RECORD_HINTS)
            steps += done
        changed.append(tree)
    if form == "json":
        data = mutate_json.dump(changed if rng.random() < 0.95 else mutate_json.value(rng))
    else:
        data = b"\n".join(mutate_json.dump(tree) for tree in changed) + b"\n" * rng.randrange(2)
    data, steps = _perhaps_bytes(rng, data, steps)
    return f"data.{form}", data, {"how": rng.choice(["documents", "chat", "pretrain", "chat data", "report"])}, steps


def _plain(rng: random.Random) -> Made:
    text = rng.choice(_PROMPTS) + "\n" + rng.choice(mutate_json.STRINGS)
    encoding = rng.choice(["utf-8", "utf-8", "gb18030", "utf-16", "utf-16-le", "utf-32", "big5", "shift_jis"])
    data, steps = _perhaps_bytes(rng, text.encode(encoding, "ignore"), [f"in {encoding}"])
    name = rng.choice(["data.txt", "data.TXT", "data", "data.csv"])
    return (
        name,
        data,
        {"how": rng.choice(["documents", "prompt", "pretrain", "eval text", "report", "calibration"])},
        steps,
    )


def _recipe(rng: random.Random) -> Made:
    tree, steps = mutate_json.mutate(rng, _RECIPE, _RECIPE_HINTS, 2)
    data, steps = _perhaps_bytes(rng, toml(tree).encode("utf-8", "surrogatepass"), steps)
    if rng.random() < 0.08:
        lines = data.split(b"\n")
        lines.insert(rng.randrange(len(lines) + 1), more := rng.choice(_TOML_LINES))
        data, steps = b"\n".join(lines), [*steps, f"the line {more[:40]!r} more"]
    changes = rng.choice(_SETTINGS)
    return "recipe.toml", data, {"how": "recipe", "set": changes, "data": rng.random() < 0.9}, steps


def _csv(rng: random.Random) -> Made:
    """Questions as the benchmarks publish them, with other cells, rows, quotes and bytes."""
    rows = list(csv.reader(QUESTIONS))
    steps = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        row = rng.choice(rows)
        kind = rng.randrange(6)
        if kind == 0 and row:
            row[rng.randrange(len(row))] = cell = rng.choice(_CELLS)
            steps.append(f"a cell is {mutate_json.short(cell)}")
        elif kind == 1 and row:
            del row[rng.randrange(len(row))]
            steps.append("a cell less")
        elif kind == 2:
            row.append(rng.choice(_CELLS))
            steps.append("a cell more")
        elif kind == 3:
            rows.append(list(row))
            steps.append("a row twice")
        elif kind == 4:
            rows.remove(row)
            steps.append("a row less")
            rows = rows or [[]]
        else:
            rows[0] = [name.upper() for name in rows[0]]
            steps.append("other names of columns")
    out = io.StringIO()
    csv.writer(out, quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])).writerows(rows)
    data, steps = _perhaps_bytes(rng, out.getvalue().encode("utf-8", "surrogatepass"), steps)
    name = rng.choice(["val/accountant_val.csv", "dev/accountant_dev.csv"])
    return name, data, {"how": "questions", "shots": rng.choice([0, 1, 2]), "cot": rng.random() < 0.3}, steps


def _template(rng: random.Random) -> Made:
    """How a record becomes a document: given on the command line."""
    text = rng.choice(
        ["{title}", "《{title}》\n{paragraphs}", "{text}", "{a.b}", "{0}", "{", "}", "{title!r}", "{title:>99999999}"]
    )
    text += rng.choice(["", *(more for more in mutate_json.STRINGS if more.isprintable())])
    data = b"\n".join(mutate_json.dump(record) for record in _RECORDS)
    return "data.jsonl", data, {"how": "template", "template": text}, [f"template {mutate_json.short(text)}"]


def _left(rng: random.Random) -> Made:
    """JSON that our own runs write, changed by somebody: a cached token file, a checkpoint's mark, a log."""
    report = {
        "file": "x",
        "entries": 1,
        "tokens": 3,
        "characters": 2,
        "masked": 0,
        "truncated": 0,
        "bad": 0,
        "bad_lines": [],
    }
    records: dict[str, dict[str, Any]] = {
        "cache.json": {"dtype": "uint16", "masked": False, "report": report},
        "out/checkpoint-5/complete.json": {"step": 5, "data_position": {"epoch": 0, "index": 3}, "files": {"a": 1}},
        "out/.cnllama.json": {
            "format": "cnllama-directory",
            "version": 1,
            "made_by": "fuzz",
            "key": {"a": 1},
            "files": {"a": [[3, 1]], "b/c": "log"},
            "directories": ["b"],
        },
        "log.jsonl": {"step": 1, "epoch": 0.1, "tokens": 10, "seconds": 0.5, "loss": 3.2},
    }
    name = rng.choice(sorted(records))
    tree, steps = mutate_json.mutate(rng, records[name])
    data, steps = _perhaps_bytes(rng, mutate_json.dump(tree), steps)
    return name, data, {"how": "left"}, [f"{name}: {step}" for step in steps]


# Windows of a text, (ids, first predicted position, targets), and what a stored reference says of them.
WINDOWS = (([1, 5, 6, 7], 1, [6, 7, 8]), ([1, 7, 8, 9], 2, [9, 3]))
VOCABULARY = 20


def stored_reference() -> bytes:
    """Log probabilities as `eval kl --save-reference` keeps them."""
    digest = hashlib.sha256()
    for ids, begin, targets in WINDOWS:
        digest.update(np.asarray([len(ids), begin, *ids, *targets], "<i8").tobytes())
    rows = sum(len(targets) for _, _, targets in WINDOWS)
    values = np.random.default_rng(1).standard_normal((rows, VOCABULARY)) - 4
    exact = np.minimum(values[:, 0], 0).astype("<f4").tobytes()
    data = exact + values.astype("<f2").tobytes()
    entries = {
        "target_logprobs": {"dtype": "F32", "shape": [rows], "data_offsets": [0, len(exact)]},
        "logprobs": {"dtype": "F16", "shape": [rows, VOCABULARY], "data_offsets": [len(exact), len(data)]},
    }
    metadata = {
        "format": "cnllama-reference", "version": "2", "source": "x", "content": "",
        "windows_sha256": digest.hexdigest(), "tensors": '{"a":{"rms":1.0,"mean":0.0,"absmax":2.0}}',
    }  # fmt: skip
    return mutate_safetensors.build({"__metadata__": metadata, **entries}, data)


def _reference(rng: random.Random) -> Made:
    data, steps = mutate_safetensors.mutate(rng, stored_reference(), ["logprobs", "target_logprobs"])
    return "reference.safetensors", data, {"how": "reference"}, steps


def _perhaps_bytes(rng: random.Random, data: bytes, steps: list[str]) -> tuple[bytes, list[str]]:
    if rng.random() < 0.2:
        changed, step = mutate_bytes.mutate(rng, data)
        return changed, [*steps, step]
    return data, steps


KINDS: tuple[tuple[int, Callable[[random.Random], Made]], ...] = (
    (34, _jsonl), (16, _plain), (20, _recipe), (16, _csv), (4, _template), (6, _left), (4, _reference),
)  # fmt: skip


def toml(tree: Any) -> str:
    """A recipe's tree as TOML; what TOML cannot say is written as JSON would."""
    if not isinstance(tree, dict):
        return _toml_value(tree)
    lines = [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in tree.items() if not _is_table(value)]
    for key, value in tree.items():
        if _is_table(value):
            for table in value if isinstance(value, list) else [value]:
                lines.append(f"[[{_toml_key(key)}]]" if isinstance(value, list) else f"[{_toml_key(key)}]")
                lines += [f"{_toml_key(name)} = {_toml_value(item)}" for name, item in table.items()]
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
    )


def _toml_key(key: str) -> str:
    plain = key.replace(mutate_json.TWIN, "")
    return plain if plain.isascii() and plain.replace("-", "").replace("_", "").isalnum() else _toml_value(plain)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    text = mutate_json.dump(value).decode("utf-8", "surrogatepass")
    return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(text, text)
