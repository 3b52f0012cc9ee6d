# SPDX-License-Identifier: Apache-2.0
"""One request on its way: its tokens, its text so far, and when it ends."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cnllama._core import Sampler
from cnllama.lookup import MAX_DRAFT, Draft, Lookup
from cnllama.sampling import SamplingParams
from cnllama.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from cnllama._core import FloatArray, IntArray


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log of softmax(logits) for the chosen token, and for the most likely ones as (id, log probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Largest:
    """The largest logits of some rows: ids, int32 [rows, k] and ascending, and their logits, float32 [rows, k]."""

    ids: IntArray
    logits: FloatArray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | int) -> Largest:
        """Some of the rows, or one without its axis."""
        return Largest(self.ids[rows], self.logits[rows])


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; cached_tokens of the prompt were still in the cache.

    drafted_tokens: guesses that speculation ran ahead of the sampler, which chose accepted_tokens of them.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds: prefill until the first token was chosen, decode from then to the end.

    Decode chose `tokens` (an end token is one) in `steps` steps of the engine: fewer where speculation guessed right.
    """

    prefill: float
    decode: float
    steps: int
    tokens: int


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    token_ids: the generated tokens without the end token; those of a stop string are among them, though `text` is cut
    before it. finish_reason: "stop" (an end token or a stop string) or "length" (max_tokens or a full context).
    logprobs: one for each of token_ids, None unless asked for. seed: what was used.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None
    usage: Usage
    timing: Timing
    seed: int


class StopMatcher:
    """Lets text through up to the first stop string, and holds back what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was found). Nothing comes after a stop string."""
        text = self._held + text
        found = min((at for at in map(text.find, self._stop) if at >= 0), default=-1)
        if found >= 0:
            self._held = ""
            return text[:found], True
        keep = max((self._overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when no stop string can come any more."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0


class Request:
    """A prompt and what has been generated for it.

    One thread, that of the caller, takes what another one, which runs the step, puts in. No lock is needed: what is put
    in is there before the mark that says so, and each mark is read before what it stands for.

    `pending` are the tokens that the cache does not hold yet: first the prompt, later the token chosen last. Whoever
    runs them, with a beginning of `draft` or without, calls `advance` with the logits.

    prompt: ids, at least one. limit: tokens that may be generated. ends: ids that end the text. banned: ids that can
    never be chosen. stop: strings that end it. progress: called by `report` with (prompt tokens done, all of them).
    speculate: whether to draft.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        decoder: StreamDecoder,
        *,
        limit: int,
        ends: frozenset[int],
        banned: Sequence[int],
        stop: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
        speculate: bool = False,
    ) -> None:
        self.prompt = list(prompt)
        self.params = params
        self.pending = self.prompt
        self.cached_tokens = 0
        self.output: list[int] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self._progress = progress
        self._done: deque[int] = deque()  # of the prompt, not reported yet
        self.seed = int.from_bytes(os.urandom(8), "little") >> 1 if params.seed is None else params.seed
        self._limit = limit
        self._ends = ends
        self._banned = list(banned)
        self._banned_early = sorted({*banned, *ends})
        self._decoder = decoder
        self._matcher = StopMatcher(stop)
        self._text: list[str] = []
        self._new: deque[str] = deque()  # of it, not taken yet
        self._cancelled = False
        self._logprobs: list[TokenLogprob] = []
        self._begin = self._first = self._end = time.perf_counter()
        self._steps = self._chosen = self._drafted = self._accepted = 0
        self._speculate = speculate
        self._lookup: Lookup | None = None  # while it runs: thousands may wait, or be kept for their answers
        self._sampler = Sampler(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repeat_penalty=params.repeat_penalty,
            repeat_last_n=params.repeat_last_n,
            seed=self.seed,
        )
        self._sampler.accept(self.prompt)
        if limit <= 0:
            self._finish("length")

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.error is not None or self._cancelled

    def cancel(self) -> None:
        """Ends it where it is. The scheduler drops it before its next step."""
        self._cancelled = True

    def start(self, cached_tokens: int) -> None:
        """The first `cached_tokens` of the prompt are in the cache already."""
        self.cached_tokens = cached_tokens
        self.pending = self.prompt[cached_tokens:]
        self._begin = self._first = self._end = time.perf_counter()
        self._lookup = Lookup(self.prompt) if self._speculate else None

    def ran(self, tokens: int) -> None:
        """The cache holds so many more of the pending tokens."""
        self.pending = self.pending[tokens:]
        if self._progress is not None and not self.output:
            self._done.append(len(self.prompt) - len(self.pending))

    def report(self) -> None:
        """Calls `progress` for what ran since the last call.

        This is in the caller's own thread and holds no lock: what it raises is the caller's own, and what it calls
        finds nothing half done.
        """
        while self._done and self._progress is not None:
            self._progress(self._done.popleft(), len(self.prompt))

    def draft(self) -> Draft:
        """What probably follows the pending token, at most as much as may still be generated."""
        left = self._limit - len(self.output) - 1  # a step brings one token more than it accepts
        if self._lookup is None or not self.output or left <= 0:
            return Draft([], [])
        return self._lookup.draft(min(left, MAX_DRAFT))

    def needed_logits(self) -> int:
        """How many of the largest logits of a row decide its token; 0: all of them, or they are reported."""
        return self._sampler.needed(len(self._banned_early)) if self.params.logprobs is None else 0

    def advance(self, logits: FloatArray | Largest, draft: Sequence[int] = ()) -> int:
        """Chooses a token and, as long as the choice is what `draft` guessed, the next one.

        logits: float32 [1 + len(draft), vocab_size], or the largest `needed_logits` of each row and one more for every
        token of the draft: after the last pending token and after each of the draft. Returns how many tokens of the
        draft the cache keeps: all chosen here but the last, which is pending as without a draft.
        """
        self._steps += 1
        self._drafted += len(draft)
        kept = 0
        while self._choose(logits[kept]) and kept < len(draft) and self.output[-1] == draft[kept]:
            kept += 1
        self._accepted += kept
        return kept

    def _choose(self, logits: FloatArray | Largest) -> bool:
        """Chooses the next token. Returns whether another one may follow."""
        early = len(self.output) < self.params.min_tokens
        banned = self._banned_early if early else self._banned
        if isinstance(logits, Largest):
            token, logprob, top = self._sampler.sample(logits.logits, banned, ids=logits.ids)
        else:
            if self._banned and self.params.logprobs is not None:  # what cannot be said has no probability
                logits = logits.copy()
                logits[self._banned] = -math.inf
            token, logprob, top = self._sampler.sample(logits, banned, self.params.logprobs or 0)
        self._end = time.perf_counter()
        self._chosen += 1
        if self._chosen == 1:
            self._first = self._end
        if token in self._ends:
            self._finish("stop")
            return False
        self.output.append(token)
        self.pending = [token]
        if self._lookup is not None:
            self._lookup.add(token)
        if self.params.logprobs is not None:
            self._logprobs.append(TokenLogprob(token, logprob, tuple(top)))
        text = self._decoder.feed(token)
        stopped = False
        if len(self.output) > self.params.min_tokens:
            text, stopped = self._matcher.feed(text)
        self._put(text)
        if stopped:
            self._finish("stop")
        elif len(self.output) >= self._limit:
            self._finish("length")
        return not self.finished

    def take(self) -> str:
        """The text that has come since the last call."""
        new = []
        while self._new:
            new.append(self._new.popleft())
        return "".join(new)

    def completion(self) -> Completion:
        """The result so far; the whole one when finished. A request that was cancelled is cut ("length")."""
        return Completion(
            text="".join(self._text),
            token_ids=list(self.output),
            finish_reason=self.finish_reason or "length",
            logprobs=list(self._logprobs) if self.params.logprobs is not None else None,
            usage=Usage(len(self.prompt), len(self.output), self.cached_tokens, self._drafted, self._accepted),
            timing=Timing(
                self._first - self._begin,
                self._end - self._first,
                steps=max(0, self._steps - 1),
                tokens=max(0, self._chosen - 1),
            ),
            seed=self.seed,
        )

    def _finish(self, reason: str) -> None:
        self._put(self._decoder.finish() + self._matcher.flush())
        self._lookup = None
        self.finish_reason = reason  # last: whoever sees it finds all of the text

    def _put(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._new.append(text)


class Stream(Iterator[str]):
    """The pieces of an answer as they come; `completion` has the result, so far or whole."""

    def __init__(self, step: Callable[[], None], request: Request) -> None:
        self._step = step
        self._request = request

    def __next__(self) -> str:
        request = self._request
        try:
            while True:
                ended = request.finished  # asked first: another thread may put in the last text and end it meanwhile
                request.report()
                text = request.take()
                if text:
                    return text
                if ended:
                    break
                self._step()
        except BaseException:
            request.cancel()  # an error of the caller's own callback, or Ctrl-C: the other requests go on
            raise
        if request.error is not None:
            raise request.error
        raise StopIteration

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Stops generating. What came so far stays in `completion`."""
        self._request.cancel()

    @property
    def completion(self) -> Completion:
        """The result so far; the whole one when the stream has ended."""
        return self._request.completion()
