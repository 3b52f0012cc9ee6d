# SPDX-License-Identifier: Apache-2.0
"""The memory plan: what is needed agrees with the engine, what there is comes from meminfo and every cgroup limit."""

from pathlib import Path
from typing import Any

import models
import pytest

from cnllama import _core
from cnllama.errors import InputError
from cnllama.plan import (
    PROCESS_BYTES,
    Available,
    available_memory,
    kv_bytes_per_token,
    make_plan,
    refuse_unless_fits,
    scratch_bytes,
    trained_length,
)

CONFIG: dict[str, Any] = models.engine_config(models.small_config(500))
MIB = 1 << 20


def machine(tmp_path: Path, available_kib: int, cgroup: str, mountinfo: str) -> Path:
    """A /proc with these files."""
    (tmp_path / "self").mkdir(parents=True)
    (tmp_path / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {available_kib} kB\n")
    (tmp_path / "self" / "cgroup").write_text(cgroup)
    (tmp_path / "self" / "mountinfo").write_text(mountinfo)
    return tmp_path


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_meminfo_alone(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, 2048, "", "")) == Available(2 * MIB, "free memory")


def test_the_tightest_of_nested_v2_groups_counts_and_page_cache_is_free(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    stat = f"anon 5\ninactive_file {20 * MIB}\nactive_file {10 * MIB}\n"
    group(root / "a" / "b", memory__max=f"{200 * MIB}\n", memory__current=f"{10 * MIB}\n", memory__stat="anon 1\n")
    group(root / "a", memory__max=f"{100 * MIB}\n", memory__current=f"{60 * MIB}\n", memory__stat=stat)
    group(root, memory__max="max\n", memory__current="0\n", memory__stat="")
    proc = machine(tmp_path / "proc", 10**9, "0::/a/b\n", f"30 1 0:26 / {root} rw - cgroup2 cgroup2 rw\n")
    assert available_memory(proc) == Available(70 * MIB, "the cgroup limit")


def test_v1_limit_inside_a_container(tmp_path: Path) -> None:
    """The path of the process is named from the host, the mount shows only its part."""
    root = tmp_path / "cgroup"
    group(
        root,
        memory__limit_in_bytes=f"{50 * MIB}\n",
        memory__usage_in_bytes=f"{30 * MIB}\n",
        memory__stat=f"total_inactive_file {4 * MIB}\ntotal_active_file {MIB}\ncache 7\n",
    )
    cgroup = "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n"
    mounts = f"31 1 0:27 /docker/x {root} rw - cgroup cgroup rw,memory\n"
    assert available_memory(machine(tmp_path / "proc", 10**9, cgroup, mounts)) == Available(
        25 * MIB, "the cgroup limit"
    )


def test_v1_without_a_limit_and_v2_namespace(tmp_path: Path) -> None:
    root, unified = tmp_path / "v1", tmp_path / "v2"
    group(root, memory__limit_in_bytes="9223372036854771712\n", memory__usage_in_bytes="1\n", memory__stat="")
    group(unified, memory__max=f"{8 * MIB}\n", memory__current="0\n", memory__stat="")
    mounts = f"31 1 0:27 / {root} rw - cgroup cgroup rw,memory\n32 1 0:28 / {unified} rw - cgroup2 cgroup2 rw\n"
    proc = machine(tmp_path / "proc", 10**9, "4:memory:/gone\n0::/../elsewhere\n", mounts)
    assert available_memory(proc).bytes == 8 * MIB


def test_a_full_group_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root, memory__max=f"{MIB}\n", memory__current=f"{2 * MIB}\n", memory__stat="")
    proc = machine(tmp_path / "proc", 10**9, "0::/\n", f"30 1 0:26 / {root} rw - cgroup2 cgroup2 rw\n")
    assert available_memory(proc).bytes == 0


def test_this_machine_has_memory() -> None:
    assert 0 < available_memory().bytes < 1 << 50


@pytest.mark.parametrize("kv_type", ["fp16", "int8"])
@pytest.mark.parametrize(("context", "sequences"), [(64, 1), (100, 3), (1024, 2)])
def test_the_cache_is_what_the_engine_reserves(kv_type: str, context: int, sequences: int) -> None:
    tensors = models.quantize_tensors(models.random_tensors(models.small_config(500)))
    engine = _core.Engine(CONFIG, tensors, threads=1, context=context, max_sequences=sequences, kv_type=kv_type)
    memory = engine.memory()
    plan = make_plan(CONFIG, memory["weights"], context=context, kv_type=kv_type, sequences=sequences)
    assert plan.kv_per_token == memory["kv_per_token"] == kv_bytes_per_token(CONFIG, kv_type)
    assert plan.kv == memory["kv_reserved"]
    assert memory["scratch"] <= scratch_bytes(CONFIG) <= 2 * memory["scratch"] + MIB


def test_the_default_context_is_what_was_trained_and_what_fits() -> None:
    roomy = Available(1 << 40, "free memory")
    assert make_plan(CONFIG, 0, available=roomy).context == 1024
    assert make_plan(CONFIG | {"max_position_embeddings": 1 << 20}, 0, available=roomy).context == 4096
    scaled = CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert make_plan(scaled, 0, available=roomy).context == trained_length(scaled) == 2048
    per_token = kv_bytes_per_token(CONFIG, "fp16")
    tight = Available(PROCESS_BYTES + scratch_bytes(CONFIG) + 200 * per_token, "free memory")
    plan = make_plan(CONFIG, 0, available=tight)
    assert plan.context == plan.fitting_context == 192
    assert plan.fits
    assert make_plan(CONFIG, 0, available=tight, kv_type="int8").fitting_context > 192


def test_what_cannot_fit_is_refused_with_the_context_that_would() -> None:
    per_token = kv_bytes_per_token(CONFIG, "fp16")
    tight = Available(PROCESS_BYTES + scratch_bytes(CONFIG) + 1000 + 200 * per_token, "the cgroup limit")
    plan = make_plan(CONFIG, 1000, context=512, available=tight)
    assert not plan.fits
    with pytest.raises(InputError, match=r"model\.cnl needs .* context of 512 .* --ctx 192") as error:
        refuse_unless_fits(plan, "model.cnl")
    assert "the cgroup limit" in str(error.value)
    assert make_plan(CONFIG, 1000, context=192, available=tight).fits
    with pytest.raises(InputError, match="no context fits"):
        refuse_unless_fits(make_plan(CONFIG, 1 << 40, available=tight), "model.cnl")


@pytest.mark.parametrize("options", [{"context": 0}, {"context": -8}, {"sequences": 0}, {"kv_type": "fp8"}], ids=str)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=str(next(iter(options.values())))):
        make_plan(CONFIG, 0, **options)


def test_the_command_prints_every_part(tiny_cnl: Path) -> None:
    done = models.command("cnllama", "plan", tiny_cnl, "--ctx", 512, "--kv", "int8")
    assert done.returncode == 0, done.stderr
    for word in ("weights", "512", "int8", "needed", "available", "it fits", "trained for 1024"):
        assert word in done.stdout


def test_the_command_says_when_it_does_not_fit(tiny_cnl: Path) -> None:
    huge = 1 << 24
    plan = models.command("cnllama", "plan", tiny_cnl, "--ctx", huge, "--sequences", 4096)
    assert plan.returncode == 1
    assert "it does not fit" in plan.stdout
