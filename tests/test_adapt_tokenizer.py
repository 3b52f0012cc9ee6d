# SPDX-License-Identifier: Apache-2.0
"""Vocabularies trained, merged, written and compared, the released ones byte for byte; tables and plots."""

from __future__ import annotations

import json
import signal
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import sentencepiece
from cnllama.convert.tokenizers import TokenizerFiles

from cnllama.adapt.plots import comparison_plot, format_table, loss_curve, read_log
from cnllama.adapt.reading import ReadLog
from cnllama.adapt.tokenizer_merge import merge_tokenizers, open_model, tokenizer_output
from cnllama.adapt.tokenizer_report import EXAMPLE, measure, read_sample
from cnllama.adapt.tokenizer_train import _cut, train_tokenizer
from cnllama.cli.main import main
from cnllama.errors import CnllamaError, InputError
from cnllama.tokenizer import Tokenizer

LLAMA_SHA = "e2676d4ca29ca1750f6ff203328d73b189321dc5776ceede037cbd36541d70c0"
ALPACA_SHA = "2d967e855b1213a439df6c8ce2791f869c84b4f3b6cfacf22b86440b8192a2f8"
PNG = b"\x89PNG\r\n\x1a\n"


def files_of(model: bytes) -> TokenizerFiles:
    return TokenizerFiles(Path("in-memory.model"), model)


def pieces_of(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text("\n".join(models.sample_lines()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def english() -> bytes:
    return models.train_tokenizer(models.english_lines(), 400)


@pytest.fixture(scope="module")
def chinese() -> bytes:
    return models.train_tokenizer(models.chinese_lines(), 850)


# merge


def test_merged_pieces_follow_in_order_with_score_zero_and_no_duplicates(english: bytes, chinese: bytes) -> None:
    merged = merge_tokenizers(files_of(english), files_of(chinese), user_defined=["<|会|>", "春天来了"], pad=True)
    old, new, result = pieces_of(english), pieces_of(chinese), pieces_of(merged.model)
    byte_or_control = {f"<0x{i:02X}>" for i in range(256)} | {"<unk>", "<s>", "</s>"}
    expected = [piece for piece in new if piece not in old and piece not in byte_or_control]
    assert result == [*old, *expected, "<|会|>", "春天来了", "[PAD]"]
    assert len(set(result)) == len(result) == merged.pieces
    assert (merged.base, merged.added, merged.user_defined, merged.pad) == (len(old), len(expected), 2, True)
    assert merged.present > 0
    processor = sentencepiece.SentencePieceProcessor(model_proto=merged.model)
    before = sentencepiece.SentencePieceProcessor(model_proto=english)
    assert all(processor.get_score(i) == 0.0 for i in range(len(old), len(result)))
    assert all(processor.get_score(i) == before.get_score(i) for i in range(len(old)))
    # A user-defined piece is never split, in no context.
    for text in ("在春天来了以后", "a<|会|>b"):
        assert {"春天来了", "<|会|>"} & set(processor.encode(text, out_type=str))
    assert processor.encode("[PAD]") != [len(result) - 1]


def test_nothing_but_pieces_is_added_to_the_base(english: bytes, chinese: bytes) -> None:
    merged = merge_tokenizers(files_of(english), files_of(chinese)).model
    same = next(i for i, (a, b) in enumerate(zip(english, merged, strict=False)) if a != b)
    assert merged.endswith(english[same:])
    assert merge_tokenizers(files_of(merged), files_of(chinese)).model == merged


def test_merging_equals_protobuf_s_own_serialization(english: bytes, chinese: bytes) -> None:
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    assert merge_tokenizers(files_of(english), files_of(chinese)).model == models.merge_tokenizers(english, chinese)


def test_kinds_of_new_pieces_are_kept(english: bytes, text_file: Path) -> None:
    new = train_tokenizer([text_file], 900, options={"user_defined_symbols": ["☃☃"], "hard_vocab_limit": False})
    merged = merge_tokenizers(files_of(english), files_of(new)).model
    processor = sentencepiece.SentencePieceProcessor(model_proto=merged)
    assert "☃☃" in processor.encode("雪人☃☃☃", out_type=str)


@pytest.mark.parametrize("kept", [0, 1, 100, 5000, -10])
def test_damaged_models_are_refused(english: bytes, chinese: bytes, kept: int) -> None:
    with pytest.raises(InputError, match=r"in-memory\.model"):
        merge_tokenizers(files_of(english[:kept]), files_of(chinese))


def test_pieces_that_exist_already_are_refused(english: bytes, chinese: bytes) -> None:
    first = merge_tokenizers(files_of(english), files_of(chinese), pad=True).model
    with pytest.raises(InputError, match=r"'\[PAD\]' is in the merged model already"):
        merge_tokenizers(files_of(first), files_of(chinese), pad=True)
    with pytest.raises(InputError, match="'<s>' is in the merged model already"):
        merge_tokenizers(files_of(english), files_of(chinese), user_defined=["<s>"])
    with pytest.raises(InputError, match="empty"):
        merge_tokenizers(files_of(english), files_of(chinese), user_defined=[""])


def test_a_base_with_tokens_beside_its_model_is_refused(tmp_path: Path, english: bytes, chinese: bytes) -> None:
    models.write_tokenizer(tmp_path, english)
    models.write_json(tmp_path / "added_tokens.json", {"[PAD]": models.piece_count(english)})
    with pytest.raises(InputError, match=r"such as '\[PAD\]' with id"):
        merge_tokenizers(open_model(tmp_path), files_of(chinese))
    assert merge_tokenizers(open_model(tmp_path / "tokenizer.model"), files_of(chinese)).base > 0


def test_the_released_tokenizers(tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, new = (shared_data / "tokenizers" / name for name in ("llama.model", "chinese_sp_20k.model"))
    assert main(["tokenizer", "merge", str(base), str(new), "-o", str(tmp_path / "llama")]) == 0
    output = capsys.readouterr().out
    assert LLAMA_SHA in output
    assert "49,953" in output
    assert main(["tokenizer", "merge", str(base), str(new), "--pad", "-o", str(tmp_path / "alpaca.model")]) == 0
    assert ALPACA_SHA in capsys.readouterr().out
    llama, alpaca = open_model(tmp_path / "llama"), open_model(tmp_path / "alpaca.model")
    assert (llama.pieces, alpaca.pieces) == (49953, 49954)
    assert alpaca.processor.id_to_piece(49953) == "[PAD]"
    assert len(open_model(base).processor.encode(EXAMPLE)) == 35
    assert len(llama.processor.encode(EXAMPLE)) == 16


# the directory


def write_tokenizer(out: Path, model: bytes, inputs: Sequence[Path] = ()) -> None:
    with tokenizer_output(out, inputs) as write:
        write(model)


def check_against_transformers(directory: Path, lines: list[str]) -> int:
    """Lines whose ids differ: transformers 5 ranks merges one by one, SentencePiece lets the pieces tie."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaTokenizer.from_pretrained(directory)
    files = open_model(directory)
    assert len(theirs) == files.pieces
    assert theirs.convert_ids_to_tokens(list(range(len(theirs)))) == pieces_of(files.model)
    differing = 0
    for line in lines:
        ids = theirs(line)["input_ids"]
        assert ids[0] == files.processor.bos_id()
        assert files.processor.decode(ids[1:]) == line
        differing += ids[1:] != files.processor.encode(line)
    return differing


def test_transformers_reads_the_directory(tmp_path: Path, english: bytes, chinese: bytes) -> None:
    write_tokenizer(tmp_path / "t", merge_tokenizers(files_of(english), files_of(chinese), pad=True).model)
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        ".cnllama.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert models.json_of(tmp_path / "t" / "special_tokens_map.json")["pad_token"] == "[PAD]"
    check_against_transformers(tmp_path / "t", models.sample_lines())
    write_tokenizer(tmp_path / "untied", english)
    assert check_against_transformers(tmp_path / "untied", models.sample_lines()) == 0


def test_transformers_reads_the_released_vocabulary(tmp_path: Path, shared_data: Path) -> None:
    base, new = (open_model(shared_data / "tokenizers" / name) for name in ("llama.model", "chinese_sp_20k.model"))
    lines = (shared_data / "eval" / "encoding_zh.txt").read_text(encoding="utf-8").splitlines()
    write_tokenizer(tmp_path / "base", base.model)
    assert check_against_transformers(tmp_path / "base", lines) == 0
    write_tokenizer(tmp_path / "merged", merge_tokenizers(base, new).model)
    assert check_against_transformers(tmp_path / "merged", lines) < 0.4 * len(lines)


def test_the_run_time_agrees_with_sentencepiece_on_the_released_vocabulary(shared_data: Path) -> None:
    base, new = (open_model(shared_data / "tokenizers" / name) for name in ("llama.model", "chinese_sp_20k.model"))
    merged = files_of(merge_tokenizers(base, new).model)
    ours = Tokenizer(merged.model, merged.settings())
    for line in (shared_data / "eval" / "encoding_zh.txt").read_text(encoding="utf-8").splitlines():
        assert ours.encode(line) == merged.processor.encode(line)
        assert ours.decode(ours.encode(line)) == line


def test_places_that_cannot_be_written_are_refused(tmp_path: Path, english: bytes) -> None:
    write_tokenizer(tmp_path / "t", english)
    with pytest.raises(InputError, match="one of the inputs"):
        write_tokenizer(tmp_path / "t", english, inputs=[tmp_path / "t"])
    with pytest.raises(InputError, match="one of the inputs"):
        write_tokenizer(tmp_path / "t" / "tokenizer.model", english, inputs=[tmp_path / "t"])
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="belongs to another tokenizer"):
        write_tokenizer(tmp_path / "t", english)
    with pytest.raises(InputError, match="expected the name of a directory"):
        write_tokenizer(tmp_path / "t" / "tokenizer.json", english)


# train


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_gives_llama_s_habits(text_file: Path, kind: str) -> None:
    options = {"model_type": kind}
    model = train_tokenizer([text_file], 900, options=options)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.get_piece_size() == 900
    assert processor.id_to_piece([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert processor.is_byte(3)
    assert processor.decode(processor.encode("  两个 空格，𠮷。")) == "  两个 空格，𠮷。"
    assert "2026" not in processor.encode("2026", out_type=str)
    assert model == train_tokenizer([text_file], 900, options=options)


def test_training_reads_records_and_reports_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.data"
    lines = [json.dumps({"text": line}, ensure_ascii=False) for line in models.sample_lines()]
    path.write_text("\n".join([*lines, "{"]), encoding="utf-8")
    log = ReadLog()
    model = train_tokenizer([path], 900, form="jsonl", log=log)
    assert models.piece_count(model) == 900
    assert log.count == 1
    assert log.listed[0].startswith(f"{path}:{len(lines) + 1}: ")


def test_long_lines_are_cut_between_sentences_and_nothing_is_lost() -> None:
    line = "".join(f"第{i}句话。" for i in range(100)) + "没有句号" * 100
    parts = list(_cut(line, 200))
    assert "".join(parts) == line
    assert all(len(part.encode()) <= 200 for part in parts)
    assert all(part.endswith("。") for part in parts[:5])


@pytest.mark.parametrize(
    ("vocab", "options", "words"),
    [
        (0, {}, "expected a positive number"),
        (10, {}, "Vocabulary size is smaller"),
        (500_000, {}, "Vocabulary size too high"),
        (700, {"model_type": "foo"}, "foo"),
        (700, {"no_such_option": 1}, "no_such_option"),
    ],
)
def test_options_that_sentencepiece_refuses(text_file: Path, vocab: int, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        train_tokenizer([text_file], vocab, options=options)
    assert "\n" not in str(caught.value)


def test_a_trainer_that_is_killed_is_an_error_not_a_hang(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    real = subprocess.Popen

    def popen_and_kill(*args: Any, **kwargs: Any) -> Any:
        process = real(*args, **kwargs)
        process.send_signal(signal.SIGKILL)
        return process

    monkeypatch.setattr(subprocess, "Popen", popen_and_kill)
    with pytest.raises(CnllamaError, match="ended with code -9"):
        train_tokenizer([text_file], 700)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("a.txt", b"", "hold no text"), ("a.jsonl", b"{\n", "all 1 lines are bad"), ("a.bin", b"x", "expected .txt")],
)
def test_files_to_train_on_must_hold_text(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        train_tokenizer([tmp_path / name], 700)


# report


def test_figures_of_an_encoding(english: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=english)
    lines = ["the rain", "春天", "a𠮷"]
    result = measure("english", files_of(english), lines)
    ids = [processor.encode(line) for line in lines]
    assert result.lengths == tuple(map(len, ids))
    assert result.characters == 12
    assert result.byte_tokens == sum(processor.is_byte(i) for line in ids for i in line)
    figures = result.figures()
    assert figures["tokens_per_character"] * figures["characters_per_token"] == pytest.approx(1)
    assert figures["example"] == processor.encode(EXAMPLE, out_type=str)


def test_a_sample_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no text"):
        read_sample(tmp_path / "a.txt", ReadLog())


# command line


def test_train_merge_and_report_on_the_command_line(
    tmp_path: Path, text_file: Path, english: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.model").write_bytes(english)
    base, new, merged = (str(tmp_path / name) for name in ("base.model", "new", "merged"))
    options = ["--vocab_size", "900", "--character-coverage", "0.98", "--no-split-digits", "--model_type", "bpe"]
    assert main(["tokenizer", "train", str(text_file), "-o", new, *options]) == 0
    assert "900 pieces" in capsys.readouterr().out
    assert main(["tokenizer", "merge", base, new, "-o", merged, "--user-defined", "<sep>"]) == 0
    assert f"{open_model(Path(merged)).pieces:,}" in capsys.readouterr().out
    report = ["tokenizer", "report", base, merged, str(text_file)]
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    assert main([*report, "--plot", str(tmp_path / "plot.png")]) == 0
    table = capsys.readouterr().out
    assert "tokens per character" in table
    assert EXAMPLE in table
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    assert main([*report, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["new"]["tokens"] < figures["old"]["tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tokenizer"], "are required"),
        (["tokenizer", "train", "none.txt", "-o", "x", "--vocab-size", "9"], "none.txt: there is no such file"),
        (["tokenizer", "train", "none.txt", "-o", "x"], "--vocab-size"),
        (["tokenizer", "merge", "none.model", "none.model", "-o", "x"], "none.model: there is no such file"),
        (["tokenizer", "merge", ".", ".", "-o", "x"], "there is no tokenizer.model"),
        (["tokenizer", "report", "none.model", "none.model", "none.txt"], "none.model: there is no such file"),
    ],
)
def test_wrong_command_lines_end_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


# tables and plots


def test_a_table_aligns_numbers() -> None:
    lines = format_table(("run", "loss", "tokens"), [("a", 1.23456, 10), ("long name", 12.5, 1234567)]).splitlines()
    assert lines == [
        "run         loss     tokens",
        "---------  -----  ---------",
        "a          1.235         10",
        "long name   12.5  1,234,567",
    ]


def test_a_log_is_read_through_a_torn_line_and_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = ['{"step": 1, "loss": 3}', '{"step": 2, "loss": 2}', '{"step": 2, "loss": 2.5, "eval_loss": 4}', "{}", "7"]
    path.write_text("\n".join([*lines, '{"step": 3, "lo']), encoding="utf-8")
    assert read_log(path) == {"loss": {1: 3.0, 2: 2.5}, "eval_loss": {2: 4.0}}


def test_plots_are_png_files_of_the_size_they_say(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps({"step": i, "loss": 5 - i / 9, "eval_loss": 4.5}) for i in range(1, 30)))
    loss_curve({"stage 1": log}, tmp_path / "one.png")
    loss_curve({"stage 1": log, "stage 2": log}, tmp_path / "two.png")
    rows = [{"rank": r, "loss": 3 / r, "seconds": None if r == 8 else r} for r in (2, 8, 32)]
    comparison_plot(rows, "rank", ["loss"], tmp_path / "narrow.png")
    comparison_plot(rows, "rank", ["loss", "seconds", "absent"], tmp_path / "wide.png", "ranks")
    widths = {}
    for path in tmp_path.glob("*.png"):
        data = path.read_bytes()
        assert data.startswith(PNG)
        widths[path.stem] = struct.unpack(">I", data[16:20])[0]
    assert widths["one"] == widths["two"] == widths["narrow"] < widths["wide"]
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
    for words, call in (
        ("holds no loss", lambda: loss_curve({"x": tmp_path / "empty.jsonl"}, tmp_path / "x.png")),
        ("no runs", lambda: comparison_plot([], "rank", ["loss"], tmp_path / "x.png")),
        ("no such file", lambda: loss_curve({"x": tmp_path / "none.jsonl"}, tmp_path / "x.png")),
    ):
        (tmp_path / "empty.jsonl").write_text("{}\n")
        with pytest.raises(InputError, match=words):
            call()
    assert not (tmp_path / "x.png").exists()
