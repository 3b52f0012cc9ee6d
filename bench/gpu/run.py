# SPDX-License-Identifier: Apache-2.0
"""Everything a GPU is asked in one call: is it right, and how fast is it?

    python bench/gpu/run.py --out results                 # builds cnllama for this GPU first, under nine minutes in all
    python bench/gpu/run.py --out results --no-build      # the installed one
    python bench/gpu/run.py --out results --dry           # without a GPU: every stage on small shapes in the emulation

Stages, each with a time limit of its own, in an order in which the earlier ones decide whether the later ones mean
anything: build, device (what it is), ceilings (what this card does at most), correctness (every kernel bit for bit
against the CPU's, the demonstration model's greedy tokens), sanitizer, kernels (percent of the ceilings of this very
run), engine (the shape of a 7B model), peers. A stage that fails does not stop the next, and what it found until then
is kept. Writes gpu.json and gpu.log into --out as it goes; the table is printed last. Exits with 1 when a stage failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import correctness
from journal import Journal, StageFailedError, StageSkippedError, find_tool, output_of

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LIMITS = {
    "build": 170,
    "device": 20,
    "ceilings": 30,
    "correctness": 110,
    "sanitizer": 50,
    "kernels": 45,
    "engine": 75,
    "peers": 40,
}  # seconds, 540 in all
DRY_FACTOR = 6  # the emulation is slow, and is built first

Found = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What the stages must know: where they write, whether it is dry, which tests, a folder for what nobody reads."""

    journal: Journal
    folder: Path
    dry: bool
    match: str


def environment() -> dict[str, str]:
    """What figures depend on; empty where it cannot be found out."""
    query = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"
    return {
        "python": platform.python_version(),
        "cpu_count": str(os.cpu_count()),
        "nvcc": output_of("nvcc", "--version").rpartition("\n")[2],
        "gpu": output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "commit": output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def target_architecture() -> str:
    """Of this GPU, as CMake and this nvcc know it; empty for all of them, where one of the two is not known."""
    capability = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split("\n")[0]
    number = capability.strip().replace(".", "")
    if not number.isdigit() or f"compute_{number}" not in output_of("nvcc", "--list-gpu-arch").split():
        return ""
    return ("90a" if number == "90" else number) + "-real"


def build(plan: Plan, limit: float) -> Found:
    """Builds and installs this tree for this GPU; dry: the emulation."""
    if plan.dry:
        if shutil.which("g++") is None:
            raise StageSkippedError("no g++ to build the emulation with")
        folder = os.environ["CNLLAMA_EMULATION"]
        plan.journal.check([sys.executable, str(ROOT / "tests/cuda/build.py"), folder], limit)
        return {}
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise StageSkippedError("no nvcc")
    if not output_of("nvidia-smi", "-L") and not Path("/dev/nvidia0").exists():
        raise StageSkippedError("no NVIDIA GPU to build for")
    architecture = target_architecture()
    defines = {"CNLLAMA_CUDA": "ON", **({"CMAKE_CUDA_ARCHITECTURES": architecture} if architecture else {})}
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "-e", str(ROOT)]
    if all(importlib.util.find_spec(name) for name in ("scikit_build_core", "pybind11")):
        command.append("--no-build-isolation")  # else they are fetched, where there is an index to fetch them from
    command += [f"-Ccmake.define.{key}={value}" for key, value in defines.items()]
    plan.journal.check(
        command,
        limit,
        PATH=os.pathsep.join((os.environ.get("PATH", ""), str(Path(nvcc).parent))),
        CUDACXX=nvcc,
        CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count()),
        PIP_BREAK_SYSTEM_PACKAGES="1",
        PIP_DEFAULT_TIMEOUT="10",
        PIP_RETRIES="0",
    )
    return {"architecture": architecture or "all"}


def worker(plan: Plan, stage: str) -> tuple[list[str], Path]:
    """(the command that runs a stage of stages.py, the file in which it leaves what it finds)."""
    target = plan.folder / f"{stage}.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "stages.py"), stage, "--result", str(target)]
    command += ["--ceilings", str(plan.folder / "ceilings.json")]
    return [*command, "--dry"] if plan.dry else command, target


def in_a_process(stage: str) -> Callable[[Plan, float], Found]:
    """A stage of stages.py in a process of its own: a lost device ends that stage only."""

    def run(plan: Plan, limit: float) -> Found:
        command, target = worker(plan, stage)
        ran = plan.journal.run(command, limit)
        found: Found = json.loads(target.read_text()) if target.exists() else {}
        for line in rows_of(stage, found):
            print(line, flush=True)
        if "skipped" in found:
            raise StageSkippedError(str(found["skipped"]))
        if ran.code != 0:
            raise StageFailedError(ran.reason(limit), found)
        return found

    return run


def sanitizer(plan: Plan, limit: float) -> Found:
    """compute-sanitizer over small shapes, where the machine has it and lets it work; dry: the shapes alone."""
    command, _ = worker(plan, "small")
    if plan.dry:
        plan.journal.check(command, limit)
        return {"small": "ran"}
    tool = find_tool("compute-sanitizer")
    if tool is None:
        raise StageSkippedError("no compute-sanitizer")
    found: Found = {}
    errors = []
    for check in ("memcheck", "racecheck"):
        ran = plan.journal.run([tool, "--tool", check, "--error-exitcode", "9", *command], limit / 2)
        summary = [line.strip("= ") for line in ran.text.splitlines() if "SUMMARY" in line]
        found[check] = summary[-1] if summary else "did not work here: " + ran.reason(limit / 2)
        if ran.code == 9:
            errors.append(f"{check}: {found[check]}")
    if errors:
        raise StageFailedError("; ".join(errors), found)
    if all(str(text).startswith("did not work") for text in found.values()):
        raise StageSkippedError(str(found["memcheck"]))
    return found


RUNNERS: dict[str, Callable[[Plan, float], Found]] = {
    "build": build,
    "device": in_a_process("device"),
    "ceilings": in_a_process("ceilings"),
    "correctness": lambda plan, limit: correctness.run(plan.journal, limit, plan.match),
    "sanitizer": sanitizer,
    "kernels": in_a_process("kernels"),
    "engine": in_a_process("engine"),
    "peers": in_a_process("peers"),
}


def run_stage(name: str, plan: Plan, limit: float) -> Found:
    """{"status": ok, skipped or failed, "seconds", "reason", and what was found}; never raises but to end it all."""
    begin = time.monotonic()
    plan.journal.note(f"\n==== {name}")
    result: Found
    try:
        result = {"status": "ok", **RUNNERS[name](plan, limit)}
    except StageSkippedError as reason:
        result = {"status": "skipped", "reason": str(reason)}
    except StageFailedError as error:
        result = {"status": "failed", "reason": str(error), **error.found}
    except Exception as error:  # the next stage is worth running
        plan.journal.note(traceback.format_exc())
        result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    result["seconds"] = round(time.monotonic() - begin, 1)
    why = f": {result['reason']}" if "reason" in result else ""
    plan.journal.say(f"== {name}: {result['status']} after {result['seconds']} s{why}")
    return result


def rows_of(stage: str, found: Found) -> Iterator[str]:
    for row in found.get("rows", []):
        yield f"{stage:9} {row['name']:44} {row['value']:>12} {row['unit']:8} {row.get('percent', '')}".rstrip()


def table(stages: dict[str, Found]) -> list[str]:
    """What is worth reading, one a line."""
    lines: list[str] = []
    if "tests" in stages.get("correctness", {}):
        lines += correctness.lines(stages["correctness"]["tests"])
    for stage in ("ceilings", "kernels", "engine", "peers"):
        lines += rows_of(stage, stages.get(stage, {}))
    return lines or ["no figures: nothing ran on a GPU"]


def run_stages(names: list[str], plan: Plan, seconds: float) -> dict[str, Found]:
    """The results of all stages, which are in the journal as soon as they are known."""
    end = time.monotonic() + seconds
    stages: dict[str, Found] = plan.journal.results["stages"]
    unusable = ""
    for name in names:
        left = end - time.monotonic()
        if unusable and name not in ("build", "device"):
            stages[name] = {"status": "skipped", "reason": unusable}
        elif left < 5:
            stages[name] = {"status": "skipped", "reason": "no time left"}
        else:
            stages[name] = run_stage(name, plan, min(LIMITS[name] * (DRY_FACTOR if plan.dry else 1), left))
        if name == "device" and stages[name]["status"] != "ok":
            unusable = str(stages[name]["reason"])
        plan.journal.save()
    return stages


def ended(*_: object) -> None:
    raise SystemExit("ended from outside")


def main(arguments: list[str] | None = None) -> int:
    """0 when no stage failed."""
    parser = argparse.ArgumentParser(description="Checks and measures the CUDA back end in one call.")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.log")
    parser.add_argument("--stages", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--no-build", action="store_true", help="use the installed cnllama")
    parser.add_argument("--dry", action="store_true", help="without a GPU: every stage, small, in the host emulation")
    parser.add_argument("--match", default="", metavar="EXPR", help="only tests that match, as pytest's -k")
    parser.add_argument("--seconds", type=float, help=f"for everything; default {sum(LIMITS.values())}, dry: no limit")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, ended)
    names = [name for name in RUNNERS if name in chosen.stages and not (name == "build" and chosen.no_build)]
    journal = Journal(chosen.out)
    journal.results["environment"] = {**environment(), **({"dry": "figures mean nothing"} if chosen.dry else {})}
    stages: dict[str, Found] = journal.results["stages"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            if chosen.dry:
                os.environ.setdefault("CNLLAMA_EMULATION", str(Path(folder) / "emulation"))
            plan = Plan(journal, Path(folder), chosen.dry, chosen.match)
            seconds = chosen.seconds or sum(LIMITS.values()) * (DRY_FACTOR if chosen.dry else 1)
            run_stages(names, plan, seconds)
    finally:
        journal.save()
        journal.say("")
        for line in table(stages):
            journal.say(line)
        failed = [name for name, result in stages.items() if result["status"] == "failed"]
        journal.say(f"{len(stages)} stages, failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
