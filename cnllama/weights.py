# SPDX-License-Identifier: Apache-2.0
"""Where the weights lie: in the file's map, or in large pages of the process's own, moved there while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cnllama.errors import InputError
from cnllama.plan import available_memory
from cnllama.resident import map_memory
from cnllama.textio import tr
from cnllama.values import shown

if TYPE_CHECKING:
    from cnllama._core import Engine
    from cnllama.format import CnlFile

MODES = ("auto", "map", "copy")
_SMALLEST = 64 << 20  # weights that fit a processor's cache gain nothing
_STEPS = 8  # that the move is spread over: each takes a third longer
_SPARE = 512 << 20  # memory that `auto` leaves to others
_WHOLE = 0.95  # of the map in large pages: as good as a copy


def check_mode(mode: object, device: str) -> str:
    """Raises InputError for anything but auto, map and copy, and for what a GPU has no use for."""
    if not isinstance(mode, str) or mode not in MODES:
        raise InputError(
            tr(
                f"weights is {shown(mode)}: choose auto, map or copy",
                f"权重的位置 {shown(mode)} 不存在：请用 auto、map 或 copy",
            )
        )
    if device != "cpu" and mode == "copy":
        raise InputError(
            tr(
                "weights is 'copy', and a GPU has a copy of its own: leave it at auto",
                "权重的位置是 copy，而 GPU 本来就有副本：请用 auto",
            )
        )
    return mode


class WeightMemory:
    """Moves the weights of an engine between its steps, where that makes decoding faster.

    mode: "map" leaves them in the file's map; "copy" moves them all; "auto" moves them unless they are small, the map
    consists of large pages already, which many processes can share, or a copy would take memory that is needed. Nothing
    changes in what is computed, and addresses stay. The pages of the map are given back as the copy grows: together
    both take what the file takes. reserve: bytes that this process will need besides the weights.
    """

    def __init__(self, engine: Engine, file: CnlFile, mode: str, reserve: int) -> None:
        self._engine, self._file, self._reserve = engine, file, reserve
        self._size = engine.own_weights(0)
        self._left = self._size
        self._moved = 0
        self._decided = mode == "copy"
        self._reason = ""
        if mode == "map":
            self._stay("map")
        elif mode == "auto" and self._size < _SMALLEST:
            self._stay("small")
        self._begun = False

    def before_step(self) -> None:
        """Moves a part of what is to be moved. The first step, whose token somebody waits for, comes before anything
        else; what the map is like is known after it.
        """
        if self._left and self._begun:
            self._advance(-(-self._size // _STEPS))
        self._begun = True

    def settle(self) -> None:
        """Moves everything: before something is timed. A step must have run, so that the map is there to be judged."""
        if self._left:
            self._advance(self._size)

    def figures(self) -> dict[str, int | str]:
        """{"where": "map" or "copy", "reason", "bytes", "moved", "large_pages"}: for JSON, sizes in bytes."""
        _, large = map_memory(self._file)
        where = "copy" if self._moved else "map"
        return {"where": where, "reason": self._reason, "bytes": self._size, "moved": self._moved, "large_pages": large}

    def _stay(self, reason: str) -> None:
        self._left, self._reason = 0, reason

    def _advance(self, size: int) -> None:
        if not self._decided:
            self._decide()
        if not self._left:
            return
        self._file.keep_pages()
        try:
            self._left = self._engine.own_weights(size)
        except RuntimeError:  # the system gives no memory: what lies in the map stays there
            self._stay("refused")
        else:
            self._moved = self._size - self._left

    def _decide(self) -> None:
        self._decided = True
        if map_memory(self._file)[1] >= _WHOLE * self._size:
            self._stay("large pages")
        elif available_memory().bytes < self._size + self._reserve + _SPARE:
            self._stay("memory")


def describe(figures: dict[str, int | str]) -> str:
    """For people: where the weights lie, and why."""
    size, moved, large = (int(figures[name]) for name in ("bytes", "moved", "large_pages"))
    share = f"{large / size:.0%}" if size else "0%"
    reasons = {
        "memory": tr("too little memory is free for a copy", "空闲内存不足以复制"),
        "refused": tr("the system gave no memory for a copy", "系统不给复制用的内存"),
        "small": tr("they are small", "权重很小"),
    }
    reason = reasons.get(str(figures["reason"]))
    more = f"; {reason}" if reason else ""
    if moved:
        done = f"{moved / size:.0%}"
        return tr(f"a copy, {done} moved, {share} in large pages{more}", f"副本（已移入 {done}，{share} 为大页）{more}")
    return tr(f"the file's map, {share} in large pages{more}", f"文件映射（{share} 为大页）{more}")
