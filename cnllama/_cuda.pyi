from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
ByteArray = npt.NDArray[np.uint8]

PAGE_SIZE: int
"""Positions in one page of the key/value cache (64)."""
SCHEMES: tuple[str, ...]
"""The weight schemes that have kernels; a model with others is refused."""

def device() -> dict[str, Any]:
    """{"problem", "name", "compute_capability", "processors", "driver", "runtime", "free_bytes", "total_bytes"}.

    problem is one sentence when there is no driver, no GPU or a too old one of either, else empty. Never raises for
    those.
    """

class Engine:
    """The interface of _core.Engine on GPU 0. Weights are uploaded and repacked; nothing of them stays in host memory.

    CNLLAMA_CUDA_OPTIONS may hold words out of: no-graphs, no-early-start, dp4a, wait.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, tuple[ByteArray, str, int, int]],
        *,
        threads: int = 0,
        context: int = 2048,
        max_sequences: int = 1,
        max_step_tokens: int = 2048,
        kv_type: str = "fp16",
    ) -> None:
        """As _core.Engine; threads is accepted and means nothing. Raises ValueError naming a tensor whose scheme has no
        kernels, and RuntimeError naming the context that would fit when the GPU's memory is too small, and when there
        is no usable GPU.
        """

    vocab_size: int
    context: int
    threads: int
    kv_type: str
    max_step_tokens: int
    max_top: int
    """The largest k of step_top."""
    device: str
    """The name of the GPU."""

    def open(self, rope_length: int = 0) -> int: ...
    def close(self, sequence: int) -> None: ...
    def length(self, sequence: int) -> int: ...
    def trim(self, sequence: int, length: int) -> None: ...
    def step(self, batch: Sequence[tuple[int, IntArray, bool]]) -> FloatArray:
        """As _core.Engine.step. A CUDA error is a RuntimeError with its name; the cache is unchanged then."""

    def step_top(self, batch: Sequence[tuple[int, IntArray, bool]], k: int) -> tuple[IntArray, FloatArray]:
        """The step of `step` of which only the largest logits leave the device: (ids, logits), int32 and float32
        [rows, k], largest first, the lowest id among equals. What is not a number or infinite comes before all others.
        Raises as step does, and ValueError for a k over max_top.
        """

    def generate(self, sequences: Sequence[int], first: IntArray, count: int) -> IntArray:
        """Greedy int32 [count, sequences]: appends first[i] to sequences[i], then what was chosen; `count` steps.

        Tokens are chosen on the device. Raises as step does, and RuntimeError when logits are not numbers.
        """

    def memory(self) -> dict[str, int]:
        """Bytes of GPU memory: {"weights", "kv_reserved", "kv_per_token", "scratch"}."""

    def graphs(self) -> int:
        """Captured steps that are kept, and those that were seen once: 32 at most."""

    def replays(self) -> int:
        """Steps that were a replay of a captured one."""
