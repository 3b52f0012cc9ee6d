# SPDX-License-Identifier: Apache-2.0
"""Choosing a device: what the absent GPU says."""

import sys

import pytest

from cnllama import device
from cnllama.errors import InputError


def test_the_cpu_is_the_default() -> None:
    assert device.choose("auto") == device.choose("cpu") == "cpu"


def test_another_name_is_refused() -> None:
    with pytest.raises(InputError, match="the device is 'tpu': choose one of auto, cpu, cuda"):
        device.choose("tpu")


def test_a_build_without_cuda_says_so(monkeypatch) -> None:
    monkeypatch.delattr("cnllama._cuda", raising=False)
    monkeypatch.delitem(sys.modules, "cnllama._cuda", raising=False)

    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name == "cnllama._cuda":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(InputError, match="built without CUDA: install it from source"):
        device.choose("cuda")


def test_a_machine_without_a_gpu_says_so() -> None:
    problem = device.cuda_problem()
    if not problem:
        pytest.skip("there is a GPU")
    with pytest.raises(InputError) as caught:
        device.choose("cuda")
    assert str(caught.value) == problem
    assert "\n" not in problem


def test_importing_cnllama_does_not_import_the_module() -> None:
    import subprocess

    code = "import cnllama, cnllama.llm, cnllama.device, sys; print('cnllama._cuda' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "False"
