# SPDX-License-Identifier: Apache-2.0
"""What can be said about the CUDA kernels without a GPU: they compile, and what they were compiled to.

    python bench/gpu/gate.py                      # sm_75, sm_80, sm_90a and PTX; compares with kernels.json
    python bench/gpu/gate.py --architectures 90a  # one of them
    python bench/gpu/gate.py --update             # writes kernels.json anew

Every translation unit is compiled with warnings as errors. Of every kernel, registers and shared memory may not be
above what kernels.json says, and there are no stack and no spills. With cuobjdump and nvdisasm on PATH (PyPI:
nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm) the machine code is read too: no local memory, weights by 128-bit loads,
the tensor-core or dp4a instruction that is meant, and for the products with few tokens the instructions a weight of the
inner loop, against the budget of docs/cuda.md. Exits with 1 when something is not as it must be, with 77 and the reason
when there is no nvcc.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("kernels.json")
ARCHITECTURES = ("75", "80", "90a")
SKIPPED = 77
FLAGS = ("-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-Werror=all-warnings")
REGISTER_SLACK = 8  # what another patch release of nvcc may add
WEIGHTS_OF_A_TILE = 16 * 64
BUDGETS = {"mma": 1.6, "mma, groups of 32": 1.9, "dp4a": 2.3}  # instructions a weight, up to 8 tokens: docs/cuda.md


Table = dict[str, dict[str, dict[str, float]]]  # architecture, kernel, number


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    code: list[str] = field(default_factory=list)


def demangled(names: list[str]) -> list[str]:
    """Readable names, without argument lists and namespaces."""
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    text = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    short = (re.sub(r"\(anonymous namespace\)::|cnl::cuda::|^void ", "", name) for name in text)
    return [re.sub(r"\((?!int\)|bool\)).*$", "", name).replace("(int)", "").replace("(bool)", "") for name in short]


def compile_unit(source: Path, architecture: str, folder: Path) -> tuple[Path, str]:
    """(cubin, what ptxas says). Exits when it does not compile."""
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    command = ["nvcc", *FLAGS, "-I", ROOT / "csrc", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", source]
    result = subprocess.run([*command, "-o", cubin], check=False, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{source.name} does not compile for sm_{architecture}:\n{result.stderr}")
    return cubin, result.stderr


def compile_ptx(source: Path, folder: Path) -> None:
    """For GPUs later than those named: must compile, is translated by their driver."""
    command = ["nvcc", *FLAGS, "-I", ROOT / "csrc", "-ptx", "-arch=compute_90", source, "-o", folder / "unit.ptx"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{source.name} does not compile to PTX:\n{result.stderr}")


def ptxas_kernels(log: str) -> Iterator[Kernel]:
    """The kernels that `ptxas -v` reports."""
    for part in re.split(r"Compiling entry function '", log)[1:]:
        kernel = Kernel(part.split("'")[0])
        numbers = {
            "registers": r"Used (\d+) registers",
            "shared": r"(\d+) bytes smem",
            "stack": r"(\d+) bytes stack frame",
        }
        for name, pattern in numbers.items():
            found = re.search(pattern, part)
            setattr(kernel, name, int(found.group(1)) if found else 0)
        kernel.spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        yield kernel


def machine_code(cubin: Path) -> dict[str, list[str]]:
    """Mangled name -> instructions, from cuobjdump."""
    text = subprocess.run(["cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            lines = functions.setdefault(found.group(1), [])
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(found.group(1).strip())
    return functions


def hot_loop(code: list[str]) -> list[str]:
    """The instructions of the innermost loop that has the most tensor-core or dp4a instructions.

    Loops are found by their backward branches: what lies between the target and the branch.
    """
    labels: dict[int, int] = {}
    best: list[str] = []
    for index in range(len(code)):
        labels[index * 16] = index
    for index, line in enumerate(code):
        found = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", line)
        start = labels.get(int(found.group(1), 16)) if found else None
        if start is None or start >= index:
            continue
        body = code[start : index + 1]
        if products(body) > products(best) or (products(body) == products(best) and best and len(body) < len(best)):
            best = body
    return best


def products(code: list[str]) -> int:
    """Tensor-core and dp4a instructions."""
    return sum(bool(re.search(r"\b(IMMA|HMMA|IDP)", line)) for line in code)


def problems_of(kernel: Kernel, architecture: str) -> Iterator[str]:
    """What is wrong with a kernel on its own."""
    where = f"sm_{architecture} {kernel.name}"
    if kernel.spills or kernel.stack:
        yield f"{where}: {kernel.spills} bytes of spills, {kernel.stack} of stack, expected none"
    if not kernel.code:
        return
    text = "\n".join(kernel.code)
    if re.search(r"\b(LDL|STL)\b", text):
        yield f"{where}: uses local memory"
    is_product = kernel.name.startswith(("stream_kernel", "large_kernel"))
    dot = is_product and kernel.name.startswith("stream_kernel") and re.search(r"(true|1)>$", kernel.name)
    if is_product and not re.search(r"LDG\.E\.(\w+\.)*128\.CONSTANT", text):
        yield f"{where}: weights are not read by 128-bit loads"
    if is_product and ("IDP.4A" if dot else "IMMA") not in text:
        yield f"{where}: lacks {'IDP.4A' if dot else 'IMMA'}"


def instructions_per_weight(kernel: Kernel) -> float | None:
    """Of the inner loop of a product with up to 8 tokens, for every lane; None for other kernels."""
    found = re.match(r"stream_kernel<(\d), (\d), 1, (true|false|0|1)>", kernel.name)
    if not found or not kernel.code:
        return None
    body = hot_loop(kernel.code)
    # Two mma (Turing: eight) or eight dp4a a tile and matrix.
    each = 8 if found.group(3) in ("true", "1") or not any("16832" in line for line in body) else 2
    tiles = products(body) / each
    return len(body) * 32 / (tiles * WEIGHTS_OF_A_TILE) if tiles else None


def budget_of(name: str) -> float:
    """What instructions_per_weight of a kernel may be."""
    if name.endswith(("true>", "1>")):
        return BUDGETS["dp4a"]
    return BUDGETS["mma, groups of 32" if name.startswith("stream_kernel<2") else "mma"]


def compare(kernels: Table, expected: Table, whole: bool = True) -> list[str]:
    """Sentences for what is above the committed table, or missing from it."""
    problems = []
    for architecture, own in kernels.items():
        table = expected.get(architecture, {})
        for name, numbers in own.items():
            if name not in table:
                problems.append(f"sm_{architecture} {name}: not in {TABLE.name}; run gate.py --update and look at it")
                continue
            for key, value in numbers.items():
                limit = table[name].get(key, 0) + (REGISTER_SLACK if key == "registers" else 0)
                if key != "instructions_per_weight" and value > limit:
                    problems.append(f"sm_{architecture} {name}: {key} {value}, expected at most {limit}")
        gone = table.keys() - own.keys() if whole else ()
        problems += [f"sm_{architecture} {name}: in {TABLE.name} but gone" for name in gone]
    return problems


def main() -> int:
    """0 when all is well, 1 when not, 77 without nvcc."""
    parser = argparse.ArgumentParser(description="Compiles the CUDA kernels and looks at what came out.")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--update", action="store_true", help="write kernels.json")
    parser.add_argument("--units", nargs="+", help="only these files of csrc/cuda, for example attention.cu")
    parser.add_argument("--no-ptx", action="store_true", help="leave the PTX out")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("skipped: no nvcc on PATH, so nothing can be compiled for a GPU")
        return SKIPPED
    can_read = shutil.which("cuobjdump") is not None and shutil.which("nvdisasm") is not None
    if not can_read:
        print("no cuobjdump and nvdisasm on PATH: the machine code is not looked at")
    kernels: Table = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            if arguments.units and source.name not in arguments.units:
                continue
            if not arguments.no_ptx:
                compile_ptx(source, folder)
            for architecture in arguments.architectures:
                cubin, log = compile_unit(source, architecture, folder)
                found = list(ptxas_kernels(log))
                code = machine_code(cubin) if can_read else {}
                for kernel, name in zip(found, demangled([kernel.name for kernel in found]), strict=True):
                    kernel.code = code.get(kernel.name, [])
                    kernel.name = name
                    problems += problems_of(kernel, architecture)
                    numbers: dict[str, float] = {"registers": kernel.registers, "shared": kernel.shared}
                    cost = instructions_per_weight(kernel)
                    if cost is not None:
                        numbers["instructions_per_weight"] = round(cost, 2)
                        limit = budget_of(name)
                        if cost > limit and architecture != "75":  # Turing takes four instructions for one
                            text = f"{cost:.2f} instructions a weight, expected at most {limit}"
                            problems.append(f"sm_{architecture} {name}: {text}")
                    kernels.setdefault(architecture, {})[name] = numbers
            print(f"{source.name}: compiled", flush=True)
    if arguments.update:
        old = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        for architecture, own in kernels.items():
            kept = old.get(architecture, {}) if arguments.units else {}
            old[architecture] = {**kept, **own}
        text = json.dumps(old, indent=1, sort_keys=True) + "\n"
        temporary_table = TABLE.with_suffix(".tmp")
        temporary_table.write_text(text)
        os.replace(temporary_table, TABLE)
    else:
        expected = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        problems += compare(kernels, expected, whole=not arguments.units)
    for problem in problems:
        print(problem)
    count = sum(map(len, kernels.values()))
    print(f"{count} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
