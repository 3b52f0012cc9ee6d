# SPDX-License-Identifier: Apache-2.0
"""Training files in: text, JSON lines and arrays, as documents or conversations. Bad lines are counted, not fatal."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnllama.errors import InputError, from_os_error
from cnllama.paths import is_dir, open_regular, read_bytes
from cnllama.templates import join_input

FORMATS = {".txt": "txt", ".jsonl": "jsonl", ".json": "json"}
# How a record without "text" becomes a document; a list of lines is joined by line breaks.
POEM_TEMPLATE = "《{title}》\n{dynasty}·{author}\n{paragraphs}"
# A text file without blank lines would otherwise be one document of its own size.
MAX_DOCUMENT_CHARS = 1 << 18
MAX_LINE = 1 << 26  # bytes
_LISTED_PROBLEMS = 20
_MAX_ARRAY = 1 << 32  # bytes of a .json file, which is read whole
_BOM = "\ufeff"


@dataclass
class ReadLog:
    """Lines that were left out, how many and the first of them as `file:line: reason`, and the bytes read so far."""

    count: int = 0
    listed: list[str] = field(default_factory=list)
    bytes_read: int = 0

    def add(self, where: str, reason: str) -> None:
        """Counts one line and lists it while the list is short."""
        self.count += 1
        if len(self.listed) < _LISTED_PROBLEMS:
            self.listed.append(f"{where}: {reason}")

    def lines(self) -> list[str]:
        """Sentences for the user, none when nothing was left out."""
        if not self.count:
            return []
        more = self.count - len(self.listed)
        return [f"{self.count:,} bad lines were left out:", *self.listed, *([f"... and {more:,} more"] if more else [])]


class BadRecordError(Exception):
    """A record that cannot be used; the text is the reason, for ReadLog."""


def format_of(path: Path, given: str | None = None) -> str:
    """ "txt", "jsonl" or "json", from the file's name unless `given`. Raises InputError for another ending."""
    if given is not None and given not in FORMATS.values():
        raise InputError(f"{path}: the format {given!r} is unknown, expected {', '.join(FORMATS.values())}")
    found = given or FORMATS.get(path.suffix.lower())
    if found is None:
        raise InputError(f"{path}: the name ends in {path.suffix or 'nothing'!r}, expected {', '.join(FORMATS)}")
    return found


def read_lines(path: Path, log: ReadLog) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end). Lines that are not UTF-8, or have no end, are problems."""
    try:
        with open_regular(path) as file:
            number = 0
            while raw := file.readline(MAX_LINE + 1):
                number += 1
                log.bytes_read += len(raw)
                if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
                    log.add(f"{path}:{number}", f"the line has more than {MAX_LINE:,} bytes; break it")
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(MAX_LINE)
                        log.bytes_read += len(raw)
                    continue
                try:
                    line = raw.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    log.add(f"{path}:{number}", f"byte {error.start} is not valid UTF-8; convert the file to UTF-8")
                    continue
                yield number, line.removeprefix(_BOM) if number == 1 else line
    except OSError as error:
        raise from_os_error(path, error) from None


def read_records(path: Path, log: ReadLog, form: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for every record of a .jsonl file, or of a .json file that holds an array of objects."""
    if format_of(path, form) == "json":
        yield from _read_array(path, log)
        return
    for number, line in read_lines(path, log):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            log.add(where, f"not valid JSON ({error!s:.80})")
            continue
        if isinstance(record, dict):
            yield where, record
        else:
            log.add(where, f"a JSON {type(record).__name__}, expected an object")


def _read_array(path: Path, log: ReadLog) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        records = json.loads(read_bytes(path, _MAX_ARRAY))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error!s:.80}); for an object on each line use .jsonl") from None
    if not isinstance(records, list):
        raise InputError(f"{path}: holds a JSON {type(records).__name__}, expected an array of objects")
    for number, record in enumerate(records, 1):
        where = f"{path}: record {number}"
        if isinstance(record, dict):
            yield where, record
        else:
            log.add(where, f"a JSON {type(record).__name__}, expected an object")


def read_documents(path: Path, log: ReadLog, template: str = POEM_TEMPLATE, form: str | None = None) -> Iterator[str]:
    """The documents of a corpus file.

    .txt: one paragraph a line, a blank line between documents; very long documents go on as new ones. .jsonl and .json:
    {"text"}, or records whose fields `template` names.
    """
    if format_of(path, form) == "txt":
        yield from _read_text(path, log)
        return
    for where, record in read_records(path, log, form):
        try:
            yield render(record, template)
        except BadRecordError as error:
            log.add(where, str(error))


def _read_text(path: Path, log: ReadLog) -> Iterator[str]:
    paragraphs: list[str] = []
    size = 0
    for _, line in read_lines(path, log):
        if line.strip():
            paragraphs.append(line)
            size += len(line)
        if paragraphs and (not line.strip() or size >= MAX_DOCUMENT_CHARS):
            yield "\n".join(paragraphs)
            paragraphs, size = [], 0
    if paragraphs:
        yield "\n".join(paragraphs)


def unescaped(template: str) -> str:
    """A rendering template as it was typed, where a line break is \\n and a tab \\t."""
    return template.replace("\\n", "\n").replace("\\t", "\t")


def template_fields(template: str) -> list[str]:
    """Names of the fields in a rendering template. Raises InputError for a template that is not plain {name}s."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"the template {template!r:.80} cannot be read ({error}); write fields as {{name}}") from None
    names = [name for _, name, _, _ in parts if name is not None]
    if not names or any(spec or conversion or not name.isidentifier() for _, name, spec, conversion in parts if name):
        raise InputError(f"the template {template!r:.80} is not usable; write fields as {{name}}, at least one")
    return names


def render(record: dict[str, Any], template: str = POEM_TEMPLATE) -> str:
    """The document of a record: its "text", or `template` filled in. Raises BadRecordError for a missing field."""
    text = record.get("text")
    if text is not None:
        return _field_text("text", text)
    missing = [name for name in template_fields(template) if name not in record]
    if missing:
        raise BadRecordError(
            f'there is neither "text" nor the "{missing[0]}" that the template {template!r:.60} asks for'
        )
    return template.format(**{name: _field_text(name, record[name]) for name in template_fields(template)})


def _field_text(name: str, value: object) -> str:
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise BadRecordError(f'"{name}" is a JSON {type(value).__name__}, expected text or a list of texts')
    if not value.strip():
        raise BadRecordError(f'"{name}" is empty')
    return _unicode(name, value)


def _unicode(name: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecordError(f'"{name}" holds half a surrogate pair, which is no text') from None
    return value


def read_conversations(path: Path, log: ReadLog, form: str | None = None) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(where, messages) of an instruction file; messages end with the assistant's.

    Records are {"instruction", "input", "output"}, the input optional, or {"messages": [{"role", "content"}]}.
    """
    if format_of(path, form) == "txt":
        raise InputError(f"{path}: a text file holds no instructions, expected .jsonl or .json")
    for where, record in read_records(path, log, form):
        try:
            yield where, conversation(record)
        except BadRecordError as error:
            log.add(where, str(error))


def conversation(record: dict[str, Any]) -> list[dict[str, str]]:
    """Messages of a record: an optional system message, then user and assistant in turn. Raises BadRecordError."""
    if "messages" in record:
        return _check_messages(record["messages"])
    values = {key: record.get(key) or "" for key in ("instruction", "input", "output")}
    for key, value in values.items():
        if not isinstance(value, str):
            raise BadRecordError(f'"{key}" is a JSON {type(value).__name__}, expected text')
        if not value.strip() and key != "input":
            raise BadRecordError(f'"{key}" is {"empty" if key in record else "missing"}')
        _unicode(key, value)
    user = join_input(values["instruction"], values["input"])
    return [{"role": "user", "content": user}, {"role": "assistant", "content": values["output"]}]


def _check_messages(messages: object) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadRecordError('"messages" is no list of messages')
    checked: list[dict[str, str]] = []
    for i, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRecordError(f'message {i} is no {{"role", "content"}} of two texts')
        if role == "assistant" and not content.strip():
            raise BadRecordError(f"message {i}, an answer, is empty")
        checked.append({"role": role, "content": _unicode("content", content)})
    turns = checked[1:] if checked[0]["role"] == "system" else checked
    for i, message in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if message["role"] != expected:
            raise BadRecordError(
                f"message {i + 1 + len(checked) - len(turns)} is by {message['role']!r:.20}, expected {expected!r}"
            )
    if not turns or len(turns) % 2:
        raise BadRecordError("the last message is not the assistant's, so there is no answer to learn")
    return checked


def check_files(paths: Sequence[Path]) -> None:
    """Raises InputError for the first path that is no readable file or has an unknown ending."""
    for path in paths:
        if is_dir(path):
            raise InputError(f"{path}: this is a directory, expected a file of text or JSON lines")
        open_regular(path).close()
