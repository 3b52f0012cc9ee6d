# SPDX-License-Identifier: Apache-2.0
"""Which back end runs a model: the CPU, or an NVIDIA GPU where this build and this machine have one."""

from __future__ import annotations

import importlib
from typing import Any

from cnllama.errors import InputError
from cnllama.plan import STEP_TOKENS, Available
from cnllama.textio import tr

NAMES = ("auto", "cpu", "cuda")
CUDA_STEP_TOKENS = 2048
"""Tokens of a step on the GPU: prompts are bound by arithmetic there, and larger steps use it better."""

_ENGINE_BYTES = 640 << 20  # what the engine and the driver take on a GPU beside weights and cache, about


def cuda_problem() -> str:
    """Why `--device cuda` cannot work here, as one sentence; empty when it can."""
    try:
        module = importlib.import_module("cnllama._cuda")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cnllama._cuda":
            return tr(
                "this cnllama was built without CUDA: install it from source where nvcc 12.8 or later is, with "
                "-Ccmake.define.CNLLAMA_CUDA=ON, or leave --device cuda out",
                "此 cnllama 构建时不含 CUDA：请在装有 nvcc 12.8 或更新版本的机器上用 -Ccmake.define.CNLLAMA_CUDA=ON "
                "从源码安装，或去掉 --device cuda",
            )
        return tr(f"the CUDA module cannot be loaded: {error}", f"无法加载 CUDA 模块：{error}")
    return str(module.device()["problem"])


def choose(name: str) -> str:
    """What an option means, "cpu" or "cuda"; "auto" is the CPU.

    Raises InputError with one sentence for another name, and for "cuda" where it cannot work.
    """
    if name not in NAMES:
        raise InputError(
            tr(
                f"the device is {name!r}: choose one of {', '.join(NAMES)}",
                f"设备 {name!r} 不存在：请选 {', '.join(NAMES)}",
            )
        )
    if name != "cuda":
        return "cpu"
    problem = cuda_problem()
    if problem:
        raise InputError(problem)
    return "cuda"


def engine_class(device: str) -> Any:
    """The Engine of a chosen device: `_core.Engine` or `_cuda.Engine`, with the same interface."""
    if device == "cuda":
        from cnllama import _cuda

        return _cuda.Engine
    from cnllama import _core

    return _core.Engine


def step_tokens(device: str) -> int:
    """The largest step of a chosen device."""
    return CUDA_STEP_TOKENS if device == "cuda" else STEP_TOKENS


def gpu_memory() -> Available:
    """What weights and cache may take of the GPU."""
    from cnllama import _cuda

    return Available(max(0, int(_cuda.device()["free_bytes"]) - _ENGINE_BYTES), "free GPU memory")
