# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of GPTQ on the first layers of a 7B-shaped model: `python bench/gptq_memory.py [options]`.

Without --base a checkpoint of random weights with --layers layers is written to a temporary directory first. What is
printed for all layers of the real model is a projection from the time of one; the peak is that of one layer (or of
lm_head, if it is larger) and does not grow with their number.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from convert_memory import GIB, MIB, measure
from make_checkpoint import SHAPES, write_base
from tiny_checkpoint import sample_lines, train_tokenizer

TRACE = """
import json, sys, time
from pathlib import Path
from cnllama.convert.pack import make_plan, peak_memory
from cnllama.convert.quantize.base import Work
from cnllama.convert.quantize.calibration import parse_tokens, read_calibration
from cnllama.convert.quantize.registry import open_quantizer
from cnllama.convert.quantize.rules import scheme_of, scheme_table
from cnllama.tokenizer import Tokenizer

base, quantizer, quant, text, tokens, device, threads, report = sys.argv[1:]
plan = make_plan(Path(base))
files = plan.vocabulary.tokenizer
tokenizer = Tokenizer(files.model, files.settings())
calibration = read_calibration(Path(text), tokenizer, plan.config, parse_tokens(tokens))
table = scheme_table(plan.tensors, scheme_of(quant, "--quant"))
started, ended = time.perf_counter(), {}
work = Work(plan.tensors, table, plan.config, int(threads), lambda line: print(line, flush=True))
for piece in open_quantizer(quantizer, calibration, device).pieces(work):
    name = piece.name
    part = name.split("layers.")[1].split(".")[0] if "layers." in name else name
    if part not in ended:
        print(f"[{time.perf_counter() - started:8.1f} s, peak {peak_memory() / 2**20:6.0f} MiB] {part}", flush=True)
    ended[part] = time.perf_counter() - started
Path(report).write_text(json.dumps({"ended": ended, "tokens": int(calibration.samples.size)}))
"""


def make_base(directory: Path, shape: str, layers: int) -> None:
    """The first `layers` layers of a named shape, with its embeddings."""
    config = SHAPES[shape] | {"num_hidden_layers": layers}
    write_base(directory, config, 1, train_tokenizer(sample_lines(), 1200))


def write_text(path: Path, tokens: str) -> None:
    """The sample text, often enough for the tokens: what it says does not change what it costs."""
    samples, length = map(int, tokens.split("x"))
    lines = sample_lines()
    copies = 1 + 4 * samples * length // sum(map(len, lines))
    path.write_text("\n".join(lines * copies), encoding="utf-8")


def describe(ended: dict[str, float], layers: int, of: int) -> str:
    """Seconds of each layer and of the embeddings, and a projection to `of` layers. ended: when each part was done."""
    begins = [0.0, *ended.values()]
    seconds = {name: end - begin for (name, end), begin in zip(ended.items(), begins, strict=False)}
    layer = [seconds[str(i)] for i in range(layers)]
    rest = sum(seconds.values()) - sum(layer)
    lines = [f"layer {i}         {taken:8.1f} s" for i, taken in enumerate(layer)]
    lines.append(f"embeddings      {rest:8.1f} s")
    lines.append(f"projected       {rest + of * sum(layer) / layers:8.0f} s for {of} layers, from the mean of these")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, metavar="DIR", help="a checkpoint of --layers layers instead of a new one")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--layers", type=int, default=2, metavar="N")
    parser.add_argument("--quantizer", choices=("gptq", "awq"), default="gptq")
    parser.add_argument("--quant", default="q4", metavar="NAME")
    parser.add_argument("--tokens", default="128x512", metavar="SAMPLESxLENGTH")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, metavar="N")
    args = parser.parse_args()
    if args.layers < 1:
        parser.error(f"--layers {args.layers}: at least 1")
    with tempfile.TemporaryDirectory() as folder:
        base, text, report = args.base or Path(folder) / "base", Path(folder) / "text.txt", Path(folder) / "report.json"
        if args.base is None:
            make_base(base, args.shape, args.layers)
        write_text(text, args.tokens)
        arguments = [base, args.quantizer, args.quant, text, args.tokens, args.device, args.threads, report]
        usage = measure([sys.executable, "-c", TRACE, *map(str, arguments)])
        if usage.status:
            print(f"the calibration ended with status {usage.status}", file=sys.stderr)
            return 1
        found = json.loads(report.read_text())
    print(f"calibrated with {found['tokens']:,} tokens")
    print(describe(found["ended"], args.layers, int(str(SHAPES[args.shape]["num_hidden_layers"]))))
    print(f"peak resident   {usage.peak_resident / GIB:8.2f} GiB (mapped pages of the checkpoint included)")
    print(f"peak anonymous  {usage.peak_anonymous / MIB:8.0f} MiB")
    print(f"processor time  {usage.cpu_seconds:8.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
