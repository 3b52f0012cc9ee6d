# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: the shared data folder, small models, and what the header prints."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gguf_files import Maker
    from kills.points import Workshop

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import models  # noqa: E402


def pytest_report_header() -> list[str]:
    """CPU, instruction sets and the versions that decide results."""
    from cnllama import _core

    info = _core.cpu_info()
    versions = []
    for name in ("cnllama", "numpy", "sentencepiece", "safetensors", "torch", "transformers", "peft"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    return [
        f"cpu: {info['model']}, kernels {info['isa']} of {', '.join(info['isas'])}, {info['default_threads']} threads",
        "versions: " + ", ".join(versions),
    ]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes that tests remember are not those of the person who runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real tokenizers and texts; not part of the repository."""
    given = os.environ.get("CNLLAMA_SHARED")
    folder = Path(given) if given else ROOT.parent / "shared"
    data = folder / "data"
    if not (data / "tokenizers").is_dir():
        pytest.skip(f"no shared data: {data} has no tokenizers (set CNLLAMA_SHARED)")
    return data


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A SentencePiece model of about 900 pieces with byte fallback, trained on the bundled text."""
    return models.train_tokenizer(models.sample_lines(), 900)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Path:
    """A Hugging Face checkpoint: hidden 96, 3 layers, 3 heads over one kv head, random weights."""
    return models.make_llama(tmp_path_factory.mktemp("tiny_llama"), tokenizer_model)


@pytest.fixture(scope="session")
def small_tokenizer() -> bytes:
    """A SentencePiece model of at most 290 pieces: for tests that write hundreds of checkpoints."""
    return models.train_tokenizer(["the cat and the dog sat on the mat"] * 8, 290)


@pytest.fixture
def small_base(tmp_path: Path, small_tokenizer: bytes) -> Path:
    """A float32 checkpoint of hidden 32 and 2 layers, free to be changed."""
    from hf_reference import small, write

    config = small(models.piece_count(small_tokenizer))
    return write(tmp_path / "base", small_tokenizer, config, models.random_tensors(config))


@pytest.fixture(scope="session")
def tiny_cnl(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """`tiny_llama` converted with the defaults. Read-only: tests that change it copy it."""
    return models.convert(tiny_llama, tmp_path_factory.mktemp("tiny_cnl") / "tiny.cnl")


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Maker:
    """make(scheme, template, ...) -> a small .cnl that all tests share. Read-only."""
    from gguf_files import Maker

    return Maker(tmp_path_factory.mktemp("gguf"), tokenizer_model)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Where the commands of tests/kills are ended."""
    for library in ("torch", "transformers", "peft", "matplotlib"):
        pytest.importorskip(library, reason="training is killed, too")
    from kills.cases import make_inputs
    from kills.children import warm_up
    from kills.points import Workshop

    warm_up()
    folder = tmp_path_factory.mktemp("kills")
    return Workshop(make_inputs(folder / "inputs"), folder / "place")


@pytest.fixture
def best_isa() -> object:
    """Restores the kernels that were in use after a test that switches them."""
    from cnllama import _core

    before = _core.isa()
    yield before
    _core.use_isa(before)


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """An open directory for a user whom permissions bind: root steps down for the test."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(user)
        for directory in folder.rglob("*/"):
            directory.chmod(0o700)
        shutil.rmtree(folder)
