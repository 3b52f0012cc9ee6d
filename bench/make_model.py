# SPDX-License-Identifier: Apache-2.0
"""Writes a random packed model of a real model's shape, as .cnl and as GGUF with the same weights, in seconds.

    python bench/make_model.py 7b --out DIR [--vocab 49953] [--scheme q4-s32] [--tokenizer FILE] [--seed N]

writes DIR/7b-q4.cnl and DIR/7b-q4_0.gguf. No weight is ever a float: quantized values and scales are drawn directly, in
panels of 16 rows, of which a matrix takes some at random; the GGUF is what `cnllama export` makes of the .cnl. Weights
have a standard deviation of 1 / sqrt(columns), norms are one, so activations stay finite. For measuring speed: the text
such a model writes is noise. Needs numpy, sentencepiece, protobuf and tqdm.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cnllama.convert import fingerprint, parity
from cnllama.convert.facts import from_hf
from cnllama.convert.gguf import export as gguf
from cnllama.convert.gguf.blocks import BLOCK, PANEL_ROWS, spans, split
from cnllama.convert.selfcheck import check_written
from cnllama.convert.tokenizers import TokenizerFiles, load_sentencepiece
from make_checkpoint import GROWN_VOCAB, SHAPES, pad_pieces
from tiny_checkpoint import sample_lines, train_tokenizer
from tqdm import tqdm

from cnllama import _core
from cnllama.config import EMBEDDING, LM_HEAD, expected_tensors
from cnllama.errors import CnllamaError, InputError, os_errors_explained
from cnllama.format import TOKENIZER, CnlWriter, open_cnl, stored_bytes
from cnllama.templates import default_template
from cnllama.verify import Statistics

Bytes = npt.NDArray[np.uint8]

POOL_BYTES = 64 << 20
CHUNK_BYTES = 16 << 20
EMBEDDINGS = "q8-s64"
TRAINED_PIECES = 1200
# Root mean square of uniform integers: -8..7, 0..15 less their mean, 1..255 less 128.
SPREAD = {"q4-s32": 21.5**0.5, "q4-s64": 21.5**0.5, "q4-a64": 21.25**0.5, "q8-s64": (254 * 256 / 12) ** 0.5}
GGUF_TYPES = {"q4-s32": "q4_0", "q4-s64": "q4_0", "q4-a64": "q4_1", "q8-s64": "q8_0"}


def draw_panels(random: np.random.Generator, scheme: str, cols: int, count: int) -> Bytes:
    """[count, panel bytes] of panels with random values and scales; padding is what the layout asks for."""
    facts = _core.schemes()[scheme]
    size = _core.packed_bytes(scheme, 2 * PANEL_ROWS, cols) // 2
    panels = np.frombuffer(random.bytes(count * size), np.uint8).reshape(count, size).copy()
    if facts["bits"] == 8:
        np.maximum(panels, 1, out=panels)
    typical = cols**-0.5 / SPREAD[scheme]
    for span in spans(scheme, cols):
        body = panels[:, span.begin : span.end].reshape(count, span.superblocks, span.size)
        body[:, :, : span.head] = 0
        scales, lines = split(panels, span, scheme)
        shape = scales[:, :, 0].shape
        scales[:, :, 0] = random.uniform(0.5, 1.5, shape) * typical
        if facts["asymmetric"]:
            scales[:, :, 1] = scales[:, :, 0].astype(np.float32) * np.float32(-7.5)
        elif facts["bits"] == 4:  # -8 .. 7 has a mean, which signs of the scales take away
            scales[:, :, 0] *= random.choice(np.array([-1, 1], np.float16), shape)
        _clear_columns(lines.view(np.uint8), int(facts["bits"]), cols - span.first)
    return panels


def _clear_columns(lines: Bytes, bits: int, cols: int) -> None:
    """Sets the columns from `cols` of a span on to the value that stands for zero (symmetric schemes) or to zero."""
    values = lines.reshape(*lines.shape[:4], PANEL_ROWS, 4)
    blocks = values.shape[1] * values.shape[2]
    for col in range(cols, blocks * BLOCK):
        block, at = divmod(col, BLOCK)
        half = at % 16 if bits == 4 else at
        cell = values[:, block // values.shape[2], block % values.shape[2], half // 4, :, half % 4]
        if bits == 8:
            cell[...] = 128
        else:
            cell[...] = cell & 0x0F | 0x80 if at >= 16 else cell & 0xF0 | 0x08


class Pool:
    """Random panels of one scheme and width, and the statistics of each."""

    def __init__(self, random: np.random.Generator, scheme: str, cols: int, most: int) -> None:
        self.scheme, self.cols = scheme, cols
        size = _core.packed_bytes(scheme, 2 * PANEL_ROWS, cols) // 2
        count = 2 * max(1, min(most, POOL_BYTES // size) // 2)
        self.panels = draw_panels(random, scheme, cols, count)
        self.total, self.squares, self.largest = (np.zeros(count) for _ in range(3))
        step = 2 * max(1, CHUNK_BYTES // (4 * PANEL_ROWS * cols) // 2)
        for begin in range(0, count, step):
            part = self.panels[begin : begin + step]
            rows = len(part) * PANEL_ROWS
            values = _core.dequantize(part.reshape(-1), scheme, rows, cols).reshape(len(part), -1)
            where = slice(begin, begin + len(part))
            self.total[where] = values.sum(axis=1, dtype=np.float64)
            self.squares[where] = np.einsum("ij,ij->i", values, values, dtype=np.float64)
            self.largest[where] = np.abs(values).max(axis=1)

    def last_panels(self, rows: int) -> Bytes:
        """[2, panel bytes]: the last `rows` (1 to 32) of a matrix, with the padding that completes them."""
        values = _core.dequantize(self.panels[:2].reshape(-1), self.scheme, 2 * PANEL_ROWS, self.cols)
        packed, _, _ = _core.quantize(np.ascontiguousarray(values[:rows]), self.scheme)
        return packed.reshape(2, -1)


@dataclass(frozen=True)
class Drawn:
    """What of a pool a matrix takes: whole panels by their index, then the end."""

    pool: Pool
    rows: int
    chosen: npt.NDArray[np.int64]
    end: Bytes | None

    def statistics(self) -> Statistics:
        """Of the values that the matrix decodes to, padding left out."""
        pool, at = self.pool, self.chosen
        largest = float(pool.largest[at].max()) if len(at) else 0.0
        result = Statistics(
            len(at) * PANEL_ROWS * pool.cols, float(pool.total[at].sum()), float(pool.squares[at].sum()), largest
        )
        if self.end is not None:
            rows = self.rows - len(at) * PANEL_ROWS
            result.add(_core.dequantize(self.end.reshape(-1), pool.scheme, rows, pool.cols))
        return result

    def write(self, writer: CnlWriter, name: str) -> None:
        """All panels, in pieces."""
        step = max(1, CHUNK_BYTES // self.pool.panels.shape[1])
        for begin in range(0, len(self.chosen), step):
            writer.write(name, self.pool.panels[self.chosen[begin : begin + step]])
        if self.end is not None:
            writer.write(name, self.end)


def draw_matrix(random: np.random.Generator, pool: Pool, rows: int) -> Drawn:
    """Panels for a matrix: none twice before all have been used."""
    whole = rows // (2 * PANEL_ROWS) * 2
    rounds = -(-whole // len(pool.panels))
    chosen = np.concatenate([random.permutation(len(pool.panels)) for _ in range(rounds)] or [np.zeros(0, np.int64)])
    left = rows - whole * PANEL_ROWS
    return Drawn(pool, rows, chosen[:whole], pool.last_panels(left) if left else None)


def make_tokenizer(file: Path | None, vocab: int | None) -> TokenizerFiles:
    """The tokenizer of `file`, or one trained on the spot, with pieces added up to `vocab`."""
    if file is None:
        model, name, vocab = train_tokenizer(sample_lines(), TRAINED_PIECES), Path("trained"), vocab or GROWN_VOCAB
    else:
        model, name = file.read_bytes(), file
    pieces = int(load_sentencepiece(model, str(name)).get_piece_size())
    if vocab is not None and vocab < pieces:
        raise InputError(f"--vocab is {vocab} and the tokenizer has {pieces} pieces: give at least that")
    return TokenizerFiles(name, model if vocab in (None, pieces) else pad_pieces(model, vocab or pieces))


def _metadata(
    shape: str, scheme: str, config: dict[str, Any], tokenizer: TokenizerFiles, bits: float
) -> dict[str, Any]:
    settings = tokenizer.settings()
    return {
        "config": config,
        "template": default_template(config["vocab_size"]),
        "generation": {"eos_token_ids": [tokenizer.processor.eos_id()], "bos_token_id": tokenizer.processor.bos_id()},
        "tokenizer": settings,
        "parity": parity.record(tokenizer.model, settings, str(tokenizer.file)),
        "fingerprint": {"tensors": {}},
        "source": {"base": f"random {shape}", "adapters": [], "cnllama": importlib.metadata.version("cnllama")},
        "quantization": {"scheme": scheme, "embeddings": EMBEDDINGS, "bits_per_weight": round(bits, 4)},
    }


def write_cnl(path: Path, shape: str, scheme: str, tokenizer: TokenizerFiles, seed: int) -> None:
    """The packed file. A seed gives the same bytes again."""
    config = from_hf(SHAPES[shape] | {"vocab_size": tokenizer.pieces}, shape)
    table: dict[str, tuple[str, int, int]] = {}
    for name, expected in expected_tensors(config):
        if not expected.optional:
            kind = "f32" if expected.vector else EMBEDDINGS if name in (EMBEDDING, LM_HEAD) else scheme
            table[name] = (kind, expected.rows, expected.cols)
    widths: dict[tuple[str, int], int] = {}
    for kind, rows, cols in table.values():
        if kind != "f32":
            widths[kind, cols] = max(widths.get((kind, cols), 0), _core.padded_rows(rows) // PANEL_ROWS)
    random = np.random.default_rng(seed)
    pools = {key: Pool(random, *key, most) for key, most in widths.items()}
    bits = sum(stored_bytes(*row) for row in table.values()) * 8 / sum(rows * cols for _, rows, cols in table.values())
    records = {}
    rows_of_tokenizer = {TOKENIZER: ("raw", len(tokenizer.model), 1)}
    metadata = _metadata(shape, scheme, config, tokenizer, bits)
    with (
        CnlWriter(path, metadata, table | rows_of_tokenizer) as writer,
        tqdm(total=writer.size, unit="B", unit_scale=True, desc="cnl", disable=None) as progress,
    ):
        for name, (kind, rows, cols) in table.items():
            if kind == "f32":
                ones = np.ones(rows, np.float32)
                writer.write_padded(name, ones.tobytes())
                statistics = Statistics()
                statistics.add(ones)
            else:
                drawn = draw_matrix(random, pools[kind, cols], rows)
                drawn.write(writer, name)
                statistics = drawn.statistics()
            records[name] = fingerprint.record(statistics, 0.0)
            progress.update(stored_bytes(kind, rows, cols))
        writer.write_padded(TOKENIZER, tokenizer.model)
        writer.finish({"fingerprint": {"tensors": records}}, check_written(path))


def make_model(
    shape: str,
    out: Path,
    *,
    vocab: int | None = None,
    scheme: str = "q4-s32",
    tokenizer: Path | None = None,
    seed: int = 0,
) -> tuple[Path, Path, gguf.Report]:
    """Writes both files; returns (.cnl, .gguf, what the export says of their equality)."""
    files = make_tokenizer(tokenizer, vocab)
    out.mkdir(parents=True, exist_ok=True)
    cnl, other = out / f"{shape}-{scheme[:2]}.cnl", out / f"{shape}-{GGUF_TYPES[scheme]}.gguf"
    write_cnl(cnl, shape, scheme, files, seed)
    report = gguf.export(open_cnl(cnl), other, progress=sys.stderr.isatty())
    return cnl, other, report


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vocab", type=int, metavar="N", help=f"rows (default: the tokenizer's, else {GROWN_VOCAB})")
    parser.add_argument("--scheme", choices=sorted(GGUF_TYPES), default="q4-s32", help="of the layers (default q4-s32)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model (default: trained on the spot)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    started = time.monotonic()
    try:
        with os_errors_explained(args.out):
            cnl, other, report = make_model(
                args.shape, args.out, vocab=args.vocab, scheme=args.scheme, tokenizer=args.tokenizer, seed=args.seed
            )
    except CnllamaError as error:
        print(f"make_model: {error}", file=sys.stderr)
        return error.exit_code
    kinds = sorted({f"{m.scheme} = {m.type.name}" for m in report.matrices if m.error == 0})
    print(f"{cnl}: {cnl.stat().st_size:,} bytes\n{other}: {other.stat().st_size:,} bytes")
    inexact = [m.name for m in report.matrices if m.error]
    same = "the same weights, value for value" if not inexact else f"{len(inexact)} matrices differ: {inexact[0]}, ..."
    print(f"{same} ({', '.join(kinds)}); {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
