# SPDX-License-Identifier: Apache-2.0
"""Damages a packed file in thousands of seeded ways, then opens and runs each in this one process.

    python tests/fuzz_cnl.py [--iterations N] [--seed S] [--seconds LIMIT] [--only I] [FILE]

A mutant may be refused (CnllamaError, which InputError is) or run; anything else is a failure: another exception is
printed with its number, a crash or a hang leaves the mutant's path on the screen. Each mutant depends on the seed and
its own number alone, so `--only I` makes it again. Meant to run under AddressSanitizer as well.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, "Base"], bytes]

HANG_SECONDS, MAX_FAILURES = 60, 10
HASH = re.compile(rb'"header_sha256":"[0-9a-f]{64}"')
ZERO_HASH = b'"header_sha256":"' + b"0" * 64 + b'"'
NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 15, 63, 64, 65, 255, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 53, 1 << 63),
    *((1 << 64) - 1, 1 << 64, -(1 << 63), 10**400, 0.0, -0.5, 0.1, 1.5, 1e-320, 1e38, 1e308, "", "0", "-1", "1", "f32"),
    *(
        "raw",
        "q4-s64",
        "q4-a64",
        "q4-s32",
        "q8-s64",
        "U8",
        "F32",
        "F16",
        "BF16",
        "I64",
        "tokenizer.model",
        "lm_head.weight",
    ),
    *("model.embed_tokens.weight", "yarn", "linear", "dynamic", "llama3", "longrope", "\x00", "\ud800", "纸" * 5000),
    *(
        [],
        {},
        [[]],
        [0, 0],
        [0, 64],
        [-64, 0],
        [1 << 62, 1 << 63],
        ["q4-a64", 1, 1],
        ["f32", 16, 1],
        {"": 1},
        {"a": {}},
    ),
]


class Base:
    """A sound file, taken apart."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.begin = 8 + int.from_bytes(data[:8], "little")
        self.header: dict[str, Any] = json.loads(data[8 : self.begin])
        self.body = data[self.begin :]

    def matrices(self) -> list[tuple[int, int]]:
        """Offsets in the body of every tensor, (begin, end)."""
        return [tuple(v["data_offsets"]) for k, v in self.header.items() if k != "__metadata__"]


def with_header(text: bytes, body: bytes, *, repair: bool = True) -> bytes:
    """A file of this header, padded to 64 bytes, its hash made right again unless it is gone."""
    text += b" " * (-(8 + len(text)) % 64)
    if repair and HASH.search(text):
        text = HASH.sub(ZERO_HASH, text, count=1)
        text = text.replace(ZERO_HASH, ZERO_HASH.replace(b"0" * 64, sha256(text).hexdigest().encode()), 1)
    return len(text).to_bytes(8, "little") + text + body


def dump(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of every value below `value`."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [path for key in keys for path in [(*at, key), *places(value[key], (*at, key))]]


def change(rng: random.Random, root: Any) -> None:
    """Replaces, removes, doubles, renames or nudges one value somewhere in a JSON tree."""
    paths = places(root)
    if not paths:
        return
    *above, key = rng.choice(paths)
    parent = root
    for step in above:
        parent = parent[step]
    value, kind = parent[key], rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["x", key + "x", "model.norm.weight", ""])] = parent.pop(key)
    elif kind == 2 and isinstance(parent, list):
        parent.insert(key, value)
    elif kind in (3, 4) and isinstance(value, (int, float)) and not isinstance(value, bool):
        parent[key] = (
            rng.choice([value + 1, value - 1, value * 2, value // 2, -value, value + 64, value << 32 | 1])
            if isinstance(value, int)
            else value * rng.choice([-1, 0, 2, 1e30, 1e-30])
        )
    elif kind == 5:
        source = root
        for step in rng.choice(paths):
            source = source[step] if not isinstance(source, list) or step < len(source) else 0
        parent[key] = copy.deepcopy(source)
    else:
        parent[key] = copy.deepcopy(rng.choice(NASTY))


def mutate_header_values(rng: random.Random, base: Base) -> bytes:
    """One to three structural changes, in the tensors' entries or inside the JSON texts of the metadata."""
    header = json.loads(json.dumps(base.header))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        metadata = header.get("__metadata__")
        items = metadata.items() if isinstance(metadata, dict) else []
        texts = [key for key, value in items if isinstance(value, str) and value.startswith("{")]
        if texts and rng.random() < 0.7:
            key = rng.choice(texts)
            try:
                value = json.loads(metadata[key])
            except ValueError:  # an earlier change took a text apart
                continue
            change(rng, value)
            metadata[key] = json.dumps(value)
        else:
            change(rng, header)
    return with_header(dump(header), base.body, repair=rng.random() < 0.95)


def mutate_sizes_together(rng: random.Random, base: Base) -> bytes:
    """A lie told everywhere: one size of the config changed, with the table's rows that had it."""
    header = json.loads(json.dumps(base.header))
    metadata = header["__metadata__"]
    config, table = json.loads(metadata["config"]), json.loads(metadata["tensors"])
    key = rng.choice([k for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool)])
    old, new = config[key], rng.choice([config[key] + 1, config[key] * 2, 1, 2, 64, 1 << 20, 1 << 31, 1 << 62])
    config[key] = new
    for row in table.values():
        row[1:] = [new if size == old else size for size in row[1:]]
    metadata["config"], metadata["tensors"] = json.dumps(config), json.dumps(table)
    return with_header(dump(header), base.body)


def mutate_header_text(rng: random.Random, base: Base) -> bytes:
    """Bytes of the header's text flipped, removed or doubled; the hash is mended half of the time."""
    text = bytearray(base.data[8 : base.begin].rstrip())
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(text))
        kind = rng.randrange(4)
        if kind == 0:
            text[at] = rng.randrange(256)
        elif kind == 1:
            del text[at : at + rng.choice([1, 1, 5, 100])]
        elif kind == 2:
            text[at:at] = text[at : at + rng.choice([1, 5, 100])]
        else:
            text[at:at] = rng.choice([b"[" * 3000, b'{"a":' * 3000, b"0" * 5000, b"\xff", b"\\ud800", b"NaN", b"1e999"])
    return with_header(bytes(text), base.body, repair=rng.random() < 0.5)


def mutate_length(rng: random.Random, base: Base) -> bytes:
    """Another header length, cut or doubled files, bytes put in anywhere."""
    kind = rng.randrange(4)
    if kind == 0:
        length = rng.choice([0, 1, 2, 8, len(base.data), 1 << 31, 1 << 63, (1 << 64) - 1, base.begin - 8 + 64])
        return struct.pack("<Q", length) + base.data[8:]
    if kind == 1:
        return base.data[: int(len(base.data) * rng.random() ** 3)]
    at = rng.randrange(len(base.data))
    if kind == 2:
        return base.data[:at] + rng.randbytes(rng.choice([1, 64, 4096])) + base.data[at:]
    return base.data[:at] + base.data[at + rng.choice([1, 64, 4096]) :]


def mutate_body(rng: random.Random, base: Base) -> bytes:
    """Bytes of the weights flipped anywhere."""
    body = bytearray(base.body)
    for _ in range(rng.choice([1, 16, 1000])):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return base.data[: base.begin] + bytes(body)


def mutate_scales(rng: random.Random, base: Base) -> bytes:
    """Runs of half floats in one tensor become 0, infinity, NaN, the largest or the smallest number."""
    body = bytearray(base.body)
    begin, end = rng.choice(base.matrices())
    for _ in range(rng.choice([1, 4, 64])):
        at = begin + rng.randrange(max(1, (end - begin) // 2)) * 2
        word = rng.choice([0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7BFF, 0xFBFF, 0x0001, 0x7D01])
        count = min(rng.choice([1, 16, 64, 4096]), (end - at) // 2)
        body[at : at + 2 * count] = struct.pack("<H", word) * count
    return base.data[: base.begin] + bytes(body)


def mutate_tokenizer(rng: random.Random, base: Base) -> bytes:
    """The SentencePiece model damaged, its hash in the settings made right."""
    header = json.loads(json.dumps(base.header))
    metadata = header["__metadata__"]
    settings, table = json.loads(metadata["tokenizer"]), json.loads(metadata["tensors"])
    begin = header["tokenizer.model"]["data_offsets"][0]
    size = table["tokenizer.model"][1]
    model = bytearray(base.body[begin : begin + size])
    for _ in range(rng.choice([1, 1, 4, 200])):
        model[rng.randrange(min(size, rng.choice([100, size])))] = rng.randrange(256)
    settings["sha256"] = sha256(model).hexdigest()
    metadata["tokenizer"] = json.dumps(settings)
    return with_header(dump(header), base.body[:begin] + bytes(model) + base.body[begin + size :])


MUTATIONS: list[tuple[int, Mutation]] = [
    (40, mutate_header_values),
    (12, mutate_sizes_together),
    (12, mutate_header_text),
    (8, mutate_length),
    (8, mutate_body),
    (12, mutate_scales),
    (8, mutate_tokenizer),
]


def mutant(base: Base, seed: int, number: int) -> tuple[str, bytes]:
    """(name of the mutation, the damaged file). Depends on its arguments only."""
    rng = random.Random(f"{seed}-{number}")
    mutation = rng.choices([m for _, m in MUTATIONS], [w for w, _ in MUTATIONS])[0]
    return mutation.__name__, mutation(rng, base)


def exercise(path: Path, number: int) -> str:
    """Opens and runs a file as a user's program does, every eighth one through `info`, `verify` and `plan` too.

    Returns "ran" or "refused".
    """
    from cnllama import LLM
    from cnllama.errors import CnllamaError

    if number % 8 == 0:
        inspect(path)
    try:
        with LLM(path, ctx=64, threads=1 + number % 2, kv_type=("fp16", "int8")[number // 2 % 2]) as llm:
            ids = llm.tokenize("从前有 a river,\n👋", bos=True)
            llm.logits(ids[:20])
            "".join(llm.stream("天", max_tokens=4, temperature=float(number % 3), seed=number))
    except CnllamaError as error:
        lines = str(error).splitlines()
        if len(lines) != 1 or not lines[0].strip():
            raise AssertionError(f"an error must be one line: {str(error)!r:.300}") from error
        return "refused"
    return "ran"


def inspect(path: Path) -> None:
    """The verbs that look into a file end with 0, 1 or 2 and no exception."""
    from cnllama.cli.main import main as cnllama

    for verb in ("info", "verify", "plan"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            code = cnllama([verb, str(path)])
        if code not in (0, 1, 2) or "--debug" in errors.getvalue():  # which an exception that nobody expected offers
            raise AssertionError(f"{verb} ended with {code}: {errors.getvalue()[-300:]!r}")


def small_file(folder: Path) -> Path:
    """A sound file of about 150 KB, made by the converter."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
    import models

    tokenizer = models.train_tokenizer(models.english_lines(), 400)
    base = models.make_llama(
        folder / "base",
        tokenizer,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        max_position_embeddings=128,
    )
    return models.convert(base, folder / "small.cnl")


def fuzz(file: Path, folder: Path, numbers: range, seed: int, seconds: float) -> tuple[Counter[str], int]:
    """Runs mutants until `numbers`, `seconds` or MAX_FAILURES end; what happened, counted by mutation, and failures."""
    base, results, end = Base(file.read_bytes()), Counter[str](), time.monotonic() + seconds
    path, failures = folder / "mutant.cnl", 0
    if exercise(file, 0) != "ran":
        raise SystemExit(f"{file} itself is refused")
    for number in numbers:
        if time.monotonic() > end or failures == MAX_FAILURES:
            break
        name, data = mutant(base, seed, number)
        path.unlink(missing_ok=True)  # a new file: an old map of it must not change
        path.write_bytes(data)
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            outcome = exercise(path, number)
        except Exception:
            kept = folder / f"failed-{seed}-{number}.cnl"
            path.replace(kept)
            print(f"\nmutant {number} of seed {seed} ({name}), kept as {kept}:", file=sys.stderr)
            traceback.print_exc(chain=False)
            outcome, failures = "FAILED", failures + 1
        faulthandler.cancel_dump_traceback_later()
        results[f"{name.removeprefix('mutate_')} {outcome}"] += 1
    return results, failures


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Open and run thousands of damaged .cnl files.")
    parser.add_argument("file", type=Path, nargs="?", help="a sound .cnl (default: a small one is made)")
    parser.add_argument("--iterations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--only", type=int, help="run this mutant alone")
    args = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="fuzz_cnl_"))
    print(f"mutants are written to {folder}/mutant.cnl; after a crash it is the last one", flush=True)
    numbers = range(args.iterations) if args.only is None else range(args.only, args.only + 1)
    start = time.monotonic()
    results, failures = fuzz(args.file or small_file(folder), folder, numbers, args.seed, args.seconds)
    for outcome, count in sorted(results.items()):
        print(f"{count:7}  {outcome}")
    print(f"{results.total()} mutants of seed {args.seed} in {time.monotonic() - start:.0f} s, {failures} failed")
    if failures:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
