# SPDX-License-Identifier: Apache-2.0
"""Training data from files: which are read, how their documents and conversations become tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnllama.adapt.datasets import BlockDataset, ChatDataset
from cnllama.adapt.reading import (
    FORMATS,
    POEM_TEMPLATE,
    ReadLog,
    check_files,
    format_of,
    read_conversations,
    read_documents,
    template_fields,
)
from cnllama.adapt.tokenfile import Entry, FileReport, Vocabulary, token_file
from cnllama.errors import InputError
from cnllama.paths import is_dir
from cnllama.templates import Template, Token, encode_chat, get_template
from cnllama.tokenizer import Tokenizer

_MAX_REPEAT = 1000


@dataclass(frozen=True)
class Source:
    """A data file. repeat: how often an epoch shows it: 3 all of it thrice, 0.25 another quarter in each epoch.

    template: how a JSON record without "text" becomes a document, `reading.POEM_TEMPLATE` by default.
    """

    path: Path
    repeat: float = 1.0
    template: str = POEM_TEMPLATE


def prepare_text(
    sources: Sequence[Source],
    vocabulary: Vocabulary,
    cache: Path,
    *,
    block_size: int = 512,
    seed: int = 0,
    shuffle: bool = True,
    progress: bool = False,
) -> BlockDataset:
    """Pre-training blocks of corpus files (.txt, .jsonl, .json); each document is framed by BOS and EOS.

    Tokens lie in the directory `cache` and are made once. Raises InputError for unreadable or empty files.
    """
    check_sources(sources)
    if block_size < 2:
        raise InputError(f"the block size is {block_size}, expected at least 2")
    files = []
    for source in sources:
        template_fields(source.template)
        options = {"kind": "text", "template": source.template}

        def produce(log: ReadLog, _: FileReport, source: Source = source) -> Iterator[Entry]:
            for document in read_documents(source.path, log, source.template):
                yield Entry(vocabulary.tokenizer.encode(document, bos=True, eos=True), len(document))

        files.append(token_file(source.path, cache, vocabulary, options, produce, progress=progress))
    return BlockDataset(files, [source.repeat for source in sources], block_size, seed, shuffle)


def prepare_chat(
    sources: Sequence[Source],
    vocabulary: Vocabulary,
    cache: Path,
    *,
    template: str = "alpaca",
    max_length: int = 512,
    seed: int = 0,
    shuffle: bool = True,
    step_items: int = 0,
    progress: bool = False,
) -> ChatDataset:
    """Instruction samples of .jsonl or .json files: the ids are those that the run time makes of the same messages.

    Every answer of a conversation becomes a sample whose prompt is all before it; where that is too long, the oldest
    turns go first and the end of the answer last. Raises InputError for unreadable or empty files.
    """
    check_sources(sources)
    chosen = chat_template(template)
    if max_length < 2:
        raise InputError(f"the maximum length is {max_length}, expected at least 2")
    options = {"kind": "chat", "template": repr(chosen), "max_length": max_length}
    files = []
    for source in sources:

        def produce(log: ReadLog, report: FileReport, source: Source = source) -> Iterator[Entry]:
            for _, messages in read_conversations(source.path, log):
                yield from chat_samples(messages, chosen, vocabulary.tokenizer, max_length, report)

        files.append(token_file(source.path, cache, vocabulary, options, produce, progress=progress))
    return ChatDataset(files, [source.repeat for source in sources], seed, shuffle, step_items)


def chat_samples(
    messages: Sequence[Mapping[str, str]], template: Template, tokenizer: Tokenizer, max_length: int, report: FileReport
) -> Iterator[Entry]:
    """A sample for every answer in `messages`; cut and unusable ones are counted in `report`."""
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns = list(messages[len(system) :])
    end = _end_token(template, tokenizer)
    for last in range(1, len(turns), 2):
        answer = turns[last]["content"]
        answer_ids = [*tokenizer.encode(answer), end]
        for first in range(0, last, 2):
            prompt = encode_chat(template, tokenizer, [*system, *turns[first:last]])
            if len(prompt) + len(answer_ids) <= max_length:
                break
        if len(prompt) >= max_length:
            report.masked += 1
            continue
        ids = (prompt + answer_ids)[:max_length]
        report.truncated += first > 0 or len(prompt) + len(answer_ids) > max_length
        yield Entry(ids, len(answer), [0] * len(prompt) + [1] * (len(ids) - len(prompt)))


def _end_token(template: Template, tokenizer: Tokenizer) -> int:
    """What follows an answer: the token that the template ends it with, EOS where that is none or unknown."""
    last = template.answer[-1]
    named = tokenizer.special_id(last.name) if isinstance(last, Token) and last.name not in ("bos", "eos") else None
    return tokenizer.eos_id if named is None else named


def check_sources(
    sources: Sequence[Source], held_out: Sequence[Source] = (), forms: Sequence[str] = tuple(FORMATS.values())
) -> None:
    """Raises InputError for files that cannot be of these forms by their names, and for repeats that cannot be."""
    if not sources:
        raise InputError("there is no data file; give at least one")
    for source in (*sources, *held_out):
        if not 0 < source.repeat <= _MAX_REPEAT:
            raise InputError(
                f"{source.path}: its repeat is {source.repeat:g}, expected a number over 0 and at most {_MAX_REPEAT}; "
                "--epochs and --max-steps show the data more often"
            )
        if is_dir(source.path):
            check_files([source.path])
        if format_of(source.path) not in forms:
            raise InputError(f"{source.path}: a text file holds no instructions, expected .jsonl or .json")


def chat_template(name: str) -> Template:
    """A prompt template to train on. Raises InputError for one that does not tell prompt from answer."""
    chosen = get_template(name)
    if not chosen.fresh_answer:
        raise InputError(f"the template {name!r} does not tell prompt from answer; choose alpaca, alpaca-2 or chatml")
    return chosen
