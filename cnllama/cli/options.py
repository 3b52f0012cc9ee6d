# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, and what they make of them."""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING, Any

from cnllama.arguments import add_list_option, add_model_file
from cnllama.errors import InputError
from cnllama.stdio import say
from cnllama.textio import decode_argument, tr

if TYPE_CHECKING:
    from cnllama.llm import LLM


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """FILE or -m, --template, --raw, --system, --ctx, --kv, --threads, --device, --weights, --speculate."""
    group = parser.add_argument_group(tr("model", "模型"))
    text = tr("a .cnl file; default: the bundled model", ".cnl 文件；默认：自带模型")
    add_model_file(parser, "model", text, required=False)
    group.add_argument(
        "--template",
        metavar="NAME",
        help=tr("prompt template instead of the file's: ", "代替文件自带的提示模板：")
        + "alpaca, alpaca-2, chatml, raw",
    )
    group.add_argument(
        "--raw", action="store_true", help=tr("no template, as --template raw", "不用模板，即 --template raw")
    )
    group.add_argument(
        "--system",
        type=decode_argument,
        metavar="TEXT",
        help=tr("system prompt instead of the template's", "代替模板的系统提示"),
    )
    group.add_argument("--ctx", type=int, metavar="N", help=tr("positions of the context", "上下文长度"))
    group.add_argument(
        "--kv", default="fp16", metavar="TYPE", help=tr("type of the cache: fp16 or int8", "缓存类型：fp16 或 int8")
    )
    group.add_argument("--threads", type=int, default=0, metavar="N", help=tr("0: physical cores", "0：物理核数"))
    group.add_argument(
        "--device", default="auto", metavar="NAME", help=tr("cpu, cuda or auto: cpu", "cpu、cuda 或 auto（即 cpu）")
    )
    add_weights_option(group)
    group.add_argument(
        "--speculate",
        metavar="HOW",
        help=tr(
            "lookup: guess from earlier text; the same answer, faster where it repeats",
            "lookup：按前文猜测；答案不变，重复处更快",
        ),
    )


def add_weights_option(parser: argparse._ActionsContainer) -> None:
    """--weights."""
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="WHERE",
        help=tr(
            "map: as the file lies in memory; copy: moved to large pages; auto: what decodes faster",
            "map：文件映射；copy：移入大页；auto：取解码更快者",
        ),
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The fields of SamplingParams; what is not given is the model's default."""
    group = parser.add_argument_group(tr("sampling (defaults: the model's)", "采样（默认值由模型决定）"))
    add = group.add_argument
    add(
        "-n",
        "--max-tokens",
        type=int,
        metavar="N",
        help=tr("tokens to generate; -1: up to the context", "生成的词元数；-1：直到上下文用完"),
    )
    add("--min-tokens", type=int, metavar="N", help=tr("no end before so many", "至少生成的词元数"))
    add(
        "--temp",
        "--temperature",
        type=float,
        dest="temperature",
        metavar="T",
        help=tr("0: the most likely token", "0：总取最可能的词元"),
    )
    add("--top-k", type=int, metavar="K", help=tr("0: all", "0：不限"))
    add("--top-p", type=float, metavar="P", help=tr("1: all", "1：不限"))
    add("--min-p", type=float, metavar="P", help=tr("0: all", "0：不限"))
    add("--repeat-penalty", type=float, metavar="R", help=tr("1: none", "1：不惩罚"))
    add(
        "--repeat-last-n",
        type=int,
        metavar="N",
        help=tr("tokens that the penalty looks back; -1: all", "惩罚回看的词元数；-1：全部"),
    )
    add("--seed", type=int, metavar="S", help=tr("random when not given", "不给则随机"))
    add_list_option(
        group,
        "--stop",
        default=None,
        type=decode_argument,
        metavar="TEXT",
        help=tr("end before these texts", "遇到这些文本即停止"),
    )
    add("--ignore-eos", action="store_true", default=None, help=tr("end tokens end nothing", "忽略结束符"))


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, by their names in SamplingParams."""
    names = (
        "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "seed",
        "stop", "ignore_eos",
    )  # fmt: skip
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if changes.get("max_tokens") == -1:
        changes["max_tokens"] = None
    if "stop" in changes:
        changes["stop"] = tuple(changes["stop"])
    return changes


def open_model(args: argparse.Namespace) -> LLM:
    """The model that the options name; warnings are printed, one line each. Raises InputError."""
    if args.raw and args.template not in (None, "raw"):
        raise InputError(tr("--raw and --template exclude each other", "--raw 与 --template 不能同时使用"))
    from cnllama.llm import LLM

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        llm = LLM(
            args.model,
            ctx=args.ctx,
            threads=args.threads,
            kv_type=args.kv,
            template="raw" if args.raw else args.template,
            speculate=args.speculate,
            device=args.device,
            weights=args.weights,
        )
    for warning in caught:
        say(tr("cnllama: warning: ", "cnllama：警告：") + str(warning.message))
    return llm


def describe(llm: LLM) -> str:
    """One line for the start: file, template, context, threads, kernels or GPU."""
    from cnllama import _core

    gpu = llm.device == "cuda"
    where = llm.engine.device if gpu else f"{llm.threads} threads, {_core.isa()}"
    chinese = llm.engine.device if gpu else f"{llm.threads} 线程，{_core.isa()}"
    return tr(
        f"{llm.path.name}: template {llm.template.name}, context {llm.context}, {where}",
        f"{llm.path.name}：模板 {llm.template.name}，上下文 {llm.context}，{chinese}",
    )
