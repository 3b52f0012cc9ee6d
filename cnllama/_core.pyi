import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]
IntArray = npt.NDArray[np.int32]
ByteArray = npt.NDArray[np.uint8]

PAGE_SIZE: int
"""Positions in one page of the key/value cache (64)."""

def schemes() -> dict[str, dict[str, Any]]:
    """Name -> {"bits", "group", "asymmetric", "bits_per_weight"} of every weight scheme in layout.hpp."""

def packed_bytes(scheme: str, rows: int, cols: int) -> int: ...
def padded_rows(rows: int) -> int: ...
def quantize(
    weight: FloatArray, scheme: str, threads: int = 0, importance: FloatArray | None = None
) -> tuple[ByteArray, float, float]:
    """Quantizes and packs rows of a matrix; returns (packed bytes, sum of squared error, sum of squares).

    weight: float32 [rows, cols], finite, rows a multiple of 32 unless they are the last of the tensor.
    importance: float32 [cols], finite and >= 0: every group of a row gets the scale (and min) of least sum of
    importance * error^2. None counts all columns the same, and so does a group of equal values, be they 0. The returned
    error has no weights.
    The same bytes for every number of threads and instruction set.
    Raises ValueError for NaN or infinity (naming row and column), and for an unknown scheme.
    """

def fit_groups(
    weight: FloatArray, scheme: str, threads: int = 0, importance: FloatArray | None = None
) -> tuple[HalfArray, HalfArray]:
    """The scales and mins that quantize chooses: float16 [rows, cols / group] each, mins 0 for symmetric schemes.

    weight: float32 [rows, cols], cols a multiple of the group. Raises ValueError as quantize does.
    """

def pack(q: ByteArray, scales: HalfArray, mins: HalfArray, scheme: str, threads: int = 0) -> ByteArray:
    """Packed bytes [panels, panel bytes] of integers as they are stored, the inverse of unpack.

    q: uint8 [rows, cols], 0 to 2^bits - 1 (1 to 255 for 8 bits); a value is scale * (q - 2^(bits - 1)) for symmetric
    schemes, else scale * q + min. scales, mins: float16 [rows, groups of a row, rounded up], finite; mins are zeros
    for symmetric schemes. Raises ValueError naming row and column for other values, and for sizes that do not match.
    """

def unpack(
    packed: ByteArray, scheme: str, rows: int, cols: int, threads: int = 0
) -> tuple[ByteArray, HalfArray, HalfArray]:
    """(q, scales, mins) of a packed matrix [rows, cols], as pack takes them.

    Raises ValueError when sizes do not match.
    """

def dequantize(
    packed: ByteArray, scheme: str, rows: int, cols: int, row_begin: int = 0, row_end: int = -1
) -> FloatArray:
    """float32 [row_end - row_begin, cols] of a packed matrix [rows, cols].

    Raises ValueError when sizes do not match.
    """

def isa() -> str: ...
def isas() -> list[str]:
    """Instruction sets this machine can run, slowest first: "scalar", then "avx2", "avxvnni", "avx512" of x86-64 or
    "neon-dotprod", "neon-i8mm" of aarch64.
    """

def use_isa(name: str) -> None:
    """Switches the kernels of this process. Raises ValueError for a name the machine lacks."""

def cpu_info() -> dict[str, Any]:
    """{"model", "isa", "isas", "physical_cores", "affinity", "cgroup_quota" (float or None), "default_threads"}."""

def read_bandwidth(threads: int = 0, mebibytes: int = 256, rounds: int = 5) -> float:
    """Bytes per second that plain reads of main memory reach, the median of some rounds: the limit of decoding."""

class Engine:
    """The model in native code: weights are borrowed from the given buffers, which it keeps alive."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, tuple[ByteArray, str, int, int]],
        *,
        threads: int = 0,
        context: int = 2048,
        max_sequences: int = 1,
        max_step_tokens: int = 256,
        kv_type: str = "fp16",
    ) -> None:
        """config: the .cnl's config. tensors: HF name -> (bytes, scheme, rows, cols); scheme "f32" is a vector of rows
        floats (norms, biases). threads 0: the default of cpu_info(). The cache holds max_sequences * context positions.
        Raises ValueError naming the tensor for a missing one or a wrong size.
        """

    vocab_size: int
    context: int
    threads: int
    kv_type: str
    max_step_tokens: int

    def open(self, rope_length: int = 0) -> int:
        """A new sequence. rope_length: the positions it is planned to reach; only dynamic NTK scaling uses it."""

    def close(self, sequence: int) -> None: ...
    def length(self, sequence: int) -> int: ...
    def trim(self, sequence: int, length: int) -> None: ...
    def step(self, batch: Sequence[tuple[int, IntArray, bool]]) -> FloatArray:
        """Runs [(sequence, int32 token ids, all_logits)] in one pass and appends them to the cache.

        Returns float32 [rows, vocab_size]: in batch order, one row for an entry's last token, or one for each of its
        tokens with all_logits. At most max_step_tokens tokens in all; a sequence may occur once. Raises ValueError for
        a bad id, an empty entry or too many tokens, RuntimeError with both numbers when the cache is full; the cache
        is unchanged then. The GIL is released while it runs.
        """

    def own_weights(self, bytes: int) -> int:
        """Moves `bytes` more of the weights out of the file's map into memory of the process's own, in large pages, at
        the same addresses and with the same content. Returns how many bytes are left; 0 when nothing can be moved.
        Raises RuntimeError when the system gives no memory: the rest stays in the map.
        """

    def read_bandwidth(self) -> float:
        """Bytes per second that the engine's threads read the weights with, where they lie now: one pass over them."""

    def memory(self) -> dict[str, int]:
        """Bytes: {"weights", "kv_reserved", "kv_per_token", "scratch"}."""

    def barriers(self) -> int: ...

class Sampler:
    """Logits to token. One per sequence; a seed gives the same tokens on every machine."""

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int = 0,
    ) -> None: ...
    def accept(self, tokens: Sequence[int]) -> None:
        """Adds tokens (prompt or generated) to the history that the repetition penalty reads."""

    def sample(
        self, logits: FloatArray, banned: Sequence[int] = (), logprobs: int = 0, ids: IntArray | None = None
    ) -> tuple[int, float, list[tuple[int, float]]]:
        """(token, its log probability, the `logprobs` most likely as (id, log probability)).

        The log probabilities are of the unmodified distribution, softmax(logits). `banned` ids cannot be chosen. The
        token is added to the history. Raises ValueError when logits hold NaN or no token is left.

        With ids, int32 and ascending, logits[i] is that of token ids[i] and all others are impossible; logprobs is 0
        then, and the log probability that of a distribution over these alone. The token is the one that all logits
        give when these are the largest, as many as `needed`.
        """

    def needed(self, banned: int) -> int:
        """How many of the largest logits decide the next token when as many ids are banned; 0: all of them."""

class MapGuard:
    """A watched map, itself a read-only buffer of its bytes: reading what was cut off the file gives zeros, not SIGBUS.

    Arrays made of it keep the map alive. Raises RuntimeError when thousands of maps are watched already.
    """

    def __init__(self, map: mmap.mmap) -> None: ...
    damaged: bool
    """Whether a part was missing when it was read. All of it is zeros then."""

def guard_memory(address: int, size: int) -> MapGuard:
    """The same for bytes of a map that somebody else made, and that must outlive the guard."""

class HeldInterrupt:
    """A context in which Ctrl-C waits for its end, in the main thread."""

    def __init__(self) -> None: ...
    def __enter__(self) -> None:
        """Raises what the handler raises, when Ctrl-C came before."""

    def __exit__(self, kind: object, error: object, traceback: object) -> None: ...
