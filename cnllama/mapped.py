# SPDX-License-Identifier: Apache-2.0
"""Maps of files that others may overwrite: what was read before that is kept, what is read after it is an error."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cnllama import _core
from cnllama.errors import CnllamaError, FileChangedError, InputError, from_os_error
from cnllama.paths import open_regular


class WatchedFile:
    """An open file of which it can be told whether it is still the one that was opened.

    size: bytes. Raises InputError for what is no readable regular file or is empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = -1
        with open_regular(self.path) as file:
            try:
                self._fd = os.dup(file.fileno())
            except OSError as error:
                raise from_os_error(self.path, error) from None
        self._stamp = self._now()
        self.size = self._stamp[0]
        if self.size == 0:
            raise InputError(f"{self.path}: the file is empty; its download or conversion was cut off, make it again")
        self._guards: list[_core.MapGuard] = []

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def map(self) -> tuple[mmap.mmap, npt.NDArray[np.uint8]]:
        """A read-only map of the whole file, and its bytes, which stay readable when the file is cut off."""
        try:
            mapping = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
        except ValueError:  # it is shorter by now
            raise self._changed() from None
        except OSError as error:
            raise from_os_error(self.path, error) from None
        try:
            self._guards.append(_core.MapGuard(mapping))
        except RuntimeError as error:  # there is room for some thousands
            raise CnllamaError(f"{self.path}: {error}") from None
        return mapping, np.frombuffer(self._guards[-1], np.uint8)  # type: ignore[call-overload]

    def guard(self, address: int, size: int) -> None:
        """The same for a map that somebody else made of the file."""
        self._guards.append(_core.guard_memory(address, size))

    def check_unchanged(self, same: Callable[[], bool] | None = None) -> None:
        """Raises FileChangedError when the file is no longer the one that was opened: cut off or written to.

        same: asked when the time of its last change is another but its size is not, which `touch` does too: whether the
        content is what it was. What was read before the call is sound if there is no error. Costs a microsecond.
        """
        now = self._now()
        if now != self._stamp and (now[0] != self.size or same is None or not same()):
            raise self._changed()
        for guard in self._guards:
            if guard.damaged:
                raise self._changed()
        self._stamp = now

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def _changed(self) -> FileChangedError:
        return FileChangedError(
            f"{self.path}: the file was overwritten or cut off while it was in use; write a new one under another name "
            "and rename it (mv), then start again"
        )
