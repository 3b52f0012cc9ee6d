# SPDX-License-Identifier: Apache-2.0
"""Wrong input on the command line: the right exit code, one sentence on stderr naming what is wrong, no traceback."""

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
from fuzz import mutate_json
from fuzz.targets.cnl import Base, with_header

FAILED, WRONG_INPUT = 1, 2


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """It ended with `code` and exactly one line on stderr, which holds every word."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr[-2000:]
    assert len(lines) == 1, f"expected one sentence, got {len(lines)} lines: {done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


def run(file: Path, *options: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return models.command("cnllama", "run", "-m", file, *options, **kwargs)


def prompt(file: Path, *options: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return run(file, "-p", "从前有一个农夫", "-n", 4, *options, **kwargs)


def edited_header(data: bytes, edit: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with its header changed by `edit` and the header's hash made right again."""
    base = Base(data)
    edit(base.header)
    return with_header(mutate_json.dump(base.header), base.body)


NORM = "model.norm.weight"


def move(begin: int, end: int) -> Callable[[dict[str, Any]], None]:
    """An edit: the final norm claims other bytes, counted from where it lies."""

    def edit(header: dict[str, Any]) -> None:
        offsets = header[NORM]["data_offsets"]
        header[NORM]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return edit


def set_field(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[NORM].__setitem__(key, value)


def set_config(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    """An edit of one value of the config inside the header."""

    def edit(header: dict[str, Any]) -> None:
        config = json.loads(header["__metadata__"]["config"])
        header["__metadata__"]["config"] = json.dumps(config | {key: value})

    return edit


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut in the data": lambda data: data[:-1000],
    "cut in the header": lambda data: data[:500],
    "cut to four bytes": lambda data: data[:4],
    "of length zero": lambda data: b"",
    "with a bit flipped in the header": lambda data: flip(data, 1000),
    "of another kind": lambda data: b"GGUF\x03\x00\x00\x00" + data[8:],
    "of text": lambda data: "这不是模型\n".encode() * 100,
    "with a tensor outside": lambda data: edited_header(data, move(1 << 40, 1 << 40)),
    "with tensors that overlap": lambda data: edited_header(data, move(-64, -64)),
    "with a huge tensor": lambda data: edited_header(data, set_field("shape", [1 << 62])),
    "with a negative offset": lambda data: edited_header(data, set_field("data_offsets", [-64, 320])),
    "with a negative size": lambda data: edited_header(data, set_field("shape", [-96])),
    "with a wrong dtype": lambda data: edited_header(data, set_field("dtype", "F16")),
    "with an unknown dtype": lambda data: edited_header(data, set_field("dtype", "Q4")),
    "with heads that do not divide": lambda data: edited_header(data, set_config("num_key_value_heads", 2)),
    "with a huge hidden size": lambda data: edited_header(data, set_config("hidden_size", 1 << 60)),
    "with a config in words": lambda data: edited_header(data, set_config("hidden_size", "large")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file(tiny_cnl: Path, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "坏 file.cnl"
    file.write_bytes(DAMAGES[damage](tiny_cnl.read_bytes()))
    assert_refused(prompt(file), WRONG_INPUT, file.name)


def test_a_bit_flipped_in_the_weights_is_found_by_verify(tiny_cnl: Path, tmp_path: Path) -> None:
    file = tmp_path / "flipped.cnl"
    data = tiny_cnl.read_bytes()
    file.write_bytes(flip(data, len(data) // 2))
    done = models.command("cnllama", "verify", file)
    assert done.returncode == FAILED, done.stderr
    assert "FAILED  content" in done.stdout
    assert "Traceback" not in done.stderr
    assert models.command("cnllama", "verify", tiny_cnl).returncode == 0


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(prompt(tmp_path / "没有.cnl"), WRONG_INPUT, "没有.cnl")
    assert_refused(models.command("cnllama", "info", tmp_path / "no.cnl"), WRONG_INPUT, "no.cnl")
    assert_refused(models.command("cnllama", "verify", tmp_path / "no.cnl"), WRONG_INPUT, "no.cnl")
    assert_refused(models.command("cnllama", "plan", tmp_path / "no.cnl"), WRONG_INPUT, "no.cnl")
    assert_refused(
        models.command("cnllama.convert", tmp_path / "no", "-o", tmp_path / "out.cnl"),
        WRONG_INPUT,
        str(tmp_path / "no"),
    )


def test_a_directory_for_a_file(tmp_path: Path) -> None:
    assert_refused(prompt(tmp_path), WRONG_INPUT, str(tmp_path))


def without_override() -> None:
    """Takes from root's child the right to pass over permissions, so that the test means something for root too."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.fixture
def locked(tmp_path: Path) -> Any:
    """A directory that nobody may enter, with a file in it."""
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "model.cnl").write_bytes(b"x")
    folder.chmod(0)
    done = subprocess.run(["ls", str(folder)], preexec_fn=without_override, capture_output=True, check=False)
    yield folder if done.returncode else None
    folder.chmod(0o700)


def test_a_directory_without_permission(locked: Path | None, tiny_llama: Path) -> None:
    if locked is None:
        pytest.skip("this user passes over permissions and cannot give that up")
    done = prompt(locked / "model.cnl", preexec_fn=without_override)
    assert_refused(done, WRONG_INPUT, str(locked), "permission")
    done = models.command("cnllama.convert", tiny_llama, "-o", locked / "out.cnl", preexec_fn=without_override)
    assert_refused(done, WRONG_INPUT, str(locked), "permission")
    done = models.command("cnllama.convert", locked, "-o", locked.parent / "out.cnl", preexec_fn=without_override)
    assert_refused(done, WRONG_INPUT, str(locked), "permission")


def test_a_prompt_longer_than_the_context(tiny_cnl: Path) -> None:
    done = run(tiny_cnl, "--raw", "--ctx", 64, "-p", "天" * 100, "-n", 4)
    assert_refused(done, WRONG_INPUT, "64", "10")


def test_a_context_over_the_trained_length_is_a_warning(tiny_cnl: Path) -> None:
    done = prompt(tiny_cnl, "--ctx", 4096)
    assert done.returncode == 0, done.stderr
    assert "4096" in done.stderr.replace(",", "")
    assert "1024" in done.stderr.replace(",", "")


@pytest.mark.parametrize("template", ["raw", "alpaca"])
def test_an_empty_prompt_runs_from_the_token_before_it(tiny_cnl: Path, template: str) -> None:
    done = run(tiny_cnl, "--template", template, "-p", "", "-n", 4, "--temp", 0)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_n_zero_prints_nothing_and_succeeds(tiny_cnl: Path) -> None:
    done = run(tiny_cnl, "-p", "天空", "-n", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--template", "vicuna"], ["vicuna", "alpaca"]),
        (["--top-p", "1.5"], ["top"]),
        (["--temp", "-1"], ["temp"]),
        (["--temp", "nan"], ["temp"]),
        (["--top-k", "-3"], ["top"]),
        (["--min-p", "2"], ["min"]),
        (["--repeat-penalty", "0"], ["repeat"]),
        (["-n", "-5"], ["-5"]),
        (["--ctx", "0"], ["0"]),
        (["--ctx", "-8"], ["-8"]),
        (["--ctx", str(1 << 30)], [str(1 << 30)]),
        (["--threads", "-2"], ["-2"]),
        (["--kv", "fp8"], ["fp8", "int8"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_out_of_range(tiny_cnl: Path, options: list[str], words: list[str]) -> None:
    done = run(tiny_cnl, "-p", "天空", "-n", 2, *options)
    assert done.returncode == WRONG_INPUT, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr.splitlines()[-1]


def test_an_instruction_set_that_the_machine_lacks(tiny_cnl: Path) -> None:
    done = prompt(tiny_cnl, env=os.environ | {"CNLLAMA_ISA": "avx1024"})
    assert_refused(done, WRONG_INPUT, "avx1024", "scalar")


def test_debug_gives_the_traceback(tmp_path: Path) -> None:
    done = models.command("cnllama", "info", tmp_path / "no.cnl", "--debug")
    assert done.returncode == WRONG_INPUT
    assert "Traceback" in done.stderr


def copy_of(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def refused_conversion(base: Path, *words: str, code: int = WRONG_INPUT) -> None:
    out = base.parent / "out.cnl"
    assert_refused(models.command("cnllama.convert", base, "-o", out), code, *words)
    assert not out.exists()
    assert not list(out.parent.glob(".out*")), "a temporary file was left"


def test_an_index_that_names_a_missing_shard(tmp_path: Path, tokenizer_model: bytes) -> None:
    base = models.make_llama(tmp_path / "base", tokenizer_model, shards=3)
    (base / "model-00002-of-00003.safetensors").unlink()
    refused_conversion(base, "model-00002-of-00003.safetensors")


def test_a_truncated_shard(tiny_llama: Path, tmp_path: Path) -> None:
    base = copy_of(tiny_llama, tmp_path)
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused_conversion(base, "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a pickle at all", b"PK\x03\x04" + b"\x00" * 200])
def test_a_corrupt_bin(tiny_llama: Path, tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("torch", reason=".bin files are read by torch")
    base = copy_of(tiny_llama, tmp_path)
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(content)
    refused_conversion(base, "pytorch_model.bin")


class Bomb:
    """What a hostile pickle does when it is loaded without weights_only."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_a_bin_that_would_run_code(tiny_llama: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason=".bin files are read by torch")
    base, marker = copy_of(tiny_llama, tmp_path), tmp_path / "it ran"
    (base / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(marker)}, base / "pytorch_model.bin")
    refused_conversion(base, "pytorch_model.bin")
    assert not marker.exists()


def test_a_tokenizer_of_another_model(tiny_llama: Path, tmp_path: Path) -> None:
    base = copy_of(tiny_llama, tmp_path)
    (base / "tokenizer.model").write_bytes(models.train_tokenizer(models.english_lines(), 400))
    done = models.command("cnllama.convert", base, "-o", tmp_path / "out.cnl")
    assert done.returncode == WRONG_INPUT, done.stderr
    assert "Traceback" not in done.stderr
    assert "tokenizer.model" in done.stderr
    assert not (tmp_path / "out.cnl").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path: Path, tokenizer_model: bytes, value: float) -> None:
    config = models.small_config(models.piece_count(tokenizer_model))
    tensors = models.random_tensors(config)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][90, 200] = value
    base = models.make_llama(tmp_path / "base", tokenizer_model, tensors=tensors)
    out = tmp_path / "out.cnl"
    done = models.command("cnllama.convert", base, "-o", out)
    assert done.returncode == WRONG_INPUT, done.stderr
    assert name in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, ["config.json", "5"]),
        ({"num_key_value_heads": 2}, ["config.json", "2"]),
        ({"hidden_act": "gelu"}, ["config.json", "gelu"]),
        ({"model_type": "gpt2"}, ["config.json", "gpt2"]),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, ["config.json", "longrope"]),
        ({"num_hidden_layers": 4}, ["model.layers.3"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_a_config_that_cannot_be(tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    base = copy_of(tiny_llama, tmp_path)
    models.write_json(base / "config.json", models.json_of(base / "config.json") | changes)
    refused_conversion(base, *words)


def test_a_config_that_is_no_json(tiny_llama: Path, tmp_path: Path) -> None:
    base = copy_of(tiny_llama, tmp_path)
    (base / "config.json").write_text('{"hidden_size": 96,', encoding="utf-8")
    refused_conversion(base, "config.json")


def test_rows_that_the_checkpoint_lacks(tmp_path: Path, tokenizer_model: bytes) -> None:
    """The tokenizer has one piece more than the embedding has rows: refused, never filled with random values."""
    vocab = models.piece_count(tokenizer_model)
    base = models.make_llama(tmp_path / "base", tokenizer_model, vocab_size=vocab - 1)
    done = models.command("cnllama.convert", base, "-o", tmp_path / "out.cnl")
    assert done.returncode == WRONG_INPUT, done.stderr
    assert str(vocab) in done.stderr
    assert str(vocab - 1) in done.stderr
    assert not (tmp_path / "out.cnl").exists()


def test_a_full_disk_is_one_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    import resource

    def small_files() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = models.command("cnllama.convert", tiny_llama, "-o", tmp_path / "out.cnl", preexec_fn=small_files)
    assert done.returncode == FAILED, done.stderr
    assert "Traceback" not in done.stderr
    assert "out.cnl" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_file_that_is_no_text(tiny_cnl: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\x81\x20\xff\x00\x9f")
    assert_refused(run(tiny_cnl, "-f", file, "-n", 2), WRONG_INPUT, "prompt.txt", "UTF-8")
