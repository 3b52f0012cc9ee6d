# SPDX-License-Identifier: Apache-2.0
"""A table of kernels that lacks one does not compile: an array that is longer than its list would end in nulls.

The CPU's arrays are filled for every shape and number of tokens that they have room for, so no list can fall short.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cuda"))

import build  # noqa: E402

CPU = ("-std=c++20", "-Wall", "-Wextra")
SCALAR, ENTRIES = "cpu/isa_scalar.cpp", "cpu/kernels.inl"
MISSING, ASSERTED = "missing initializer for member", "static assertion failed"
# (what is compiled, where the list is, the end of it, what is left when the last kernel is forgotten, the error)
LISTS = [
    (SCALAR, ENTRIES, r"float_peak,\s*read_lines\}", "float_peak}", MISSING),
    (SCALAR, ENTRIES, r"\{\},\s*expand,", "{},", MISSING),
    (SCALAR, "cpu/isa.hpp", r"kShapeCount = 9;", "kShapeCount = 10;", ASSERTED),  # a shape that is not described
    ("cuda/matmul_stream.cu", None, r", stream_kernel<3, kMatrices, kBlocks, kDot>\}", "}", ASSERTED),
    ("cuda/matmul_large.cu", None, r", large_kernel<3, kMatrices, kTokenWarps>\}", "}", ASSERTED),
    ("cuda/repack.cu", None, r",\s*repack_kernel<3>\}", "}", ASSERTED),
    ("cuda/activations.cu", None, r", embed_kernel<3>\}", "}", ASSERTED),
]


def compile_it(source: Path) -> str:
    """The compiler's errors, empty when there are none. The source lies in a copy of csrc."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    include = [f"-I{source.parents[1]}", f"-I{ROOT / 'tests' / 'cuda' / 'emulator'}"]
    flags = CPU if source.suffix == ".cpp" else (*build.FLAGS, "-Wno-unknown-pragmas")
    command = [compiler, "-x", "c++", *flags, *include, "-fsyntax-only", str(source)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False).stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(ROOT / "csrc", tmp_path_factory.mktemp("tables") / "csrc"))


@pytest.mark.parametrize("source", sorted({source for source, *_ in LISTS}))
def test_the_tables_are_complete(source: str, sources: Path) -> None:
    assert "error" not in compile_it(sources / source)


@pytest.mark.parametrize(("source", "place", "last", "rest", "error"), LISTS)
def test_a_forgotten_kernel_does_not_compile(
    source: str, place: str | None, last: str, rest: str, error: str, sources: Path
) -> None:
    file = sources / (place or source)
    whole = file.read_text()
    shorter, count = re.subn(last, rest, whole)
    assert count == 1
    try:
        file.write_text(shorter)
        errors = compile_it(sources / source)
    finally:
        file.write_text(whole)
    assert error in errors, errors
