# SPDX-License-Identifier: Apache-2.0
"""Training data: what is read, how it is cut, in which order it comes, and what is said about bad lines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import models
import numpy as np
import pytest
import sentencepiece
from adapt_data import POEM, pairs, write_jsonl

from cnllama.adapt.data import Source, prepare_chat, prepare_text
from cnllama.adapt.datasets import IGNORED, BlockDataset, ChatDataset
from cnllama.adapt.tokenfile import Vocabulary, open_vocabulary
from cnllama.errors import InputError
from cnllama.templates import encode_chat, get_template


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    models.write_tokenizer(directory, tokenizer_model)
    return directory


@pytest.fixture(scope="module")
def vocabulary(tokenizer_directory: Path) -> Vocabulary:
    return open_vocabulary(tokenizer_directory)


# blocks


def expected_stream(model: bytes, documents: list[str]) -> list[int]:
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [i for text in documents for i in [sp.bos_id(), *sp.encode(text), sp.eos_id()]]


def test_blocks_in_order_are_the_documents_between_bos_and_eos(
    tmp_path: Path, vocabulary: Vocabulary, tokenizer_model: bytes
) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.jsonl"
    documents = models.sample_lines()
    first.write_text("\n\n".join(documents), encoding="utf-8")
    write_jsonl(second, [{"text": text} for text in reversed(documents)])
    data = prepare_text([Source(first), Source(second, 2)], vocabulary, tmp_path / "c", block_size=33, shuffle=False)
    stream = expected_stream(tokenizer_model, documents + documents[::-1] * 2)
    assert data.tokens == len(stream)
    assert len(data) == -(-len(stream) // 33)
    got = np.concatenate([data[i]["input_ids"] for i in range(len(data))])
    assert got.dtype == np.int64
    assert got[: len(stream)].tolist() == stream
    assert np.array_equal(data[3]["labels"], data[3]["input_ids"])
    left = len(stream) % 33
    assert left > 1
    assert data[len(data) - 1]["labels"].tolist() == stream[-left:] + [IGNORED] * (33 - left)
    assert [data.size(len(data) - 2), data.size(len(data) - 1)] == [33, left]
    with pytest.raises(IndexError):
        data[len(data)]


def test_an_epoch_shows_every_document_whole_in_a_new_repeatable_order(
    tmp_path: Path, vocabulary: Vocabulary, tokenizer_model: bytes
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in models.sample_lines()])
    # A single token at the end has nothing to predict.
    data = prepare_text([Source(path)], vocabulary, tmp_path, block_size=2, seed=5)
    same = prepare_text([Source(path)], vocabulary, tmp_path, block_size=2, seed=5)
    stream = expected_stream(tokenizer_model, models.sample_lines())
    epochs = []
    for epoch in range(3):
        data.set_epoch(epoch)
        same.set_epoch(epoch)
        blocks = [tuple(data[i]["input_ids"]) for i in range(len(data))]
        assert blocks == [tuple(same[i]["input_ids"]) for i in range(len(same))]
        left = np.bincount(stream, minlength=1000) - np.bincount(np.concatenate(blocks), minlength=1000)
        assert left.sum() == len(stream) % 2
        assert left.min() >= 0
        epochs.append(blocks)
    assert epochs[0] != epochs[1] != epochs[2]
    other = prepare_text([Source(path)], vocabulary, tmp_path, block_size=2, seed=6)
    assert [tuple(other[i]["input_ids"]) for i in range(len(other))] != epochs[0]


def test_tokens_are_made_once_and_again_when_anything_changes(
    tmp_path: Path, vocabulary: Vocabulary, tokenizer_directory: Path
) -> None:
    path, cache = write_jsonl(tmp_path / "a.jsonl", [POEM] * 30), tmp_path / "cache"

    def prepare(vocabulary: Vocabulary = vocabulary, template: str = "{title}\n{paragraphs}") -> BlockDataset:
        return prepare_text([Source(path, template=template)], vocabulary, cache, block_size=8)

    def stems() -> set[str]:
        return {file.stem for file in cache.glob("*.json")}

    first = prepare()
    times = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert prepare().reports[0] == first.reports[0]
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == times
    prepare(template="{title}")
    assert len(stems()) == 2
    prepare(dataclasses.replace(vocabulary, sha256="another"))
    assert len(stems()) == 3
    write_jsonl(path, [POEM] * 31)
    assert prepare().reports[0].entries == 31
    assert len(stems()) == 4


def test_a_damaged_or_unfinished_cache_is_made_again(tmp_path: Path, vocabulary: Vocabulary) -> None:
    path, cache = write_jsonl(tmp_path / "a.jsonl", [POEM] * 30), tmp_path / "cache"
    good = prepare_text([Source(path)], vocabulary, cache, block_size=8)[0]["input_ids"].tolist()
    for pattern, content in (("*.tokens", b"xx"), ("*.json", b"{"), ("*.ends", b""), ("*.json", b'{"report": {}}')):
        next(cache.glob(pattern)).write_bytes(content)
        assert prepare_text([Source(path)], vocabulary, cache, block_size=8)[0]["input_ids"].tolist() == good
    next(cache.glob("*.json")).unlink()
    assert prepare_text([Source(path)], vocabulary, cache, block_size=8)[0]["input_ids"].tolist() == good


def test_token_files_are_16_bits_wide_while_the_vocabulary_allows(tmp_path: Path, vocabulary: Vocabulary) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [POEM] * 30)
    small = prepare_text([Source(path)], dataclasses.replace(vocabulary, size=65536), tmp_path / "a", block_size=8)
    large = prepare_text([Source(path)], dataclasses.replace(vocabulary, size=65537), tmp_path / "b", block_size=8)
    assert small.files[0].tokens.dtype == np.uint16
    assert large.files[0].tokens.dtype == np.uint32
    assert small[1]["input_ids"].tolist() == large[1]["input_ids"].tolist()


# instructions


def test_a_sample_is_the_prompt_of_the_run_time_and_the_answer(tmp_path: Path, vocabulary: Vocabulary) -> None:
    record = {"instruction": "写一首诗", "input": "题目：春天", "output": "春风又绿江南岸。\n明月何时照我还。"}
    path = write_jsonl(tmp_path / "s.jsonl", [record])
    for name in ("alpaca", "alpaca-2", "chatml"):
        data = prepare_chat([Source(path)], vocabulary, tmp_path, template=name)
        message = {"role": "user", "content": "写一首诗\n题目：春天"}
        prompt = encode_chat(get_template(name), vocabulary.tokenizer, [message])
        answer = [*vocabulary.tokenizer.encode(record["output"]), vocabulary.tokenizer.eos_id]
        assert len(data) == 1
        assert data[0]["input_ids"].tolist() == prompt + answer
        assert data[0]["labels"].tolist() == [IGNORED] * len(prompt) + answer


def test_a_template_ends_answers_with_its_own_token(tmp_path: Path, tokenizer_model: bytes) -> None:
    models.write_tokenizer(tmp_path, tokenizer_model)
    size = models.piece_count(tokenizer_model)
    models.write_json(tmp_path / "added_tokens.json", {"<|im_start|>": size, "<|im_end|>": size + 1})
    data = prepare_chat(
        [Source(write_jsonl(tmp_path / "s.jsonl", pairs(1)))], open_vocabulary(tmp_path), tmp_path, template="chatml"
    )
    assert data[0]["labels"][-1] == size + 1


def test_every_answer_of_a_conversation_is_learned_after_all_before_it(tmp_path: Path, vocabulary: Vocabulary) -> None:
    turns = [("你好", "你好！"), ("你是谁", "我是助手。"), ("再见", "再见。")]
    messages = [{"role": "system", "content": "简短回答。"}]
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    path = write_jsonl(tmp_path / "m.jsonl", [{"messages": messages}])
    data = prepare_chat([Source(path)], vocabulary, tmp_path, shuffle=False)
    assert len(data) == 3
    template, tokenizer = get_template("alpaca"), vocabulary.tokenizer
    for i, (_, assistant) in enumerate(turns):
        prompt = encode_chat(template, tokenizer, messages[: 2 * i + 2])
        assert data[i]["input_ids"].tolist() == [*prompt, *tokenizer.encode(assistant), tokenizer.eos_id]
        assert (data[i]["labels"] == IGNORED).sum() == len(prompt)


def test_long_conversations_lose_their_oldest_turns_first(tmp_path: Path, vocabulary: Vocabulary) -> None:
    messages = []
    for i in range(6):
        messages += [{"role": "user", "content": f"第{i}问"}, {"role": "assistant", "content": f"第{i}答"}]
    template, tokenizer = get_template("alpaca"), vocabulary.tokenizer
    answer = [*tokenizer.encode("第5答"), tokenizer.eos_id]
    prompt = encode_chat(template, tokenizer, messages[8:11])
    path = write_jsonl(tmp_path / "m.jsonl", [{"messages": messages}])
    limit = len(prompt) + len(answer)
    data = prepare_chat([Source(path)], vocabulary, tmp_path, shuffle=False, max_length=limit)
    assert data[5]["input_ids"].tolist() == prompt + answer
    assert data.reports[0].truncated == 4
    assert data.reports[0].masked == 0


def test_samples_without_room_for_an_answer_are_counted(tmp_path: Path, vocabulary: Vocabulary) -> None:
    records = [*pairs(3), {"instruction": "长" * 400, "output": "短"}, {"instruction": "短", "output": "长" * 400}]
    data = prepare_chat([Source(write_jsonl(tmp_path / "s.jsonl", records))], vocabulary, tmp_path, max_length=200)
    assert len(data) == 4
    assert (data.reports[0].masked, data.reports[0].truncated) == (1, 1)
    assert max(len(data[i]["input_ids"]) for i in range(4)) == 200
    assert all((data[i]["labels"] != IGNORED).any() for i in range(4))
    lines = "\n".join(data.reports[0].lines())
    assert "1 samples were cut" in lines
    assert "1 samples were skipped" in lines


def test_repeats_and_order_of_samples(tmp_path: Path, vocabulary: Vocabulary) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl", pairs(40)), write_jsonl(tmp_path / "b.jsonl", pairs(8)[4:])
    sources = [Source(first, 0.5), Source(second, 3)]
    data = prepare_chat(sources, vocabulary, tmp_path, seed=3)
    assert len(data) == 20 + 12
    shown = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        shown.append([tuple(data[i]["input_ids"]) for i in range(len(data))])
    assert shown[0] == shown[2] != shown[1]
    thrice = prepare_chat([Source(second)], vocabulary, tmp_path)
    for i in range(4):
        assert all(epoch.count(tuple(thrice[i]["input_ids"])) >= 3 for epoch in shown)


def test_batches_hold_samples_of_like_length(tmp_path: Path, vocabulary: Vocabulary) -> None:
    records = [{"instruction": "重复", "output": "字" * (1 + i * 7 % 90)} for i in range(500)]
    sources = [Source(write_jsonl(tmp_path / "s.jsonl", records))]

    def padded(data: ChatDataset) -> int:
        lengths = [len(data[i]["input_ids"]) for i in range(len(data))]
        return sum(8 * max(lengths[i : i + 8]) for i in range(0, len(lengths), 8))

    plain = prepare_chat(sources, vocabulary, tmp_path)
    grouped = prepare_chat(sources, vocabulary, tmp_path, step_items=8)
    assert padded(grouped) - grouped.tokens < 0.2 * (padded(plain) - plain.tokens)
    items = [sorted(tuple(data[i]["input_ids"]) for i in range(500)) for data in (plain, grouped)]
    assert items[0] == items[1]
    lengths = [len(grouped[i]["input_ids"]) for i in range(0, 496, 8)]
    assert lengths != sorted(lengths)
    assert grouped.lengths().tolist() == [len(grouped[i]["input_ids"]) for i in range(500)]


# refusals


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\n \n", "holds no text"),
        ("a.txt", b"\xff\xff\n", "all 1 lines are bad"),
        ("a.jsonl", b"{}\n", "all 1 lines are bad"),
        ("a.json", b"{}", "expected an array"),
        ("a.json", b"[", "not valid JSON"),
        ("a.csv", b"x", "expected .txt, .jsonl, .json"),
        ("a.txt", b"short", "fewer than one block of 512"),
    ],
)
def test_files_without_a_use_are_refused(
    tmp_path: Path, vocabulary: Vocabulary, name: str, content: bytes, words: str
) -> None:
    path, cache = tmp_path / name, tmp_path / "cache"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        prepare_text([Source(path)], vocabulary, cache)
    assert str(path) in str(caught.value)
    assert not list(cache.glob(".*"))


def test_other_refusals(tmp_path: Path, vocabulary: Vocabulary) -> None:
    text, samples = tmp_path / "a.txt", write_jsonl(tmp_path / "s.jsonl", pairs(2))
    text.write_text("文本", encoding="utf-8")
    for words, call in (
        ("no such file", lambda: prepare_text([Source(tmp_path / "none.txt")], vocabulary, tmp_path)),
        ("directory", lambda: prepare_text([Source(tmp_path)], vocabulary, tmp_path)),
        ("at least one", lambda: prepare_text([], vocabulary, tmp_path)),
        ("repeat is 0", lambda: prepare_text([Source(text, 0)], vocabulary, tmp_path)),
        ("template", lambda: prepare_text([Source(text, template="{a!r}")], vocabulary, tmp_path)),
        ("template", lambda: prepare_text([Source(text, template="{")], vocabulary, tmp_path)),
        ("block size is 1", lambda: prepare_text([Source(text)], vocabulary, tmp_path, block_size=1)),
        ("no instructions", lambda: prepare_chat([Source(text)], vocabulary, tmp_path)),
        ("choose alpaca", lambda: prepare_chat([Source(samples)], vocabulary, tmp_path, template="raw")),
        ("none of 2 samples", lambda: prepare_chat([Source(samples)], vocabulary, tmp_path, max_length=9)),
        ("repeats leave", lambda: prepare_chat([Source(samples, 0.1)], vocabulary, tmp_path)),
        ("no tokenizer.model", lambda: open_vocabulary(tmp_path)),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_a_vocabulary_must_fit_the_rows_of_the_model(tokenizer_directory: Path, vocabulary: Vocabulary) -> None:
    assert open_vocabulary(tokenizer_directory, rows=vocabulary.size).size == vocabulary.size
    with pytest.raises(InputError, match=f"{vocabulary.size} ids but the model {vocabulary.size - 1} rows"):
        open_vocabulary(tokenizer_directory, rows=vocabulary.size - 1)


def test_the_shared_corpus(tmp_path: Path, shared_data: Path) -> None:
    models.write_tokenizer(tmp_path, (shared_data / "tokenizers" / "chinese_alpaca2.model").read_bytes())
    vocabulary = open_vocabulary(tmp_path)
    names = ("eval/poems.jsonl", "eval/zh_prose.txt", "eval/en_prose.txt")
    text = prepare_text([Source(shared_data / name) for name in names], vocabulary, tmp_path)
    assert [report.entries for report in text.reports] == [1188, 63, 8]
    chat = prepare_chat([Source(shared_data / "sft/poem_instructions.jsonl")], vocabulary, tmp_path)
    assert len(chat) == 21245
    assert all(report.bad == 0 for report in (*text.reports, *chat.reports))
