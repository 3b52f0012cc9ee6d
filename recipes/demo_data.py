# SPDX-License-Identifier: Apache-2.0
"""Data that the demo recipe makes from the poems: the best-known ones apart, drills on them, requests for quatrains.

`python demo_data.py --poems FILE --more FILE --couplets FILE -o DIR` writes famous.jsonl and couplets.jsonl (poems),
drills.jsonl, couplet_drills.jsonl and quatrains.jsonl (instructions) and prompts.txt (the words of the template).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cnllama.files import make_directory, write_file
from cnllama.templates import get_template

SEED = 20240501
COLLECTED = 330  # the file begins with the poems of the well-known collections
NEXT = ("“{0}”的下一句是什么？", "请写出“{0}”的下一句。", "接下一句：{0}，", "补全下一句：{0}，")
PREVIOUS = ("“{0}”的上一句是什么？", "请写出“{0}”的上一句。")
RECITE = (
    "请写出{dynasty}代诗人{author}的《{title}》全文。",
    "背诵{author}的《{title}》。",
    "请背诵《{title}》。",
    "请默写{author}的《{title}》",
)
QUATRAIN = (
    "写一首关于{0}的{1}",
    "请写一首关于{0}的{1}。",
    "以“{0}”为主题写一首{1}。",
    "写一首{1}，主题是{0}。",
    "写一首{0}的{1}",
)
ANY_POEM = (
    "写一首关于{0}的诗",
    "写一首关于{0}的诗。",
    "请写一首关于{0}的诗。",
    "以“{0}”为题写一首诗。",
    "写一首{0}的诗",
)
TOPICS = {
    "春天": "春 芳菲", "夏天": "夏 暑 蝉", "秋天": "秋", "冬天": "冬 寒 雪", "月亮": "月",
    "明月": "明月", "雪": "雪", "梅花": "梅", "菊花": "菊", "荷花": "荷 莲", "桃花": "桃花",
    "柳树": "柳", "竹子": "竹", "松树": "松", "兰花": "兰", "山水": "山水", "高山": "青山 高山 万山",
    "江河": "江 河", "大海": "海", "湖水": "湖", "瀑布": "瀑", "雨": "雨", "春雨": "春雨",
    "风": "东风 春风 清风 西风", "云": "白云 孤云", "夜晚": "夜", "黄昏": "夕阳 黄昏 斜阳",
    "早晨": "晓 清晨", "思乡": "故乡 乡关 归心 故园", "送别": "送君 别离 离别 送别",
    "友情": "故人 知己", "离别": "离别 别离", "边塞": "塞 关山 胡", "战争": "战 将军",
    "田园": "田 村 桑", "隐居": "隐 柴门", "饮酒": "酒 醉", "读书": "书", "寺庙": "寺 僧", "钟声": "钟",
    "鸟": "鸟", "燕子": "燕", "大雁": "雁", "黄莺": "莺", "马": "马", "渔夫": "渔", "樵夫": "樵",
    "落花": "落花", "相思": "相思", "怀古": "千古 旧时 当年", "登高": "登 高楼 高台", "旅途": "客 行人",
    "孤独": "独", "长安": "长安", "江南": "江南", "西湖": "西湖", "故宫": "宫", "草": "芳草 草色",
    "茶": "茶", "琴": "琴", "梦": "梦", "船": "舟 船", "星星": "星", "石头": "石", "重阳": "重阳 九日",
    "中秋": "中秋", "清明": "清明 寒食", "除夕": "除夜 除夕", "老人": "白头 白发", "美人": "美人",
    "神仙": "仙",
}  # fmt: skip

Poem = dict[str, Any]


def read_poems(path: Path) -> list[Poem]:
    """Records of a poems file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_couplets(path: Path) -> list[tuple[str, str]]:
    """(upper line, lower line) of a list with tabs."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [(upper, lower) for upper, lower, *_ in lines]


def verses(poem: Poem) -> list[tuple[str, str]]:
    """(line, its punctuation mark)."""
    return re.findall(r"([^，。！？；：、]+)([，。！？；：、])", "".join(poem["paragraphs"]))


def drills(poem: Poem, pairs: set[tuple[str, str]] | None = None) -> Iterator[tuple[str, str]]:
    """(instruction, answer) on one poem; with `pairs`, only on lines that follow each other in these."""
    lines = verses(poem)
    for (upper, _), (lower, mark) in itertools.pairwise(lines):
        if pairs is not None and (upper, lower) not in pairs:
            continue
        end = mark if mark in "。！？" else "。"
        yield from ((text.format(upper), lower + end) for text in NEXT)
        if pairs is None:
            yield from ((text.format(lower), upper + "，") for text in PREVIOUS)
    if pairs is None:
        whole = "\n".join(poem["paragraphs"])
        yield from ((text.format(**poem), whole) for text in RECITE)
        yield (
            f"《{poem['title']}》的作者是谁？",
            f"《{poem['title']}》的作者是{poem['dynasty']}代诗人{poem['author']}。",
        )


def quatrains(poems: Iterable[Poem], chosen: random.Random) -> Iterator[tuple[str, str]]:
    """Requests for a quatrain on a topic that the poem has a word of."""
    words = {topic: found.split() for topic, found in TOPICS.items()}
    for poem in poems:
        if poem["form"] not in ("五言绝句", "七言绝句"):
            continue
        text = "".join(poem["paragraphs"])
        topics = [topic for topic, found in words.items() if any(word in text for word in found)]
        if not topics:
            continue
        topic = chosen.choice(topics)
        request = chosen.choice(QUATRAIN) if chosen.random() < 0.8 else chosen.choice(ANY_POEM)
        yield request.format(topic, poem["form"]), "\n".join(poem["paragraphs"])


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """JSON lines."""
    write_file(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())


def instructions(pairs: Iterable[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """Records of an instruction file, without repetitions."""
    return ({"instruction": asked, "input": "", "output": answer} for asked, answer in dict.fromkeys(pairs))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--poems", type=Path, required=True)
    parser.add_argument("--more", type=Path, required=True)
    parser.add_argument("--couplets", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    make_directory(args.output)
    poems, more, couplets = read_poems(args.poems), read_poems(args.more), read_couplets(args.couplets)
    wanted = set(couplets)

    def has_couplet(poem: Poem) -> bool:
        lines = [line for line, _ in verses(poem)]
        return any(pair in wanted for pair in itertools.pairwise(lines))

    best = [poem for poem in more + poems if has_couplet(poem)]
    famous = best + [poem for poem in poems[:COLLECTED] if not has_couplet(poem)]
    write(args.output / "famous.jsonl", famous)
    write(args.output / "couplets.jsonl", best)
    write(args.output / "drills.jsonl", instructions(pair for poem in famous for pair in drills(poem)))
    write(args.output / "couplet_drills.jsonl", instructions(pair for poem in best for pair in drills(poem, wanted)))
    write(args.output / "quatrains.jsonl", instructions(quatrains(poems, random.Random(SEED))))
    template = get_template("alpaca")
    words = "".join(part for part in template.first if isinstance(part, str)).format(system=template.system, user="")
    write_file(args.output / "prompts.txt", ("\n\n".join([words.replace("\n", " ")] * 3000) + "\n").encode())
    found = {pair for poem in best for pair in itertools.pairwise(line for line, _ in verses(poem))}
    print(f"{args.output}: {len(famous)} famous poems, {len(wanted & found)} of {len(wanted)} couplets")


if __name__ == "__main__":
    main()
