# SPDX-License-Identifier: Apache-2.0
"""Engines side by side on the same weights: one command, one run, as many threads for each.

    python bench/make_model.py 7b --out DIR
    python bench/compare.py DIR/7b-q4.cnl --gguf DIR/7b-q4_0.gguf --q4-k-m --json 7b.json --markdown 7b.md --png 7b.png

Every engine holds its model in a process of its own and they take turns within each round, the machine's limit being
measured between any two. What does not fit into memory at once is compared in groups, this project in each of them.
Tables come as measures end; the JSON is written after each. What is not installed or was given no model is named.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import report
from peers import MODULES
from peers.base import Skipped, Spec
from peers.session import Session, Settings

from cnllama import bench
from cnllama.bench import Measure
from cnllama.cli.parser import Parser
from cnllama.errors import CnllamaError, InputError, os_errors_explained
from cnllama.plan import available_memory
from cnllama.textio import count_chinese, read_text_file

SCHEMA = 1
ROUNDS, LONG_ROUNDS, LONG_PREFILL = 5, 3, 2048
START_ROUNDS = 3
MEMORY_PROMPT = 512
MEMORY_SHARE = 0.95  # of what is free: the rest is for the system
STEP_COST = 6  # a decoding step takes about as long as so many tokens of a prompt


@dataclass(frozen=True)
class Planned:
    """A measure and how often it is repeated."""

    measure: Measure
    rounds: int

    @property
    def cost(self) -> float:
        """How long it takes, relative to the others."""
        m = self.measure
        return m.size * m.batch + self.rounds * m.steps * STEP_COST if m.kind == "decode" else m.size * self.rounds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison. Returns the exit code: 0, 1 for a failure, 2 for wrong input, 130 when interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # workers must end with this process
    try:
        return run(arguments(argv))
    except CnllamaError as error:
        print(f"compare: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("compare: interrupted; what was measured is in the JSON", file=sys.stderr)
        return 130


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises InputError."""
    parser = Parser(prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, metavar="FILE.cnl")
    add("--gguf", type=Path, action="append", default=[], metavar="FILE", help="for llama.cpp; may be repeated")
    add("--q4-k-m", action="store_true", help="also Q4_K_M, made from the first GGUF beside it unless it is there")
    add(
        "--llama-avx2",
        metavar="PATH",
        help="interpreter, or folder of llama.cpp's libraries, built for AVX2: more rows",
    )
    add("--flash-attention", choices=("auto", "on", "off"), default="auto", help="of llama.cpp; default: auto")
    add("--hf", type=Path, metavar="DIR", help="Hugging Face checkpoint for transformers")
    add("--ct2", type=Path, metavar="DIR", help="model converted for CTranslate2")
    add("--ort", type=Path, metavar="DIR", help="model built for onnxruntime-genai")
    add("--peer-python", metavar="PYTHON", help="interpreter that has the other engines; it needs cnllama too")
    add("--avx2", action="store_true", help="one more row: this project held to AVX2; implied by --llama-avx2")
    add("--only", default="", metavar="NAME,...", help="engines whose name begins so; default: all")
    add("--threads", type=int, default=0, metavar="N", help="of every engine; default: physical cores")
    add("--kv", choices=("fp16", "int8"), default="fp16", help="this project's cache; the others' are 16 bits")
    add("--prefill", default="128,512,2048", metavar="N[:ROUNDS],...", help="default: 128,512,2048")
    add("--decode-context", default="0,2048", metavar="N[:ROUNDS],...", help="default: 0,2048")
    add("--batch", default="1,4,8", metavar="N[:ROUNDS],...", help="at context 0; default: 1,4,8")
    add("--rounds", type=int, metavar="N", help=f"default: {ROUNDS}, and {LONG_ROUNDS} for prompts of {LONG_PREFILL}")
    add("--start-rounds", type=int, default=START_ROUNDS, metavar="N", help="of load and first token; 0: leave out")
    add("--budget", type=float, metavar="SECONDS", help="fewer rounds so that it ends about then")
    add("--quick", action="store_true", help="one short round of each")
    add("--text", type=Path, metavar="FILE", help="text to count characters per token on; default: the built-in one")
    add("--json", type=Path, metavar="OUT")
    add("--markdown", type=Path, metavar="OUT")
    add("--png", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    for name, low in (("rounds", 1), ("start_rounds", 0), ("threads", 0)):
        value = getattr(args, name)
        if value is not None and not low <= value <= 1000:
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected an integer from {low} to 1000")
    if args.budget is not None and not args.budget > 0:
        raise InputError(f"--budget is {args.budget:g}, expected a number of seconds above 0")
    if args.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--png needs matplotlib, which is not installed: pip install 'cnllama[bench]'")
    for option in ("json", "markdown", "png"):
        path = getattr(args, option)
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"--{option} {path}: there is no directory {path.absolute().parent}; make it first")
    args.avx2 = args.avx2 or args.llama_avx2 is not None
    if args.q4_k_m and not args.gguf:
        raise InputError("--q4-k-m has no GGUF to start from: give one with --gguf FILE")


def run(args: argparse.Namespace) -> int:
    """Plans, measures and reports."""
    begin = time.monotonic()
    planned = plan_measures(args)
    specs, skipped = plan_engines(args)
    text = read_text_file(args.text) if args.text else bench.TEXT
    quick = args.quick
    settings = Settings(
        threads=args.threads,
        text=text,
        min_seconds=0.0 if quick else bench.MIN_SECONDS,
        memory_prompt=64 if quick else MEMORY_PROMPT,
        available=int(available_memory().bytes * MEMORY_SHARE),
        macs=args.macs,
    )
    result = {
        "schema": SCHEMA,
        "machine": machine.describe(args.threads),
        "limits": machine.limits(args.threads, 1 if quick else ROUNDS),
        "settings": {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "first_prompt": bench.FIRST_PROMPT,
            "memory_prompt": settings.memory_prompt,
            "min_seconds": settings.min_seconds,
            "text_characters": count_chinese(text),
            "available_bytes": settings.available,
        },
        "engines": [],
        "start": [],
        "measures": [],
        "skipped": [{"name": s.name, "reason": s.reason, "measure": None} for s in skipped],
    }
    print("\n".join(machine.lines(result["machine"], result["limits"])), flush=True)
    for entry in skipped:
        print(f"* skipped: {entry.name}: {entry.reason}", flush=True)
    with Session(specs, settings, _say) as session:
        measure_all(args, session, planned, result, begin)
    if args.markdown:
        _write(args.markdown, report.markdown(result))
    if args.png:
        with os_errors_explained(args.png):
            report.picture(result, args.png)
    if not any(entry["results"] for entry in result["measures"]):
        raise CnllamaError("no engine could be measured; the reasons are above")
    return 0


def measure_all(
    args: argparse.Namespace, session: Session, planned: list[Planned], result: dict[str, Any], begin: float
) -> None:
    """Fills `result`, printing each table when it is there and saving the JSON after it."""
    known = result["skipped"]
    start_rounds = min(1, args.start_rounds) if args.quick else args.start_rounds

    def save() -> None:
        result["skipped"] = known + session.skipped
        result["engines"] = [_engine(spec, session.facts.get(spec.name, {})) for spec in session.specs]
        if args.json:
            _write(args.json, json.dumps(result, ensure_ascii=False, indent=1) + "\n")

    if start_rounds:
        result["start"] = session.start(start_rounds, bench.FIRST_PROMPT)
        save()
        print("\n" + report.start_table(result), flush=True)
    for index, item in enumerate(planned):
        now = time.monotonic()
        deadline = None
        if args.budget is not None:
            left = begin + args.budget - now
            if left <= 0:
                known.append({"name": "all", "reason": "the budget was spent", "measure": item.measure.name})
                continue
            deadline = now + left * item.cost / sum(other.cost for other in planned[index:])
        rows = session.run(item.measure, item.rounds, deadline)
        limit = "int8_macs_per_s" if item.measure.kind == "prefill" else "read_bytes_per_s"
        entry = {"measure": item.measure.name, "limit": limit, "results": rows}
        result["measures"].append(entry)
        save()
        print("\n" + report.measure_table(result, entry), flush=True)
    save()


def plan_measures(args: argparse.Namespace) -> list[Planned]:
    """Every measure of the command line. Raises InputError."""
    rounds = 1 if args.quick and args.rounds is None else args.rounds
    found = []
    for size, own in parse_sizes(args.prefill, "--prefill", 1):
        default = rounds or (LONG_ROUNDS if size >= LONG_PREFILL else ROUNDS)
        found.append(Planned(Measure("prefill", size), own or default))
    contexts = parse_sizes(args.decode_context, "--decode-context", 0)
    batches = parse_sizes(args.batch, "--batch", 1)
    for context, own in contexts if any(size == 1 for size, _ in batches) else []:
        found.append(Planned(Measure("decode", context), own or rounds or ROUNDS))
    for size, own in batches:
        if size > 1:
            found.append(Planned(Measure("decode", 0, batch=size), own or rounds or ROUNDS))
    if not found:
        raise InputError("there is nothing to measure: give --prefill, or --decode-context with --batch")
    return found


def parse_sizes(text: str, option: str, low: int) -> list[tuple[int, int | None]]:
    """(number, rounds or None) of each item `N` or `N:ROUNDS`. Raises InputError."""
    found = {}
    for item in filter(None, text.split(",")):
        size, colon, rounds = item.partition(":")
        if not size.isdecimal() or int(size) < low or (colon and not (rounds.isdecimal() and int(rounds) > 0)):
            raise InputError(f"{option} has {item!r}, expected N or N:ROUNDS with N from {low}, separated by commas")
        found[int(size)] = int(rounds) if colon else None
    return list(found.items())


def plan_engines(args: argparse.Namespace) -> tuple[list[Spec], list[Skipped]]:
    """(rows to measure, rows named as skipped). Raises InputError for a file that is not sound."""
    from cnllama import _core
    from cnllama.format import open_cnl

    args.threads = args.threads or _core.cpu_info()["default_threads"]
    args.python = args.llama_python = args.peer_python or sys.executable
    file = open_cnl(args.model)
    config, args.macs = file.config, bench.macs_of(file)
    args.kv_values = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    args.embedding_values = 0 if config["tie_word_embeddings"] else config["vocab_size"] * config["hidden_size"]
    if args.q4_k_m:
        made = make_q4_k_m(args)
        if isinstance(made, Path):
            args.gguf.append(made)
    rows = [row for name in MODULES for row in importlib.import_module(f"peers.{name}").plan(args)]
    if args.q4_k_m and isinstance(made, Skipped):
        rows.append(made)
    wanted = tuple(filter(None, args.only.split(",")))
    if wanted:
        for name in wanted:
            if not any(row.name.startswith(name) for row in rows):
                raise InputError(f"--only names {name!r}; the engines are {', '.join(row.name for row in rows)}")
        rows = [row for row in rows if row.name.startswith(wanted)]
    return [r for r in rows if isinstance(r, Spec)], [r for r in rows if isinstance(r, Skipped)]


def make_q4_k_m(args: argparse.Namespace) -> Path | Skipped:
    """Q4_K_M beside the first GGUF, made by llama.cpp itself from its weights; what is there already is taken."""
    source: Path = args.gguf[0]
    stem = source.stem
    for ending in ("-q4_0", "-q4_1", "-q8_0", "-f16", "-f32"):
        stem = stem.removesuffix(ending)
    target = source.with_name(f"{stem}-q4_k_m.gguf")
    if not target.exists():
        _say(f"making {target.name} from {source.name}")
        script = Path(__file__).parent / "peers" / "llamacpp.py"
        command = [args.llama_python, str(script), str(source), str(target), str(args.threads)]
        path = os.pathsep.join([str(script.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=False)
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            return Skipped("llama.cpp-q4_k_m", f"it could not be made from {source.name}: {said or done.returncode}")
    return target


def _engine(spec: Spec, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": spec.name,
        "version": facts.get("version"),
        "settings": facts.get("settings"),
        "system": facts.get("system"),
        "model": Path(spec.options["model"]).name,
        "file_bytes": spec.file_bytes,
        "step_bytes": spec.weights,
        "kv_bytes": spec.kv,
        "vocab_size": facts.get("vocab_size"),
        "chars_per_token": facts.get("chars_per_token"),
    }


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    with os_errors_explained(path):
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def _say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
