# SPDX-License-Identifier: Apache-2.0
"""Builds cnllama._cuda with the host emulation of CUDA in place of CUDA.

    python tests/cuda/build.py DIRECTORY

The kernels and everything around them are the sources that nvcc compiles; only tests/cuda/emulator differs. What is in
DIRECTORY and newer than all sources is left as it is.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("model.cpp", "rope.cpp", "kv_cache.cpp", "bind_model.cpp", "fork.cpp")
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wno-unknown-pragmas")  # `#pragma unroll` is nvcc's


def sources() -> list[Path]:
    """Every file that is compiled."""
    cuda = ROOT / "csrc" / "cuda"
    found = [*sorted(cuda.glob("*.cu")), *sorted(cuda.glob("*.cpp")), *(ROOT / "csrc" / name for name in SHARED)]
    return [*found, ROOT / "tests" / "cuda" / "emulator" / "emulator.cpp"]


def newest_input() -> float:
    """When a source or a header was changed last."""
    headers = [*(ROOT / "csrc").glob("*.hpp"), ROOT / "csrc" / "cpu" / "half.hpp"]
    folders = (ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda" / "emulator")
    files = [path for folder in folders for path in folder.iterdir()]
    return max(path.stat().st_mtime for path in (*sources(), *headers, *files, Path(__file__)))


def build(directory: Path) -> Path:
    """The extension module in `directory`, built where it is missing or old. Raises FileNotFoundError without g++."""
    import pybind11

    module = directory / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    if module.exists() and module.stat().st_mtime > newest_input():
        return module
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("g++")
    directory.mkdir(parents=True, exist_ok=True)
    own = (ROOT / "csrc", ROOT / "tests" / "cuda" / "emulator")
    others = (pybind11.get_include(), sysconfig.get_path("include"))
    flags = [*FLAGS, *WARNINGS, *(f"-I{path}" for path in own)]
    for path in others:
        flags += ["-isystem", path]

    def compile_one(source: Path) -> Path:
        target = directory / (source.name + ".o")
        subprocess.run([compiler, "-x", "c++", *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources()))
    subprocess.run([compiler, "-shared", *objects, "-o", module], check=True)
    return module


def load(directory: Path) -> ModuleType:
    """The module, built where it must be."""
    spec = importlib.util.spec_from_file_location("_cuda", build(directory))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
