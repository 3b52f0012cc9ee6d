# SPDX-License-Identifier: Apache-2.0
"""What a model was made from, by the names that people know."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cnllama.paths import real_path

_HASH_DIGITS = 8


def model_name(directory: Path) -> str:
    """A directory's name; of a snapshot in the hub's cache, `owner/name@` and the beginning of its commit.

    The path is read before links are followed, for a cache's files are links to blobs that have hashes for names.
    """
    for path in (Path(os.path.abspath(directory)), real_path(directory)):
        name = _hub_name(path.parts)
        if name is not None:
            return name
    return real_path(directory).name or str(directory)


def _hub_name(parts: Sequence[str]) -> str | None:
    """Of .../models--owner--name/snapshots/HASH and what lies in it."""
    for i in range(len(parts) - 2):
        kind, dashes, name = parts[i].partition("--")
        if kind == "models" and dashes and parts[i + 1] == "snapshots":
            return "/".join([f"{name.replace('--', '/')}@{parts[i + 2][:_HASH_DIGITS]}", *parts[i + 3 :]])
    return None
