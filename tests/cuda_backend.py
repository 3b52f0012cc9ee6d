# SPDX-License-Identifier: Apache-2.0
"""The CUDA back end for tests: the real module where there is a GPU, else its host emulation."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

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

    folder = os.environ.get("CNLLAMA_EMULATION") or tempfile.mkdtemp(prefix="cnllama-emulation-")
    path = build.build(Path(folder))
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
