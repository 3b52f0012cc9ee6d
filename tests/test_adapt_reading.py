# SPDX-License-Identifier: Apache-2.0
"""What is read of text and instruction files, and what is said about bad lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapt_data import POEM, pairs, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnllama.adapt import reading
from cnllama.adapt.reading import MAX_DOCUMENT_CHARS, ReadLog, read_conversations, read_documents


def test_text_documents_end_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff第一段\r\n第二段\r\n\r\n\r\n另一篇\n尾".encode())
    log = ReadLog()
    assert list(read_documents(path, log)) == ["第一段\n第二段", "另一篇\n尾"]
    assert log.count == 0
    assert log.bytes_read == path.stat().st_size


def test_a_line_that_is_not_utf8_is_named_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("好\n".encode() + "坏".encode("gbk") + "\n也好\n".encode())
    log = ReadLog()
    assert list(read_documents(path, log)) == ["好\n也好"]
    assert log.count == 1
    assert log.listed[0].startswith(f"{path}:2: byte 0 is not valid UTF-8")


def test_a_text_without_blank_lines_is_cut_into_documents(tmp_path: Path) -> None:
    line = "字" * 1000
    path = tmp_path / "long.txt"
    path.write_text(f"{line}\n" * 600, encoding="utf-8")
    documents = list(read_documents(path, ReadLog()))
    assert len(documents) > 1
    assert max(map(len, documents)) < MAX_DOCUMENT_CHARS + 2000
    assert "\n".join(documents) == "\n".join([line] * 600)


def test_records_are_rendered_by_their_text_or_the_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [POEM, {"text": "散文", "title": "x"}])
    assert list(read_documents(path, ReadLog())) == ["《山行》\n唐·杜牧\n远上寒山石径斜，\n白云生处有人家。", "散文"]
    assert next(iter(read_documents(path, ReadLog(), "{title}：{paragraphs}"))).startswith("山行：远上")


def test_bad_records_are_counted_and_only_some_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    bad = ['{"text": ', "[1]", '{"text": ""}', '{"text": 3}', '{"title": "x"}', '{"text": "\\ud800"}'] * 10
    path.write_text("\n".join([*bad, json.dumps(POEM)]), encoding="utf-8")
    log = ReadLog()
    assert len(list(read_documents(path, log))) == 1
    assert log.count == 60
    assert len(log.listed) == 20
    for number, reason in enumerate(["not valid JSON", "list", "empty", "int", '"dynasty"', "surrogate"], 1):
        assert log.listed[number - 1].startswith(f"{path}:{number}: ")
        assert reason in log.listed[number - 1]
    assert log.lines()[0] == "60 bad lines were left out:"
    assert log.lines()[-1] == "... and 40 more"


def test_an_array_of_records_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([*pairs(3), "x"]), encoding="utf-8")
    log = ReadLog()
    assert len(list(read_conversations(path, log))) == 3
    assert log.listed == [f"{path}: record 4: a JSON str, expected an object"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "", "output": "a"}, '"instruction" is empty'),
        ({"instruction": "a"}, '"output" is missing'),
        ({"instruction": "a", "output": 3}, "int"),
        ({"messages": []}, "no list"),
        ({"messages": [{"role": "user"}]}, "message 1"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "expected 'user'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "not the assistant's"),
        ({"messages": [{"role": "system", "content": "a"}]}, "not the assistant's"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "empty"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "message 2"),
    ],
)
def test_bad_conversations_say_why(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [*pairs(1), record])
    log = ReadLog()
    assert len(list(read_conversations(path, log))) == 1
    assert log.count == 1
    assert log.listed[0].startswith(f"{path}:2: ")
    assert reason in log.listed[0]


@given(st.lists(st.integers(0, 40), max_size=12), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_lines_without_an_end_are_left_out_one_by_one(tmp_path: Path, lengths: list[int], last_ends: bool) -> None:
    lines = [f"{'x' * length}" for length in lengths]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines) + "\n" * (last_ends and bool(lines)))
    log = ReadLog()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "MAX_LINE", 10)
        found = list(reading.read_lines(path, log))
    if lines and not last_ends and not lines[-1]:
        lines.pop()  # nothing follows the last line's end
    assert found == [(i, line) for i, line in enumerate(lines, 1) if len(line) <= 10]
    assert log.count == sum(len(line) > 10 for line in lines)
    assert log.bytes_read == path.stat().st_size


def test_a_huge_file_without_lines_is_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(3 << 28)
    code = (
        "import resource, sys; from pathlib import Path; from cnllama.adapt.reading import ReadLog, read_documents\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); log = ReadLog()\n"
        "print(list(read_documents(Path(sys.argv[1]), log)), log.listed)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "[]" in done.stdout, done.stderr
    assert "a.txt:1: the line has more than 67,108,864 bytes; break it" in done.stdout
