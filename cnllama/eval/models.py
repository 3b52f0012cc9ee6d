# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks of a model, logits of stretches of tokens, and the engine's answer to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cnllama.errors import CnllamaError, InputError

if TYPE_CHECKING:
    from types import TracebackType

    from cnllama.llm import LLM

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int], object]

# Tokens before the wanted ones that are worth a step of their own: it saves their rows of the output matrix.
_WORTH_A_CUT = 64


@dataclass(frozen=True)
class Item:
    """Token ids to run; the logits after every token from position `begin` on are wanted."""

    ids: Sequence[int]
    begin: int


class Rows(NamedTuple):
    """Logits [n, vocab_size] after the tokens of items[item] from `position` on."""

    item: int
    position: int
    logits: FloatArray


class Scorer(Protocol):
    """A model that gives logits. Within an item positions ascend; items may come interleaved."""

    vocab_size: int

    def rows(self, items: Sequence[Item], progress: Progress | None = None) -> Iterator[Rows]:
        """The wanted logits of every item, in pieces. progress: called with numbers of tokens that were done."""


def shared_length(held: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for i, (a, b) in enumerate(zip(held, wanted, strict=False)):
        if a != b:
            return i
    return min(len(held), len(wanted))


@dataclass(eq=False)
class _Lane:
    """A sequence of the engine: `tokens` are in its cache; `item` is what it works on, by number."""

    sequence: int
    rope_length: int
    tokens: list[int] = field(default_factory=list)
    item: tuple[int, Item] | None = None

    @property
    def plan(self) -> Sequence[int]:
        """What the cache holds, or will hold when the work is done."""
        return self.item[1].ids if self.item else self.tokens


class EngineScorer:
    """An LLM's engine: short items share a step, and an item that begins like an earlier one continues its cache.

    lanes: sequences that run at once; the LLM must have been opened for that many besides the requests that it serves.
    tokens_run counts the tokens that were really run.
    """

    def __init__(self, llm: LLM, lanes: int = 1) -> None:
        self.vocab_size: int = llm.vocab_size
        self.tokens_run = 0
        self._llm, self._context, self._engine = llm, llm.context, llm.engine
        self._unscaled = _unscaled_length(llm)
        self._lanes: list[_Lane] = []
        self._size = lanes

    def __enter__(self) -> EngineScorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the cache back to the engine."""
        for lane in self._lanes:
            self._engine.close(lane.sequence)
        self._lanes.clear()

    def rows(self, items: Sequence[Item], progress: Progress | None = None) -> Iterator[Rows]:
        """See Scorer. Raises InputError for an item longer than the context."""
        for item in items:
            if not 0 <= item.begin < len(item.ids) <= self._context:
                raise InputError(
                    f"{len(item.ids)} tokens are to be run and the context holds 1 to {self._context}: "
                    "shorten the text or raise the context (--ctx)"
                )
        for lane in self._lanes:
            lane.item = None  # left behind when an earlier call was not read to its end
        queue = deque(enumerate(items))
        while queue or any(lane.item for lane in self._lanes):
            self._admit(queue, progress)
            yield from self._step(progress)

    def _admit(self, queue: deque[tuple[int, Item]], progress: Progress | None) -> None:
        while queue:
            number, item = queue[0]
            lane = self._place(item)
            if lane is None:
                return
            queue.popleft()
            keep = min(shared_length(lane.tokens, item.ids), item.begin)
            del lane.tokens[keep:]
            self._engine.trim(lane.sequence, keep)
            lane.item = (number, item)
            if progress and keep:
                progress(keep)

    def _place(self, item: Item) -> _Lane | None:
        """An idle lane for the item, None to wait.

        It waits for a busy one that is computing its beginning where that saves more than the item's own rest costs:
        questions behind the same examples run one after the other, unrelated ones side by side.
        """
        idle = [lane for lane in self._lanes if lane.item is None]
        busy = [lane for lane in self._lanes if lane.item is not None]
        if not idle and len(self._lanes) == self._size:
            return None
        rope_length = max(self._unscaled, len(item.ids)) if self._unscaled else 0
        shared = {
            lane: shared_length(lane.plan, item.ids) if lane.rope_length == rope_length else 0 for lane in self._lanes
        }
        own = max((shared[lane] for lane in idle), default=0)
        other = max((shared[lane] for lane in busy), default=0)
        if other - own > len(item.ids) - other:
            return None
        if own <= 1 and len(self._lanes) < self._size:
            self._lanes.append(_Lane(self._engine.open(rope_length), rope_length))
            return self._lanes[-1]
        lane = max(idle, key=lambda lane: (shared[lane], -len(lane.tokens)))
        if lane.rope_length != rope_length:
            self._engine.close(lane.sequence)
            lane.sequence, lane.rope_length, lane.tokens = self._engine.open(rope_length), rope_length, []
        return lane

    def _step(self, progress: Progress | None) -> Iterator[Rows]:
        room = self._engine.max_step_tokens
        batch = []
        for lane in self._lanes:
            if lane.item is None or room == 0:
                continue
            begin = len(lane.tokens)
            end = _end_of_piece(lane.item[1], begin, room)
            room -= end - begin
            batch.append((lane, begin, end, end - max(begin, lane.item[1].begin) > 1))
        work = [(lane.sequence, lane.item[1].ids[begin:end], every) for lane, begin, end, every in batch if lane.item]
        logits = _run(self._llm, work)
        row = 0
        for lane, begin, end, every in batch:
            assert lane.item is not None
            number, item = lane.item
            lane.tokens.extend(item.ids[begin:end])
            count = end - begin if every else 1
            first = max(item.begin, end - count)
            if first < end:
                yield Rows(number, first, logits[row + count - (end - first) : row + count])
            row += count
            self.tokens_run += end - begin
            if end == len(item.ids):
                lane.item = None
            if progress:
                progress(end - begin)


def _end_of_piece(item: Item, begin: int, room: int) -> int:
    """Where the piece from `begin` ends: before the wanted tokens when enough lie before them."""
    end = min(len(item.ids), begin + room)
    if item.begin - begin >= _WORTH_A_CUT and end - item.begin > 1:
        return item.begin  # which is before `end`
    return end


class Sequences:
    """Sequences of an LLM's engine that grow token by token, `count` of them, each with a cache of its own."""

    def __init__(self, llm: LLM, count: int) -> None:
        self._llm, self._engine = llm, llm.engine
        self._unscaled = _unscaled_length(llm)
        self._lanes: list[_Lane | None] = [None] * count

    def __enter__(self) -> Sequences:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for lane in self._lanes:
            if lane is not None:
                self._engine.close(lane.sequence)
        self._lanes = []

    def fill(self, number: int, tokens: Sequence[int], room: int) -> FloatArray:
        """Runs the tokens in place of what the sequence held, as far as it does not begin so, with room for more.

        Returns the logits [vocab_size] after the last one.
        """
        rope_length = max(self._unscaled, len(tokens) + room) if self._unscaled else 0
        lane = self._lanes[number]
        if lane is not None and lane.rope_length != rope_length:
            self._engine.close(lane.sequence)
            lane = None
        if lane is None:
            lane = self._lanes[number] = _Lane(self._engine.open(rope_length), rope_length)
        keep = min(shared_length(lane.tokens, tokens), len(tokens) - 1)
        self._engine.trim(lane.sequence, keep)
        size = self._engine.max_step_tokens
        for at in range(keep, len(tokens), size):
            logits = _run(self._llm, [(lane.sequence, tokens[at : at + size], False)])
        lane.tokens = list(tokens)
        last: FloatArray = logits[-1].copy()
        return last

    def step(self, tokens: Mapping[int, int]) -> dict[int, FloatArray]:
        """Appends a token to some of the sequences, by number; returns the logits after each."""
        lanes = [(lane, token) for number, token in tokens.items() if (lane := self._lanes[number]) is not None]
        if not lanes:
            return {}
        logits = _run(self._llm, [(lane.sequence, [token], False) for lane, token in lanes])
        for lane, token in lanes:
            lane.tokens.append(token)
        return dict(zip(tokens, logits, strict=True))


def _unscaled_length(llm: LLM) -> int:
    """Positions up to which frequencies do not depend on a sequence's length; 0 where they never do."""
    scaling = llm.file.config.get("rope_scaling") or {}
    dynamic = scaling.get("rope_type", scaling.get("type")) == "dynamic"
    return int(llm.file.config["max_position_embeddings"]) if dynamic else 0


def _run(llm: LLM, work: Sequence[tuple[int, Sequence[int], bool]]) -> FloatArray:
    """A step of (sequence, tokens, whether the logits after every one are wanted). Raises CnllamaError."""
    batch = [(number, np.asarray(ids, np.int32), every) for number, ids, every in work]
    try:
        logits: FloatArray = llm.engine.step(batch)
    except (ValueError, RuntimeError) as error:
        llm.check_weights()
        raise CnllamaError(f"{llm.path}: {error}; check the file with: cnllama verify {llm.path}") from error
    llm.check_weights()
    return logits
