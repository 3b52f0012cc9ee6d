# SPDX-License-Identifier: Apache-2.0
"""Which tokens run in the next step: continuous batching and chunked prefill, over caches that outlive a request."""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cnllama._core import HeldInterrupt
from cnllama.errors import CnllamaError
from cnllama.lookup import StepCosts, worth_running
from cnllama.request import Largest, Request

if TYPE_CHECKING:
    from cnllama._core import Engine, FloatArray, IntArray

Entry = tuple[int, "IntArray", bool]
_CLOSED = "this LLM was closed: open the file again"


class TopEngine(Protocol):
    """An engine that can keep most logits of a step to itself; `_cuda.Engine` is one."""

    @property
    def max_top(self) -> int:
        """The largest k."""

    def step_top(self, batch: Sequence[Entry], k: int) -> tuple[IntArray, FloatArray]:
        """A step that brings (ids, logits) [rows, k], the largest of each row, in any order."""


@dataclass(eq=False)
class Slot:
    """A sequence of the engine. Its cache holds at least `tokens`: they are noted after a step, never before."""

    sequence: int
    rope_length: int
    tokens: list[int] = field(default_factory=list)


class SlotPool:
    """At most `size` sequences. A finished request leaves its cache behind, and the next one that begins with the same
    tokens continues there: a conversation never runs its past again.

    unscaled_length: with dynamic scaling of positions, the length up to which all sequences have the same frequencies;
    None when the scaling does not depend on the length.
    """

    def __init__(self, engine: Engine, size: int, unscaled_length: int | None = None) -> None:
        self._engine = engine
        self._size = size
        self._unscaled = unscaled_length
        self._slots: list[Slot] = []  # least recently used first

    def acquire(self, prompt: Sequence[int], length: int, busy: Collection[Slot]) -> Slot | None:
        """A slot that holds a beginning of `prompt`, at most all but the last token, whose logits are wanted.

        length: the positions it is planned to reach. None when all are busy.
        """
        rope_length = 0 if self._unscaled is None else max(length, self._unscaled)
        free = [slot for slot in self._slots if slot not in busy]
        shared = [_shared(slot.tokens, prompt) if slot.rope_length == rope_length else 0 for slot in free]
        # Half of a cache or more must be of use: a header that all prompts share is no reason to forget a conversation.
        useful = [i for i, slot in enumerate(free) if shared[i] and 2 * shared[i] >= len(slot.tokens)]
        if not useful and len(self._slots) < self._size:
            return self._open(rope_length)
        if not free:
            return None
        best = max(useful, key=shared.__getitem__, default=0)
        slot, keep = free[best], shared[best]
        if slot.rope_length != rope_length:
            self._slots.remove(slot)
            return self._open(rope_length)
        del slot.tokens[keep:]
        self._engine.trim(slot.sequence, keep)
        self._slots.sort(key=lambda other: other is slot)
        return slot

    def _open(self, rope_length: int) -> Slot:
        """A new slot; the engine numbers its sequences from 0, always with the lowest number that is free.

        Sequences of no slot are closed first: those of slots given up, and one that Ctrl-C cut off from its slot when
        it had been opened but not yet noted.
        """
        for lost in set(range(self._size)) - {slot.sequence for slot in self._slots}:
            with suppress(ValueError):  # it is not open
                self._engine.close(lost)
        self._slots.append(Slot(self._engine.open(rope_length), rope_length))
        return self._slots[-1]


def _shared(tokens: Sequence[int], prompt: Sequence[int]) -> int:
    count = min(len(tokens), len(prompt) - 1)
    return next((i for i in range(count) if tokens[i] != prompt[i]), max(count, 0))


@dataclass(eq=False)
class Part:
    """What one request runs in a step: `ids` of its pending tokens, and guesses of what follows them."""

    request: Request
    slot: Slot
    ids: list[int]
    draft: list[int] = field(default_factory=list)


class Scheduler:
    """Runs requests, several in one step. Every method may be called from any thread.

    top: the engine again, if it can bring the largest logits alone: it is asked for them where they decide. check:
    called after every step of the engine; raises when its logits may not be used. explain: makes an error for people of
    what the engine or a sampler refused. before_step: called before every step of the engine.

    A step runs the requests of all callers, in the thread of the one who needed it first. So nothing of a caller is
    called here (a request reports to its own caller), Ctrl-C waits until the step is whole,
    and what goes wrong becomes the error of those requests it belongs to.
    """

    def __init__(
        self,
        engine: Engine,
        pool: SlotPool,
        top: TopEngine | None = None,
        *,
        check: Callable[[], None] = lambda: None,
        explain: Callable[[Exception], Exception] = lambda error: error,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._top = top
        self._pool = pool
        self._check = check
        self._explain = explain
        self._before_step = before_step
        self._waiting: deque[tuple[Request, int]] = deque()
        self._running: dict[Request, Slot] = {}
        self._costs = StepCosts()
        self._closed = False
        self._lock = threading.RLock()
        with _registry:
            _living[next(_numbers)] = self

    def add(self, request: Request, length: int) -> None:
        """Queues a request that is planned to reach `length` positions."""
        with self._lock:
            self._refuse_closed()
            self._waiting.append((request, length))

    def step(self) -> None:
        """Admits, runs and advances. Raises nothing that belongs to a request: that becomes its error."""
        with self._lock, HeldInterrupt():
            if self._closed:
                return  # its requests have ended
            self._admit()
            batch = self._next_batch()
            try:
                if batch:
                    self._before_step()
                    self._advance(batch, self._run(batch))
            except Exception as error:  # of the engine, which ran all of them, or none
                for part in batch:
                    self._end(part.request, self._explained(error))
            except BaseException as error:
                for part in batch:
                    self._end(part.request, error)
                raise

    def close(self) -> None:
        """Ends every request with an error; no other can follow."""
        with self._lock:
            self._closed = True
            for request in [*self._running, *(request for request, _ in self._waiting)]:
                self._end(request, CnllamaError(_CLOSED))
            self._waiting.clear()

    def all_logits(self, ids: Sequence[int], out: FloatArray) -> None:
        """Fills out float32 [len(ids), vocab_size] with the logits of every position.

        Running requests are advanced until a slot is free. Raises what the engine refuses as `explain` puts it.
        """
        with self._lock:
            self._refuse_closed()
            while (slot := self._pool.acquire([], len(ids), self._running.values())) is None:
                self.step()
            size = self._engine.max_step_tokens
            for begin in range(0, len(ids), size):
                chunk = np.asarray(ids[begin : begin + size], np.int32)
                try:
                    out[begin : begin + len(chunk)] = self._engine.step([(slot.sequence, chunk, True)])
                    self._check()
                except Exception as error:
                    raise self._explained(error) from error
                slot.tokens.extend(chunk.tolist())

    def _refuse_closed(self) -> None:
        if self._closed:
            raise CnllamaError(_CLOSED)

    def _explained(self, error: Exception) -> Exception:
        if not isinstance(error, ValueError | RuntimeError):
            return error
        explained = self._explain(error)
        explained.__cause__ = error
        return explained

    def _end(self, request: Request, error: BaseException) -> None:
        request.error = request.error or error
        self._running.pop(request, None)

    def _admit(self) -> None:
        for request in [r for r in self._running if r.finished]:
            del self._running[request]
        while self._waiting:
            request, length = self._waiting[0]
            if not request.finished and request not in self._running:
                try:
                    slot = self._pool.acquire(request.prompt, length, self._running.values())
                except Exception as error:
                    self._end(request, self._explained(error))
                    slot = None
                if slot is None and not request.finished:
                    return
                if slot is not None:
                    request.start(len(slot.tokens))
                    self._running[request] = slot
            self._waiting.popleft()

    def _next_batch(self) -> list[Part]:
        """Requests that decode come first, so that a long prompt delays nobody; prompts share what is left."""
        room = self._engine.max_step_tokens
        batch = []
        for request in sorted(self._running, key=lambda r: len(r.pending) > 1):
            ids = request.pending[:room]
            room -= len(ids)
            if ids:
                batch.append(Part(request, self._running[request], ids))
        self._add_drafts(batch, room)
        return batch

    def _add_drafts(self, batch: list[Part], room: int) -> None:
        drafts = [part.request.draft() for part in batch]
        if not any(draft.tokens for draft in drafts):
            return
        tokens = sum(len(part.ids) for part in batch)
        deciding = sum(len(part.ids) == len(part.request.pending) for part in batch)
        lengths = worth_running(drafts, tokens, deciding, room, self._costs)
        for part, draft, length in zip(batch, drafts, lengths, strict=True):
            part.draft = draft.tokens[:length]

    def _run(self, batch: list[Part]) -> FloatArray | Largest:
        """Logits: for every part one row after its `ids` and one after each token of its draft."""
        entries = [
            (part.slot.sequence, np.asarray(part.ids + part.draft, np.int32), bool(part.draft)) for part in batch
        ]
        begin = time.perf_counter()
        logits: FloatArray | Largest | None = self._largest(batch, entries)
        if logits is None:
            logits = self._engine.step(entries)
        self._check()
        seconds = time.perf_counter() - begin
        if all(len(part.ids) == 1 for part in batch):
            drafted = sum(len(part.draft) for part in batch)
            self._costs.note(len(batch) + drafted, drafted, seconds)
        return logits

    def _largest(self, batch: list[Part], entries: list[Entry]) -> Largest | None:
        """Runs the step where the largest logits of it are enough for every request that chooses a token."""
        if self._top is None:
            return None
        needed = [part.request.needed_logits() for part in batch if len(part.ids) == len(part.request.pending)]
        k = max(needed, default=1) + max(len(part.draft) for part in batch)
        if 0 in needed or k > self._top.max_top:
            return None
        ids, logits = self._top.step_top(entries, k)
        order = np.argsort(ids, axis=1)
        return Largest(np.take_along_axis(ids, order, axis=1), np.take_along_axis(logits, order, axis=1))

    def _advance(self, batch: list[Part], logits: FloatArray | Largest) -> None:
        row = 0
        for part in batch:
            rows = logits[row : row + 1 + len(part.draft)]
            row += len(rows)
            try:
                self._advance_one(part, rows)
            except Exception as error:  # a sampler's, of logits that are no numbers: the others have their own
                self._end(part.request, self._explained(error))

    def _advance_one(self, part: Part, rows: FloatArray | Largest) -> None:
        request, slot = part.request, part.slot
        slot.tokens.extend(part.ids)
        request.ran(len(part.ids))
        if not request.pending:
            kept = request.advance(rows, part.draft)
            slot.tokens.extend(part.draft[:kept])
        if part.draft:
            self._engine.trim(slot.sequence, len(slot.tokens))
        if request.finished:
            self._running.pop(request, None)


class _Fork(threading.local):
    """Waits for the steps of other threads when this one forks: the child gets every scheduler whole and unlocked.

    All are locked in the order in which they were made, so that two threads may fork at once.
    """

    def __init__(self) -> None:
        self._held: list[Scheduler] = []

    def before(self) -> None:
        """Locks all schedulers."""
        _registry.acquire()
        for _, scheduler in sorted(_living.items()):
            scheduler._lock.acquire()
            self._held.append(scheduler)

    def after(self) -> None:
        """Unlocks them, in the parent and in the child."""
        while self._held:
            self._held.pop()._lock.release()
        _registry.release()


_registry = threading.Lock()
_numbers = itertools.count()
_living: weakref.WeakValueDictionary[int, Scheduler] = weakref.WeakValueDictionary()
_fork = _Fork()
os.register_at_fork(before=_fork.before, after_in_parent=_fork.after, after_in_child=_fork.after)
