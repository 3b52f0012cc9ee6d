# SPDX-License-Identifier: Apache-2.0
"""Runs measures on engines that take turns: which fit into memory together, who is open, what failed and why."""

from __future__ import annotations

import base64
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cnllama import bench
from cnllama.bench import Measure, Sample, Work
from peers.base import OVERHEAD, Spec
from peers.client import Client, PeerError

OURS, OUR_MODULE = "cnllama", "cnl"
SETTLE_SECONDS = 0.05  # for the threads of a library to fall asleep after their work
READ_CHUNK = 1 << 24


@dataclass(frozen=True)
class Settings:
    """How it is measured. macs: of a token in the layers and in the output matrix; min_seconds: of a timed round."""

    threads: int
    text: str
    min_seconds: float
    memory_prompt: int
    available: int
    macs: tuple[int, int]


def need(specs: Sequence[Spec], positions: int, idle: Sequence[Spec] = ()) -> int:
    """Bytes that these engines take together with `positions` of cache each, and `idle` ones with none.

    A file that two of them map counts once.
    """
    everyone = [*specs, *idle]
    mapped = {spec.mapped: spec.file_bytes for spec in everyone if spec.mapped is not None}
    private = sum(spec.private + OVERHEAD for spec in everyone)
    return sum(mapped.values()) + private + sum(spec.kv * positions for spec in specs)


def waves(specs: Sequence[Spec], positions: int, available: int) -> tuple[list[list[Spec]], list[Spec]]:
    """(groups that fit into `available` bytes at once, engines that never fit).

    This project is in every group, so that each other engine is compared with it in the same rounds.
    """
    ours: list[Spec] = []
    too_large: list[Spec] = []
    for spec in specs:
        if spec.module == OUR_MODULE:
            (ours if need([*ours, spec], positions) <= available else too_large).append(spec)
    groups, group = [], list(ours)
    for spec in specs:
        if spec.module == OUR_MODULE:
            continue
        if need([*ours, spec], positions) > available:
            too_large.append(spec)
            continue
        if need([*group, spec], positions) > available:
            groups.append(group)
            group = list(ours)
        group.append(spec)
    if group:
        groups.append(group)
    return groups, too_large


def divergence(logits: np.ndarray, others: np.ndarray) -> float:
    """Kullback-Leibler divergence, nats, of the distribution of `others` from that of `logits`."""
    p, q = (x.astype(np.float64) - x.max() for x in (logits, others))
    p, q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
    return float(np.sum(np.exp(p) * (p - q)))


class Session:
    """The workers of one run. skipped: {"name", "reason", "measure" or None} of what could not be measured."""

    def __init__(self, specs: Sequence[Spec], settings: Settings, say: Callable[[str], None]) -> None:
        self.specs = list(specs)
        self.skipped: list[dict[str, Any]] = []
        self.facts: dict[str, dict[str, Any]] = {}
        self._settings = settings
        self._say = say
        self._clients: dict[str, Client] = {}  # least recently used first

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        for client in self._clients.values():
            client.kill() if error is not None else client.close()
        self._clients.clear()

    # --- starting, in processes that do nothing else

    def start(self, rounds: int, prompt: int) -> list[dict[str, Any]]:
        """Load time, time to first token, memory and agreement of every engine, each alone on the machine."""
        records: dict[str, list[dict[str, float]]] = {spec.name: [] for spec in self.specs}
        ends: dict[str, dict[str, Any]] = {}
        for turn in range(rounds):
            for spec in list(self.specs):
                if need([spec], self._settings.memory_prompt + bench.STEPS) > self._settings.available:
                    self._drop_too_large(spec, None)
                    continue
                self._say(f"start {turn + 1}/{rounds}: {spec.name}")
                try:
                    record, end = self._start_once(spec, prompt, last=turn == rounds - 1)
                except PeerError as error:
                    self._drop(spec, str(error))
                    continue
                records[spec.name].append(record)
                ends[spec.name] = end
        first = ends.get(OURS, {}).pop("logits", None)
        return [
            self._start_row(spec, records[spec.name], ends[spec.name], first if spec.name != OURS else None)
            for spec in self.specs
        ]

    def _start_once(self, spec: Spec, prompt: int, last: bool) -> tuple[dict[str, float], dict[str, Any]]:
        if spec.mapped is not None:
            warm_page_cache(spec.mapped)
        client = Client(spec, self._settings.threads)
        try:
            record = client.call("first", options=spec.options, tokens=prompt)
            record["process_to_first_s"] = time.perf_counter() - client.started
            end: dict[str, Any] = {}
            if last:
                end["logits"] = client.call("logits", tokens=prompt)
                end["memory"] = client.call(
                    "memory", tokens=self._settings.memory_prompt, steps=bench.STEPS, path=spec.options["model"]
                )
            client.close()
        except BaseException:
            client.kill()
            raise
        return record, end

    def _start_row(
        self, spec: Spec, records: list[dict[str, float]], end: dict[str, Any], ours: str | None
    ) -> dict[str, Any]:
        memory = end.get("memory")
        if memory is not None:
            kv = spec.kv * (self._settings.memory_prompt + bench.STEPS)
            memory |= {"kv": kv, "besides": max(0, memory["resident"] - memory["mapped"] - kv)}
        row = {"engine": spec.name, "memory": memory, "divergence": None}
        for name in ("load_s", "open_to_first_s", "process_to_first_s"):
            row[name] = [record[name] for record in records]
        if ours is not None and end.get("logits") is not None:
            p, q = (np.frombuffer(base64.b64decode(x), "<f4") for x in (ours, end["logits"]))
            row["divergence"] = divergence(p, q) if p.shape == q.shape else None
        return row

    # --- measures, engines taking turns

    def run(self, measure: Measure, rounds: int, deadline: float | None) -> list[dict[str, Any]]:
        """One measure on every engine that fits; rows in the order of the engines. deadline: on time.monotonic."""
        positions = (measure.context + measure.room) * measure.batch
        groups, too_large = waves(self.specs, positions, self._settings.available)
        for spec in too_large:
            self._drop_too_large(spec, measure)
        groups.sort(key=lambda group: -sum(spec.name in self._clients for spec in group))  # reload as little as can be
        found: dict[str, list[Sample]] = {}
        ratios: dict[str, list[float]] = {}
        for index, group in enumerate(groups):
            now = time.monotonic()
            end = None if deadline is None else now + (deadline - now) / (len(groups) - index)
            samples = self._run_group(group, measure, rounds, end)
            for spec in group:
                found.setdefault(spec.name, []).extend(samples.get(spec.name, []))
                if spec.module != OUR_MODULE:
                    pairs = zip(samples.get(spec.name, []), samples.get(spec.against, []), strict=False)
                    ratios[spec.name] = [theirs / ours for (theirs, _), (ours, _) in pairs]
        return [
            self._row(spec, measure, found[spec.name], ratios.get(spec.name, []))
            for spec in self.specs
            if found.get(spec.name)
        ]

    def _run_group(
        self, group: list[Spec], measure: Measure, rounds: int, end: float | None
    ) -> dict[str, list[Sample]]:
        self._make_room(group, (measure.context + measure.room) * measure.batch)
        ready = [spec for spec in group if self._prepare(spec, measure)]
        if not ready:
            return {}
        limit = bench.limit_of(measure)
        begin = time.monotonic()

        def enough(done: int) -> bool:
            now = time.monotonic()
            self._say(f"{measure.name}: {done}/{rounds} rounds")
            return end is not None and now + (now - begin) / done > end

        runs = {spec.name: partial(self._time, spec, measure) for spec in ready}
        samples = bench.interleave(runs, lambda: limit(self._settings.threads), rounds, enough)
        for spec in ready:
            if spec.name in self._clients:
                self._ask(spec, measure, "release")
        return samples

    def _row(self, spec: Spec, measure: Measure, samples: list[Sample], ratios: list[float]) -> dict[str, Any]:
        facts = self.facts[spec.name]
        work = Work(spec.weights, spec.kv, *self._settings.macs)
        row = bench.summarize(measure, samples, work, facts["chars_per_token"]) | {"engine": spec.name}
        row["against"] = spec.against if ratios else None
        row["ours_to_this"] = statistics.median(ratios) if ratios else None
        row["ours_to_this_min"], row["ours_to_this_max"] = (min(ratios), max(ratios)) if ratios else (None, None)
        return row

    def _time(self, spec: Spec, measure: Measure) -> float | None:
        seconds = self._settings.min_seconds
        if measure.kind == "prefill":
            found = self._ask(spec, measure, "prefill", tokens=measure.size, min_seconds=seconds)
        else:
            found = self._ask(spec, measure, "decode", steps=measure.steps, batch=measure.batch, min_seconds=seconds)
        time.sleep(SETTLE_SECONDS)
        return None if found is None else float(found)

    def _prepare(self, spec: Spec, measure: Measure) -> bool:
        self._say(f"{measure.name}: preparing {spec.name}")
        if spec.name not in self._clients and not self._open(spec):
            return False
        self._clients[spec.name] = self._clients.pop(spec.name)  # now the most recently used
        filled = self._ask(spec, measure, "fill", context=measure.context, room=measure.room, batch=measure.batch)
        return filled is not None

    def _open(self, spec: Spec) -> bool:
        try:
            client = self._clients[spec.name] = Client(spec, self._settings.threads)
            facts = client.call("open", options=spec.options, text=self._settings.text)
        except PeerError as error:
            self._close(spec)
            self._drop(spec, str(error))
            return False
        facts["chars_per_token"] = self._chars_per_token(facts)
        self.facts[spec.name] = facts
        return True

    def _chars_per_token(self, facts: dict[str, Any]) -> float | None:
        """Of the engine's tokenizer, or of this project's where it has none and as large a vocabulary."""
        tokens, ours = facts["text_tokens"], self.facts.get(OURS)
        if tokens:
            return bench.count_chinese(self._settings.text) / float(tokens)
        return ours["chars_per_token"] if ours and ours["vocab_size"] == facts["vocab_size"] else None

    def _ask(self, spec: Spec, measure: Measure, op: str, **arguments: Any) -> Any:
        """The answer (True for none), or None when the engine failed: it is closed then and opened again later."""
        try:
            answer = self._clients[spec.name].call(op, **arguments)
        except PeerError as error:
            self._close(spec)
            self._note(spec, str(error), measure)
            return None
        return True if answer is None else answer

    # --- memory and failures

    def _make_room(self, group: list[Spec], positions: int) -> None:
        """Closes the least recently used of the others until all that is open fits."""
        for name in list(self._clients):
            idle = [spec for spec in self.specs if spec.name in self._clients and spec not in group]
            if need(group, positions, idle) <= self._settings.available:
                return
            if name in {spec.name for spec in idle}:
                self._close(next(spec for spec in idle if spec.name == name))

    def _close(self, spec: Spec) -> None:
        client = self._clients.pop(spec.name, None)
        if client is not None:
            client.close()

    def _drop_too_large(self, spec: Spec, measure: Measure | None) -> None:
        positions = (measure.context + measure.room) * measure.batch if measure else 0
        with_ours = [s for s in self.specs if s.module == OUR_MODULE and measure is not None and s is not spec]
        needed, have = need([*with_ours, spec], positions) / 2**30, self._settings.available / 2**30
        beside = f" beside {OURS}" if with_ours else ""
        reason = f"it needs {needed:.1f} GiB{beside} and {have:.1f} GiB can be had"
        if measure is None:
            self._drop(spec, reason)
        else:
            self._note(spec, reason, measure)

    def _drop(self, spec: Spec, reason: str) -> None:
        self.specs.remove(spec)
        self._note(spec, reason, None)

    def _note(self, spec: Spec, reason: str, measure: Measure | None) -> None:
        self._say(f"skipped: {spec.name}: {reason}")
        self.skipped.append({"name": spec.name, "reason": reason, "measure": measure.name if measure else None})


def warm_page_cache(path: Path) -> None:
    """Reads a file once, so that loading it afterwards reads no disk."""
    if path.is_file():
        with path.open("rb", buffering=0) as file:
            while file.read(READ_CHUNK):
                pass
