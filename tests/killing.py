# SPDX-License-Identifier: Apache-2.0
"""Ends a process between two changes of a disk: a child for each change, ended just before it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator

from cnllama import files

_KILLED, _FAILED = 77, 78


def killed_everywhere(work: Callable[[], object], limit: int = 400, step: int = 1) -> Iterator[int]:
    """Runs `work` in a child that ends as by kill -9 before its first change, then in one that ends before its second.

    Yields the number of the change for every child that was ended; a child that comes to its end is the last. step: of
    these numbers.
    """
    for number in range(0, limit, step):
        if not _ends_before(work, number):
            return
        yield number
    raise AssertionError(f"more than {limit} changes of the disk")


def _ends_before(work: Callable[[], object], number: int) -> bool:
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        left = number

        def operation(kind: str, path: object) -> None:
            nonlocal left
            if left == 0:
                os._exit(_KILLED)
            left -= 1

        files._operation = operation
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(_FAILED)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _KILLED), f"the child ended with {code}"
    return code == _KILLED
