# SPDX-License-Identifier: Apache-2.0
"""The thread pool, the processor's description and CNLLAMA_ISA."""

import os
import subprocess
import sys

import pytest

from cnllama import _core

pool_visits = _core.ops.pool_visits


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "grain"), [(0, 1), (1, 1), (7, 3), (1000, 1), (1000, 64), (5, 1000)])
def test_every_item_once_per_loop(threads, count, grain):
    visits, barriers = pool_visits(threads, count, grain, loops=50)
    assert (visits == 50).all()
    assert barriers == 50


def test_many_short_loops_with_more_threads_than_cores():
    visits, _ = pool_visits(2 * (os.cpu_count() or 1) + 1, 16, 1, loops=300)
    assert (visits == 300).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("fail_at", [0, 500, 999])
def test_an_exception_of_any_thread_arrives(threads, fail_at):
    with pytest.raises(RuntimeError, match=f"item {fail_at} failed"):
        pool_visits(threads, 1000, 7, loops=3, fail_at=fail_at)


def test_no_pool_without_threads():
    with pytest.raises(ValueError, match="at least 1 thread"):
        pool_visits(0, 1, 1)
    with pytest.raises(ValueError, match="threads must be 0"):
        _core.quantize([[1.0]], "q4-a64", threads=-1)


def test_cpu_info():
    info = _core.cpu_info()
    assert info["isas"] == _core.isas()
    assert info["isa"] == _core.isa()
    assert info["model"]
    assert 1 <= info["default_threads"] <= min(info["physical_cores"], info["affinity"])
    assert info["affinity"] == len(os.sched_getaffinity(0))


def test_default_threads_follow_the_affinity():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from cnllama import _core; i = _core.cpu_info(); print(i['affinity'], i['default_threads'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


# ---- control groups: trees as /proc/self and /sys/fs/cgroup show them


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return _core.ops.cgroup_quota(str(root))


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 32 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:7 - cgroup cgroup rw,cpu,cpuacct\n"


def test_cgroup_v2_takes_the_smallest_of_the_nested(tmp_path):
    quota = tree(
        tmp_path,
        {
            "proc/self/mountinfo": V2,
            "proc/self/cgroup": "0::/user.slice/app/job\n",
            "sys/fs/cgroup/user.slice/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/user.slice/app/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/user.slice/app/job/cpu.max": "max 100000\n",
        },
    )
    assert quota == 1.5


def test_cgroup_v2_of_a_container_that_sees_only_its_own(tmp_path):
    quota = tree(
        tmp_path,
        {
            "proc/self/mountinfo": V2.replace(" / ", " /docker/abc ", 1),
            "proc/self/cgroup": "0::/docker/abc/inner\n",
            "sys/fs/cgroup/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/inner/cpu.max": "max 100000\n",
        },
    )
    assert quota == 3.0


def test_cgroup_path_that_is_not_mounted_falls_back_to_the_mount(tmp_path):
    quota = tree(
        tmp_path,
        {
            "proc/self/mountinfo": V2,
            "proc/self/cgroup": "0::/../../elsewhere\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
    )
    assert quota == 0.5


def test_cgroup_v1(tmp_path):
    files = {
        "proc/self/mountinfo": "31 32 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n" + V1,
        "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/batch/job\n0::/\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/batch/cpu.cfs_quota_us": "250000\n",
        "sys/fs/cgroup/cpu,cpuacct/batch/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/batch/job/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/batch/job/cpu.cfs_period_us": "100000\n",
    }
    assert tree(tmp_path, files) == 2.5


@pytest.mark.parametrize("text", ["max 100000\n", "", "nonsense\n", "0 100000\n"])
def test_no_quota(tmp_path, text):
    files = {"proc/self/mountinfo": V2, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": text}
    assert tree(tmp_path, files) is None
    assert _core.ops.cgroup_quota(str(tmp_path / "absent")) is None


# ---- CNLLAMA_ISA


def imported(isa):
    code = "from cnllama import _core; print(_core.isa())"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "CNLLAMA_ISA": isa},
        check=False,
    )


def test_environment_forces_the_instruction_set():
    for isa in _core.isas():
        assert imported(isa).stdout.strip() == isa
    assert imported("").stdout.strip() == _core.isas()[-1]


def test_environment_with_an_unknown_instruction_set():
    done = imported("neon2")
    assert done.returncode != 0
    assert "CNLLAMA_ISA: instruction set 'neon2' is unknown; this machine supports: scalar" in done.stderr
