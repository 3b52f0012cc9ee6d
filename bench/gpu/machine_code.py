# SPDX-License-Identifier: Apache-2.0
"""Kernels and what they were compiled to: out of a built module, or by compiling every file here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("75", "80", "90a")
LATER = "90"  # PTX for GPUs later than those: their driver translates it
FLAGS = ("-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-Werror=all-warnings")
RESERVED_SHARED = 1024  # bytes of every block that Hopper keeps; cuobjdump counts them, ptxas does not


@dataclass
class Kernel:
    """One kernel for one architecture. Sizes are bytes; code is empty where machine code is not read."""

    name: str
    architecture: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    code: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tools:
    """cuobjdump, and an environment in which it finds nvdisasm."""

    cuobjdump: str
    environment: dict[str, str]

    def lines(self, *arguments: str | Path) -> Iterator[str]:
        """What it prints. Raises CalledProcessError when it fails."""
        command = [self.cuobjdump, *map(str, arguments)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self.environment) as process:
            assert process.stdout is not None
            yield from process.stdout
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, stderr="")


def find_tools() -> Tools | None:
    """On PATH, or where the packages of the Python that runs this put them."""
    packages = [str(path) for entry in sys.path for path in sorted(Path(entry or ".").glob("nvidia/*/bin"))]
    search = os.pathsep.join([os.environ.get("PATH", ""), *packages])
    cuobjdump, nvdisasm = (shutil.which(name, path=search) for name in ("cuobjdump", "nvdisasm"))
    if cuobjdump is None or nvdisasm is None:
        return None
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])
    return Tools(cuobjdump, {**os.environ, "PATH": path})


def demangled(names: Sequence[str]) -> list[str]:
    """Readable names, without argument lists and namespaces."""
    tool = shutil.which("c++filt")
    if tool is None:
        sys.exit("there is no c++filt to read the names of kernels with: install binutils")
    text = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = (re.sub(r"\(anonymous namespace\)::|cnl::cuda::|^void ", "", name) for name in text)
    return [re.sub(r"\((?!int\)|bool\)).*$", "", name).replace("(int)", "").replace("(bool)", "") for name in short]


def contents(module: Path, tools: Tools) -> tuple[set[str], bool]:
    """(architectures that it has machine code for, whether it has PTX for later ones)."""
    held = {found.group(1) for line in tools.lines("-lelf", module) if (found := re.search(r"\.sm_(\w+)\.cubin", line))}
    ptx = any(f".sm_{LATER}.ptx" in line for line in tools.lines("-lptx", module))
    return held, ptx


def of_module(module: Path, tools: Tools) -> Iterator[Kernel]:
    """Every kernel of a module, one after another."""
    usage = {(kernel.architecture, kernel.name): kernel for kernel in usage_of(tools.lines("-res-usage", module))}
    names = sorted({name for _, name in usage})
    readable = dict(zip(names, demangled(names), strict=True))
    for architecture, name, code in functions_of(tools.lines("-sass", module)):
        kernel = usage.pop((architecture, name))
        kernel.name, kernel.code = readable[name], code
        yield kernel
    if usage:
        sys.exit(f"{module}: {len(usage)} kernels have no machine code, {next(iter(usage))} among them")


def usage_of(lines: Iterator[str]) -> Iterator[Kernel]:
    """The kernels, under their mangled names, of `cuobjdump -res-usage`."""
    architecture = name = ""
    for line in lines:
        if found := re.match(r"arch = sm_(\w+)", line):
            architecture = found.group(1)
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found.group(1)
        elif name and "REG:" in line:
            numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            reserved = RESERVED_SHARED if int(architecture.rstrip("af")) >= 90 else 0
            shared = max(0, numbers["SHARED"] - reserved)
            yield Kernel(name, architecture, numbers["REG"], shared, numbers["STACK"], numbers["LOCAL"])
            name = ""


def functions_of(lines: Iterator[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(architecture, mangled name, instructions) of `cuobjdump -sass`, each when it is complete."""
    architecture = name = ""
    code: list[str] = []
    for line in lines:
        if found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(found.group(1).strip())
        elif found := re.search(r"Function : (\S+)", line):
            if name:
                yield architecture, name, code
            name, code = found.group(1), []
        elif found := re.match(r"arch = sm_(\w+)", line):
            if name:
                yield architecture, name, code
            architecture, name, code = found.group(1), "", []
    if name:
        yield architecture, name, code


def of_sources(units: Sequence[Path], folder: Path, tools: Tools | None) -> Iterator[Kernel]:
    """Every kernel of the files, compiled into `folder`. Exits when one does not compile."""
    for source in units:
        compiled(source, folder / "unit.ptx", "-ptx", f"-arch=compute_{LATER}")
        for architecture in ARCHITECTURES:
            cubin = folder / f"{source.stem}.{architecture}.cubin"
            log = compiled(source, cubin, "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v")
            found = list(ptxas_kernels(log, architecture))
            code = {name: code for _, name, code in functions_of(tools.lines("-sass", cubin))} if tools else {}
            for kernel, name in zip(found, demangled([kernel.name for kernel in found]), strict=True):
                kernel.name, kernel.code = name, code.get(kernel.name, [])
                yield kernel
        print(f"{source.name}: compiled", flush=True)


def compiled(source: Path, target: Path, *options: str) -> str:
    """What nvcc says. Exits when it fails."""
    command = ["nvcc", *FLAGS, "-I", ROOT / "csrc", *options, source, "-o", target]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{source.name} does not compile with {' '.join(options)}:\n{result.stderr}")
    return result.stderr


def ptxas_kernels(log: str, architecture: str) -> Iterator[Kernel]:
    """The kernels that `ptxas -v` reports."""
    patterns = {"registers": r"Used (\d+) registers", "shared": r"(\d+) bytes smem", "stack": r"(\d+) bytes stack"}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        numbers = {name: re.search(pattern, part) for name, pattern in patterns.items()}
        sizes = {name: int(found.group(1)) for name, found in numbers.items() if found}
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        yield Kernel(part.split("'")[0], architecture, spills=spills, **sizes)
