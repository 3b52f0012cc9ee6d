# SPDX-License-Identifier: Apache-2.0
"""cnllama tokenizer train | merge | report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnllama.arguments import add_list_option, add_output_option
from cnllama.files import Output
from cnllama.paths import real_path
from cnllama.stdio import say, show, to_json
from cnllama.textio import decode_argument, tr

if TYPE_CHECKING:
    from cnllama.adapt.reading import ReadLog

HELP = tr("train, merge and compare SentencePiece tokenizers", "训练、合并和比较 SentencePiece 分词器")

# Options of SentencePieceTrainer under their own names: name -> (type, help).
_TRAINER: dict[str, tuple[type, str]] = {
    "model_type": (str, "bpe (default), unigram, char or word"),
    "character_coverage": (float, "share of the characters that get a piece of their own (default 0.9995)"),
    "byte_fallback": (bool, "other characters become bytes (default yes)"),
    "input_sentence_size": (int, "sentences taken from the input; 0, the default: all"),
    "shuffle_input_sentence": (bool, "choose them at random"),
    "random_seed": (int, "makes that choice repeatable"),
    "max_sentence_length": (int, "bytes of a sentence; longer ones are cut (default 16384)"),
    "max_sentencepiece_length": (int, "characters of a piece"),
    "split_digits": (bool, "each digit is a piece (default yes)"),
    "split_by_whitespace": (bool, "no piece goes on over a space"),
    "split_by_unicode_script": (bool, "no piece mixes scripts"),
    "split_by_number": (bool, "no piece mixes digits and letters"),
    "allow_whitespace_only_pieces": (bool, "pieces of spaces alone (default yes)"),
    "remove_extra_whitespaces": (bool, "drop doubled spaces (default no)"),
    "add_dummy_prefix": (bool, "a space before the text"),
    "normalization_rule_name": (str, "identity (default), nmt_nfkc, nfkc, ..."),
    "user_defined_symbols": (str, "pieces to take as they are, with commas between them"),
    "control_symbols": (str, "tokens that no text contains, with commas between them"),
    "required_chars": (str, "characters that must have a piece"),
    "hard_vocab_limit": (bool, "fail when there are fewer pieces than asked for"),
    "num_threads": (int, "threads"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three verbs, each with its own options."""
    verbs = parser.add_subparsers(dest="action", required=True, metavar="train | merge | report")
    _add_train(verbs.add_parser("train", help=tr("train a vocabulary on text", "用文本训练词表"), allow_abbrev=False))
    _add_merge(verbs.add_parser("merge", help=tr("append the pieces of another", "并入另一词表"), allow_abbrev=False))
    _add_report(verbs.add_parser("report", help=tr("compare two on a text", "在文本上比较两者"), allow_abbrev=False))


def run(args: argparse.Namespace) -> int:
    """Runs the chosen verb and returns the exit code."""
    return {"train": _train, "merge": _merge, "report": _report}[args.action](args)


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input-format",
        "--input_format",
        choices=("txt", "jsonl", "json"),
        help=tr("instead of what the file's name says", "代替文件扩展名所示的格式"),
    )
    parser.add_argument(
        "--template",
        type=decode_argument,
        metavar="TEXT",
        help=tr(
            'the text of a JSON record without "text", e.g. "{title}\\n{paragraphs}"',
            "没有 text 字段的 JSON 记录如何成文",
        ),
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help=tr("text, .jsonl or .json", "文本、.jsonl 或 .json")
    )
    add_output_option(parser, "OUT", tr("a tokenizer directory, or a file NAME.model", "分词器目录，或文件 NAME.model"))
    parser.add_argument(
        "--vocab-size", "--vocab_size", type=int, required=True, metavar="N", help=tr("pieces", "词表大小")
    )
    _add_input_options(parser)
    group = parser.add_argument_group(tr("options of SentencePiece", "SentencePiece 选项"))
    for name, (kind, text) in _TRAINER.items():
        flags = list(dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")))
        if kind is bool:
            group.add_argument(*flags, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(*flags, dest=name, type=decode_argument if kind is str else kind, metavar="X", help=text)


def _train(args: argparse.Namespace) -> int:
    from cnllama.adapt.reading import POEM_TEMPLATE, ReadLog, unescaped
    from cnllama.adapt.tokenizer_merge import tokenizer_output
    from cnllama.adapt.tokenizer_train import train_tokenizer

    options = {name: getattr(args, name) for name in _TRAINER if getattr(args, name) is not None}
    for name in ("user_defined_symbols", "control_symbols"):
        if name in options:
            options[name] = options[name].split(",")
    log = ReadLog()
    with tokenizer_output(args.output) as write:
        model = train_tokenizer(
            args.files,
            args.vocab_size,
            form=args.input_format,
            template=unescaped(args.template or POEM_TEMPLATE),
            options=options,
            progress=sys.stderr.isatty(),
            log=log,
        )
        _print_problems(log)
        write(model)
    pieces = _pieces(model)
    show(tr(f"{args.output}: {pieces:,} pieces", f"{args.output}：{pieces:,} 个词元"))
    return 0


def _add_merge(parser: argparse.ArgumentParser) -> None:
    what = tr("a .model file or a tokenizer directory", ".model 文件或分词器目录")
    parser.add_argument("base", type=Path, metavar="BASE", help=what)
    parser.add_argument("new", type=Path, metavar="NEW", help=what)
    add_output_option(parser, "OUT", tr("a tokenizer directory, or a file NAME.model", "分词器目录，或文件 NAME.model"))
    parser.add_argument(
        "--pad", action="store_true", help=tr("one more piece [PAD], as Alpaca has", "再加一个 [PAD]，如 Alpaca")
    )
    add_list_option(
        parser,
        "--user-defined",
        type=decode_argument,
        metavar="TEXT",
        help=tr("more pieces, which are never split", "再加一些不可切分的词元"),
    )


def _merge(args: argparse.Namespace) -> int:
    from cnllama.adapt.plots import format_table
    from cnllama.adapt.tokenizer_merge import merge_tokenizers, open_model, tokenizer_output

    base, new = open_model(args.base), open_model(args.new)
    merged = merge_tokenizers(base, new, user_defined=args.user_defined, pad=args.pad)
    with tokenizer_output(args.output, (args.base, args.new)) as write:
        write(merged.model)
    rows = [
        (tr("base", "原词表"), merged.base),
        (tr("appended", "新增"), merged.added),
        (tr("already there", "已有"), merged.present),
        (tr("user-defined", "自定义"), merged.user_defined),
        ("[PAD]", int(merged.pad)),
        (tr("pieces", "合计"), merged.pieces),
    ]
    show(*format_table((str(args.output), tr("pieces", "词元数")), rows).split("\n"))
    show(f"sha256 {merged.sha256}")
    return 0


def _add_report(parser: argparse.ArgumentParser) -> None:
    what = tr("a .model file or a tokenizer directory", ".model 文件或分词器目录")
    parser.add_argument("old", type=Path, metavar="OLD", help=what)
    parser.add_argument("new", type=Path, metavar="NEW", help=what)
    parser.add_argument("file", type=Path, metavar="FILE", help=tr("text, .jsonl or .json", "文本、.jsonl 或 .json"))
    parser.add_argument("--plot", type=Path, metavar="PNG", help=tr("draw the comparison", "画出比较图"))
    parser.add_argument("--json", action="store_true", help=tr("print JSON", "输出 JSON"))
    _add_input_options(parser)


def _report(args: argparse.Namespace) -> int:
    from cnllama.adapt.plots import need_matplotlib
    from cnllama.adapt.reading import POEM_TEMPLATE, ReadLog, unescaped
    from cnllama.adapt.tokenizer_merge import open_model
    from cnllama.adapt.tokenizer_report import measure, plot_report, read_sample, report_table

    if args.plot is not None:
        need_matplotlib()
        Output(args.plot).discard()  # a place that cannot be written is found out before the work
    models = [open_model(path) for path in (args.old, args.new)]
    log = ReadLog()
    lines = read_sample(args.file, log, unescaped(args.template or POEM_TEMPLATE), args.input_format)
    _print_problems(log)
    old, new = (measure(name, files, lines) for name, files in zip(_names(args.old, args.new), models, strict=True))
    if args.plot is not None:
        plot_report(old, new, args.plot)
    if args.json:
        print(to_json({"file": str(args.file), "old": old.figures(), "new": new.figures()}, indent=2))
    else:
        show(*report_table(old, new).split("\n"))
    return 0


def _names(old: Path, new: Path) -> tuple[str, str]:
    """Short names that differ."""
    first, second = real_path(old).name.removesuffix(".model"), real_path(new).name.removesuffix(".model")
    return (first, second) if first != second else (f"old {first}", f"new {second}")


def _pieces(model: bytes) -> int:
    import sentencepiece

    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    return int(processor.get_piece_size())


def _print_problems(log: ReadLog) -> None:
    for line in log.lines():
        say(f"cnllama: {line}")
