# SPDX-License-Identifier: Apache-2.0
"""Names for kept results: a hash of everything that decides them, so that a change of any of it is another name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from cnllama.errors import InputError, from_os_error

_CHUNK = 1 << 22


def content_key(paths: Iterable[Path]) -> str:
    """sha256 of the contents of files, and of the files of directories with their names, in this order.

    Where they lie and when they were written does not matter. Raises InputError for what cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        for name, file in _files(path):
            digest.update(f"{name}\0{_hash_file(file)}\n".encode("utf-8", "surrogateescape"))
        digest.update(b"\0")
    return digest.hexdigest()


def code_key() -> str:
    """Changes with the code of this installation of cnllama: of its packages, its converter and its kernels."""
    import cnllama
    import cnllama.convert
    from cnllama import _core

    places = dict.fromkeys(Path(str(package.__file__)).parent for package in (cnllama, cnllama.convert))
    files = [file for place in places for file in sorted(place.rglob("*.py"))]
    return content_key([*files, Path(_core.__file__)])


def options_key(*values: object) -> str:
    """sha256 of plain values: texts, numbers, None."""
    return hashlib.sha256(repr(values).encode("utf-8", "surrogateescape")).hexdigest()


def _files(path: Path) -> Sequence[tuple[str, Path]]:
    if not path.is_dir():
        return [("", path)]
    try:
        return [(entry.name, entry) for entry in sorted(path.iterdir()) if entry.is_file()]
    except OSError as error:
        raise from_os_error(path, error) from error


def _hash_file(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: this is no regular file")
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise from_os_error(path, error) from error
    return digest.hexdigest()
