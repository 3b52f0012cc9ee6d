# SPDX-License-Identifier: Apache-2.0
"""The files that a recipe's script is made of: itself and the modules beside it that it imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from cnllama.errors import CnllamaError
from cnllama.paths import is_file, read_bytes

_MAX_BYTES = 1 << 24
_MAX_FILES = 1000


def script_files(script: Path) -> list[Path]:
    """The script and what it imports from its own directory, by import statements, at any depth; the script first."""
    found = [script]
    for path in found:  # grows while it is walked
        for name in _imports(path):
            parts = name.split(".")
            for end in range(len(parts), 0, -1):
                base = script.parent.joinpath(*parts[:end])
                for candidate in (base.with_suffix(".py"), base / "__init__.py"):
                    if is_file(candidate) and candidate not in found and len(found) < _MAX_FILES:
                        found.append(candidate)
    return found


def _imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports; none of a file that is no Python: running it will say so."""
    try:
        tree = ast.parse(read_bytes(path, _MAX_BYTES))
    except (CnllamaError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            package = path.parent.name  # of a package beside the script
            names = [alias.name for alias in node.names] if not node.module else [node.module]
            yield from (f"{package}.{name}" for name in names)
