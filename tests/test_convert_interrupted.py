# SPDX-License-Identifier: Apache-2.0
"""Conversions that do not come to their end: killed, interrupted, out of room, not permitted."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cnllama.convert.pack import convert
from models import command, make_llama

from cnllama.errors import InputError
from cnllama.files import Output
from cnllama.format import CnlWriter, open_cnl


def large_checkpoint(directory: Path, tokenizer_model: bytes) -> Path:
    """Large enough that a conversion can be caught at work."""
    return make_llama(directory, tokenizer_model, hidden_size=1024, intermediate_size=4096, num_attention_heads=8)


def test_kill_leaves_no_file(tmp_path: Path, tokenizer_model: bytes) -> None:
    base = large_checkpoint(tmp_path / "base", tokenizer_model)
    out = tmp_path / "out"
    out.mkdir()
    options = ["-o", str(out / "x.cnl"), "--threads", "1", "--quantizer", "rtn"]
    arguments = [sys.executable, "-m", "cnllama.convert", str(base), *options]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not any(part.stat().st_size > 1 << 20 for part in out.glob(".x.cnl.*.part")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "x.cnl").exists()
    assert len(list(out.iterdir())) == 1, "the temporary file of the killed run"
    convert(base, [], out / "x.cnl", quant="q8")
    assert [path.name for path in out.iterdir()] == ["x.cnl"]


def test_interrupt_removes_the_temporary_file(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CnlWriter, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_llama, [], tmp_path / "x.cnl")
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit_is_one_sentence(tmp_path: Path, tiny_llama: Path) -> None:
    size = 1 << 17

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = command("cnllama.convert", tiny_llama, "-o", tmp_path / "x.cnl", "--quantizer", "rtn", preexec_fn=limit)
    assert done.returncode == 1
    assert "the file would pass the largest size allowed here" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_directories_without_permission(ordinary_user: Path) -> None:
    closed = ordinary_user / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(InputError, match=r"closed.*: no permission"):
        Output(closed / "x.cnl")
    closed.chmod(0)
    with pytest.raises(InputError, match=r"closed.*: no permission"):
        convert(closed, [], ordinary_user / "x.cnl")
    with pytest.raises(InputError, match=r"closed.*: no permission"):
        open_cnl(closed / "x.cnl")
