# SPDX-License-Identifier: Apache-2.0
"""How much memory a model needs, how much there is, and which context fits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cnllama.errors import InputError
from cnllama.paths import is_own_dir
from cnllama.textio import tr
from cnllama.values import integer, shown

DEFAULT_CONTEXT = 4096
MIN_CONTEXT = 64
PAGE = 64  # positions that the cache takes at once
STEP_TOKENS = 256
PROCESS_BYTES = 96 << 20  # Python, NumPy, the tokenizer
KV_TYPES = ("fp16", "int8")
GIB = 1 << 30


@dataclass(frozen=True)
class Available:
    """Bytes that this process can still take, and who says so: "free memory" or "the cgroup limit"."""

    bytes: int
    source: str


@dataclass(frozen=True)
class Plan:
    """Bytes that a model needs with `context` positions for each of `sequences`, against what there is.

    fitting_context: the largest context, a multiple of 64, that fits; 0 when none does.
    """

    context: int
    sequences: int
    kv_type: str
    weights: int
    kv: int
    kv_per_token: int
    scratch: int
    available: Available
    fitting_context: int

    @property
    def total(self) -> int:
        """All of it, with what the process itself takes."""
        return self.weights + self.kv + self.scratch + PROCESS_BYTES

    @property
    def fits(self) -> bool:
        """Whether it can be run."""
        return self.total <= self.available.bytes


def trained_length(config: Mapping[str, Any]) -> int:
    """Positions that the model was made for, its scaling of positions included."""
    length = int(config["max_position_embeddings"])
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) in ("linear", "dynamic"):
        return int(length * float(scaling.get("factor", 1.0)))
    return length


def kv_bytes_per_token(config: Mapping[str, Any], kv_type: str) -> int:
    """Bytes of keys and values of one position, all layers (csrc/kv_cache.hpp)."""
    dim = -(-int(config["head_dim"]) // 16) * 16
    per_head = 4 * dim if kv_type == "fp16" else 2 * dim + 4
    return per_head * int(config["num_key_value_heads"]) * int(config["num_hidden_layers"])


def scratch_bytes(config: Mapping[str, Any], step_tokens: int = STEP_TOKENS) -> int:
    """Bytes of a step's buffers: float and int8 activations, and a row of logits."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    q = int(config["num_attention_heads"]) * int(config["head_dim"])
    kv = int(config["num_key_value_heads"]) * int(config["head_dim"])
    floats = 2 * hidden + 2 * q + 2 * kv + inner + int(config["head_dim"])
    quantized = hidden + q + inner
    return step_tokens * (4 * floats + quantized + quantized // 8) + 4 * int(config["vocab_size"])


def make_plan(
    config: Mapping[str, Any],
    weights: int,
    *,
    context: int | None = None,
    kv_type: str = "fp16",
    sequences: int = 1,
    available: Available | None = None,
) -> Plan:
    """The plan for a .cnl's `config` and its `weights` bytes.

    context None: the trained length, at most 4096 and at most what fits. Raises InputError for a context, a kv_type or
    a number of sequences that cannot be.
    """
    if kv_type not in KV_TYPES:
        raise InputError(f"the cache type is {kv_type!r}: choose {' or '.join(KV_TYPES)}")
    context = None if context is None else _count("context", context)
    sequences = _count("number of sequences", sequences)
    available = available or available_memory()
    per_token = kv_bytes_per_token(config, kv_type)
    scratch = scratch_bytes(config)
    left = available.bytes - weights - scratch - PROCESS_BYTES
    fitting = max(0, left // (per_token * sequences) // PAGE * PAGE)
    if context is None:
        context = min(trained_length(config), DEFAULT_CONTEXT)
        if fitting >= MIN_CONTEXT:
            context = min(context, fitting)
    pages = -(-context // PAGE) * sequences
    return Plan(context, sequences, kv_type, weights, pages * PAGE * per_token, per_token, scratch, available, fitting)


def _count(name: str, value: object) -> int:
    found = integer(value)
    if found is None or not 1 <= found <= 1 << 24:
        raise InputError(f"the {name} is {shown(value)}, expected an integer from 1 to {1 << 24:,}")
    return found


def refuse_unless_fits(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Raises InputError naming the context that would fit, when the plan's does not."""
    if plan.fits:
        return
    need, have = plan.total / GIB, plan.available.bytes / GIB
    chinese = {"free memory": "空闲内存", "free GPU memory": "空闲显存"}
    source = tr(plan.available.source, chinese.get(plan.available.source, "cgroup 限制"))
    if plan.fitting_context >= MIN_CONTEXT:
        raise InputError(
            tr(
                f"{path} needs {need:.2f} GiB with a context of {plan.context} and {have:.2f} GiB can be had "
                f"({source}): a context of {plan.fitting_context} fits, --ctx {plan.fitting_context}",
                f"{path} 在上下文长度 {plan.context} 时需要 {need:.2f} GiB，而可用的只有 {have:.2f} GiB（{source}）："
                f"长度 {plan.fitting_context} 放得下，请用 --ctx {plan.fitting_context}",
            )
        )
    raise InputError(
        tr(
            f"{path} needs {need:.2f} GiB, {plan.weights / GIB:.2f} of them for the weights alone, and {have:.2f} GiB "
            f"can be had ({source}): no context fits, free some memory or take a smaller model",
            f"{path} 需要 {need:.2f} GiB，仅权重就要 {plan.weights / GIB:.2f} GiB，而可用的只有 {have:.2f} GiB"
            f"（{source}）：任何上下文长度都放不下，请释放内存或换用更小的模型",
        )
    )


def available_memory(proc: Path = Path("/proc")) -> Available:
    """What the machine and every cgroup around this process leave. Page cache counts as free: it can be dropped."""
    candidates = [Available(_free_memory(proc), "free memory")]
    candidates += [Available(room, "the cgroup limit") for room in _cgroup_rooms(proc)]
    return min(candidates, key=lambda candidate: candidate.bytes)


def _free_memory(proc: Path) -> int:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1 << 62  # unknown: the system will say no itself


def _cgroup_rooms(proc: Path) -> Iterator[int]:
    """Bytes left under every memory limit, from this process's own cgroup up to the root that it can see."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        unified = hierarchy == "0" and not controllers
        if not unified and "memory" not in controllers.split(","):
            continue
        for directory in _cgroup_directories(proc, unified, path):
            room = _room_v2(directory) if unified else _room_v1(directory)
            if room is not None:
                yield room


def _cgroup_directories(proc: Path, unified: bool, path: str) -> Iterator[Path]:
    mount = _cgroup_mount(proc, unified)
    if mount is None:
        return
    root, point = mount
    try:
        relative = PurePosixPath(path).relative_to(root)
    except ValueError:
        relative = PurePosixPath(path.lstrip("/"))
    directory = point / relative
    while True:
        if is_own_dir(directory):
            yield directory
        if directory == point or point not in directory.parents:
            return
        directory = directory.parent


def _cgroup_mount(proc: Path, unified: bool) -> tuple[str, Path] | None:
    """(root of the hierarchy that is mounted, where it is)."""
    for line in _read(proc / "self" / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        matches = kind[0] == "cgroup2" if unified else kind[0] == "cgroup" and "memory" in kind[2].split(",")
        if matches:
            return fields[3], Path(fields[4])
    return None


def _room_v2(directory: Path) -> int | None:
    limit = _read(directory / "memory.max").strip()
    if not limit.isdigit():
        return None
    return _room(int(limit), _read(directory / "memory.current"), _read(directory / "memory.stat"), "")


def _room_v1(directory: Path) -> int | None:
    limit = _read(directory / "memory.limit_in_bytes").strip()
    if not limit.isdigit() or int(limit) >= 1 << 60:
        return None
    return _room(int(limit), _read(directory / "memory.usage_in_bytes"), _read(directory / "memory.stat"), "total_")


def _room(limit: int, usage: str, stat: str, prefix: str) -> int:
    used = int(usage) if usage.strip().isdigit() else 0
    values = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line)
    cached = sum(int(values.get(prefix + name, 0)) for name in ("inactive_file", "active_file"))
    return max(0, limit - max(0, used - cached))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
