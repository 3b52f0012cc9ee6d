# SPDX-License-Identifier: Apache-2.0
"""What is installed and what the README promises: wheel, source distribution, scripts, stub, commands."""

import ast
import importlib
import importlib.metadata
import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from cnllama import _core
from cnllama.cli.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh.md")
NAMED_FILE = "zh-alpaca-plus-7b.cnl"


def python(*arguments: str, cwd: Path = ROOT) -> str:
    """Runs this interpreter; its standard output. A failure shows what it wrote to standard error."""
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def code_blocks(readme: str, language: str) -> list[str]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def readme_commands() -> list[list[str]]:
    """Every simple command of the README's bash blocks, as words."""
    lines = "\n".join(code_blocks("README.md", "bash")).splitlines()
    return [shlex.split(command) for line in lines for command in line.split("&&") if command.strip()]


# --- wheel, source distribution, installation


def test_wheel_has_both_packages_and_their_data(tmp_path: Path) -> None:
    # The native part is left out of this wheel: it takes a minute to compile, and the tests run on it anyway.
    flags = ("--no-build-isolation", "--no-deps", "-q", "-Cwheel.cmake=false", f"-Cbuild-dir={tmp_path / 'build'}")
    python("-m", "pip", "wheel", *flags, "-w", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("cnllama-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"cnllama"}
    expected = {f"cnllama/{path.relative_to(ROOT / 'cnllama')}" for path in package_files(ROOT / "cnllama")}
    expected |= {f"cnllama/convert/{path.relative_to(ROOT / 'convert')}" for path in package_files(ROOT / "convert")}
    assert expected <= names
    assert {"cnllama/py.typed", "cnllama/_core.pyi", "cnllama/convert/__main__.py"} <= expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name]


def package_files(directory: Path) -> list[Path]:
    hidden = re.compile(r"__pycache__|\.")
    return [
        path
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != ".so" and not any(map(hidden.match, path.relative_to(directory).parts))
    ]


def test_source_distribution_has_what_it_takes_to_build_and_test(tmp_path: Path) -> None:
    python("-c", f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})")
    (archive,) = tmp_path.glob("cnllama-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names
    assert {"CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "convert/__main__.py"} <= names
    assert {"tests/test_packaging.py", "bench/tiny_checkpoint.py", ".ci/constraints.txt"} <= names
    assert not [name for name in names if name.startswith((".venv", "build/"))]


def test_convert_is_found_from_any_directory(tmp_path: Path) -> None:
    for directory in (ROOT, tmp_path):
        assert "usage: cnllama convert" in python("-m", "cnllama.convert", "--help", cwd=directory)


def test_importing_brings_no_training_library(tmp_path: Path) -> None:
    code = "import cnllama, cnllama.cli.main, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(python("-c", code, cwd=tmp_path).split())
    assert "cnllama" in loaded
    assert not loaded & {"torch", "transformers", "peft", "accelerate", "safetensors"}


@pytest.mark.parametrize("script", ["cnllama", "cnllama-run"])
def test_console_scripts_are_installed_and_start(script: str, tmp_path: Path) -> None:
    path = Path(sysconfig.get_path("scripts")) / script
    result = subprocess.run([path, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--help" in result.stdout


def test_version_is_the_package_s() -> None:
    assert importlib.metadata.version("cnllama") in python("-m", "cnllama", "--version")


def test_constraints_pin_every_named_requirement() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / ".ci/constraints.txt").read_text().splitlines()
        if "==" in line
    }
    named = set()
    for requirement in importlib.metadata.requires("cnllama") or []:
        if "adapt" not in requirement:
            named.add(re.split(r"[<>=;\[ ]", requirement)[0].lower().replace("_", "-"))
    assert "torch" in named
    assert named <= pinned


# --- the stub

PROTOCOL = ("__init__", "__enter__", "__exit__")


def stub_members() -> dict[str, ast.stmt]:
    """Public names of _core.pyi, with methods as Class.method, without the type aliases and imports."""
    tree = ast.parse((ROOT / "cnllama/_core.pyi").read_text())
    members: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            members[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            members[node.target.id] = node
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef):
                    members[f"{node.name}.{child.name}"] = child
                elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                    members[f"{node.name}.{child.target.id}"] = child
    return members


def module_members() -> set[str]:
    """Public names of the built module; submodules are for tests and benchmarks and have no stub."""
    names = set()
    for name, value in vars(_core).items():
        if name.startswith("_") or isinstance(value, type(sys)):
            continue
        names.add(name)
        if isinstance(value, type):
            names |= {f"{name}.{key}" for key in vars(value) if not key.startswith("_") or key in PROTOCOL}
    return names


def documented_parameters(doc: str) -> list[str]:
    """Parameter names of the signature that pybind11 writes into the first line of a docstring."""
    inner = doc.splitlines()[0]
    inner = inner[inner.index("(") + 1 : inner.rindex(")")]
    if " -> " in inner and inner.count("(") < inner.count(")"):  # the result is a tuple in parentheses
        inner = inner[: inner.rindex(") -> ")]
    names, depth, start = [], 0, 0
    for index, character in enumerate(inner + ","):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            names.append(inner[start:index].split(":")[0].strip())
            start = index + 1
    return [name for name in names if name not in ("", "*", "/")]


def test_stub_names_what_the_module_has() -> None:
    assert set(stub_members()) == module_members()


def test_stub_names_the_parameters_the_module_takes() -> None:
    compared = 0
    for name, node in stub_members().items():
        if not isinstance(node, ast.FunctionDef):
            continue
        value: object = _core
        for part in name.split("."):
            value = getattr(value, part)
        arguments = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        assert documented_parameters(value.__doc__ or "") == arguments, name
        compared += 1
    assert compared > 10


# --- the README


@pytest.mark.parametrize("language", ["bash", "python"])
def test_chinese_readme_has_the_same_code(language: str) -> None:
    english, chinese = (code_blocks(readme, language) for readme in READMES)
    assert english
    assert english == chinese


@pytest.mark.parametrize("readme", READMES)
def test_readme_links_lead_somewhere(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_readme_python_runs(tiny_cnl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = code_blocks("README.md", "python")
    assert NAMED_FILE in code
    scope: dict[str, object] = {}
    exec(compile(code.replace(NAMED_FILE, str(tiny_cnl)), "README.md", "exec"), scope)
    assert scope["logits"].shape[0] == len(scope["ids"])
    assert capsys.readouterr().out


def verb_and_arguments(words: list[str]) -> tuple[str, list[str]] | None:
    """The verb of a command line of ours and what follows it; None for pip, python -m venv and the like."""
    match Path(words[0]).name, words[1:]:
        case "cnllama", [verb, *arguments]:
            return verb, arguments
        case "cnllama-run", arguments:
            return "run", arguments
        case "python", ["-m", "cnllama.convert", *arguments]:
            return "convert", arguments
    return None


def test_readme_commands_are_understood() -> None:
    seen = set()
    for words in readme_commands():
        if (found := verb_and_arguments(words)) is None:
            continue
        verb, arguments = found
        module = importlib.import_module(f"cnllama.cli.{verb}")
        parser = Parser(prog=verb)
        module.add_arguments(parser)
        parser.parse_args(arguments)  # raises InputError for an option that is not there
        seen.add(verb)
    assert seen >= {"run", "chat", "convert", "info", "verify", "plan"}
