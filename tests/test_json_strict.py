# SPDX-License-Identifier: Apache-2.0
"""JSON of strangers: what is sound is read as it is, everything else is one sentence that names the file."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnllama.container import parse_json, read_json
from cnllama.errors import InputError, printable

CHARACTERS = st.text(st.characters(exclude_categories=("Cs",)))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | CHARACTERS
VALUES = st.recursive(SCALARS, lambda v: st.lists(v) | st.dictionaries(CHARACTERS, v), max_leaves=30)


@given(VALUES, st.booleans())
def test_sound_json_is_read_as_it_is(value: object, escaped: bool) -> None:
    text = json.dumps(value, ensure_ascii=escaped)
    assert parse_json(text, "x") == value
    assert parse_json(text.encode("utf-8"), "x") == value


def nested(depth: int, begin: str, end: str) -> str:
    return begin * depth + "1" + end * depth


HOSTILE = {
    "half a pair": '{"a": "\\ud800"}',
    "half a pair, small letters": '["x\\uDfFf"]',
    "half a pair as a key": '{"\\udcff": 1}',
    "half a pair as it is": '["\ud800"]',
    "two halves in the wrong order": '["\\udc00\\ud800"]',
    "long integer": f'{{"a": -{"9" * 401}}}',
    "very long integer": f"[{'9' * 100_000}]",
    "beyond the floats": "[1e309]",
    "below the floats": "[-1e999]",
    "NaN": '{"a": NaN}',
    "infinity": "[Infinity]",
    "minus infinity": "[-Infinity]",
    "lists": nested(101, "[", "]"),
    "objects": nested(101, '{"a":', "}"),
    "lists without end": "[" * 200_000,
    "objects without end": '{"a":' * 200_000,
    "a key twice": '{"a": 1, "b": {"c": 1, "c": 1}}',
    "a long key twice": f'{{"{"k" * 100_000}": 1, "{"k" * 100_000}": 1}}',
    "empty": "",
    "control character": '["a\nb"]',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json_is_one_sentence(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    for work in (lambda: parse_json(text, str(file)), lambda: read_json(file)):
        with pytest.raises(InputError) as caught:
            work()
        said = str(caught.value)
        assert said.startswith(str(file))
        assert said.endswith(("get it again", "is damaged", "make it again"))
        assert said == printable(said)
        assert len(said) < 1000


@given(st.binary(max_size=40))
def test_any_bytes_are_a_value_or_one_sentence(data: bytes) -> None:
    try:
        sound = json.loads(data.decode("utf-8"))
    except ValueError:
        with pytest.raises(InputError, match=r"^file "):
            parse_json(data, "file")
    else:
        with suppress(InputError):  # of a number beyond the floats, for one
            assert parse_json(data, "file") == sound


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "gb18030", "utf-8-sig"])
def test_another_encoding_is_refused_by_name(encoding: str) -> None:
    with pytest.raises(InputError, match=r"UTF-8|UTF-16|JSON"):
        parse_json('{"名": "春"}'.encode(encoding), "file")


def test_what_is_nested_as_deep_as_allowed_and_what_is_as_large_is_read() -> None:
    assert parse_json(nested(99, "[", "]"), "x")
    assert parse_json("[1.7976931348623157e308, 1e-400]", "x") == [1.7976931348623157e308, 0.0]
    assert parse_json(f"[{10**30}]", "x") == [10**30]  # model_max_length of many tokenizers
    assert math.isclose(parse_json("[-1E+3]", "x")[0], -1000)


def test_names_of_files_keep_their_bytes() -> None:
    assert parse_json('["\\udcff"]', "x", names=True) == ["\udcff"]
    with pytest.raises(InputError, match="half a surrogate pair"):
        parse_json('["\\ud800"]', "x", names=True)
