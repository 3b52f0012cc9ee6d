# SPDX-License-Identifier: Apache-2.0
"""Trains a SentencePiece vocabulary on text or JSON files, with LLaMA's settings unless told otherwise."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cnllama.adapt.reading import POEM_TEMPLATE, ReadLog, check_files, format_of, read_documents, template_fields
from cnllama.errors import CnllamaError, InputError

# The settings of LLaMA's own vocabulary, so that pieces of both split text alike.
LLAMA_DEFAULTS: Mapping[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.9995,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "max_sentence_length": 16384,
}
_SENTENCE_END = re.compile(r"(?<=[。！？；!?;])")
# "I0000 00:00:1700000000.123456   1234 bpe_model_trainer.cc:421] ..." or "trainer_interface.cc(557) LOG(INFO) ..."
_LOG_PREFIX = re.compile(r"^(?:[IWEF]\d{4} .*?\.cc:\d+\]|\S+\.cc\(\d+\) LOG\(\w+\)) ")
_REASON = re.compile(r"^(?:\w+: )?(?:src/)?\S+\.cc\(\d+\) \[[^\]]*\]\s*")


def train_tokenizer(
    files: Sequence[Path],
    vocab_size: int,
    *,
    form: str | None = None,
    template: str = POEM_TEMPLATE,
    options: Mapping[str, Any] | None = None,
    progress: bool = False,
    log: ReadLog | None = None,
) -> bytes:
    """A SentencePiece model of `vocab_size` pieces trained on all files; returns the bytes of tokenizer.model.

    form: "txt", "jsonl" or "json" instead of what the names say. options: of SentencePieceTrainer by their names, over
    LLAMA_DEFAULTS; `random_seed` makes sampling of sentences repeatable. log: collects the lines that were left out.
    Raises InputError for unreadable or empty files and with SentencePiece's own reason for options it refuses.
    """
    if vocab_size < 1:
        raise InputError(f"the vocabulary size is {vocab_size}, expected a positive number")
    check_files(files)
    template_fields(template)
    for path in files:
        format_of(path, form)
    settings = {**LLAMA_DEFAULTS, **(options or {}), "vocab_size": vocab_size}
    log = ReadLog() if log is None else log
    sentences = _sentences(files, log, form, template, int(settings["max_sentence_length"]))
    first = next(sentences, None)
    if first is None:
        reason = f"all {log.count:,} lines are bad, the first is {log.listed[0]}" if log.count else "they hold no text"
        raise InputError(f"{', '.join(map(str, files))}: {reason}")
    return _run(files, settings, itertools.chain([first], sentences), log, progress=progress)


def _sentences(files: Sequence[Path], log: ReadLog, form: str | None, template: str, limit: int) -> Iterator[bytes]:
    """Lines of at most `limit` bytes; SentencePiece would leave longer ones out."""
    for path in files:
        for document in read_documents(path, log, template, form):
            for line in document.split("\n"):
                data = line.encode("utf-8")
                if len(data) <= limit:
                    yield data
                else:
                    yield from (part.encode("utf-8") for part in _cut(line, limit))


def _cut(line: str, limit: int) -> Iterator[str]:
    """Pieces of a long line, cut after sentences where that is possible."""
    held = ""
    for sentence in _SENTENCE_END.split(line):
        if held and len((held + sentence).encode("utf-8")) > limit:
            yield held
            held = ""
        held += sentence
        while len(held.encode("utf-8")) > limit:
            head = held.encode("utf-8")[:limit].decode("utf-8", "ignore")
            yield head
            held = held[len(head) :]
    if held:
        yield held


def _run(
    files: Sequence[Path],
    settings: Mapping[str, Any],
    sentences: Iterable[bytes],
    log: ReadLog,
    *,
    progress: bool,
) -> bytes:
    """Feeds the worker and waits for its model, with a bar for reading, then its own words on how far it is."""
    from tqdm import tqdm

    command = [sys.executable, "-m", "cnllama.adapt.sentencepiece_worker", json.dumps(settings)]
    total = sum(path.stat().st_size for path in files)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stderr is not None
        words: list[str] = []
        model: list[bytes] = []
        try:
            listener = threading.Thread(target=_listen, args=(worker.stderr, words), daemon=True)
            listener.start()
            reader = threading.Thread(target=_take, args=(worker.stdout, model), daemon=True)
            reader.start()  # a pipe that nobody reads would fill up
            with tqdm(total=total, unit="B", unit_scale=True, desc="read", disable=not progress) as bar:
                _feed(worker.stdin, sentences, lambda: bar.update(log.bytes_read - bar.n))
            with tqdm(desc="train", bar_format="{desc}: {elapsed}{postfix}", disable=not progress) as bar:
                while listener.is_alive():
                    listener.join(0.2)
                    bar.set_postfix_str(words[-1][:60] if words else "")
            code = worker.wait()
        except BaseException:
            worker.kill()
            raise
        if code:
            raise _failure(code, words[-1] if words else "")
        reader.join()
        return model[0]


def _feed(stdin: IO[bytes], sentences: Iterable[bytes], advance: Callable[[], object]) -> None:
    """Writes the sentences, one a line; a worker that has ended says why on stderr."""
    try:
        for sentence in sentences:
            stdin.write(sentence + b"\n")
            advance()
    except BrokenPipeError:
        pass
    finally:
        with contextlib.suppress(BrokenPipeError):
            stdin.close()


def _take(stdout: IO[bytes], model: list[bytes]) -> None:
    model.append(stdout.read())


def _listen(stderr: IO[bytes], words: list[str]) -> None:
    """Keeps the last line of SentencePiece's log, without its prefix."""
    for line in stderr:
        text = _LOG_PREFIX.sub("", line.decode("utf-8", "replace")).strip()
        if text:
            words[:] = [text]


def _failure(code: int, line: str) -> CnllamaError:
    """The end of a worker that failed: an option or data it refused, or its being killed."""
    if code == 1 and line:
        reason = _REASON.sub("", line).strip() or line
        return InputError(f"SentencePiece refuses: {reason}")
    return CnllamaError(
        f"SentencePiece ended with code {code}{f' ({line:.200})' if line else ''}; if memory ran out, "
        "lower --input-sentence-size"
    )
