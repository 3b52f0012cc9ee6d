# SPDX-License-Identifier: Apache-2.0
"""Decode with and without `--speculate lookup`, turn by turn on one open model.

    python bench/lookup.py model.cnl
    python bench/lookup.py model.cnl --rounds 9 --tokens 200 --threads 1
    python bench/lookup.py model.cnl --records instructions.jsonl --count 200

First what a step of several tokens costs, in steps of one, which bounds what guessing can gain. Then answers. Some are
spoken: the sampler works as always and is then overruled by a given text, so that a model of random weights shows what
a real one would gain that gives this answer to this prompt. Others are the model's own. Ratios are medians of the
rounds, each of which decodes the same tokens both ways, and it is checked that they are the same. With --records the
answers are those of instruction records ("instruction", "input", "output"), spoken; a ratio is of one answer then.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnllama import LLM, SamplingParams, _core
from cnllama.request import Stream

TEXT = (Path(__file__).resolve().parent / "sample_text.txt").read_text(encoding="utf-8").splitlines()
PASSAGE, OTHER = "\n".join(TEXT[:11]), "\n".join(TEXT[14:24])
CHANGES = {
    "老人": "爷爷",
    "孩子们": "学生们",
    "小城": "古镇",
    "夏天": "初夏",
    "银杏": "梧桐",
    "语言模型": "程序",
    "简单": "容易",
}
STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # tokens of a step


def rewritten(text):
    """The text with a word replaced here and there, as an editor would."""
    for old, new in CHANGES.items():
        text = text.replace(old, new)
    return text


@dataclass(frozen=True)
class Case:
    """A prompt and the answer that is spoken, or None for the model's own."""

    name: str
    prompt: str
    answer: str | None
    sampling: dict


CASES = (
    Case("spoken: quotes its prompt", "请把下面的文章原样抄写一遍:\n" + PASSAGE, PASSAGE, {}),
    Case("spoken: edits its prompt", "请修改下面的文章:\n" + PASSAGE, rewritten(PASSAGE), {}),
    Case("spoken: something new", "请读下面的文章,再写一篇别的:\n" + PASSAGE, OTHER, {}),
    Case("own, greedy: asked to quote", "请把下面的文章原样抄写一遍:\n" + PASSAGE, None, {"temperature": 0.0}),
    Case("own, greedy: asked freely", "请写一首关于春天的诗。", None, {"temperature": 0.0}),
    Case("own, temperature 0.8", "请写一首关于春天的诗。", None, {"temperature": 0.8, "top_p": 0.95}),
)


class Spoken:
    """A sampler that says given tokens, at the price of a real one."""

    def __init__(self, sampler, tokens):
        self._sampler, self._tokens = sampler, iter(tokens)

    def sample(self, logits, banned, logprobs):
        """The next token of the text."""
        _, logprob, top = self._sampler.sample(logits, banned, logprobs)
        return next(self._tokens), logprob, top


def step_costs(llm, rounds, context=256):
    """Seconds of a step by its number of tokens, after `context` positions: {tokens: [one for each round]}."""
    rng = np.random.default_rng(0)
    context = min(context, llm.context - max(STEPS))
    ids = rng.integers(3, llm.vocab_size, context + max(STEPS), dtype=np.int32)
    sequence = llm.engine.open()
    for begin in range(0, context, llm.engine.max_step_tokens):
        llm.engine.step([(sequence, ids[begin : min(context, begin + llm.engine.max_step_tokens)], False)])
    seconds = {tokens: [] for tokens in STEPS}
    for _ in range(rounds + 1):
        for tokens in STEPS:
            begin = time.perf_counter()
            llm.engine.step([(sequence, ids[context : context + tokens], True)])
            seconds[tokens].append(time.perf_counter() - begin)
            llm.engine.trim(sequence, context)
    llm.engine.close(sequence)
    return {tokens: values[1:] for tokens, values in seconds.items()}


def decode(llm, case, tokens, speculate):
    """The finished answer, decoded with or without speculation; both find the prompt in the cache or neither does."""
    llm.speculate = speculate
    ids = llm.prompt_ids(case.prompt)
    answer = llm.tokenize(case.answer)[:tokens] if case.answer is not None else None
    limit = min(tokens, llm.context - len(ids)) if answer is None else len(answer)
    request = llm._request(ids, SamplingParams(max_tokens=limit, ignore_eos=True, seed=1, **case.sampling), None)
    if answer is not None:
        request._sampler = Spoken(request._sampler, answer)
    for _ in Stream(llm._step, request):
        pass
    return request.completion()


def compare(llm, case, tokens, rounds):
    """[(tokens a second without, with, the answer with)], one for each round."""
    results = []
    for i in range(rounds):
        done = {}
        for speculate in (None, "lookup") if i % 2 else ("lookup", None):
            done[speculate] = decode(llm, case, tokens, speculate)
        plain, guessed = done[None], done["lookup"]
        if plain.token_ids != guessed.token_ids:
            sys.exit(f"wrong result: {case.name} differs with speculation")
        rates = [answer.timing.tokens / answer.timing.decode for answer in (plain, guessed)]
        results.append((*rates, guessed))
    return results


def report(case, results):
    """One line of the table."""
    ratios = [guessed / plain for plain, guessed, _ in results]
    plain, guessed = (statistics.median(result[i] for result in results) for i in (0, 1))
    answer = results[-1][2]
    usage, timing = answer.usage, answer.timing
    print(
        f"| {case.name} | {timing.tokens} | {usage.accepted_tokens} of {usage.drafted_tokens} | "
        f"{timing.tokens / max(1, timing.steps):.2f} | {plain:.1f} | {guessed:.1f} | {statistics.median(ratios):.2f} | "
        f"{min(ratios):.2f} - {max(ratios):.2f} |",
        flush=True,
    )


def read_records(path, count):
    """Cases of up to `count` records, evenly over the file, with an input and without."""
    with open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    for name, wanted in (("with an input", True), ("without one", False)):
        chosen = [r for r in records if bool(r.get("input")) == wanted and len(r["output"]) >= 30]
        for record in chosen[:: max(1, len(chosen) // count)][:count]:
            prompt = record["instruction"] + "\n" + record.get("input", "")
            yield Case(f"records {name}", prompt, record["output"], {})


def report_records(llm, cases, tokens):
    """One line for each kind of records: all tokens over all seconds, and how the ratios of answers lie."""
    print("| records | answers | tokens | ratio | least | 5 % | median | 95 % |\n|" + "---|" * 8)
    for name in dict.fromkeys(case.name for case in cases):
        ratios, done, seconds = [], 0, [0.0, 0.0]
        for case in (case for case in cases if case.name == name):
            if len(llm.prompt_ids(case.prompt)) + tokens > llm.context:
                continue
            rounds = compare(llm, case, tokens, 2)[1:]  # the first has the prompt to run, at the cost of the caches
            for plain, guessed, answer in rounds:
                ratios.append(guessed / plain)
                done += answer.timing.tokens
                seconds = [seconds[0] + answer.timing.tokens / plain, seconds[1] + answer.timing.tokens / guessed]
        ratios.sort()
        marks = " | ".join(f"{ratios[round(q * (len(ratios) - 1))]:.2f}" for q in (0, 0.05, 0.5, 0.95))
        print(f"| {name} | {len(ratios)} | {done} | {seconds[0] / seconds[1]:.3f} | {marks} |", flush=True)


def main():
    """Parses the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .cnl file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--threads", type=int, default=0, help="default: as the engine chooses")
    parser.add_argument("--cases", default="", help="words that the names of the cases to run hold")
    parser.add_argument("--records", metavar="FILE", help="instruction records (JSON lines) instead")
    parser.add_argument("--count", type=int, default=100, help="records of each kind")
    args = parser.parse_args()
    with LLM(args.model, ctx=1024, threads=args.threads, template="raw") as llm:
        print(f"{_core.cpu_info()['model']}, {_core.isa()}, {llm.threads} threads, {llm.path.name}\n")
        seconds = step_costs(llm, args.rounds)
        costs = [statistics.median(s / one for s, one in zip(seconds[m], seconds[1], strict=True)) for m in STEPS]
        print("| tokens of a step | " + " | ".join(map(str, STEPS)) + " |\n|" + "---|" * (len(STEPS) + 1))
        print("| steps of one | " + " | ".join(f"{cost:.2f}" for cost in costs) + " |\n")
        if args.records:
            report_records(llm, list(read_records(args.records, args.count)), args.tokens)
            return
        print("| answer | tokens | guessed right | tokens a step | tok/s without | with | ratio | spread |")
        print("|---|---|---|---|---|---|---|---|")
        for case in CASES:
            if args.cases in case.name:
                report(case, compare(llm, case, args.tokens, args.rounds))


if __name__ == "__main__":
    main()
