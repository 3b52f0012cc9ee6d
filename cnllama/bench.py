# SPDX-License-Identifier: Apache-2.0
"""How fast an engine is, and how close to what the machine allows: what `cnllama bench` and bench/compare.py share.

Every figure has its limit beside it, measured just before and just after: prompts are bound by int8 multiply-adds,
decoding by the bytes that must be read. Medians are of rounds; shares are medians of the ratios within a round, because
on a shared machine both sides move together.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cnllama.config import EMBEDDING, LM_HEAD
from cnllama.errors import CnllamaError
from cnllama.textio import count_chinese

if TYPE_CHECKING:
    from cnllama._core import IntArray
    from cnllama.format import CnlFile
    from cnllama.llm import LLM

MIN_SECONDS = 0.5  # a timed round repeats what takes less
STEPS = 16  # tokens that a decoding round appends to each sequence
FIRST_PROMPT = 16  # tokens of the prompt that the time to first token is measured with
FIRST_IDS = 300  # ids under it are control tokens and bytes in LLaMA's vocabularies

# The stated text: characters per token are counted on it.
TEXT = (
    "天刚亮，码头上已经热闹起来。渔船一只接一只靠岸，女人们把竹筐摆成一排，拣鱼、过秤、记账，手里不停，嘴上也不停。"
    "老周在海边住了六十三年，他说潮水比钟表还准：初一、十五涨得最高，隔七八天便低下去，从来不会误事。"
    "前年镇里修了新路，年轻人陆续买了车，鲜鱼当天就能送进省城的市场；可是老周仍旧每天走到堤上，看看云，听听风，"
    "再决定要不要出海。孙女问他为什么不看手机里的天气预报，他笑着回答：“预报讲的是明天，我看的是今天。”\n"
    "机器读书的办法与人不同。它先把句子切成词元，再把每个词元换成一串数字，一层一层地相乘、相加，最后算出下一个词元"
    "各有多大的可能。词表里中文越多，同一句话切出的词元就越少，写同样长的回答也就越快。因此比较两个模型的速度，"
    "不能只数每秒多少词元，还要看每秒写出多少个汉字。\n"
)


class Runner(Protocol):
    """An engine with a cache of its own: what is timed. Every call returns when the logits can be read."""

    vocab_size: int

    def prepare(self, context: int, room: int, batch: int) -> None:
        """A new cache of `batch` sequences, `context` tokens in each and room for `room` more."""

    def prefill(self, ids: IntArray) -> None:
        """Appends a prompt (int32 [tokens]) to the first sequence."""

    def step(self, ids: IntArray) -> None:
        """Appends one token (int32 [batch]) to each sequence."""

    def rewind(self) -> None:
        """Back to what `prepare` left."""

    def settle(self) -> None:
        """Does now what the engine would do once, in the steps that follow the first."""


@dataclass(frozen=True)
class Work:
    """What a model costs: bytes of weights read by a step, bytes of keys and values of a position, multiply-adds of
    a token in the layers, and of the output matrix, which a prompt needs once.
    """

    weights: int
    kv: int
    layer_macs: int
    head_macs: int

    def step_bytes(self, context: int, steps: int, batch: int) -> float:
        """Bytes that one decoding step reads, on average over `steps` of them after `context` tokens."""
        return self.weights + batch * self.kv * (context + (steps + 1) / 2)

    def prompt_macs(self, tokens: int) -> int:
        """Multiply-adds with weights that a prompt takes. Attention is not counted: it multiplies no weights."""
        return tokens * self.layer_macs + self.head_macs


@dataclass(frozen=True)
class Measure:
    """One line of the results: a prompt of `size` tokens, or decoding after `size` tokens in each of `batch`."""

    kind: str  # "prefill" or "decode"
    size: int
    batch: int = 1
    steps: int = STEPS

    @property
    def name(self) -> str:
        """For people and for JSON."""
        if self.kind == "prefill":
            return f"prefill {self.size}"
        return f"decode at {self.size}" + (f", batch {self.batch}" if self.batch > 1 else "")

    @property
    def context(self) -> int:
        """Tokens in the cache before the clock starts."""
        return 0 if self.kind == "prefill" else self.size

    @property
    def room(self) -> int:
        """Positions that the timed part adds to a sequence."""
        return self.size if self.kind == "prefill" else self.steps

    @property
    def tokens(self) -> int:
        """Tokens that the timed part runs."""
        return self.size if self.kind == "prefill" else self.steps * self.batch

    def share(self, seconds: float, limit: float, work: Work) -> float:
        """The part of the machine's `limit` (multiply-adds or bytes a second) that was reached."""
        if self.kind == "prefill":
            return work.prompt_macs(self.size) / seconds / limit
        return work.step_bytes(self.size, self.steps, self.batch) * self.steps / seconds / limit


Sample = tuple[float, float]  # seconds, and the limit around it


def macs_of(file: CnlFile) -> tuple[int, int]:
    """Multiply-adds of one token in the layers, and in the output matrix."""
    tensors = file.tensors.items()
    matrices = {name: tensor.rows * tensor.cols for name, tensor in tensors if tensor.scheme not in ("f32", "raw")}
    layers = sum(size for name, size in matrices.items() if name not in (EMBEDDING, LM_HEAD))
    return layers, matrices[LM_HEAD if LM_HEAD in matrices else EMBEDDING]


def work_of(llm: LLM) -> Work:
    """The work of an open model."""
    from cnllama.stats import bytes_per_step

    return Work(bytes_per_step(llm), llm.plan.kv_per_token, *macs_of(llm.file))


def token_ids(count: int, vocab_size: int) -> IntArray:
    """int32 [count]: the same ids for every engine, spread over the vocabulary, none of them a control token."""
    low = min(FIRST_IDS, vocab_size // 2)
    return (low + np.arange(count, dtype=np.int64) * 40503 % (vocab_size - low)).astype(np.int32)


def fill(runner: Runner, context: int, room: int, batch: int) -> None:
    """Prepares a runner and lets it run a little, so that code and weights are warm. Clocks nothing."""
    runner.prepare(context, room, batch)
    if batch == 1 and context == 0:
        runner.prefill(token_ids(min(room, 64), runner.vocab_size))
        runner.rewind()
    for _ in range(min(room, 2)):
        runner.step(token_ids(batch, runner.vocab_size))
    runner.settle()
    runner.rewind()


def time_prefill(runner: Runner, tokens: int, min_seconds: float = MIN_SECONDS) -> float:
    """Seconds that a prompt of `tokens` takes in an empty cache."""
    ids = token_ids(tokens, runner.vocab_size)
    return _repeat(runner, lambda: runner.prefill(ids), min_seconds)


def time_decode(runner: Runner, steps: int, batch: int, min_seconds: float = MIN_SECONDS) -> float:
    """Seconds that `steps` steps of one token in each of `batch` sequences take, from the prepared context on."""
    ids = token_ids(steps * batch, runner.vocab_size).reshape(steps, batch)

    def run() -> None:
        for row in ids:
            runner.step(row)

    return _repeat(runner, run, min_seconds)


def _repeat(runner: Runner, run: Callable[[], None], min_seconds: float) -> float:
    total, count = 0.0, 0
    while count == 0 or total < min_seconds:
        begin = time.perf_counter()
        run()
        total += time.perf_counter() - begin
        count += 1
        runner.rewind()
    return total / count


def read_limit(threads: int) -> float:
    """Bytes a second that plain reads of main memory reach now."""
    from cnllama import _core

    return _core.read_bandwidth(threads, 256, 3)


def peak_limit(threads: int) -> float:
    """int8 multiply-adds a second that the instruction set in use reaches in registers now."""
    from cnllama import _core

    ops: Any = vars(_core)["ops"]  # the bindings for benchmarks have no stub
    return float(ops.int8_peak(threads, 0.05))


def limit_of(measure: Measure) -> Callable[[int], float]:
    """The function of the threads that measures what bounds a measure."""
    return peak_limit if measure.kind == "prefill" else read_limit


def interleave(
    runs: Mapping[str, Callable[[], float | None]],
    limit: Callable[[], float],
    rounds: int,
    enough: Callable[[int], bool] = lambda done: False,
) -> dict[str, list[Sample]]:
    """Times every run once a round, each round beginning with another, the limit between any two.

    A run that returns None is left out from then on, with what it had. enough(rounds done) ends it early.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    active = list(runs)
    before = limit()
    for done in range(rounds):
        if not active or (done and enough(done)):
            break
        first = done % len(active)
        for name in active[first:] + active[:first]:
            seconds = runs[name]()
            if seconds is None:
                active.remove(name)
                continue
            after = limit()
            samples[name].append((seconds, (before + after) / 2))
            before = after
    return samples


def summarize(measure: Measure, samples: Sequence[Sample], work: Work, chars_per_token: float | None) -> dict[str, Any]:
    """Figures of one engine in one measure, for JSON: rates in tokens (of all sequences) a second."""
    rates = [measure.tokens / seconds for seconds, _ in samples]
    shares = [measure.share(seconds, limit, work) for seconds, limit in samples]
    rate = statistics.median(rates)
    return {
        "measure": measure.name,
        "kind": measure.kind,
        "size": measure.size,
        "batch": measure.batch,
        "steps": measure.steps if measure.kind == "decode" else None,
        "seconds": [seconds for seconds, _ in samples],
        "limits": [limit for _, limit in samples],
        "tokens_per_s": rate,
        "tokens_per_s_min": min(rates),
        "tokens_per_s_max": max(rates),
        "chars_per_s": rate * chars_per_token if chars_per_token else None,
        "limit": "int8_macs_per_s" if measure.kind == "prefill" else "read_bytes_per_s",
        "share": statistics.median(shares),
        "share_min": min(shares),
        "share_max": max(shares),
    }


class LLMRunner:
    """This project's engine as a Runner. path: a .cnl, None for the bundled model. Raises InputError as LLM does."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        threads: int = 0,
        kv_type: str = "fp16",
        weights: str = "auto",
    ) -> None:
        self._path, self._threads, self._kv_type, self._weights = path, threads, kv_type, weights
        self._context = 0
        self._sequences: list[int] = []
        self.llm: LLM = self._open(64, 1)
        self.load_seconds = self.llm.load_seconds
        self.vocab_size: int = self.llm.vocab_size
        self.logits: Any = None

    @property
    def threads(self) -> int:
        """Threads that the engine uses."""
        return self.llm.threads

    @property
    def chars_per_token(self) -> float:
        """Chinese characters per token of TEXT."""
        return count_chinese(TEXT) / len(self.llm.tokenize(TEXT))

    def prepare(self, context: int, room: int, batch: int) -> None:
        """See Runner."""
        self.close()
        self.llm = self._open(context + room, batch)
        engine = self.llm.engine
        self._context = context
        self._sequences = [engine.open(context + room) for _ in range(batch)]
        for sequence in self._sequences if context else ():
            self._append(sequence, token_ids(context, self.vocab_size))

    def prefill(self, ids: IntArray) -> None:
        """See Runner."""
        self._append(self._sequences[0], ids)

    def step(self, ids: IntArray) -> None:
        """See Runner."""
        self.logits = self.llm.engine.step(
            [(sequence, ids[i : i + 1], False) for i, sequence in enumerate(self._sequences)]
        )

    def rewind(self) -> None:
        """See Runner."""
        for sequence in self._sequences:
            self.llm.engine.trim(sequence, min(self._context, self.llm.engine.length(sequence)))

    def settle(self) -> None:
        """See Runner."""
        if self.llm.weight_memory:
            self.llm.weight_memory.settle()

    def close(self) -> None:
        """Frees the cache."""
        self._sequences = []
        self.llm.close()

    def _append(self, sequence: int, ids: IntArray) -> None:
        size = self.llm.engine.max_step_tokens
        for begin in range(0, len(ids), size):
            self.logits = self.llm.engine.step([(sequence, ids[begin : begin + size], False)])

    def _open(self, context: int, sequences: int) -> LLM:
        from cnllama.llm import LLM

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the context is longer than what the model was made for
            return LLM(
                self._path,
                ctx=context,
                threads=self._threads,
                kv_type=self._kv_type,
                max_sequences=sequences,
                template="raw",
                weights=self._weights,
            )


def first_prompt(llm: LLM, tokens: int = FIRST_PROMPT) -> str:
    """The longest beginning of TEXT that `llm` makes at most `tokens` tokens of."""
    end = 1
    while end < len(TEXT) and len(llm.prompt_ids(TEXT[: end + 1])) <= tokens:
        end += 1
    return TEXT[:end]


def first_token_seconds(path: Path, prompt: str, options: Iterable[str]) -> float:
    """Seconds from the start of a process that runs `cnllama run` to the first byte of its answer.

    options: of that verb. Raises CnllamaError with what it says when it fails.
    """
    command = [sys.executable, "-m", "cnllama", "run", "-m", str(path), "--raw", "-p", prompt]
    command += ["-n", "1", "--min-tokens", "1", "--temp", "0", *options]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        _, errors = process.communicate()
    if process.returncode or not first:
        said = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise CnllamaError(f"{path}: `cnllama run` ended with exit code {process.returncode}: {said}")
    return seconds


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`median (min-max)`, or the value alone."""
    middle = statistics.median(values)
    if len(values) == 1 or math.isclose(min(values), max(values)):
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
