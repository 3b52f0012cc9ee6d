# SPDX-License-Identifier: Apache-2.0
"""Packed files: the header's JSON, also inside its texts, with hash and sizes made right again, weights and tokenizer.

Every mutant is opened and runs tokens as a user's program does; some go through `info`, `verify`, `plan` and `export`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from pathlib import Path
from typing import Any, ClassVar

from fuzz import engine, mutate_bytes, mutate_json, mutate_proto, mutate_safetensors, seeds
from fuzz.case import Case
from fuzz.engine import FindingError, Target

FILE = "model.cnl"
HASH = re.compile(rb'"header_sha256":"[0-9a-f]{64}"')
ZERO_HASH = b'"header_sha256":"' + b"0" * 64 + b'"'
_WORDS = (0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7BFF, 0xFBFF, 0x0001, 0x7D01)
_NAMES = (
    "tokenizer.model", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.9.mlp.up_proj.weight",
    "model.layers.0.mlp.up_proj.bias", "model.norm.weight",
)  # fmt: skip
_HINTS = {
    "rope_scaling": [None, seeds.YARN, seeds.LINEAR, {"rope_type": "dynamic", "factor": 2.0}],
    "rope_theta": [1.0, 1e15, 10000],
    "rms_norm_eps": [1e-30, 1.0, 1e-6],
    "tie_word_embeddings": [True, False],
    "eos_token_ids": [[], [1, 2, 3], [2, 2], list(range(300))],
    "bos_token_id": [None, 0, 329],
    "added_tokens": [{"新": 329}, {"<|im_end|>": 329}, {"": 1}, {"a\nb": 5}, {"\x1b[2J": 6}, {"\ud800": 7}],
    "temperature": [0, 0.0, 1e-320, 1e8],
    "top_k": [-1, 0.5, 1e8, 40],
    "top_p": [0, 1, 2, -1],
    "repetition_penalty": [0, -1, 1e-30],
    "max_new_tokens": [0, -1, 1e8],
    "min_p": [0, 1, 2],
    "add_bos": [True, False],
    "add_dummy_prefix": [True, False],
    "pieces": [0, 330, 1],
    "legacy": [True, False],
    "texts": [0],
    "corpus": ["1"],
    "rms": [0, 1e37],
}


# The JSON texts of the metadata, by how much the product reads of them.
_WEIGHT_OF = {
    "config": 8, "generation": 4, "tokenizer": 4, "tensors": 3, "fingerprint": 3, "quantization": 1, "parity": 1,
    "source": 1,
}  # fmt: skip


class Base:
    """A sound file, taken apart."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.begin = 8 + int.from_bytes(data[:8], "little")
        self.header: dict[str, Any] = json.loads(data[8 : self.begin])
        self.body = data[self.begin :]

    def tensors(self) -> list[tuple[int, int]]:
        """Offsets in the body of every tensor, (begin, end)."""
        return [tuple(v["data_offsets"]) for k, v in self.header.items() if k != "__metadata__"]


def with_header(text: bytes, body: bytes, *, repair: bool = True) -> bytes:
    """A file of this header, padded to 64 bytes, its hash made right again unless it is gone."""
    text += b" " * (-(8 + len(text)) % 64)
    if repair and HASH.search(text):
        text = HASH.sub(ZERO_HASH, text, count=1)
        digest = hashlib.sha256(text).hexdigest().encode()
        text = text.replace(ZERO_HASH, ZERO_HASH.replace(b"0" * 64, digest), 1)
    return len(text).to_bytes(8, "little") + text + body


Made = tuple[bytes, list[str]]


def header_values(rng: random.Random, base: Base) -> Made:
    """Structural changes in the tensors' entries or inside the JSON texts of the metadata."""
    header = json.loads(json.dumps(base.header))
    metadata = header["__metadata__"]
    if rng.random() < 0.25:
        header, steps = mutate_json.mutate(rng, header)
        return with_header(mutate_json.dump(header), base.body, repair=rng.random() < 0.95), steps
    steps = []
    texts = sorted(_WEIGHT_OF)
    for key in dict.fromkeys(rng.choices(texts, [_WEIGHT_OF[key] for key in texts], k=rng.choice([1, 1, 1, 2]))):
        value, done = mutate_json.mutate(rng, json.loads(metadata[key]), _HINTS, 2)
        metadata[key] = mutate_json.dump(value).decode("utf-8", "surrogatepass")
        steps += [f"{key}: {step}" for step in done]
    return with_header(mutate_json.dump(header), base.body, repair=rng.random() < 0.95), steps


def sizes_together(rng: random.Random, base: Base) -> Made:
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
    return with_header(mutate_json.dump(header), base.body), [f"{key} := {new} everywhere"]


def tensors_together(rng: random.Random, base: Base) -> Made:
    """A tensor less, one more, one of another name or scheme: in the header, the table and the fingerprint alike."""
    from cnllama.format import stored_bytes, stored_shape

    header = json.loads(json.dumps(base.header))
    metadata = header["__metadata__"]
    table, fingerprint = json.loads(metadata["tensors"]), json.loads(metadata["fingerprint"])
    name = rng.choice(list(table))
    kind = rng.randrange(4)
    if kind == 3:
        table[name][0] = scheme = rng.choice(["f32", "raw", "q4-s64", "q4-a64", "q8-s64", "q3-a64", "q2-a64", "q6-s64"])
        step = f"{name} is {scheme}"
    else:
        row, known = table[name], fingerprint["tensors"].get(name, {"rms": 1, "mean": 0, "absmax": 1})
        if kind != 1:
            del table[name]
            fingerprint["tensors"].pop(name, None)
        if kind != 0:
            other = rng.choice([*_NAMES, rng.choice(mutate_json.STRINGS)])
            table[other] = row
            if row[0] != "raw":
                fingerprint["tensors"][other] = known
        step = f"{name} {('is gone', 'is there twice', 'has another name')[kind]}"
    entries, parts, end = {}, [], 0
    for key, row in table.items():
        begin, stop = header[key]["data_offsets"] if key in header else (0, 0)
        size = stored_bytes(*row)
        part = (base.body[begin:stop] + bytes(max(0, size - (stop - begin))))[:size]
        dtype, shape = stored_shape(*row)
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        parts.append(part)
        end += size
    metadata["tensors"], metadata["fingerprint"] = json.dumps(table), json.dumps(fingerprint)
    return with_header(mutate_json.dump({"__metadata__": metadata, **entries}), b"".join(parts)), [step]


def offsets(rng: random.Random, base: Base) -> Made:
    """A tensor lies over another one, or beyond the end."""
    header = json.loads(json.dumps(base.header))
    step = mutate_safetensors.shift(rng, header)
    return with_header(mutate_json.dump(header), base.body), [step]


def header_text(rng: random.Random, base: Base) -> Made:
    """Bytes of the header's text changed; the hash is mended half of the time."""
    text, step = mutate_bytes.mutate(rng, base.data[8 : base.begin].rstrip())
    return with_header(text, base.body, repair=rng.random() < 0.5), [f"header: {step}"]


def whole_file(rng: random.Random, base: Base) -> Made:
    """Another header length, cut or doubled files, bytes put in anywhere."""
    data, step = mutate_bytes.mutate(rng, base.data, [0, 0, 4, base.begin, len(base.data) - 64])
    return data, [step]


def scales(rng: random.Random, base: Base) -> Made:
    """Runs of half floats in one tensor become 0, infinity, NaN, the largest or the smallest number."""
    body = bytearray(base.body)
    begin, end = rng.choice(base.tensors())
    for _ in range(rng.choice([1, 4, 64])):
        at = begin + rng.randrange(max(1, (end - begin) // 2)) * 2
        word = rng.choice(_WORDS)
        count = min(rng.choice([1, 16, 64, 4096]), (end - at) // 2)
        body[at : at + 2 * count] = struct.pack("<H", word) * count
    return base.data[: base.begin] + bytes(body), [f"{word:#06x} {count} times at {at}"]


def weights(rng: random.Random, base: Base) -> Made:
    """Bytes of the weights changed anywhere."""
    body = bytearray(base.body)
    count = rng.choice([1, 16, 1000])
    for _ in range(count):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return base.data[: base.begin] + bytes(body), [f"{count} bytes of weights changed"]


def tokenizer_model(rng: random.Random, base: Base) -> Made:
    """The SentencePiece model damaged, its sizes and its hash in the settings made right."""
    header = json.loads(json.dumps(base.header))
    metadata = header["__metadata__"]
    settings, table = json.loads(metadata["tokenizer"]), json.loads(metadata["tensors"])
    entry = header["tokenizer.model"]
    begin, size = entry["data_offsets"][0], table["tokenizer.model"][1]  # it lies last in the file
    model, steps = mutate_proto.mutate(rng, base.body[begin : begin + size])
    padded = model + bytes(-len(model) % 64)
    settings["sha256"] = hashlib.sha256(model).hexdigest()
    table["tokenizer.model"][1] = len(model)
    entry |= {"shape": [len(padded)], "data_offsets": [begin, begin + len(padded)]}
    metadata["tokenizer"], metadata["tensors"] = json.dumps(settings), json.dumps(table)
    return with_header(mutate_json.dump(header), base.body[:begin] + padded), steps


class Cnl(Target):
    name: ClassVar[str] = "cnl"
    share: ClassVar[int] = 6
    needs: ClassVar[tuple[str, ...]] = ("cnllama.llm", "cnllama.convert.parity", "cnllama.convert.gguf.export")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.bases = {path.name: Base((path / FILE).read_bytes()) for path in sorted(folder.iterdir())}

    @staticmethod
    def make_seeds(folder: Path) -> None:
        from cnllama.convert.pack import convert

        plain = seeds.checkpoint(folder / "base")
        for name, quant, template in (("q4", "q4", "raw"), ("q3", "q3", "alpaca-2"), ("q8", "q8", "chatml")):
            (folder / name).mkdir()
            convert(plain, [], folder / name / FILE, quant=quant, template=template)
        tied = seeds.checkpoint(
            folder / "base2", tie_word_embeddings=True, attention_bias=True, rope_scaling=seeds.YARN
        )
        (folder / "tied").mkdir()
        convert(tied, [], folder / "tied" / FILE)
        for used in (plain, tied):
            for path in used.iterdir():
                path.unlink()
            used.rmdir()

    def mutant(self, rng: random.Random) -> Case:
        variant = rng.choice(sorted(self.bases))
        call = {"threads": rng.choice([1] * 7 + [2]), "kv": rng.choice(["fp16", "int8"]), "verbs": rng.random() < 0.12}
        call |= {"sampled": rng.random() < 0.5, "export": rng.random() < 0.06}
        if rng.random() < 0.01:
            special = mutate_bytes.special(rng)
            return Case(variant, {FILE: special}, call, [special.kind])
        made, steps = engine.choose(rng, _MUTATIONS)(rng, self.bases[variant])
        return Case(variant, {FILE: made}, call, steps)

    def run(self, case: Case, folder: Path) -> str:
        from cnllama import LLM

        path = folder / FILE
        if case.call["verbs"]:
            for verb in ("info", "verify", "plan"):
                engine.command([verb, str(path)])
        if case.call["export"]:
            engine.command(["export", str(path), "-o", str(folder / "out.gguf")])
        with LLM(path, ctx=400, threads=case.call["threads"], kv_type=case.call["kv"]) as llm:
            _check_opened(llm, case.files[FILE])
            ids = llm.tokenize("从前有 a river,\n👋", bos=True)
            llm.logits(ids[:20])
            sampling = {"temperature": 1.0, "seed": 1} if case.call["sampled"] else {"temperature": 0}
            "".join(llm.stream("天", max_tokens=4, **sampling))
            "".join(llm.stream("a", max_tokens=2))  # by the file's own defaults
        return "ran"


def _check_opened(llm: Any, data: object) -> None:
    """Nothing may open whose header lies about itself: looked at by other code than the product's."""
    if not isinstance(data, bytes):
        raise FindingError("wrong", "a file that is none was opened", "opened no file")
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    found = HASH.findall(text)
    digest = hashlib.sha256(HASH.sub(ZERO_HASH, text)).hexdigest().encode()
    if len(found) != 1 or digest not in found[0]:
        raise FindingError("wrong", "the header's hash does not fit", "opened against its hash")
    begin = 8 + len(text)
    spans = sorted(v["data_offsets"] for k, v in json.loads(text).items() if k != "__metadata__")
    if begin % 64 or [b for b, _ in spans] != [0, *(e for _, e in spans[:-1])] or begin + spans[-1][1] != len(data):
        raise FindingError("wrong", "the tensors do not cover the file", "opened with holes or overlaps")
    for key, value in llm.file.config.items():
        good = value is None or isinstance(value, dict) if key == "rope_scaling" else isinstance(value, (int, float))
        if not good or (isinstance(value, bool) and key != "tie_word_embeddings") or value != value:
            raise FindingError("wrong", f"{key} is {value!r}", "opened with a config of wrong types")
    ids = [*llm.file.generation["eos_token_ids"], *llm.file.tokenizer["added_tokens"].values()]
    if not all(type(i) is int and 0 <= i < llm.vocab_size for i in ids):
        raise FindingError("wrong", f"ids are {ids!r:.80}", "opened with ids outside the vocabulary")


_MUTATIONS = (
    (40, header_values),
    (10, sizes_together),
    (8, tensors_together),
    (4, offsets),
    (10, header_text),
    (8, whole_file),
    (8, weights),
    (8, scales),
    (12, tokenizer_model),
)
