# SPDX-License-Identifier: Apache-2.0
"""Files of strangers that an evaluation reads: regular, of a bounded size, and of the kind that was asked for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cnllama.errors import InputError, from_os_error
from cnllama.paths import check_name, read_bytes

MAX_BYTES = 1 << 26
_OTHER_KINDS = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "a database",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF": "a PDF",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself (git lfs pull fetches that)",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
}


def check_text_file(path: Path, wanted: str) -> None:
    """Raises InputError unless `path` is a regular file of at most MAX_BYTES that begins like text.

    wanted: what is expected, for the sentence. A pipe is refused before it is opened, which would wait for its writer.
    """
    check_name(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path}: this is a directory, expected {wanted}")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: this is no regular file, expected {wanted}")
        if status.st_size > MAX_BYTES:
            raise InputError(
                f"{path}: the file has {status.st_size:,} bytes and at most {MAX_BYTES:,} are read: take a part of it, "
                f"such as: head -c {MAX_BYTES} {path.name!r}"
            )
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise from_os_error(path, error) from error
    found = next((name for magic, name in _OTHER_KINDS.items() if start.startswith(magic)), None)
    if found is not None:
        raise InputError(f"{path}: this is {found}, expected {wanted}")


def read_text_bytes(path: Path, wanted: str) -> bytes:
    """The whole file, see check_text_file."""
    check_text_file(path, wanted)
    return read_bytes(path, MAX_BYTES)
