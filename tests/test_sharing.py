# SPDX-License-Identifier: Apache-2.0
"""One LLM, several threads and processes: every caller gets his own text and his own errors, and nothing hangs."""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import start, wait

from cnllama import LLM, CnllamaError, SamplingParams, _core
from cnllama.format import open_cnl
from cnllama.request import Request, Stream
from cnllama.scheduler import Scheduler, SlotPool

LONG = {"temperature": 0.9, "max_tokens": 40, "ignore_eos": True}
PROMPTS = ("从前有一个", "春天", "写一首诗", "明月")
SECONDS = 60


@pytest.fixture(scope="module")
def llm(tiny_cnl: Path) -> Iterator[LLM]:
    with LLM(tiny_cnl, ctx=512, threads=2, max_sequences=3) as llm:
        yield llm


def alone(path: Path, prompt: str, seed: int) -> str:
    """The text of a request that nobody disturbs."""
    with LLM(path, ctx=512, threads=1) as llm:
        return llm.generate(prompt, seed=seed, **LONG)[0].text


def within(work: Callable[[], Any]) -> Any:
    """The result of `work`, in a thread that must come to an end."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=SECONDS)


# ---- streams under several threads


def test_a_thousand_streams_lose_no_text(llm: LLM) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def streams(thread: int) -> list[tuple[str, str]]:
        found = []
        for i in range(250):
            stream = llm.stream(PROMPTS[thread], temperature=0.9, seed=1000 * thread + i, max_tokens=3, ignore_eos=True)
            text = "".join(stream)
            found.append((text, stream.completion.text))
        return found

    try:
        with ThreadPoolExecutor(4) as pool:
            results = [pair for pairs in pool.map(streams, range(4), timeout=SECONDS) for pair in pairs]
    finally:
        sys.setswitchinterval(before)
    assert len(results) == 1000
    assert all(text == whole for text, whole in results)


class _Meanwhile(Request):
    """Another thread puts in the last text and ends the request right after `take` or `finished` has looked."""

    moment = ""

    def take(self) -> str:
        text = super().take()
        self._other_thread("take")
        return text

    @property
    def finished(self) -> bool:
        ended = super().finished
        self._other_thread("finished")
        return ended

    def _other_thread(self, moment: str) -> None:
        if self.moment == moment:
            self.moment = ""
            self._put("the last words")
            self._finish("stop")


@pytest.mark.parametrize("moment", ["take", "finished"])
def test_text_that_comes_between_two_looks_is_not_lost(moment: str, llm: LLM) -> None:
    request = _Meanwhile([1], SamplingParams(), llm.tokenizer.stream(), limit=9, ends=frozenset(), banned=[], stop=[])
    request.moment = moment
    stream = Stream(lambda: None, request)
    assert "".join(stream) == stream.completion.text == "the last words"


def test_closing_ends_the_streams_of_other_threads(tiny_cnl: Path) -> None:
    llm = LLM(tiny_cnl, ctx=4096, threads=1, max_sequences=2)

    def read() -> str:
        try:
            return f"whole {len(''.join(llm.stream('从前', temperature=1.5, max_tokens=4000, ignore_eos=True)))}"
        except CnllamaError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(read) for _ in range(4)]
        time.sleep(0.1)
        llm.close()
        llm.close()
        assert {future.result(timeout=SECONDS) for future in running} == {"this LLM was closed: open the file again"}


# ---- a caller's exception is the caller's own


class _Own(BaseException):
    pass


@pytest.mark.parametrize(
    "error", [ValueError("mine"), RuntimeError("mine"), KeyboardInterrupt(), SystemExit(3), _Own()]
)
@pytest.mark.parametrize("stepped_by", ["its caller", "the neighbour"])
def test_an_error_of_a_callback_ends_its_request_only(
    error: BaseException, stepped_by: str, llm: LLM, tiny_cnl: Path
) -> None:
    def fail(done: int, total: int) -> None:
        raise error

    good = llm.stream("春天", seed=1, **LONG)
    text = next(good)
    bad = llm.stream("从前有一个", progress=fail)
    if stepped_by == "the neighbour":
        text += "".join(good)
    with pytest.raises(type(error)) as caught:
        next(bad)
    assert caught.value is error
    assert "".join(bad) == bad.completion.text  # what came before, and no more
    assert text + "".join(good) == alone(tiny_cnl, "春天", 1)


def test_interrupts_at_random_moments_leave_the_neighbour_whole(llm: LLM, tiny_cnl: Path) -> None:
    expected = {seed: alone(tiny_cnl, "春天", seed) for seed in range(3)}
    chance = random.Random(1)
    main = threading.main_thread().ident
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupted = 0
    try:
        for round_ in range(40):
            good = llm.stream("春天", seed=round_ % 3, **LONG)
            bad = llm.stream("从前有一个", seed=1, **LONG)
            text = next(good)
            timer = threading.Timer(chance.uniform(0.0, 0.006), signal.pthread_kill, (main, signal.SIGINT))
            try:
                timer.start()
                list(bad)
                timer.join()
                time.sleep(0.001)
            except KeyboardInterrupt:
                interrupted += 1
            timer.join()
            assert text + "".join(good) == expected[round_ % 3]
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted > 20


def test_only_what_the_engine_refuses_blames_the_file(llm: LLM) -> None:
    class Engine:
        max_step_tokens = 64

        def open(self, rope_length: int) -> int:
            return 0

        def close(self, sequence: int) -> None: ...

        def trim(self, sequence: int, length: int) -> None: ...

        def step(self, batch: Any) -> np.ndarray:
            return np.full((1, llm.vocab_size), np.nan, np.float32)

    def request() -> Request:
        return Request([1], SamplingParams(), llm.tokenizer.stream(), limit=9, ends=frozenset(), banned=[], stop=[])

    engine: Any = Engine()
    scheduler = Scheduler(engine, SlotPool(engine, 1), explain=lambda error: CnllamaError(f"{error}; check the file"))
    first, second = request(), request()
    scheduler.add(first, 9)
    scheduler.add(second, 9)
    for waiting in (first, second):
        stream = Stream(scheduler.step, waiting)
        with pytest.raises(CnllamaError, match="the logit of token 0 is not a number; check the file"):
            next(stream)


# ---- callbacks that come back


@pytest.mark.parametrize(
    "call",
    [
        lambda llm, stream: llm.generate("秋", max_tokens=5),
        lambda llm, stream: llm.chat([{"role": "user", "content": "秋"}], max_tokens=5),
        lambda llm, stream: list(llm.stream("秋", max_tokens=5, progress=lambda done, total: llm.logits([1, 2]))),
        lambda llm, stream: llm.logits([1, 2, 3]),
        lambda llm, stream: llm.close(),
        lambda llm, stream: next(stream),
        lambda llm, stream: stream.close(),
        lambda llm, stream: stream.completion,
    ],
    ids=["generate", "chat", "stream", "logits", "close", "next", "close the stream", "completion"],
)
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_callback_may_call_anything(call: Callable[[LLM, Stream], object], sequences: int, tiny_cnl: Path) -> None:
    def work() -> str:
        with LLM(tiny_cnl, ctx=512, threads=1, max_sequences=sequences) as llm:
            streams: list[Stream] = []
            streams.append(
                llm.stream("写诗" * 100, progress=lambda done, total: call(llm, streams[0]), max_tokens=8, seed=1)
            )
            try:
                return "".join(streams[0])
            except CnllamaError as error:
                return str(error)

    text = within(work)
    assert isinstance(text, str)
    assert "bug" not in text


# ---- processes


def in_a_fork(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child, or the sentence of its error."""
    context = multiprocessing.get_context("fork")
    reading, writing = context.Pipe(duplex=False)

    def send() -> None:
        try:
            writing.send(work())
        except BaseException as error:
            writing.send(f"{type(error).__name__}: {error}")

    child = context.Process(target=send)
    child.start()
    child.join(SECONDS)
    hangs = child.is_alive()
    if hangs:
        child.kill()
    assert not hangs, "the child hangs"
    assert child.exitcode == 0
    return reading.recv()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_forked_child_answers(threads: int, tiny_cnl: Path) -> None:
    with LLM(tiny_cnl, ctx=256, threads=threads, max_sequences=2) as llm:
        expected = llm.generate("春天", seed=1, **LONG)[0].text
        running = llm.stream("春天", seed=1, **LONG)
        first = next(running)

        def child() -> tuple[str, str, str]:
            closed = ""
            texts = llm.generate("春天", seed=1, **LONG)[0].text, first + "".join(running)
            llm.close()
            try:
                llm.generate("x")
            except CnllamaError as error:
                closed = str(error)
            return *texts, closed

        assert in_a_fork(child) == (expected, expected, "this LLM was closed: open the file again")
        assert first + "".join(running) == expected
        assert in_a_fork(lambda: in_a_fork(lambda: llm.generate("春天", seed=1, **LONG)[0].text)) == expected
        assert llm.generate("春天", seed=1, **LONG)[0].text == expected


def test_a_fork_while_other_threads_run(tiny_cnl: Path) -> None:
    with LLM(tiny_cnl, ctx=512, threads=2, max_sequences=2) as llm:
        expected = llm.generate("春天", seed=1, **LONG)[0].text
        done = threading.Event()

        def busy() -> int:
            count = 0
            while not done.is_set():
                assert llm.generate("春天", seed=1, **LONG)[0].text == expected
                count += 1
            return count

        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(busy) for _ in range(2)]
            for _ in range(10):
                assert in_a_fork(lambda: llm.generate("春天", seed=1, **LONG)[0].text) == expected
            done.set()
            assert sum(future.result(timeout=SECONDS) for future in running) > 0


def test_an_engine_forked_in_the_middle_of_a_step_says_so(tiny_cnl: Path) -> None:
    file = open_cnl(tiny_cnl)
    engine = _core.Engine(file.config, file.engine_tensors(), threads=2, context=2048, max_step_tokens=2048)
    engine.open()
    ids = np.ones(2000, np.int32)
    step = threading.Thread(target=lambda: engine.step([(0, ids, True)]))
    step.start()
    step.join(0.01)  # it has begun, and takes longer
    found = in_a_fork(lambda: engine.length(0))
    step.join()
    assert found == 2000 or "forked in the middle of a step: open the model again in the child" in str(found)
    assert engine.length(0) == 2000


# ---- the raw engine


def test_a_raw_engine_in_several_threads(tiny_cnl: Path) -> None:
    file = open_cnl(tiny_cnl)
    engine = _core.Engine(file.config, file.engine_tensors(), threads=2, context=256, max_sequences=6)
    texts = [np.random.default_rng(i).integers(3, 300, 40, dtype=np.int32) for i in range(4)]
    single = _core.Engine(file.config, file.engine_tensors(), threads=1, context=256)
    expected = []
    for ids in texts:
        sequence = single.open()
        expected.append(single.step([(sequence, ids, True)]))
        single.close(sequence)

    def run(i: int) -> None:
        for _ in range(15):
            sequence = engine.open()
            for begin in range(0, 40, 8):
                found = engine.step([(sequence, texts[i][begin : begin + 8], True)])
                np.testing.assert_array_equal(found, expected[i][begin : begin + 8])
            assert engine.length(sequence) == 40
            engine.trim(sequence, 16)
            found = engine.step([(sequence, texts[i][16:], False)])
            np.testing.assert_array_equal(found[0], expected[i][-1])
            engine.close(sequence)
            assert engine.memory()["weights"] > 0

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4), timeout=SECONDS))


def test_ids_that_change_during_a_step_do_no_harm(tiny_cnl: Path) -> None:
    file = open_cnl(tiny_cnl)
    engine = _core.Engine(file.config, file.engine_tensors(), threads=1, context=512)
    sequence = engine.open()
    ids = np.ones(200, np.int32)
    expected = engine.step([(sequence, ids, False)])
    done = threading.Event()

    def scribble() -> None:
        while not done.is_set():
            ids[:] = 2**31 - 1
            ids[:] = 1

    writer = threading.Thread(target=scribble)
    writer.start()
    try:
        for _ in range(50):
            engine.trim(sequence, 0)
            try:
                found = engine.step([(sequence, ids, False)])
            except ValueError:
                continue  # the copy was made of the wrong moment
            assert found.shape == expected.shape
    finally:
        done.set()
        writer.join()


# ---- threads that cannot be started


def _little_room() -> None:
    import resource

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))  # a thread takes 8 MiB of addresses


@pytest.mark.parametrize("verb", ["run", "convert"])
def test_threads_that_cannot_be_started_are_one_sentence(
    verb: str, tiny_cnl: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    arguments = (
        ("run", "-p", "x", "-m", tiny_cnl)
        if verb == "run"
        else ("convert", tiny_llama, "-o", tmp_path / "x.cnl", "--quantizer", "rtn")
    )
    room = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = start(*arguments, "--threads", 1000, preexec_fn=_little_room, env=room)
    _, err = wait(process, b"")
    assert process.returncode == 1, err
    assert b"1000 threads cannot be started" in err
    assert len(err.splitlines()) == 1
