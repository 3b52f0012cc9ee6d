# SPDX-License-Identifier: Apache-2.0
"""cnllama eval ppl | kl | ceval | cmmlu | table: measures of a packed file that others can repeat."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnllama.arguments import add_list_option, add_model_file
from cnllama.cli import eval_table
from cnllama.cli.eval_shared import Files, add_model_options, add_text_options, command, opener, read, say
from cnllama.errors import InputError
from cnllama.stdio import show
from cnllama.textio import tr

if TYPE_CHECKING:
    from cnllama.eval.models import Scorer
    from cnllama.eval.text_scores import Reference
    from cnllama.format import CnlFile

HELP = tr("measure a .cnl: perplexity, KL, C-Eval, CMMLU; all schemes", "评测：困惑度、KL、C-Eval、CMMLU、各量化方案")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The five measures, each with its own options."""
    verbs = parser.add_subparsers(dest="measure", required=True, metavar="ppl | kl | ceval | cmmlu | table")
    add = verbs.add_parser
    _add_ppl(add("ppl", help=tr("perplexity per token and per character", "困惑度"), allow_abbrev=False))
    _add_kl(add("kl", help=tr("divergence from the checkpoint that was packed", "与原模型的差异"), allow_abbrev=False))
    for name, title in (("ceval", "C-Eval"), ("cmmlu", "CMMLU")):
        _add_choice(add(name, help=tr(f"multiple choice: {title}", f"选择题：{title}"), allow_abbrev=False), name)
    text = tr("a checkpoint in every weight scheme, side by side", "同一模型的各种量化方案对比")
    eval_table.add_arguments(add("table", help=text, allow_abbrev=False))


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes the files that were asked for. Returns the exit code."""
    return {"ppl": _ppl, "kl": _kl, "table": eval_table.run}.get(args.measure, _choice)(args)


def _add_reference_options(parser: argparse.ArgumentParser) -> None:
    from cnllama.eval.reference import DTYPES

    parser.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help=tr("the Hugging Face checkpoint that was packed", "被转换的 Hugging Face 模型"),
    )
    add_list_option(parser, "--lora", type=Path, metavar="DIR", help=tr("and its adapters", "及其 LoRA"))
    parser.add_argument(
        "--reference-dtype", choices=DTYPES, default="float32", help=tr("what it is run in", "参考模型的精度")
    )


def _add_ppl(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help=tr("a .cnl file", ".cnl 文件"))
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help=tr("text or .jsonl", "文本或 .jsonl"))
    add_text_options(parser)
    add_model_options(parser)


def _add_kl(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help=tr("a .cnl file", ".cnl 文件"))
    parser.add_argument("text", type=Path, metavar="TEXT", help=tr("text or .jsonl", "文本或 .jsonl"))
    _add_reference_options(parser)
    parser.add_argument(
        "--save-reference", type=Path, metavar="OUT", help=tr("keep the checkpoint's log probabilities", "保存参考概率")
    )
    parser.add_argument(
        "--reference-logits", type=Path, metavar="IN", help=tr("use kept ones instead", "使用已保存的参考概率")
    )
    add_text_options(parser)
    add_model_options(parser)


def _add_choice(parser: argparse.ArgumentParser, name: str) -> None:
    from cnllama.eval.answers import VARIANTS
    from cnllama.eval.benchmarks import BENCHMARKS
    from cnllama.eval.procedures import PRESETS

    benchmark = BENCHMARKS[name]
    add = parser.add_argument
    add_model_file(parser, "file", tr("a .cnl (default: the bundled one)", ".cnl 文件"), required=False)
    add("--data", type=Path, required=True, metavar="DIR", help=tr("the official files, with dev/", "官方数据目录"))
    add("--split", choices=benchmark.splits, default=benchmark.default_split)
    add("--shots", type=int, default=0, metavar="N", help=tr("solved examples before a question", "示例数量"))
    add_list_option(parser, "--subject", metavar="KEY", help=tr("only these", "只评测这些科目"))
    add("--preset", choices=PRESETS, default="auto", help=tr("form of the prompt (the file's)", "提示形式"))
    add("--letters", choices=VARIANTS, help=tr("spellings of A-D whose logits count (the preset's)", "字母的写法"))
    text = tr("repetition penalty on letters (the preset's)", "字母的重复惩罚")
    add("--repeat-penalty", "--penalty", dest="penalty", type=float, metavar="R", help=text)
    add("--generate", action="store_true", help=tr("let it write, and read the letter out of that", "自由生成"))
    add("--cot", action="store_true", help=tr("step by step; with --generate", "思维链"))
    add("--temp", type=float, metavar="T", help=tr("of --generate (0.2)", "生成温度"))
    add("--seed", type=int, default=1, metavar="S", help=tr("of --generate", "生成的随机种子"))
    add("--max-tokens", type=int, metavar="N", help=tr("of --generate (the preset's: 20)", "生成长度"))
    add("--sequences", type=int, metavar="N", help=tr("generated at once (1)", "同时生成的数量（1）"))
    add("--log", type=Path, metavar="OUT", help=tr("every prompt and answer, JSON lines", "记录全部提示与回答"))
    if name == "ceval":
        add("--submission", type=Path, metavar="OUT", help=tr("the letters as C-Eval takes them", "提交文件"))
    _add_reference_options(parser)
    add_model_options(parser)


def _ppl(args: argparse.Namespace) -> int:
    from cnllama.eval.text_scores import measure_perplexity
    from cnllama.format import open_cnl

    with Files(args.json) as files:
        texts = [read(path, args) for path in args.texts]
        result = measure_perplexity(open_cnl(args.file), texts, opener(args), context=args.ctx, stride=args.stride)
        files.write_json(args.json, command(args) | result)
    for row in result["texts"]:
        show(
            f"{row['text']}: perplexity {row['perplexity_per_token']:.4f} per token, "
            f"{row['perplexity_per_character']:.4f} per character, {row['bits_per_character']:.4f} bits per character; "
            f"{row['tokens']:,} tokens, {_characters(row)} in {row['documents']:,} documents; "
            f"context {result['context']}, stride {result['stride']}; {row['seconds']:.1f} s, "
            f"{row['tokens_run_per_s']:,.0f} tok/s"
        )
    return 0


def _characters(row: dict[str, Any]) -> str:
    found, text = row["characters"], row["text_characters"]
    return f"{found:,} characters" + (f" of {text:,}" if found != text else "")


def _kl(args: argparse.Namespace) -> int:
    from cnllama.eval.text_scores import measure_divergence
    from cnllama.format import open_cnl

    with Files(args.json) as files:
        file = open_cnl(args.file)
        result = measure_divergence(
            file,
            read(args.text, args),
            opener(args),
            reference=_reference(args, file),
            stored=args.reference_logits,
            save=args.save_reference,
            context=args.ctx,
            stride=args.stride,
            say=say,
        )
        files.write_json(args.json, command(args) | result)
    r = result
    show(
        f"{r['text']}: KL(reference || {args.file.name}) mean {r['kl_mean']:.6f} (±{r['kl_mean_standard_error']:.6f}), "
        f"median {r['kl_median']:.6f}, 99 % {r['kl_p99']:.6f}, largest {r['kl_max']:.6f} nats; "
        f"same most likely token {r['top1_agreement']:.2%}; perplexity {r['perplexity_per_token']:.4f} against "
        f"{r['reference_perplexity_per_token']:.4f} ({r['perplexity_ratio'] - 1:+.2%}); {r['tokens']:,} tokens, "
        f"context {r['context']}, stride {r['stride']}"
    )
    return 0


def _choice(args: argparse.Namespace) -> int:
    from cnllama.eval.benchmarks import BENCHMARKS
    from cnllama.eval.multiple_choice import evaluate
    from cnllama.eval.results import sentences, submission, table
    from cnllama.eval.text_scores import progress_bar
    from cnllama.format import open_cnl
    from cnllama.llm import bundled_model

    asked = getattr(args, "submission", None)
    with Files(args.json, args.log, asked) as files:
        file = open_cnl(args.file or bundled_model())
        run = evaluate(
            BENCHMARKS[args.measure],
            file,
            args.data,
            _settings(args),
            opener(args),
            reference=_reference(args, file),
            bar=progress_bar,
            say=say,
        )
        files.write_json(args.json, command(args) | run.result)
        if args.log:
            lines = (json.dumps(answer.record(), ensure_ascii=False) + "\n" for answer in run.answers)
            files.write(args.log, "".join(lines))
        files.write_json(asked, submission(run.answers))
    show(*table(run.result).split("\n"), "", *sentences(run.result))
    return 0


def _settings(args: argparse.Namespace) -> Any:
    from cnllama.eval.multiple_choice import Settings

    if args.reference and (args.generate or args.cot):
        raise InputError("--reference compares choices by logits: leave out --generate and --cot")
    if args.sequences is not None and args.sequences < 1:
        raise InputError(f"--sequences is {args.sequences}, expected 1 or more")
    if args.penalty is not None and not (args.penalty > 0 and math.isfinite(args.penalty)):
        raise InputError(f"--penalty is {args.penalty}, expected a number over 0")
    given = {"--temp": args.temp, "--max-tokens": args.max_tokens, "--sequences": args.sequences}
    unused = [name for name, value in given.items() if value is not None]
    if unused and not (args.generate or args.cot):
        raise InputError(f"{unused[0]} belongs to --generate: letters are chosen without it")
    return Settings(
        split=args.split,
        shots=args.shots,
        cot=args.cot,
        preset=args.preset,
        letters=args.letters,
        penalty=args.penalty,
        generate=args.generate,
        temperature=args.temp,
        seed=args.seed,
        max_tokens=args.max_tokens,
        context=args.ctx,
        sequences=args.sequences or 1,
        only=tuple(args.subject),
    )


def _reference(args: argparse.Namespace, file: CnlFile) -> Reference | None:
    if args.reference is None:
        if args.lora:
            raise InputError("--lora belongs to --reference: name the checkpoint too")
        return None
    from cnllama.eval.reference import check_reference
    from cnllama.eval.text_scores import other_vocabulary

    found = check_reference(args.reference, args.lora, args.reference_dtype).config["vocab_size"]
    if found != file.vocab_size:
        raise other_vocabulary(args.reference, found, file)

    def open_it() -> tuple[Scorer, dict[str, Any]]:
        from cnllama.contents import content_key
        from cnllama.eval.reference import open_reference

        described = {"directory": str(args.reference), "lora": list(map(str, args.lora)), "dtype": args.reference_dtype}
        described["content"] = content_key([args.reference, *args.lora])
        model = open_reference(args.reference, args.lora, args.reference_dtype)
        return model, described | {"tensors": model.tensors}

    return open_it
