# SPDX-License-Identifier: Apache-2.0
"""cnllama run: one prompt, the answer streamed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cnllama.cli.options import add_model_options, add_sampling_options, describe, open_model, sampling_changes
from cnllama.errors import InputError, os_errors_explained
from cnllama.start import INTERRUPTED
from cnllama.stdio import say, to_json
from cnllama.textio import decode_argument, decode_text, read_limited, read_text_file, tr

if TYPE_CHECKING:
    from cnllama.llm import LLM
    from cnllama.request import Completion, Stream

HELP = tr("answer one prompt, streamed", "回答一个提示，流式输出")
PATIENCE = 2.0  # seconds that a prompt may take without a progress bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cnllama run`."""
    parser.add_argument(
        "-p",
        "--prompt",
        type=decode_argument,
        metavar="TEXT",
        help=tr("the prompt; without it, what is piped in", "提示；不给则读管道输入"),
    )
    parser.add_argument(
        "-f", "--file", metavar="FILE", help=tr("prompt from a file, UTF-8 or GBK", "从文件读提示，UTF-8 或 GBK")
    )
    add_model_options(parser)
    add_sampling_options(parser)
    group = parser.add_argument_group(tr("output", "输出"))
    group.add_argument(
        "--logprobs", type=int, metavar="K", help=tr("log probabilities, with --json", "对数概率，与 --json 同用")
    )
    group.add_argument("--stats", action="store_true", help=tr("speed, on stderr", "在标准错误输出速度"))
    group.add_argument("--json", action="store_true", help=tr("one JSON object instead of text", "输出一个 JSON 对象"))


def run(args: argparse.Namespace) -> int:
    """Returns 0, or 130 after Ctrl-C."""
    if args.logprobs is not None and not args.json:
        raise InputError(tr("--logprobs needs --json", "--logprobs 需要 --json"))
    prompt = _read_prompt(args)
    with open_model(args) as llm:
        messages = [{"role": "user", "content": prompt}]
        if args.system is not None:
            messages.insert(0, {"role": "system", "content": args.system})
        with prefill_progress() as progress:
            stream = llm.stream(messages, progress=progress, logprobs=args.logprobs, **sampling_changes(args))
            if not args.json:
                say(describe(llm))
            interrupted = _print_stream(stream, quiet=args.json)
        completion = stream.completion
        reason = "interrupted" if interrupted else completion.finish_reason
        figures = _figures(llm, completion, args.stats) if args.stats or args.json or interrupted else {}
        if args.json:
            print(to_json(_as_json(llm, completion, reason, figures)))
        elif figures:
            _print_stats(completion, reason, figures)
        return INTERRUPTED if interrupted else 0


class prefill_progress:  # noqa: N801
    """A progress bar for prompts that take long, on a terminal only."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._begin = time.monotonic()

    def __enter__(self) -> Callable[[int, int], None]:
        return self._update

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _update(self, done: int, total: int) -> None:
        if self._bar is None:
            if done == total or time.monotonic() - self._begin < PATIENCE or not sys.stderr.isatty():
                return
            from tqdm import tqdm  # here: importing it takes as long as a short answer

            self._bar = tqdm(total=total, desc=tr("prompt", "提示"), unit="tok", leave=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.file is not None:
        raise InputError(tr("-p and -f exclude each other: give one prompt", "-p 与 -f 不能同时使用：只给一个提示"))
    if args.prompt is not None:
        return str(args.prompt)
    if args.file is not None:
        return read_text_file(args.file)
    name = tr("standard input", "标准输入")
    with os_errors_explained(name):
        piped = b"" if sys.stdin.isatty() else read_limited(sys.stdin.buffer, name)
    if not piped:
        raise InputError(
            tr(
                'there is no prompt: give one with -p "...", with -f FILE, or pipe it in',
                '没有提示：请用 -p "……"、-f 文件或管道输入',
            )
        )
    return decode_text(piped, name).removesuffix("\n")


def _print_stream(stream: Stream, quiet: bool) -> bool:
    """Prints the pieces as they come. Returns whether Ctrl-C ended it."""
    last = "\n"
    try:
        for piece in stream:
            if not quiet:
                print(piece, end="", flush=True)
                last = piece
    except KeyboardInterrupt:
        if not quiet:
            print(flush=True)
        return True
    if not quiet and not last.endswith("\n"):
        print(flush=True)
    return False


def _figures(llm: LLM, completion: Completion, bandwidth: bool) -> dict[str, Any]:
    from cnllama.stats import measure

    return measure(llm, completion, bandwidth)


def _print_stats(completion: Completion, reason: str, figures: dict[str, Any]) -> None:
    from cnllama.stats import table

    names = {"stop": tr("the answer was complete", "回答完毕"), "interrupted": tr("interrupted", "已中断")}
    cut = tr("cut at the limit of tokens, -n or --ctx", "到达词元数上限（-n 或 --ctx）")
    say(*table(figures).split("\n"))
    say(tr("finish", "结束") + f": {reason} ({names.get(reason, cut)}) · seed {completion.seed}")


def _as_json(llm: LLM, completion: Completion, reason: str, figures: dict[str, Any]) -> dict[str, Any]:
    usage = completion.usage
    result: dict[str, Any] = {
        "model": str(llm.path),
        "template": llm.template.name,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": reason,
        "seed": completion.seed,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "stats": figures,
    }
    if completion.logprobs is not None:
        result["logprobs"] = [
            {"token": p.token, "piece": llm.tokenizer.piece(p.token), "logprob": p.logprob, "top": p.top}
            for p in completion.logprobs
        ]
    return result
