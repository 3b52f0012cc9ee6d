# SPDX-License-Identifier: Apache-2.0
"""The tile layout against the fragment maps of the instructions, on the CPU, exact."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_tiles_are_the_fragments_of_every_instruction(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the emulation with")
    program = tmp_path / "layout_test"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-I", ROOT / "csrc"]
    subprocess.run([compiler, *flags, ROOT / "tests/cuda/layout_test.cpp", "-o", program], check=True, timeout=540)
    result = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "mma s8, on Turing, mma f16, dp4a, wgmma A, places, sizes: all equal"
