# SPDX-License-Identifier: Apache-2.0
"""A full disk, an I/O error or no permission at any change of the disk: one sentence, nothing lost, nothing left."""

from __future__ import annotations

import errno

import pytest
from kills.cases import CASES
from kills.points import ERRORS, Workshop, chosen, fail_at
from test_kills_points import FRESH, OVER

# Changes that fail: fewer of commands that take long.
MOST = {
    "tokenizer-train": 5, "create": 6, "pretrain": 6, "pretrain-full": 4, "sft": 2, "pretrain-restart": 3,
    "convert-gptq": 5, "recipe": 3, "recipe-redo": 2,
}  # fmt: skip


@pytest.mark.parametrize(("name", "earlier"), [(n, False) for n in FRESH] + [(n, True) for n in OVER])
def test_error_at_a_change(workshop: Workshop, name: str, earlier: bool) -> None:
    case = CASES[name]
    known = workshop.know(case, earlier)
    for turn, number in enumerate(chosen(known.changes, MOST.get(name, 6))):
        codes = [code for code, kinds in ERRORS.items() if known.changes[number].kind in kinds]
        if codes:
            code = codes[turn % len(codes)]
            wrong = fail_at(workshop, case, known, number, code)
            assert not wrong, (number, errno.errorcode[code], known.changes[number])
