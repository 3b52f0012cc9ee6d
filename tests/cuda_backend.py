# SPDX-License-Identifier: Apache-2.0
"""The CUDA back end for tests: the real module where there is a GPU, else its host emulation."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda"))


def on_a_gpu() -> bool:
    """Whether the real module is built and finds a GPU."""
    try:
        from cnllama import _cuda
    except ImportError:
        return False
    return not _cuda.device()["problem"]


@cache
def load() -> ModuleType:
    """The module. CNLLAMA_EMULATION names a folder to build the emulation in, and to keep it."""
    if on_a_gpu():
        from cnllama import _cuda

        return _cuda
    if shutil.which("g++") is None:
        pytest.skip("no GPU, and no g++ to build the host emulation with")
    import build

    kept = os.environ.get("CNLLAMA_EMULATION")
    folder = kept or tempfile.mkdtemp(prefix="cnllama-emulation-")
    if not kept:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build.load(Path(folder))


class Repeated:
    """Functions of a module, of which every call is made three times and must give the same bits: a GPU runs its blocks
    in an order of its own, and no result may show it.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            first = function(*arguments, **options)
            for _ in range(2):
                assert _bits(function(*arguments, **options)) == _bits(first), f"{name} gives other bits the next time"
            return first

        return call


def _bits(result: Any) -> list[bytes]:
    arrays = result if isinstance(result, tuple | list) else [result]
    return [np.ascontiguousarray(array).tobytes() for array in arrays]
