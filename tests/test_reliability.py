# SPDX-License-Identifier: Apache-2.0
"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|") and not re.match(r"\|(---| promise )", line)]
    assert len(rows) > 30
    for row in rows:
        promise, named = row.strip("|").rsplit("|", 1)
        tests = re.findall(r"`(\w+): (\w+)`", named)
        assert tests, f"no test holds {promise.strip()!r}"
        for file, name in tests:
            path = ROOT / "tests" / f"test_{file}.py"
            source = path.read_text(encoding="utf-8")
            assert re.search(rf"^def test_{name}\(", source, re.MULTILINE), (file, name)
