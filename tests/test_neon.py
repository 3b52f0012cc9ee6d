# SPDX-License-Identifier: Apache-2.0
"""The Arm kernels under emulation, and the same bits on both architectures.

The program of tests/arm runs every op with every instruction set that its machine has, compares the results with plain
C++ bit for bit, and prints a hash of each. Here it is compiled for this machine and for aarch64, and the hashes must
be the same. Needs CMake; the aarch64 half needs Debian's g++-aarch64-linux-gnu and qemu-user.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SYSROOT = Path("/usr/aarch64-linux-gnu")
pytestmark = pytest.mark.timeout(1200)  # two builds, on a machine that may have other work
X86 = platform.machine().lower() in ("x86_64", "amd64")


def build_tool(name: str) -> str | None:
    """A program of PATH, or one that pip installed: beside this interpreter or in the Python package of that name."""
    spec = importlib.util.find_spec(name)
    folders = [Path(place) / "data" / "bin" for place in (spec and spec.submodule_search_locations) or ()]
    places = os.pathsep.join(str(folder) for folder in [Path(sys.executable).parent, *folders])
    return shutil.which(name) or shutil.which(name, path=places)


def answers_for_aarch64(compiler: str) -> bool:
    """Compiler caches of that name may be configured to run another compiler."""
    result = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True)
    return result.stdout.startswith("aarch64")


def cross_compiler() -> str | None:
    folders = os.get_exec_path()
    found: Iterable[str | None] = (shutil.which("aarch64-linux-gnu-g++", path=folder) for folder in folders)
    return next((compiler for compiler in found if compiler and answers_for_aarch64(compiler)), None)


def build(folder: Path, *settings: str) -> Path:
    cmake, ninja = build_tool("cmake"), build_tool("ninja")
    if cmake is None:
        pytest.skip("no cmake, neither on PATH nor as a Python package")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    if not ninja and not shutil.which("make"):
        pytest.skip("neither ninja nor make")
    flags = ["-DCNLLAMA_KERNEL_TEST=ON", "-DCNLLAMA_WERROR=ON", *settings]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), *generator, *flags],
        [cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return folder / "kernels_test"


def run(*command: str) -> tuple[list[str], dict[str, str]]:
    """Instruction sets the program saw, and {case: hash}. Fails with the program's own words."""
    result = subprocess.run(command, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    bad = [line for line in lines if not line.startswith("ok")]
    assert result.returncode == 0, "\n".join([*bad, result.stderr])
    assert lines[0].startswith("isas: ")
    cases = [line.split()[1:] for line in lines if line.startswith("ok")]
    return lines[0].split()[1:], {" ".join(words[:-1]): words[-1] for words in cases}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler")
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not X86:
        pytest.skip("this machine needs no emulation")
    compiler = cross_compiler()
    if compiler is None or not SYSROOT.is_dir():
        pytest.skip("no cross compiler (Debian: g++-aarch64-linux-gnu)")
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("no emulator (Debian: qemu-user)")
    toolchain = ROOT / "cmake" / "aarch64-linux-gnu.cmake"
    folder = tmp_path_factory.mktemp("arm")
    return build(folder, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", f"-DCMAKE_CXX_COMPILER={compiler}")


def emulated(cpu: str, program: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    return run("qemu-aarch64", "-cpu", cpu, "-L", str(SYSROOT), str(program), *arguments)


@pytest.fixture(scope="module")
def native_results(native: Path) -> tuple[list[str], dict[str, str]]:
    return run(str(native))


def test_every_op_has_the_same_bits_on_every_instruction_set(native_results: tuple[list[str], dict[str, str]]) -> None:
    isas, cases = native_results
    assert isas[0] == "scalar"
    assert len(cases) > 150


def test_every_op_has_the_same_bits_on_neon_as_on_x86(
    arm: Path, native_results: tuple[list[str], dict[str, str]]
) -> None:
    isas, cases = emulated("max", arm)
    assert isas == ["scalar", "neon-dotprod", "neon-i8mm"]
    assert cases == native_results[1]


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [("cortex-a57", ["scalar"]), ("cortex-a76", ["scalar", "neon-dotprod"])],
)
def test_a_processor_gets_the_kernels_it_can_run(
    arm: Path, native_results: tuple[list[str], dict[str, str]], cpu: str, expected: list[str]
) -> None:
    # The emulator stops at an instruction that this processor lacks: nothing but the table's own files may have any.
    isas, cases = emulated(cpu, arm, "model")
    assert isas == expected
    assert cases == {name: value for name, value in native_results[1].items() if name.startswith("model")}
