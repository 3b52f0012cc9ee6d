# SPDX-License-Identifier: Apache-2.0
"""What a file is by its first bytes, when it is not what its name promised: a pointer, a web page, another format."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import NamedTuple

from cnllama.errors import printable

HEAD = 512  # bytes that decide; the mark of a tar archive lies at 257

_AGAIN = "get the file itself again"
_UNPACK = "unpack it and give what is inside"
_TORCH = "if PyTorch wrote it, its name ends with .bin"
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF file", "it is already converted, for llama.cpp; give the Hugging Face checkpoint"),
    (b"tjgg", "a GGML file of llama.cpp's early versions", "give the Hugging Face checkpoint"),
    (b"fmgg", "a GGML file of llama.cpp's early versions", "give the Hugging Face checkpoint"),
    (b"lmgg", "a GGML file of llama.cpp's early versions", "give the Hugging Face checkpoint"),
    (b"algg", "a GGML adapter of llama.cpp's early versions", "give the PEFT adapter"),
    (b"PK\x03\x04", "a zip archive", f"{_TORCH}, else {_UNPACK}"),
    (b"PK\x05\x06", "an empty zip archive", _AGAIN),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "an lz4 archive", _UNPACK),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file of TensorFlow or Keras", "give the PyTorch or safetensors weights"),
    (b"\x93NUMPY", "a NumPy array", _AGAIN),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", _AGAIN),
    (b"\xff\xd8\xff", "a JPEG image", _AGAIN),
    (b"GIF8", "a GIF image", _AGAIN),
    (b"%PDF-", "a PDF document", _AGAIN),
    (b"\x7fELF", "a program", _AGAIN),
    (b"SQLite format 3\x00", "an SQLite database", _AGAIN),
)  # fmt: skip
_POINTER = re.compile(rb"version [^\n]{1,200}\s+(?:ext-[^\n]{1,200}\n)*oid sha256:([0-9a-f]{8,64})\s+size (\d{1,20})\b")
_POINTER_START = re.compile(rb"version https?://(git-lfs\.github\.com|hawser\.github\.com)/spec/")
_PICKLE = re.compile(rb"\x80[\x01-\x05][\x00-\xff]")
_HTML = re.compile(rb"<(!doctype html|html|head|body|script)\b", re.IGNORECASE)


class Contents(NamedTuple):
    """What a file is, to follow "this is", and the mend."""

    what: str
    mend: str

    def __str__(self) -> str:
        return f"this is {self.what}; {self.mend}"


def what_it_is(head: bytes, text: bool = False) -> Contents | None:
    """What begins with these bytes, the first HEAD of a file or all of a shorter one. None: nothing known.

    text: it was to be text, so that plain text says nothing. Ask after the format that was expected has been ruled out:
    short marks can begin other files too.
    """
    if not head:
        return Contents("an empty file", "its download or conversion was cut off, make it again")
    if _POINTER_START.match(head):
        return _pointer(head)
    if not head.strip(b"\x00"):
        return Contents("nothing but zeros", "its download reserved the space and never filled it, get it again")
    for magic, what, mend in _MAGIC:
        if head.startswith(magic):
            return Contents(what, mend)
    if head[257:262] == b"ustar":
        return Contents("a tar archive", _UNPACK)
    if _PICKLE.match(head):
        return Contents("a pickle", _TORCH)
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return Contents("a safetensors file", "its name should end with .safetensors")
    return _text(head, text)


def what_the_file_is(path: Path) -> Contents | None:
    """The same of a file; None also for what is no regular file or cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            return None
        with open(path, "rb") as file:
            return what_it_is(file.read(HEAD))
    except (OSError, ValueError):  # a text that is no file's name
        return None


def _pointer(head: bytes) -> Contents:
    found = _POINTER.match(head)
    of = f" of {int(found[2]):,} bytes (sha256 {found[1][:12].decode()}...)" if found else ""
    mend = "run `git lfs pull` in the clone, or download the file itself"
    return Contents(f"a Git LFS pointer, which stands for a file{of}", mend)


def _text(head: bytes, expected: bool) -> Contents | None:
    """Text where bytes were expected is mostly what a server said instead of sending the file."""
    bare = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _HTML.match(bare) or (bare.startswith(b"<!--") and b"<html" in bare.lower()):
        return Contents("an HTML page", f"the download saved what a web site said, {_AGAIN}")
    if bare.startswith((b"<?xml", b"<Error")):
        return Contents("an XML document", f"the download saved what a server said, {_AGAIN}")
    words = bare.decode("utf-8", "ignore")
    if (
        expected
        or not words
        or len(words.encode()) < len(bare) - 3
        or not all(c.isprintable() or c.isspace() for c in words)
    ):
        return None
    said = f"({printable(' '.join(words.split())):.60})"
    mend = f"probably what a server said instead of sending the file, {_AGAIN}"
    if bare[:1] in (b"{", b"["):
        return Contents(f"a JSON text {said}", mend)
    return Contents(f"a text {said}", mend)
