# SPDX-License-Identifier: Apache-2.0
"""A full disk, an I/O error or no permission at any change of the disk: one sentence, nothing lost, nothing left."""

from __future__ import annotations

import errno

import pytest
from kills.cases import CASES
from kills.points import ERRORS, Workshop, chosen, fail_at
from test_kills_points import OVER

# Changes that fail: fewer of commands that take long.
MOST = {"pretrain": 10, "pretrain-full": 6, "sft": 4, "recipe": 5, "recipe-redo": 5, "pretrain-restart": 5}


@pytest.mark.parametrize(("name", "earlier"), [(n, False) for n in CASES] + [(n, True) for n in OVER])
def test_error_at_a_change(workshop: Workshop, name: str, earlier: bool) -> None:
    case = CASES[name]
    known = workshop.know(case, earlier)
    for turn, number in enumerate(chosen(known.changes, MOST.get(name, 12))):
        codes = [code for code, kinds in ERRORS.items() if known.changes[number].kind in kinds]
        if codes:
            code = codes[turn % len(codes)]
            wrong = fail_at(workshop, case, known, number, code)
            assert not wrong, (number, errno.errorcode[code], known.changes[number])
