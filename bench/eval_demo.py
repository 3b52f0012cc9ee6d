# SPDX-License-Identifier: Apache-2.0
"""Measures the demo model: `python bench/eval_demo.py --model FILE.cnl --data DIR [--base DIR --lora DIR...]`.

Held-out perplexity per character, packed and (with --base) in float32; the form of 100 sampled quatrains; the next line
of 100 well-known couplets; answers to ten ordinary instructions as they are. Needs transformers only for --base.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnllama import LLM
from cnllama.adapt.reading import ReadLog, read_conversations, read_documents
from cnllama.arguments import add_list_option
from cnllama.eval.texts import windows
from cnllama.templates import encode_chat

COUPLETS = Path(__file__).resolve().parent.parent / "tests" / "demo_couplets.tsv"
SETS = ("poems.jsonl", "zh_prose.txt", "en_prose.txt", "open_zh.jsonl")
WINDOW = 256  # tokens: the length that the model was trained at
FORMS = {"五言绝句": 5, "七言绝句": 7}
TOPICS = [
    "春天",
    "夏天",
    "秋天",
    "冬天",
    "月亮",
    "雪",
    "梅花",
    "菊花",
    "荷花",
    "桃花",
    "柳树",
    "竹子",
    "松树",
    "山水",
    "高山",
    "江河",
    "大海",
    "湖水",
    "瀑布",
    "雨",
    "风",
    "云",
    "夜晚",
    "黄昏",
    "早晨",
    "思乡",
    "送别",
    "友情",
    "离别",
    "边塞",
    "战争",
    "田园",
    "隐居",
    "饮酒",
    "读书",
    "寺庙",
    "钟声",
    "燕子",
    "大雁",
    "马",
    "渔夫",
    "落花",
    "相思",
    "登高",
    "旅途",
    "孤独",
    "长安",
    "江南",
    "西湖",
    "茶",
]
INSTRUCTIONS = (
    "你好",
    "你是谁？",
    "介绍一下你自己。",
    "写一首关于春天的诗",
    "背诵李白的《静夜思》。",
    "“春眠不觉晓”的下一句是什么？",
    "请补全歇后语：孔夫子搬家——",
    "计算：23＋45＝？",
    "中国的首都是哪里？",
    "杜甫是谁？",
)

Score = Callable[[Sequence[int]], np.ndarray[Any, np.dtype[np.float32]]]
Sample = tuple[list[int], int, int]  # ids, where the scored part begins, characters


def samples(llm: LLM, path: Path) -> Iterator[Sample]:
    """What a set is scored on: documents in windows, or answers after their prompts where they fit into one.

    Without end tokens, which spell no character.
    """
    tokenizer, log = llm.tokenizer, ReadLog()
    if path.name.startswith("open_zh"):
        for _, messages in read_conversations(path, log):
            prompt = encode_chat(llm.template, tokenizer, messages[:-1])
            answer = messages[-1]["content"]
            ids = [*prompt, *tokenizer.encode(answer)]
            if len(ids) <= WINDOW:
                yield ids, len(prompt), len(answer)
        return
    for window in windows(tokenizer, list(read_documents(path, log)), WINDOW - 1, WINDOW - 1):
        yield [*window.ids, window.targets[-1]], window.begin + 1, window.characters


def perplexity(score: Score, parts: Sequence[Sample]) -> float:
    """exp(negative log likelihood per character)."""
    total, characters = 0.0, 0
    for ids, begin, count in parts:
        logits = score(ids)[begin - 1 : -1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(ids) - begin), ids[begin:]]
        total -= float((chosen - np.log(np.exp(logits).sum(axis=1))).sum())
        characters += count
    return math.exp(total / characters)


def float_scores(base: Path, adapters: list[Path]) -> Score:
    """Logits of the merged model in float32, by transformers."""
    import torch
    from cnllama.convert.pack import make_plan, merged_tensors
    from transformers import LlamaConfig, LlamaForCausalLM

    plan = make_plan(base, adapters)
    config = LlamaConfig.from_pretrained(base)
    config.vocab_size, config.tie_word_embeddings = plan.config["vocab_size"], plan.config["tie_word_embeddings"]
    model = LlamaForCausalLM(config).float().eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in merged_tensors(plan):
            parameters[name].copy_(torch.from_numpy(values))

    def score(ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        with torch.no_grad():
            return model(torch.tensor([list(ids)])).logits[0].numpy()  # type: ignore[no-any-return]

    return score


def lines_of(text: str) -> list[str]:
    """Lines of a poem without their punctuation marks."""
    return [line for line in re.split(r"[，。！？；：、\s]+", text) if line]


def keeps_form(text: str, width: int) -> bool:
    """Exactly four lines of `width` characters, none twice."""
    lines = lines_of(text)
    return len(lines) == 4 and all(len(line) == width for line in lines) and len(set(lines)) == 4


def quatrains(llm: LLM, temperature: float, seed: int) -> dict[str, Any]:
    """Fifty topics in two forms; what broke the form is listed."""
    broken = []
    for number, (topic, form) in enumerate((topic, form) for topic in TOPICS for form in FORMS):
        request = f"写一首关于{topic}的{form}"
        answer = llm.generate(request, temperature=temperature, seed=seed + number, max_tokens=96)[0].text
        if not keeps_form(answer, FORMS[form]):
            broken.append({"request": request, "answer": answer})
    return {"kept": 2 * len(TOPICS) - len(broken), "of": 2 * len(TOPICS), "broken": broken}


def couplets(llm: LLM) -> dict[str, Any]:
    """Greedy completion of the lines in tests/demo_couplets.tsv."""
    rows = [line.split("\t") for line in COUPLETS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    wrong = []
    for upper, lower, *_ in rows:
        answer = llm.generate(f"“{upper}”的下一句是什么？", temperature=0, max_tokens=32)[0].text
        if lines_of(answer) != [lower]:
            wrong.append({"line": upper, "expected": lower, "answer": answer})
    seen = sum(row[4] != "no" for row in rows)
    return {"right": len(rows) - len(wrong), "of": len(rows), "in_training_data": seen, "wrong": wrong}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, printed as it comes."""
    llm = LLM(args.model, threads=args.threads)
    report: dict[str, Any] = {"model": llm.path.name, "bytes": llm.path.stat().st_size}
    if args.data is not None:
        exact = float_scores(args.base, args.lora) if args.base else None
        report["perplexity_per_character"] = {}
        for name in SETS:
            parts = list(samples(llm, args.data / "eval" / name))
            row: dict[str, float] = {"samples": len(parts), "packed": perplexity(llm.logits, parts)}
            text = f"{name:<16}{len(parts):6} samples  packed {row['packed']:.4f}"
            if exact is not None:
                row["float32"] = perplexity(exact, parts)
                row["difference"] = row["packed"] / row["float32"] - 1
                text += f"  float32 {row['float32']:.4f}  difference {row['difference']:+.2%}"
            print(text, flush=True)
            report["perplexity_per_character"][name] = row
    report["quatrains"] = quatrains(llm, args.temperature, args.seed)
    print("form of quatrains kept: {kept} of {of}".format_map(report["quatrains"]), flush=True)
    report["couplets"] = couplets(llm)
    print("next lines right: {right} of {of}, {in_training_data} in the training data".format_map(report["couplets"]))
    report["answers"] = {}
    for instruction in INSTRUCTIONS:
        answer = llm.generate(instruction, seed=args.seed, max_tokens=160)[0].text
        report["answers"][instruction] = answer
        print(f"\n> {instruction}\n{answer}")
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure the demo model.")
    parser.add_argument("--model", type=Path, help="a .cnl (default: the bundled one)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder with eval/")
    parser.add_argument("--base", type=Path, metavar="DIR", help="the checkpoint that was packed, for float32")
    add_list_option(parser, "--lora", type=Path, metavar="DIR", help="and its adapters")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it")
    args = parser.parse_args()
    report = measure(args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
