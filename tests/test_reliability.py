# SPDX-License-Identifier: Apache-2.0
"""Pages that promise something name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("page", "heading", "prefix", "least"),
    [("reliability.md", "| promise |", "", 30), ("adapt.md", "| claim |", "adapt_", 25)],
    ids=["reliability", "adapt"],
)
def test_every_promise_names_a_test_that_exists(page: str, heading: str, prefix: str, least: int) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text[text.index(heading) :].splitlines()
    rows = [line for line in lines if line.startswith("|") and not line.startswith(("|---", heading))]
    assert len(rows) > least
    for row in rows:
        promise, named = row.strip("|").rsplit("|", 1)
        tests = re.findall(r"`(\w+): (\w+)`", named)
        assert tests, f"no test holds {promise.strip()!r}"
        for file, name in tests:
            path = ROOT / "tests" / f"test_{prefix}{file}.py"
            source = path.read_text(encoding="utf-8")
            assert re.search(rf"^def test_{name}\(", source, re.MULTILINE), (file, name)
