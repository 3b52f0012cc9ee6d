# SPDX-License-Identifier: Apache-2.0
"""Nothing in cnllama/ and convert/ changes a disk beside cnllama/files.py: by the source, and by what Python does."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WRITER = "cnllama/files.py"
# (file, function, call): each with the reason why it changes nothing that could be lost.
ALLOWED = {
    ("cnllama/stdio.py", "configure_stdio", "open"): "opens the null device for a stream that is closed",
    ("cnllama/cli/main.py", "_abandon_stdout", "os.open"): "opens the null device",
    ("cnllama/adapt/plots.py", "save_figure", "figure.savefig"): "into memory",
    ("cnllama/eval/table_report.py", "picture", "figure.savefig"): "into memory",
    ("cnllama/adapt/create.py", "_write", "model.save_pretrained"): "into the scratch directory",
    ("cnllama/adapt/train.py", "_finish", "trainer.save_model"): "into the scratch directory",
    ("cnllama/cli/line_reader.py", "_walk", "shutil.get_terminal_size"): "asks for the width",
    ("cnllama/cli/eval_table.py", "run", "gettempdir"): "asks where temporary files go",
}
CHANGING = {
    "write_text", "write_bytes", "mkdir", "makedirs", "rmdir", "removedirs", "unlink", "rename", "renames", "touch",
    "chmod", "chown", "fchmod", "fchown", "lchmod", "lchown", "symlink_to", "hardlink_to", "link_to", "symlink", "link",
    "truncate", "ftruncate", "utime", "mkfifo", "mknod", "pwrite", "pwritev", "sendfile", "copy_file_range", "mkstemp",
    "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "SpooledTemporaryFile", "gettempdir",
    "save_file", "save_pretrained", "save_model", "savefig", "savez", "savez_compressed", "savetxt", "tofile",
    "save_checkpoint", "save_to_json", "to_json_file", "push_to_hub", "extractall", "setxattr", "fsync", "fdatasync",
}  # fmt: skip
MODULES = {"shutil", "tempfile"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def mode_of(call: ast.Call, position: int) -> str:
    given = [k.value for k in call.keywords if k.arg == "mode"] + call.args[position : position + 1]
    if not given:
        return "r"
    return given[0].value if isinstance(given[0], ast.Constant) and isinstance(given[0].value, str) else "?"


def changes(call: ast.Call) -> bool:
    """Whether a call may change a disk, by its name and arguments; names that mean other things too are told apart."""
    name = dotted(call.func)
    first, _, last = name.rpartition(".")
    if last in CHANGING or first.split(".")[0] in MODULES:
        return True
    if last == "open" and first in ("", "io", "gzip", "bz2", "lzma", "codecs"):
        return bool(set(mode_of(call, 1)) & set("wax+?"))
    if last == "open" and first == "os":
        return any(flag in ast.dump(call) for flag in ("O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND"))
    if last == "open" and first not in ("os", "self", "self._engine", "engine", "LLM", "webbrowser"):
        return bool(set(mode_of(call, 0)) & set("wax+?"))
    if last == "replace":  # of text and data classes there are two or keyword arguments; of os and Path there is one
        return first == "os" or (len(call.args) == 1 and not call.keywords)
    if last == "remove":
        return first == "os"
    if last == "save":
        return first in ("torch", "np", "numpy", "safetensors.torch")
    if last == "dump":
        return first in ("json", "pickle", "marshal")
    if last == "memmap":
        return bool(set(mode_of(call, 2)) & set("wax+c?"))
    return last == "mmap" and "ACCESS_READ" not in ast.dump(call)


def calls(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(child, ast.Call):
            yield function, child
        yield from calls(child, inner)


def found_in(source: str, file: str) -> set[tuple[str, str, str]]:
    return {(file, function, dotted(call.func)) for function, call in calls(ast.parse(source)) if changes(call)}


def test_no_other_file_changes_a_disk() -> None:
    found = set()
    for folder in ("cnllama", "convert"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            if file != WRITER:
                found |= found_in(path.read_text(encoding="utf-8"), file)
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "line",
    [
        "path.write_text('x')", "path.write_bytes(b'x')", "open(path, 'w')", "open(path, mode='ab')", "open(p, mode)",
        "path.open('x')", "path.open(mode='r+')", "os.open(path, os.O_RDWR)", "os.replace(a, b)", "a.replace(b)",
        "os.remove(a)", "a.unlink()", "shutil.rmtree(a)", "shutil.copyfile(a, b)", "tempfile.mkdtemp()", "a.mkdir()",
        "np.save(a, b)", "np.memmap(a, t, 'r+')", "torch.save(a, b)", "json.dump(a, b)", "mmap.mmap(f, 0)", "a.touch()",
        "model.save_pretrained(a)", "save_file(a, b)", "os.truncate(a, 0)", "a.chmod(0o600)",
    ],
)  # fmt: skip
def test_each_way_of_changing_a_disk_is_found(line: str) -> None:
    assert found_in(f"def f():\n    {line}\n", "x.py")


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'rb')", "open(path)", "path.open('rb')", "path.open()", "text.replace('a', 'b')", "replace(x, a=1)",
        "os.open(path, os.O_RDONLY)", "names.remove(a)", "np.memmap(a, t, 'r', shape=s)", "json.dumps(a)",
        "mmap.mmap(f, 0, access=mmap.ACCESS_READ)", "engine.open(4096)",
    ],
)  # fmt: skip
def test_readers_are_not_taken_for_writers(line: str) -> None:
    assert not found_in(f"def f():\n    {line}\n", "x.py")


WATCHED = """
import os, sys, traceback
import cnllama.files as files

operations, events, outside = [], [], []
files._operation = lambda kind, path: operations.append(kind)
place = sys.argv[1]
watched = {"os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.chmod", "os.chown", "os.truncate", "os.link",
           "os.symlink", "os.utime", "shutil.rmtree", "shutil.copyfile", "shutil.move", "open"}
busy = False

def hook(event, arguments):
    global busy
    if busy or event not in watched:
        return
    path, flags = arguments[0], arguments[2] if event == "open" else os.O_WRONLY
    if not isinstance(path, (str, bytes, os.PathLike)) or not os.fsdecode(path).startswith(place):
        return
    if event == "open" and not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return
    busy = True
    frames = [frame.filename for frame in traceback.extract_stack()]
    busy = False
    events.append(event)
    scratch = "/.cnllama-scratch" in os.fsdecode(path)
    if not scratch and not any(name.endswith("cnllama/files.py") for name in frames):
        outside.append((event, os.fsdecode(path)))

sys.addaudithook(hook)
from cnllama.cli.main import main
import json
codes = [main(json.loads(line)) for line in sys.argv[2:]]
print(json.dumps({"codes": codes, "events": len(events), "operations": len(operations), "outside": outside}))
"""


def test_python_reports_no_other_change(tmp_path: Path, tiny_llama: Path) -> None:
    """Audit events of a training run, a merge, a conversion and an export: every change comes from the writer."""
    pytest.importorskip("peft", reason="training needs peft")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"第{i}天，春风又绿江南岸。" * 4}) + "\n" for i in range(40)))
    out = tmp_path / "out"
    train = ["adapt", "pretrain", tiny_llama, "-o", out / "a", "--data", data, "--max-steps", 3, "--save-every", 1]
    train += ["--block-size", 32, "--batch-size", 2, "--eval-every", 0, "--keep", 1]
    lines = [
        train, [*train, "--restart"], ["adapt", "merge", tiny_llama, "--lora", out / "a", "-o", out / "m"],
        ["adapt", "create", tiny_llama, "-o", out / "c", "--hidden-size", 32, "--heads", 2, "--layers", 1],
        ["convert", out / "m", "-o", out / "m.cnl", "--quantizer", "rtn"],
        ["export", out / "m.cnl", "-o", out / "m.gguf"],
    ]  # fmt: skip
    words = [json.dumps(list(map(str, line))) for line in lines]
    out.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCHED), str(out), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["codes"] == [0] * len(lines), result.stderr
    assert found["outside"] == []
    assert found["operations"] >= found["events"] > 100
