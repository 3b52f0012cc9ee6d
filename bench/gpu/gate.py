# SPDX-License-Identifier: Apache-2.0
"""What can be said about the CUDA kernels without a GPU: what they were compiled to.

    python bench/gpu/gate.py                      # the installed cnllama._cuda; compares with kernels.json
    python bench/gpu/gate.py --module FILE        # this one
    python bench/gpu/gate.py --compile            # compiles every file itself, warnings as errors: minutes
    python bench/gpu/gate.py --update             # writes kernels.json anew

An installed module that is newer than its sources and holds every architecture was compiled from them, so nothing is
compiled twice; it is read with cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm). Where there
is none, or none of these, nvcc compiles.

Of every kernel, registers and shared memory may not be above what kernels.json says, and there are no stack and no
spills. In the machine code: no local memory, weights by 128-bit loads, the tensor-core or dp4a instruction that is
meant, and for the products with few tokens the instructions a weight of the inner loop, against the budget of
docs/cuda.md. A line for everything that is not as it must be: kernel, value, limit. Exits with 1 then, and with 77 and
the reason where there is neither a module nor nvcc.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import machine_code
from machine_code import ARCHITECTURES, Kernel, Tools

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("kernels.json")
SKIPPED = 77
REGISTER_SLACK = 8  # what another patch release of nvcc may add
WEIGHTS_OF_A_TILE = 16 * 64
BUDGETS = {"mma": 1.6, "mma, groups of 32": 1.9, "dp4a": 2.3}  # instructions a weight, up to 8 tokens: docs/cuda.md

Table = dict[str, dict[str, dict[str, float]]]  # architecture, kernel, number


def products(code: list[str]) -> int:
    """Tensor-core and dp4a instructions."""
    return sum(bool(re.search(r"\b(IMMA|HMMA|IDP)", line)) for line in code)


def hot_loop(code: list[str]) -> list[str]:
    """The instructions of the innermost loop that has the most tensor-core or dp4a instructions.

    Loops are found by their backward branches: what lies between the target and the branch.
    """
    best: list[str] = []
    for index, line in enumerate(code):
        found = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", line)
        start = int(found.group(1), 16) // 16 if found else index  # an instruction takes 16 bytes
        if start >= index:
            continue
        body = code[start : index + 1]
        if products(body) > products(best) or (products(body) == products(best) and best and len(body) < len(best)):
            best = body
    return best


def problems_of(kernel: Kernel) -> Iterator[str]:
    """What is wrong with a kernel on its own."""
    where = f"sm_{kernel.architecture} {kernel.name}"
    if kernel.spills:
        yield f"{where}: {kernel.spills} bytes of spills, limit 0"
    if kernel.stack:
        yield f"{where}: {kernel.stack} bytes of stack, limit 0"
    if not kernel.code:
        return
    text = "\n".join(kernel.code)
    local = len(re.findall(r"\b(?:LDL|STL)\b", text))
    if local:
        yield f"{where}: {local} accesses to local memory, limit 0"
    if kernel.name.startswith(("stream_kernel", "large_kernel")):
        meant = "IDP.4A" if uses_dp4a(kernel.name) else "IMMA"
        if meant not in text:
            yield f"{where}: 0 instructions {meant}, expected some"
        if not re.search(r"LDG\.E\.(\w+\.)*128\.CONSTANT", text):
            yield f"{where}: 0 loads of weights with 128 bits, expected some"
    cost, limit = instructions_per_weight(kernel), budget_of(kernel.name)
    if cost is not None and cost > limit and kernel.architecture != "75":  # Turing takes four instructions for one
        yield f"{where}: {cost:.2f} instructions a weight, limit {limit}"


def uses_dp4a(name: str) -> bool:
    return bool(re.match(r"stream_kernel<.*(true|1)>$", name))


def instructions_per_weight(kernel: Kernel) -> float | None:
    """Of the inner loop of a product with up to 8 tokens, for every lane; None for other kernels."""
    if not re.match(r"stream_kernel<\d, \d, 1, (true|false|0|1)>", kernel.name) or not kernel.code:
        return None
    body = hot_loop(kernel.code)
    # Two mma (Turing: eight) or eight dp4a a tile and matrix.
    each = 8 if uses_dp4a(kernel.name) or not any("16832" in line for line in body) else 2
    tiles = products(body) / each
    return len(body) * 32 / (tiles * WEIGHTS_OF_A_TILE) if tiles else None


def budget_of(name: str) -> float:
    if uses_dp4a(name):
        return BUDGETS["dp4a"]
    return BUDGETS["mma, groups of 32" if name.startswith("stream_kernel<2,") else "mma"]


def judge(kernels: Iterable[Kernel]) -> tuple[Table, list[str]]:
    """What the table has to say about kernels, and what is wrong with each on its own."""
    numbers: Table = {}
    problems: list[str] = []
    for kernel in kernels:
        problems += problems_of(kernel)
        own: dict[str, float] = {"registers": kernel.registers, "shared": kernel.shared}
        cost = instructions_per_weight(kernel)
        if cost is not None:
            own["instructions_per_weight"] = round(cost, 2)
        numbers.setdefault(kernel.architecture, {})[kernel.name] = own
    return numbers, problems


def compare(kernels: Table, expected: Table, whole: bool = True) -> list[str]:
    """What differs from the committed table. whole: all kernels were read, so one that is missing is gone."""
    problems = []
    for architecture, own in kernels.items():
        table = expected.get(architecture, {})
        for name, numbers in own.items():
            if name not in table:
                problems.append(f"sm_{architecture} {name}: not in {TABLE.name}; run gate.py --update and look at it")
                continue
            for key in ("registers", "shared"):
                limit = table[name].get(key, 0) + (REGISTER_SLACK if key == "registers" else 0)
                if numbers[key] > limit:
                    problems.append(f"sm_{architecture} {name}: {key} {numbers[key]}, limit {limit}")
        gone = sorted(table.keys() - own.keys()) if whole else ()
        problems += [f"sm_{architecture} {name}: in {TABLE.name} but gone" for name in gone]
    return problems


def write_table(kernels: Table, whole: bool) -> None:
    old: Table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    merged = {**old, **{name: own if whole else {**old.get(name, {}), **own} for name, own in kernels.items()}}
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, TABLE)


def installed_module() -> tuple[Path | None, str]:
    """(the module of the installed cnllama, why it cannot be used): one of them."""
    import importlib.util

    try:
        spec = importlib.util.find_spec("cnllama._cuda")
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        return None, "no cnllama._cuda is installed"
    module = Path(spec.origin)
    sources = [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc").glob("*.hpp"), ROOT / "cmake" / "cuda.cmake"]
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > module.stat().st_mtime:
        return None, f"the installed cnllama._cuda is older than {newest.relative_to(ROOT)}"
    return module, ""


def read_module(module: Path, tools: Tools) -> Iterator[Kernel]:
    """Its kernels. Exits when it lacks an architecture or the code for later ones."""
    held, ptx = machine_code.contents(module, tools)
    lacking = [f"sm_{name}" for name in ARCHITECTURES if name not in held] + ([] if ptx else ["PTX"])
    if lacking:
        sys.exit(f"{module}: has no code for {', '.join(lacking)}: build it without CMAKE_CUDA_ARCHITECTURES")
    print(f"reading {module.name}", flush=True)
    yield from machine_code.of_module(module, tools)


def chosen_kernels(arguments: argparse.Namespace, folder: Path) -> Iterator[Kernel] | None:
    """The kernels that the arguments ask for; None, with the reason printed, where there is no way to have them."""
    tools = machine_code.find_tools()
    module, reason = (arguments.module, "") if arguments.module else installed_module()
    if arguments.compile or arguments.units:
        module, reason = None, "asked to"
    if module is not None and tools is None:
        if arguments.module:
            sys.exit(f"{module}: cannot be read without cuobjdump and nvdisasm: install both from PyPI")
        module, reason = None, "there are no cuobjdump and nvdisasm to read the installed module"
    if module is not None and tools is not None:
        return read_module(module, tools)
    if shutil.which("nvcc") is None:
        print(f"skipped: {reason}, and there is no nvcc to compile with")
        return None
    print(f"compiling: {reason}" + ("" if tools else "; no cuobjdump and nvdisasm, so machine code is not read"))
    units = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    wanted = [path for path in units if not arguments.units or path.name in arguments.units]
    return machine_code.of_sources(wanted, folder, tools)


def main() -> int:
    """0 when all is well, 1 when not, 77 where nothing can be looked at."""
    parser = argparse.ArgumentParser(description="Looks at what the CUDA kernels were compiled to.")
    parser.add_argument("--module", type=Path, help="a compiled module instead of the installed one")
    parser.add_argument("--compile", action="store_true", help="compile here, whatever is installed")
    parser.add_argument("--units", nargs="+", default=[], help="compile only these of csrc/cuda, say attention.cu")
    parser.add_argument("--update", action="store_true", help="write kernels.json")
    arguments = parser.parse_args()
    whole = not arguments.units
    with tempfile.TemporaryDirectory() as temporary:
        found = chosen_kernels(arguments, Path(temporary))
        if found is None:
            return SKIPPED
        try:
            kernels, problems = judge(found)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{error.cmd[0]} ended with {error.returncode}:\n{error.stderr}")
    if arguments.update:
        write_table(kernels, whole)
    else:
        problems += compare(kernels, json.loads(TABLE.read_text()), whole)
    for problem in problems:
        print(problem)
    print(f"{sum(map(len, kernels.values()))} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
