# SPDX-License-Identifier: Apache-2.0
"""Small files out: complete under their name or not there at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cnllama.container import Output
from cnllama.errors import from_os_error

_CHUNK = 1 << 22


def write_file(path: Path, data: bytes) -> None:
    """Writes a file. Raises CnllamaError for a full disk and InputError for a place that cannot be written."""
    output = Output(path)
    try:
        output.write(data, 0)
        output.commit()
    except BaseException:
        output.discard()
        raise


def write_json(path: Path, value: object) -> None:
    """Writes readable JSON, as Hugging Face's files are."""
    write_file(path, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8"))


def copy_file(source: Path, target: Path, advance: Callable[[int], object] = lambda _: None) -> None:
    """Copies a file of any size; `advance` gets the bytes of every piece."""
    output = Output(target)
    try:
        with open(source, "rb") as file:
            offset = 0
            while data := file.read(_CHUNK):
                output.write(data, offset)
                offset += len(data)
                advance(len(data))
        output.commit()
    except OSError as error:
        output.discard()
        raise from_os_error(source, error) from None
    except BaseException:
        output.discard()
        raise
