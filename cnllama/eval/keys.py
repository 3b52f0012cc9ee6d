# SPDX-License-Identifier: Apache-2.0
"""Names for kept results: a hash of everything that decides them, so that a change of any of it is another name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cnllama.contents import content_key


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
