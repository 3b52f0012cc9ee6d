# SPDX-License-Identifier: Apache-2.0
"""cnllama eval table: a checkpoint in every weight scheme, and in llama.cpp's types, side by side."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from cnllama.arguments import add_comma_option, add_list_option
from cnllama.cli.eval_shared import Files, add_text_options, check_threads, command, opener, read, say
from cnllama.errors import InputError, os_errors_explained
from cnllama.files import make_directory
from cnllama.paths import exists, is_dir, is_file, real_path
from cnllama.scratch import scratch_beside
from cnllama.stdio import show
from cnllama.textio import tr

if TYPE_CHECKING:
    from cnllama.eval.models import Scorer
    from cnllama.eval.table import Form
    from cnllama.tokenizer import Tokenizer

DEFAULT_SCHEMES = "q8,q6,q5,q4-a64,q4-s32,q4-s64,q3,q2"
_F32_WEIGHTS = 1 << 30  # up to so many, llama.cpp's types are made from float32
_MAX_ROUNDS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `cnllama eval table`."""
    add = parser.add_argument
    add("base", type=Path, metavar="BASE", help=tr("directory of a Hugging Face LLaMA", "Hugging Face 模型目录"))
    add("text", type=Path, metavar="TEXT", help=tr("text or .jsonl", "文本或 .jsonl"))
    add_list_option(parser, "--lora", type=Path, metavar="DIR", help=tr("its adapters", "其 LoRA"))
    add_comma_option(
        parser,
        "--schemes",
        metavar="NAME,...",
        help=tr(
            f"as --quant of convert, or all; q4-a64:q6 takes q6 for embeddings and output ({DEFAULT_SCHEMES})",
            f"同 convert 的 --quant，或 all；q4-a64:q6 表示词嵌入与输出用 q6（{DEFAULT_SCHEMES}）",
        ),
    )
    text = tr("rtn, gptq, awq (rtn)", "rtn、gptq、awq（rtn）")
    add_comma_option(parser, "--quantizer", default="rtn", metavar="NAME,...", help=text)
    add("--calibrate", type=Path, metavar="FILE", help=tr("text of the quantizers that take one", "校准文本"))
    add_comma_option(
        parser,
        "--gguf",
        nargs="?",
        const="",
        metavar="TYPE,...",
        help=tr(
            "llama.cpp's types too, Q4_K_M and so on; Q4_0:Q8_0 takes Q8_0 for embeddings and output",
            "同时评测 llama.cpp 的类型，如 Q4_K_M；Q4_0:Q8_0 表示词嵌入与输出用 Q8_0",
        ),
    )
    add("--ctx", type=int, metavar="N", help=tr("tokens of a window", "窗口长度"))
    add_text_options(parser)
    add("--threads", type=int, default=0, metavar="N", help=tr("0: physical cores", "0：物理核数"))
    add("--rounds", type=int, default=3, metavar="N", help=tr("of the speed; 0: leave it out (3)", "测速轮数，0 不测"))
    add("--work", type=Path, metavar="DIR", help=tr("keep what is made, take what is there", "保留并复用生成的文件"))
    add("--json", type=Path, metavar="OUT", help=tr("write the result to a file", "把结果写入文件"))
    add("--markdown", type=Path, metavar="OUT", help=tr("write the report to a file", "把报告写入文件"))
    add("--png", type=Path, metavar="OUT", help=tr("draw KL against bits per weight", "绘制 KL 与每权重比特数"))


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the files. Returns the exit code."""
    if not 0 <= args.rounds <= _MAX_ROUNDS:
        raise InputError(f"--rounds is {args.rounds}, expected 0 to {_MAX_ROUNDS}")
    if args.png and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--png needs matplotlib, which is not installed; run: pip install 'cnllama[bench]'")
    from cnllama.eval.table import Settings, Table
    from cnllama.eval.table_report import markdown, picture

    check_threads(args)
    _check_work(args)
    forms = [*our_forms(args), *their_forms(args)]
    args.kv = "fp16"
    with Files(args.json, args.markdown, args.png) as files, ExitStack() as stack:
        text = read(args.text, args)
        source = _Checkpoint(args)
        if args.gguf is not None:
            source.check_gguf()
        keep = args.work is not None
        work = args.work if keep else stack.enter_context(scratch_beside(Path(gettempdir(), "table")))
        make_directory(work)
        settings = Settings(args.ctx, args.stride, args.threads, args.rounds, keep)
        result = Table(source, text, work, settings, opener(args), say=say).measure(forms)
        result = command(args) | {"llama_cpp": _llama_cpp_version(args)} | result
        report = markdown(result)
        files.write_json(args.json, result)
        files.write(args.markdown, report)
        if args.png:
            files.write(args.png, picture(result))
    show(*report.rstrip("\n").split("\n"))
    return 0


def _check_work(args: argparse.Namespace) -> None:
    """What is kept would change the checkpoint's directory, by whose contents it is named."""
    if args.work is None:
        return
    with os_errors_explained(args.work):
        if exists(args.work) and not is_dir(args.work):
            raise InputError(f"{args.work}: this is no directory, expected one for what is kept")
        if real_path(args.work) in [real_path(path) for path in (args.base, *args.lora)]:
            raise InputError(f"{args.work}: this is the checkpoint's own directory, choose another one for --work")


def our_forms(args: argparse.Namespace) -> list[Form]:
    """The forms that --schemes and --quantizer ask for. Raises InputError for unknown names."""
    from cnllama.convert.quantize.registry import AUTO, CALIBRATED, check_quantizer
    from cnllama.convert.quantize.rules import quantizations, scheme_of
    from cnllama.eval.table import OURS, Form

    known = quantizations()
    names = [name for name in DEFAULT_SCHEMES.split(",") if name in known]
    if args.schemes is not None:
        names = []
        for item in _items(args.schemes, "--schemes"):
            names += dict.fromkeys(known.values()) if item == "all" else [item]
    quantizers = _items(args.quantizer, "--quantizer")
    for quantizer in quantizers:
        check_quantizer(quantizer)
        if quantizer == AUTO:
            raise InputError(
                f"--quantizer {AUTO} is another one on every machine, expected rtn, {', '.join(CALIBRATED)}"
            )
    if args.calibrate is not None:
        if not set(quantizers) & set(CALIBRATED):
            raise InputError(f"--calibrate needs --quantizer {' or '.join(CALIBRATED)}")
        if not is_file(args.calibrate):
            raise InputError(f"{args.calibrate}: there is no such file, expected a text to calibrate with")
    forms = []
    for name in names:
        inner, outer = _split(name)
        scheme = scheme_of(inner, "--schemes")
        outside = None if outer is None else scheme_of(outer, "--schemes")
        forms += [Form(OURS, scheme, quantizer, outside) for quantizer in quantizers]
    return list(dict.fromkeys(forms))


def their_forms(args: argparse.Namespace) -> list[Form]:
    """The forms that --gguf asks for. Raises InputError for unknown names, and when llama-cpp-python is missing."""
    if args.gguf is None:
        return []
    from cnllama.eval import llama_cpp
    from cnllama.eval.table import RIVAL, Form

    files, tensors = llama_cpp.file_types(), llama_cpp.tensor_types()
    forms = []
    for name in _items(args.gguf, "--gguf") if args.gguf else llama_cpp.DEFAULT_TYPES:
        kind, outer = _split(name)
        for found, known in ((kind, files), (outer, tensors)):
            if found is not None and found not in known:
                raise InputError(f"--gguf has {found!r:.80}, expected names of {', '.join(sorted(known))}")
        forms.append(Form(RIVAL, kind, outer=outer))
    return list(dict.fromkeys(forms))


def _items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise InputError(f"{option} is {text!r}, expected names with commas between them")
    return items


def _split(name: str) -> tuple[str, str | None]:
    inner, colon, outer = name.partition(":")
    return inner, outer if colon else None


def _llama_cpp_version(args: argparse.Namespace) -> str | None:
    from cnllama.eval.llama_cpp import package_version

    return None if args.gguf is None else package_version()


class _Checkpoint:
    """A table.Source: what the converter makes of --lora and BASE."""

    def __init__(self, args: argparse.Namespace) -> None:
        from cnllama.eval.reference import check_reference
        from cnllama.plan import trained_length

        self._base: Path = args.base
        self._loras: Sequence[Path] = args.lora
        self._calibrate: Path | None = args.calibrate
        self._threads: int = args.threads
        self._plan: Any = check_reference(self._base, self._loras)
        self.name = " + ".join(map(str, (self._base, *self._loras)))
        self.key = _key([self._base, *self._loras], args.calibrate)
        self.vocab_size: int = self._plan.config["vocab_size"]
        shapes = [tensor.shape for tensor in self._plan.tensors.values()]
        self.parameters = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes)
        self.context = trained_length(self._plan.config)

    def tokenizer(self) -> Tokenizer:
        """See Source."""
        from cnllama.tokenizer import Tokenizer

        files = self._plan.vocabulary.tokenizer
        return Tokenizer(files.model, files.settings())

    def reference(self) -> Scorer:
        """See Source."""
        from cnllama.eval.reference import open_reference

        return open_reference(self._base, self._loras)

    def pack(self, form: Form, path: Path) -> list[str]:
        """See Source."""
        from cnllama.convert.pack import convert
        from cnllama.convert.quantize.rules import Rule

        options: dict[str, Any] = {"quantizer": form.quantizer}
        if form.outer:
            names = ["embed_tokens"] if self._plan.config["tie_word_embeddings"] else ["embed_tokens", "lm_head"]
            options["rules"] = [Rule(name, form.outer) for name in names]
        if form.quantizer != "rtn":
            options |= {"calibrate": self._calibrate, "check": False}
        options |= {"threads": self._threads, "progress": sys.stderr.isatty()}
        warnings: list[str] = convert(self._base, self._loras, path, quant=form.kind, **options).warnings
        return warnings

    def check_gguf(self) -> None:
        """Raises InputError for a model that llama.cpp cannot run: before hours of work, not after."""
        from cnllama.convert.gguf.container import GgmlType
        from cnllama.convert.gguf.from_checkpoint import describe
        from cnllama.convert.gguf.metadata import make_metadata

        make_metadata(describe(self._plan), GgmlType.F32)

    def write_gguf(self, path: Path) -> str:
        """See Source."""
        from cnllama.convert.gguf.from_checkpoint import write_checkpoint

        kind = "f32" if self.parameters <= _F32_WEIGHTS else "f16"
        for warning in write_checkpoint(self._plan, path, kind, progress=sys.stderr.isatty()):
            say(warning)
        return kind


def _key(directories: Sequence[Path], calibrate: Path | None) -> str:
    """Names what --work keeps: the contents of the checkpoint, its adapters and the calibration text, and the code."""
    from cnllama.contents import content_key
    from cnllama.eval.keys import code_key, options_key

    chosen = "the bundled text" if calibrate is None else content_key([calibrate])
    return options_key(content_key(directories), chosen, code_key())
