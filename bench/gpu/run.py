# SPDX-License-Identifier: Apache-2.0
"""Everything a GPU is asked in one call: is it right, and how fast is it?

    python bench/gpu/run.py --out results                 # builds cnllama for this GPU first, under nine minutes in all
    python bench/gpu/run.py --out results --no-build      # the installed one
    python bench/gpu/run.py --out results --dry           # without a GPU: stages that need none, the others say why not

Stages, each with a time limit of its own, in an order in which the earlier ones decide whether the later ones mean
anything: build, ceilings (what this card does at most), correctness (every kernel bit for bit against the CPU's, the
demonstration model's greedy tokens), sanitizer, kernels (percent of the ceilings of this very run), engine (the shape
of a 7B model), peers. One stage that fails does not stop the next. Writes gpu.json and gpu.log into --out as it goes;
the table is printed last.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
STAGES = ("build", "ceilings", "correctness", "sanitizer", "kernels", "engine", "peers")
LIMITS = {
    "build": 150,
    "ceilings": 30,
    "correctness": 120,
    "sanitizer": 60,
    "kernels": 45,
    "engine": 90,
    "peers": 45,
}  # seconds, 540 in all


class StageSkippedError(Exception):
    """A stage that cannot run here, with the reason."""


class Journal:
    """gpu.log and gpu.json, written as results come."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.results: dict[str, object] = {"stages": {}}
        self.log = (folder / "gpu.log").open("w", encoding="utf-8")

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def save(self) -> None:
        temporary = self.folder / "gpu.json.tmp"
        temporary.write_text(json.dumps(self.results, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, self.folder / "gpu.json")


def output_of(*command: str) -> str:
    """First lines of what a program prints; empty when it is not there."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=30).stdout.strip()


def environment() -> dict[str, str]:
    """What figures depend on."""
    query = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"
    return {
        "python": platform.python_version(),
        "nvcc": output_of("nvcc", "--version").rpartition("\n")[2],
        "gpu": output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "commit": output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
    }


def run_logged(journal: Journal, command: list[str], limit: float, **variables: str) -> str:
    """Runs a program into the log; its output. Raises RuntimeError when it fails or takes too long."""
    journal.say("+ " + " ".join(command))
    try:
        result = subprocess.run(
            command,
            check=False,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            env={**os.environ, **variables},
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took more than {limit:.0f} s") from error
    print(result.stdout, file=journal.log, flush=True)
    if result.returncode:
        raise RuntimeError(f"ended with {result.returncode}: " + "\n".join(result.stdout.splitlines()[-15:]))
    return result.stdout


def build(journal: Journal, limit: float) -> dict[str, object]:
    """Builds and installs this tree for the architecture of this GPU."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        raise StageSkippedError("no nvcc")
    capability = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").splitlines()
    architecture = capability[0].replace(".", "") if capability else "90"
    if architecture == "90":
        architecture = "90a"
    begin = time.monotonic()
    path = os.pathsep.join(("/usr/local/cuda/bin", os.environ["PATH"]))
    defines = {"CNLLAMA_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": f"{architecture}-real"}
    flags = [f"-Ccmake.define.{key}={value}" for key, value in defines.items()]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".", *flags]
    run_logged(journal, command, limit, PATH=path, CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count()))
    return {"architecture": architecture, "seconds": round(time.monotonic() - begin, 1)}


def in_a_process(stage: str) -> Callable[[Journal, float], dict[str, object]]:
    """A stage of stages.py in a process of its own: a lost device ends that stage only."""

    def run(journal: Journal, limit: float) -> dict[str, object]:
        target = journal.folder / f"{stage}.json"
        target.unlink(missing_ok=True)
        ceilings = journal.folder / "ceilings.json"
        command = [sys.executable, str(HERE / "stages.py"), stage, str(target), str(ceilings)]
        try:
            text = run_logged(journal, command, limit)
        finally:
            found = json.loads(target.read_text()) if target.exists() else {}
        if "skipped" in found:
            raise StageSkippedError(str(found["skipped"]))
        print(text.strip()[-3000:], flush=True)
        return dict(found)

    return run


def correctness(journal: Journal, limit: float) -> dict[str, object]:
    """The tests of the CUDA back end: on the GPU where there is one, else in the host emulation."""
    tests = ["tests/test_cuda_ops.py", "tests/test_cuda_engine.py", "tests/test_cuda_device.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    text = run_logged(journal, command, limit)
    return {"pytest": text.strip().splitlines()[-1]}


def sanitizer(journal: Journal, limit: float) -> dict[str, object]:
    """compute-sanitizer over small shapes, where the machine has it and lets it work."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise StageSkippedError("no compute-sanitizer")
    found: dict[str, object] = {}
    for check in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            sys.executable,
            str(HERE / "stages.py"),
            "small",
            "-",
            "-",
        ]
        text = run_logged(journal, command, limit / 2)
        found[check] = next((line for line in text.splitlines() if "SUMMARY" in line), "no summary")
    return found


RUNNERS: dict[str, Callable[[Journal, float], dict[str, object]]] = {
    "build": build,
    "ceilings": in_a_process("ceilings"),
    "correctness": correctness,
    "sanitizer": sanitizer,
    "kernels": in_a_process("kernels"),
    "engine": in_a_process("engine"),
    "peers": in_a_process("peers"),
}


def run_stage(name: str, journal: Journal, budget: float) -> dict[str, object]:
    """{"status": ok, skipped or failed, ...}; never raises."""
    begin = time.monotonic()
    result: dict[str, object]
    try:
        result = {"status": "ok", **RUNNERS[name](journal, min(LIMITS[name], budget))}
    except StageSkippedError as reason:
        result = {"status": "skipped", "reason": str(reason)}
    except Exception as error:  # the next stage is worth running
        print(traceback.format_exc(), file=journal.log, flush=True)
        result = {"status": "failed", "reason": str(error)}
    result["seconds"] = round(time.monotonic() - begin, 1)
    journal.say(
        f"== {name}: {result['status']} after {result['seconds']} s"
        + (f": {result['reason']}" if "reason" in result else "")
    )
    return result


def table(results: dict[str, dict[str, object]]) -> list[str]:
    """The figures worth reading, one a line."""
    lines = []
    for stage in ("ceilings", "kernels", "engine", "peers"):
        rows = results.get(stage, {}).get("rows", [])
        assert isinstance(rows, list)
        lines += [
            f"{stage:9} {row['name']:44} {row['value']:>12} {row['unit']:8} {row.get('percent', '')}" for row in rows
        ]
    return lines or ["no figures: nothing ran on a GPU"]


def main() -> int:
    """0 when no stage failed."""
    parser = argparse.ArgumentParser(description="Checks and measures the CUDA back end in one call.")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.log")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--no-build", action="store_true", help="use the installed cnllama")
    parser.add_argument("--dry", action="store_true", help="without a GPU: same stages, nothing is built or measured")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    arguments = parser.parse_args()
    if arguments.dry:
        os.environ["CNLLAMA_GPU_DRY"] = "1"
    end = time.monotonic() + arguments.seconds
    journal = Journal(arguments.out)
    journal.results["environment"] = environment()
    stages: dict[str, dict[str, object]] = {}
    journal.results["stages"] = stages
    for name in arguments.stages:
        left = end - time.monotonic()
        if name == "build" and (arguments.no_build or arguments.dry):
            continue
        if left < 5:
            stages[name] = {"status": "skipped", "reason": "no time left"}
            continue
        stages[name] = run_stage(name, journal, left)
        journal.save()
    journal.save()
    journal.say("")
    for line in table(stages):
        journal.say(line)
    failed = [name for name, result in stages.items() if result["status"] == "failed"]
    journal.say(f"{len(stages)} stages, failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
