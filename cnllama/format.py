# SPDX-License-Identifier: Apache-2.0
"""The .cnl file: opened with suspicion, mapped, and written. docs/format.md describes it for other languages."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cnllama import _core
from cnllama.added_tokens import FLAGS, MAX_LENGTH
from cnllama.config import check_config, expected_tensors
from cnllama.container import Bytes, Entry, SafetensorsFile, TensorWriter, is_count, is_number, parse_json, round_up
from cnllama.errors import CnllamaError
from cnllama.sampling import read_defaults

FORMAT, VERSION = "cnl", "1"
ALIGNMENT = 64
VECTOR_PAD = 16  # floats
PANEL_ROWS = 16
TOKENIZER = "tokenizer.model"
MAX_HEADER_BYTES = 1 << 24
JSON_KEYS = ("config", "tensors", "quantization", "generation", "tokenizer", "parity", "fingerprint", "source")
_HASH = re.compile(rb'"header_sha256":"([0-9a-f]{64})"')
_HEX64 = re.compile(r"[0-9a-f]{64}")
_ZERO_HASH = "0" * 64


@dataclass(frozen=True)
class TensorEntry:
    """A packed matrix [rows, cols] (true sizes), a vector (scheme f32, cols 1) or the tokenizer (scheme raw).

    data: read-only uint8 view of the map, 64-byte aligned, padded as the scheme says.
    """

    name: str
    scheme: str
    rows: int
    cols: int
    data: Bytes


def stored_shape(scheme: str, rows: int, cols: int) -> tuple[str, list[int]]:
    """(safetensors dtype, shape) of a tensor in the file. Raises ValueError for an unknown scheme."""
    if scheme == "raw":
        return "U8", [round_up(rows, ALIGNMENT)]
    if scheme == "f32":
        return "F32", [round_up(rows, VECTOR_PAD)]
    panels = _core.padded_rows(rows) // PANEL_ROWS
    return "U8", [panels, _core.packed_bytes(scheme, rows, cols) // panels]


def stored_bytes(scheme: str, rows: int, cols: int) -> int:
    """Bytes of a tensor in the file, padding included."""
    dtype, shape = stored_shape(scheme, rows, cols)
    return math.prod(shape) * (4 if dtype == "F32" else 1)


def open_cnl(path: str | os.PathLike[str]) -> CnlFile:
    """Opens and validates a packed model. Raises InputError (one sentence) for anything a sound file would not hold."""
    return CnlFile(path)


class CnlFile:
    """A validated, mapped .cnl: header hash, sizes, offsets, config, tokenizer settings and required tensors all fit.

    The weights themselves are not read here; verify.py does that.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = SafetensorsFile(path, MAX_HEADER_BYTES)
        self.path: Path = self._file.path
        self.size: int = self._file.size
        metadata = self._file.metadata
        self._check_version(metadata)
        self._check_header_hash()
        values = {key: parse_json(metadata[key], f"{self.path}: {key!r} in the header") for key in JSON_KEYS}
        for key, value in values.items():
            if not isinstance(value, dict):
                self.refuse(f"{key!r} in the header is no JSON object", "the file is damaged, convert again")
        self.config: dict[str, Any] = check_config(values["config"], str(self.path))
        self.vocab_size: int = self.config["vocab_size"]
        self.quantization: dict[str, Any] = values["quantization"]
        self.generation: dict[str, Any] = values["generation"]
        self.tokenizer: dict[str, Any] = values["tokenizer"]
        self.parity: dict[str, Any] = values["parity"]
        self.fingerprint: dict[str, Any] = values["fingerprint"]
        self.source: dict[str, Any] = values["source"]
        self.template: str = metadata["template"]
        self.tensors: dict[str, TensorEntry] = dict(self._tensors(values["tensors"]))
        self._check_architecture()
        self._check_generation()
        self._check_template()
        self._check_tokenizer()
        self._check_fingerprint()
        self._file.advise_huge_pages()

    @property
    def tokenizer_model(self) -> bytes:
        """The SentencePiece model, byte for byte the original file."""
        entry = self.tensors[TOKENIZER]
        return entry.data[: entry.rows].tobytes()

    def check_unchanged(self) -> None:
        """Raises FileChangedError when the file is no longer the one that was opened. What was read until now is sound
        otherwise. Where only the time of its last change is another, its content is hashed again.
        """
        self._file.check_unchanged(self._content_is_the_same)

    def _content_is_the_same(self) -> bool:
        """Of what is used: pages that weights were moved to hold what the file held before."""
        content = hashlib.sha256()
        for chunk in self.data_chunks():
            content.update(chunk.data)
        same = self._file.bytes[8 : self._file.data_begin].tobytes() == self._file.header
        return same and content.hexdigest() == self.fingerprint["content_sha256"]

    def engine_tensors(self) -> dict[str, tuple[Bytes, str, int, int]]:
        """Name -> (bytes, scheme, rows, cols) of every tensor the engine reads."""
        return {name: (t.data, t.scheme, t.rows, t.cols) for name, t in self.tensors.items() if t.scheme != "raw"}

    @property
    def address(self) -> int:
        """Where the map of the file begins in this process."""
        return self._file.address

    def keep_pages(self) -> None:
        """Makes `release` do nothing from now on: weights are about to leave the file's pages for others."""
        self._file.keep_pages()

    def release(self, name: str | None = None) -> None:
        """Drops the pages of a tensor, or of all, from memory; reading them again brings them back."""
        if name is None:
            self._file.release(self._file.data_begin, self.size)
        else:
            entry = self._file.entries[name]
            self._file.release(entry.begin, entry.end)

    def data_chunks(self, size: int = 1 << 24) -> Iterator[Bytes]:
        """The data area in pieces, dropped from memory once read: for hashing files larger than the memory."""
        for begin in range(self._file.data_begin, self.size, size):
            end = min(begin + size, self.size)
            yield self._file.bytes[begin:end]
            self._file.release(begin, end)

    def refuse(self, found: str, mend: str) -> NoReturn:
        """Raises InputError naming this file."""
        self._file.refuse(found, mend)

    def _check_version(self, metadata: Mapping[str, str]) -> None:
        if metadata.get("format") != FORMAT:
            self.refuse("this safetensors file is no .cnl", "make one with: cnllama convert")
        if metadata.get("version") != VERSION:
            self.refuse(
                f"it has version {metadata.get('version')!r:.40} of the format and this cnllama reads {VERSION!r}",
                "update cnllama or convert again",
            )
        missing = [key for key in (*JSON_KEYS, "template", "header_sha256") if key not in metadata]
        if missing:
            self.refuse(f"the header lacks {', '.join(missing)}", "the file is damaged, convert again")

    def _check_header_hash(self) -> None:
        header = self._file.header
        found = _HASH.findall(header)
        if len(found) != 1 or header_hash(header) != found[0].decode():
            self.refuse("the header does not match its own hash", "the file is damaged, get it again")

    def _tensors(self, table: dict[str, Any]) -> Iterator[tuple[str, TensorEntry]]:
        if set(table) != set(self._file.entries):
            name = min(set(table) ^ set(self._file.entries))
            self.refuse(f"tensor {name!r:.80} is not both in the table and in the file", "the file is damaged")
        if self._file.data_begin % ALIGNMENT:
            self.refuse(f"the data begin at byte {self._file.data_begin:,}, no multiple of 64", "the file is damaged")
        for name, value in table.items():
            entry = self._file.entries[name]
            scheme, rows, cols = self._check_row(name, value)
            self._check_stored(name, entry, scheme, rows, cols)
            yield name, TensorEntry(name, scheme, rows, cols, self._file.view(name))

    def _check_row(self, name: str, value: object) -> tuple[str, int, int]:
        if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
            self.refuse(f"the table says {value!r:.80} of tensor {name!r:.80}", "expected [scheme, rows, columns]")
        scheme, rows, cols = value
        known = [*_core.schemes(), "f32", "raw"]
        if scheme not in known:
            self.refuse(f"tensor {name!r:.80} has scheme {scheme!r:.40}", f"expected one of {', '.join(known)}")
        if not is_count(rows, 1, 1 << 30) or not is_count(cols, 1, 1 << 30):
            self.refuse(f"tensor {name!r:.80} has sizes {rows!r:.40} x {cols!r:.40}", "expected positive integers")
        return scheme, rows, cols

    def _check_stored(self, name: str, entry: Entry, scheme: str, rows: int, cols: int) -> None:
        dtype, shape = stored_shape(scheme, rows, cols)
        if (entry.dtype, list(entry.shape)) != (dtype, shape):
            self.refuse(
                f"tensor {name!r:.80} is stored as {entry.dtype} {list(entry.shape)}, expected {dtype} {shape}",
                "the file is damaged, convert again",
            )
        if entry.begin % ALIGNMENT:
            self.refuse(f"tensor {name!r:.80} begins at byte {entry.begin:,}, no multiple of 64", "the file is damaged")

    def _check_architecture(self) -> None:
        left = {name for name, tensor in self.tensors.items() if tensor.scheme != "raw"}
        for name, expected in expected_tensors(self.config):
            tensor = self.tensors.get(name)
            if tensor is None:
                if expected.optional:
                    continue
                self.refuse(f"tensor {name!r} is missing", "the file is damaged, convert again")
            left.discard(name)
            if (tensor.rows, tensor.cols) != (expected.rows, expected.cols):
                self.refuse(
                    f"tensor {name!r} is {tensor.rows} x {tensor.cols} and the config asks for "
                    f"{expected.rows} x {expected.cols}",
                    "the file is damaged, convert again",
                )
            if (tensor.scheme == "f32") != expected.vector:
                self.refuse(f"tensor {name!r} has scheme {tensor.scheme!r}", "the file is damaged, convert again")
        if left:
            self.refuse(f"tensor {min(left)!r:.80} belongs to no LLaMA of this config", "the file is damaged")
        if TOKENIZER not in self.tensors or sum(t.scheme == "raw" for t in self.tensors.values()) != 1:
            self.refuse(f"it must hold one raw tensor, {TOKENIZER!r}", "the file is damaged, convert again")

    def _check_template(self) -> None:
        from cnllama.templates import TEMPLATES

        if self.template not in TEMPLATES:
            self.refuse(
                f"its prompt template is {self.template!r:.40}, expected one of {', '.join(TEMPLATES)}",
                "update cnllama or convert again",
            )

    def _check_generation(self) -> None:
        ids = self.generation.get("eos_token_ids")
        if not isinstance(ids, list) or not all(is_count(i, 0, self.vocab_size - 1) for i in ids):
            self.refuse(f"the end tokens are {ids!r:.60}", f"expected a list of ids under {self.vocab_size}")
        bos = self.generation.get("bos_token_id")
        if bos is not None and not is_count(bos, 0, self.vocab_size - 1):
            self.refuse(f"bos_token_id is {bos!r:.40}", f"expected an id under {self.vocab_size} or null")

    def _check_tokenizer(self) -> None:
        settings, entry = self.tokenizer, self.tensors[TOKENIZER]
        mend = "the file is damaged, convert again"
        if settings.get("type") != "sentencepiece":
            self.refuse(f"the tokenizer is of type {settings.get('type')!r:.40}", "expected 'sentencepiece'")
        for key in ("add_bos", "add_dummy_prefix"):
            if not isinstance(settings.get(key), bool):
                self.refuse(f"the tokenizer's {key} is {settings.get(key)!r:.40}, expected true or false", mend)
        if not is_count(settings.get("pieces"), 1, self.vocab_size):
            self.refuse(f"the tokenizer has {settings.get('pieces')!r:.40} pieces for {self.vocab_size} rows", mend)
        if not isinstance(settings.get("legacy", True), bool):
            self.refuse(f"the tokenizer's legacy is {settings['legacy']!r:.40}, expected true or false", mend)
        added = settings.get("added_tokens")
        if not isinstance(added, dict) or not all(is_count(i, 0, self.vocab_size - 1) for i in added.values()):
            self.refuse(f"the added tokens are {added!r:.80}, expected ids under {self.vocab_size}", mend)
        if len(set(added.values())) != len(added) or not all(map(_is_text, added)):
            self.refuse("two added tokens share one id, or one has no text or more than it may", mend)
        self._check_token_flags(settings.get("token_flags", {}), added)
        for key in ("bos_token_id", "eos_token_id"):
            i = settings.get(key, 0)
            if not is_count(i, 0, self.vocab_size - 1) or (i >= settings["pieces"] and i not in added.values()):
                self.refuse(f"the tokenizer's {key} is {i!r:.40}, which has no text", mend)
        if hashlib.sha256(entry.data[: entry.rows].data).hexdigest() != settings.get("sha256"):
            self.refuse("the tokenizer does not match its hash", "the file is damaged, get it again")

    def _check_token_flags(self, flags: object, added: Mapping[str, int]) -> None:
        if not isinstance(flags, dict) or not set(flags) <= set(added):
            self.refuse(f"the token flags are {flags!r:.80}, expected some for added tokens", "convert again")
        for text, names in flags.items():
            if not isinstance(names, list) or not all(isinstance(n, str) and n in FLAGS for n in names):
                self.refuse(
                    f"the flags of the added token {text!r:.40} are {names!r:.80}, expected some of {', '.join(FLAGS)}",
                    "update cnllama or convert again",
                )

    def _check_fingerprint(self) -> None:
        mend = "the file is damaged, convert again"
        content = self.fingerprint.get("content_sha256")
        if not isinstance(content, str) or not _HEX64.fullmatch(content):
            self.refuse(f"content_sha256 is {content!r:.80}, expected 64 hexadecimal digits", mend)
        tensors = self.fingerprint.get("tensors")
        if not isinstance(tensors, dict) or set(tensors) != set(self.engine_tensors()):
            self.refuse("the fingerprint does not list exactly the tensors of the file", mend)
        for name, statistics in tensors.items():
            if not isinstance(statistics, dict) or not {"rms", "mean", "absmax"} <= set(statistics):
                self.refuse(f"the fingerprint of {name!r} lacks rms, mean or absmax", mend)
            if not all(is_number(v) for v in statistics.values()):
                self.refuse(f"the fingerprint of {name!r} holds something that is no number", mend)


def header_hash(header: bytes) -> str:
    """The SHA-256 (hexadecimal) of a header whose `header_sha256` is read as 64 zeros."""
    return hashlib.sha256(_HASH.sub(f'"header_sha256":"{_ZERO_HASH}"'.encode(), header)).hexdigest()


def _is_text(value: str) -> bool:
    """Neither empty nor endless, and free of lone surrogates, which JSON can spell."""
    return 0 < len(value) <= MAX_LENGTH and value.encode("utf-8", "replace").decode() == value


class CnlWriter(TensorWriter):
    """Streams a .cnl to a temporary name and renames it when complete.

    path: the final name. table: name -> (scheme, rows, cols) in file order. metadata: the header's values as Python
    objects (JSON_KEYS without "tensors", and "template"); values known only at the end may come to finish().
    Tensors are written in the table's order, each in pieces of any size. An exception leaves no file.
    """

    def __init__(
        self, path: str | os.PathLike[str], metadata: Mapping[str, Any], table: Mapping[str, tuple[str, int, int]]
    ) -> None:
        self._metadata = dict(metadata)
        self._table = dict(table)
        self._sizes = {name: stored_bytes(*row) for name, row in table.items()}
        self._content = hashlib.sha256()
        self._data_begin = _data_begin(metadata, table)
        super().__init__(path, self._sizes, self._data_begin)

    def write_padded(self, name: str, data: Bytes | bytes) -> None:
        """Writes a whole tensor and the zeros that fill it up."""
        data = data.tobytes() if isinstance(data, np.ndarray) else data
        self.write(name, data + bytes(self._sizes[name] - len(data)))

    def finish(self, updates: Mapping[str, Any], check: Callable[[Path], None] | None = None) -> str:
        """Adds metadata, writes the header, syncs and renames. Returns the content hash.

        check: called with the temporary name of the whole file; what it raises leaves no file.
        """
        self._check_complete()
        content = self._content.hexdigest()
        self._metadata.update(updates)
        _, unusable = read_defaults(self._metadata.get("generation", {}))
        if unusable:
            raise CnllamaError(f"{self.path}: no run could use its sampling defaults: {'; '.join(unusable.values())}")
        self._metadata["fingerprint"] = {**self._metadata["fingerprint"], "content_sha256": content}
        room = self._data_begin - 8
        header = _header(self._metadata, self._table, _ZERO_HASH)
        if len(header) > room:
            raise CnllamaError(f"{self.path}: the header needs {len(header):,} bytes and {room:,} were kept for it")
        header += b" " * (room - len(header))
        header = _HASH.sub(f'"header_sha256":"{header_hash(header)}"'.encode(), header)
        self._output.write(room.to_bytes(8, "little") + header, 0)
        if check is not None:
            check(self._output.temporary)
        self._output.commit()
        return content

    def _append(self, data: memoryview) -> None:
        super()._append(data)
        self._content.update(data)


def planned_size(metadata: Mapping[str, Any], table: Mapping[str, tuple[str, int, int]]) -> int:
    """Bytes of the file that a CnlWriter makes of these."""
    return _data_begin(metadata, table) + sum(stored_bytes(*row) for row in table.values())


def _data_begin(metadata: Mapping[str, Any], table: Mapping[str, tuple[str, int, int]]) -> int:
    """The header is written last but the data cannot move: room is left for the statistics of every tensor."""
    return round_up(8 + len(_header(metadata, table, "")) + 192 * len(table) + (1 << 12), ALIGNMENT)


def _header(metadata: Mapping[str, Any], table: Mapping[str, tuple[str, int, int]], digest: str) -> bytes:
    values = {key: metadata.get(key, {}) for key in JSON_KEYS} | {"tensors": table}
    described = {"format": FORMAT, "version": VERSION, "template": metadata["template"], "header_sha256": digest}
    described |= {key: _dump(value) for key, value in values.items()}
    header: dict[str, Any] = {"__metadata__": described}
    begin = 0
    for name, row in table.items():
        dtype, shape = stored_shape(*row)
        end = begin + stored_bytes(*row)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    # Names of directories may hold bytes that are no UTF-8; the header must.
    return _dump(header).encode("utf-8", "replace")


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
