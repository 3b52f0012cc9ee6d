# SPDX-License-Identifier: Apache-2.0
"""A small language of our own to train on: sentences from a grammar, held-out ones never shown."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import models

WHEN = ("春天", "夏天", "秋天", "冬天", "清晨", "黄昏", "夜里", "中午")
WHERE = ("山上", "河边", "村里", "城外", "桥下", "湖中", "林间", "院子里")
WHO = ("老人", "孩子", "渔夫", "书生", "燕子", "白马", "姑娘", "将军")
WHAT = ("唱着歌", "看着月亮", "等着朋友", "走得很慢", "喝着热茶", "想念家乡", "听着雨声", "数着星星")
ENGLISH = ("the old man", "a small child", "the grey cat", "my brother", "the doctor", "a young girl")
DOES = ("walks to", "looks at", "sleeps near", "dreams of", "comes from", "sings about")
PLACE = ("the river", "the old house", "a green hill", "the town", "the sea", "a quiet garden")
POEM = {"title": "山行", "author": "杜牧", "dynasty": "唐", "paragraphs": ["远上寒山石径斜，", "白云生处有人家。"]}


def chinese() -> list[str]:
    """4,096 different sentences in a fixed order."""
    sentences = [f"{a}，{b}的{c}{d}。" for a, b, c, d in itertools.product(WHEN, WHERE, WHO, WHAT)]
    random.Random(1).shuffle(sentences)
    return sentences


def questions() -> list[dict[str, str]]:
    """Instructions whose answers follow from them: 512 in a fixed order."""
    records = [
        {"instruction": f"{where}的{who}在做什么？", "input": what, "output": f"{who}在{where}{what}。"}
        for where, who, what in itertools.product(WHERE, WHO, WHAT)
    ]
    random.Random(2).shuffle(records)
    return records


def write_data(directory: Path) -> Path:
    """The files that recipes/tiny.toml names."""
    directory.mkdir(parents=True, exist_ok=True)
    english = [f"{a.capitalize()} {b} {c}." for a, b, c in itertools.product(ENGLISH, DOES, PLACE)]
    random.Random(3).shuffle(english)
    lines = {"en.txt": english, "zh.txt": chinese()[:600], "zh_eval.txt": chinese()[-100:]}
    for name, sentences in lines.items():
        # four sentences make a document
        documents = ["\n".join(sentences[i : i + 4]) for i in range(0, len(sentences), 4)]
        (directory / name).write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    records = questions()
    for name, part in (("sft.jsonl", records[:400]), ("sft_eval.jsonl", records[-40:])):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in part)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """The records, one a line; returns `path`."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def pairs(count: int) -> list[dict[str, str]]:
    """Instructions with answers of different lengths."""
    return [{"instruction": f"问题{i}", "input": "", "output": f"回答{i}" * (1 + i % 7)} for i in range(count)]


def small_base(directory: Path, data: Path) -> Path:
    """A checkpoint of hidden 64 and 2 layers with a tokenizer of the training text, weights as trained ones have."""
    tokenizer = models.train_tokenizer((data / "zh.txt").read_text().splitlines(), 420)
    config = models.small_config(models.piece_count(tokenizer), hidden_size=64, intermediate_size=128)
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    tensors = {name: value * 0.3 if value.ndim == 2 else value for name, value in models.random_tensors(config).items()}
    return models.make_llama(directory, tokenizer, tensors=tensors, dtype="float32", **config)
