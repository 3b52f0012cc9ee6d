# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back: SentencePiece, the checkpoint's added tokens, and a decoder that is fed one id at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cnllama.errors import InputError

SPACE = "\u2581"
REPLACEMENT = "\ufffd"
_MARKER = re.compile(r"<.*>|\[.*\]", re.DOTALL)


class Tokenizer:
    """A SentencePiece model with the checkpoint's added tokens.

    model: the bytes of `tokenizer.model`. settings: the `tokenizer` metadata of a .cnl, of which `add_bos`,
    `add_dummy_prefix` and `added_tokens` (text -> id) are read. Raises InputError when the model cannot be read.
    """

    def __init__(self, model: bytes, settings: Mapping[str, Any] | None = None) -> None:
        import sentencepiece

        settings = settings or {}
        dummy_prefix = settings.get("add_dummy_prefix")
        if dummy_prefix is not None:
            # A repeated field of a serialized message is merged into the first: this sets
            # normalizer_spec.add_dummy_prefix and leaves the rest alone.
            model = model + bytes([0x1A, 2, 0x18, bool(dummy_prefix)])
        try:
            if not model:
                raise ValueError("it is empty")
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:
            reason = " ".join(str(error).split())  # SentencePiece quotes the damaged bytes, line breaks and all
            raise InputError(
                f"the tokenizer is not a SentencePiece model ({reason}): "
                "convert again with the original tokenizer.model"
            ) from error
        self.pieces = int(self._sp.get_piece_size())
        self.bos_id = int(self._sp.bos_id())
        self.eos_id = int(self._sp.eos_id())
        self.add_bos = bool(settings.get("add_bos", True)) and self.bos_id >= 0
        self.added_tokens = {str(text): int(i) for text, i in settings.get("added_tokens", {}).items()}
        self._added_text = {i: text for text, i in self.added_tokens.items() if i >= self.pieces}
        probe = "".join(self._sp.encode("a  a", out_type=str))
        self.strips_space = probe.startswith(SPACE)
        self.removes_extra_spaces = SPACE * 2 not in probe
        self._surfaces: dict[int, _Surface] = {}
        self._special_pattern: re.Pattern[str] | None = None

    @property
    def size(self) -> int:
        """One more than the largest id that has a text."""
        return max([self.pieces, *(i + 1 for i in self._added_text)])

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`. With `special`, the names of control and added tokens in it become their ids; otherwise they
        are ordinary text, so that what a user types never becomes a control token. Raises InputError for text that is
        not Unicode (lone surrogates).
        """
        ids = self._encode_special(text) if special else self._encode_plain(text)
        return [self.bos_id] * (bos and self.bos_id >= 0) + ids + [self.eos_id] * (eos and self.eos_id >= 0)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: what a stream of them gives. Control tokens have none; see StreamDecoder."""
        decoder = self.stream()
        return "".join([decoder.feed(i) for i in ids]) + decoder.finish()

    def stream(self, continues: bool = False) -> StreamDecoder:
        """A decoder. `continues`: the ids follow earlier text, so a leading space belongs to the text and stays."""
        return StreamDecoder(self, continues)

    def special_id(self, name: str) -> int | None:
        """Id of the added, control or user-defined token called `name`, None when there is none."""
        if name in self.added_tokens:
            return self.added_tokens[name]
        i = int(self._sp.piece_to_id(name))
        plain = self._sp.is_unknown(i) or self._sp.is_byte(i) or self._sp.id_to_piece(i) != name
        return i if not plain and _MARKER.fullmatch(name) else None

    def piece(self, token: int) -> str:
        """The token's piece as the vocabulary spells it, for display. Raises InputError for an id without one."""
        return self._added_text[token] if token in self._added_text else str(self._sp.id_to_piece(self._check(token)))

    def has(self, token: int) -> bool:
        """Whether the id has a text: rows of padding do not."""
        return 0 <= token < self.pieces or token in self._added_text

    def surface(self, token: int) -> _Surface:
        """How a token decodes. Raises InputError for an id without a text."""
        found = self._surfaces.get(token)
        if found is None:
            found = self._surfaces[token] = self._make_surface(token)
        return found

    def _make_surface(self, token: int) -> _Surface:
        if token in self._added_text:
            text = self._added_text[token]
            return _Surface("" if _MARKER.fullmatch(text) else text, None, False)
        sp = self._sp
        self._check(token)
        piece = str(sp.id_to_piece(token))
        if sp.is_control(token):
            return _Surface("", None, False)
        if sp.is_unknown(token):
            return _Surface(str(sp.decode([token])), None, False)
        if sp.is_byte(token):
            return _Surface("", int(piece[3:5], 16), False)
        return _Surface(piece, None, True)

    def _check(self, token: int) -> int:
        if not 0 <= token < self.pieces:
            raise InputError(f"token id {token} is not in the tokenizer, whose ids are 0 to {self.size - 1}")
        return token

    def _encode_plain(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not valid Unicode at character {error.start}: decode it as UTF-8 or GBK first"
            ) from error
        return [int(i) for i in self._sp.encode(text)] if text else []

    def _encode_special(self, text: str) -> list[int]:
        if self._special_pattern is None:
            controls = [self._sp.id_to_piece(i) for i in range(min(self.pieces, 16)) if self._sp.is_control(i)]
            names = sorted({*controls, *self.added_tokens}, key=len, reverse=True)
            self._special_pattern = re.compile("(" + "|".join(re.escape(n) for n in names) + ")" if names else "(?!)")
        ids: list[int] = []
        for i, part in enumerate(self._special_pattern.split(text)):
            if i % 2 == 0:
                ids += self._encode_plain(part)
            else:
                ids.append(self.added_tokens.get(part, int(self._sp.piece_to_id(part))))
        return ids


class _Surface(NamedTuple):
    """What one token adds to the text: verbatim text, one byte, or a piece in which SPACE stands for a space."""

    text: str
    byte: int | None
    is_piece: bool


class StreamDecoder:
    """Decodes ids one at a time; the concatenation of what it returns is what SentencePiece's decode gives.

    Bytes of a character that spans tokens are held until it is complete. Bytes that can begin no character come out as
    U+FFFD, one each, as SentencePiece does; a character that is still incomplete at the end is left out. Control tokens
    and added tokens named like markers (`<...>`, `[...]`) have no text.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._held = b""
        self._at_start = not continues and (tokenizer.strips_space or tokenizer.removes_extra_spaces)
        self._started = False
        self._space_seen = False

    def feed(self, token: int) -> str:
        """Adds one id; returns the characters that it completes, possibly none."""
        surface = self._tokenizer.surface(int(token))
        if surface.byte is not None:
            self._held += bytes([surface.byte])
            text, self._held = split_utf8(self._held)
            self._started = self._started or bool(text)
            return text
        text = REPLACEMENT * len(self._held)
        self._held = b""
        if self._started or self._space_seen or text:
            self._at_start = False
        text += self._piece_text(surface)
        self._started = self._started or bool(text)
        return text

    def finish(self) -> str:
        """The end: returns what was still to come, which is nothing; an incomplete character is dropped."""
        self._held = b""
        return ""

    def _piece_text(self, surface: _Surface) -> str:
        self._space_seen = False
        if not surface.is_piece:
            return surface.text
        piece = surface.text
        if self._at_start and piece.startswith(SPACE):
            piece = piece[1:]
            self._space_seen = not self._tokenizer.removes_extra_spaces
        return piece.replace(SPACE, " ")


def split_utf8(data: bytes) -> tuple[str, bytes]:
    """(text of the complete characters, the bytes of a character that may still be completed)."""
    out = []
    at = 0
    while at < len(data):
        length = _sequence_length(data, at)
        if length == 0:
            out.append(REPLACEMENT)
            at += 1
        elif at + length > len(data):
            break
        else:
            out.append(data[at : at + length].decode("utf-8"))
            at += length
    return "".join(out), data[at:]


def _sequence_length(data: bytes, at: int) -> int:
    """Bytes of the character that begins at `at`, 0 when what is there can begin none (RFC 3629, section 4)."""
    lead = data[at]
    if lead < 0x80:
        return 1
    if 0xC2 <= lead <= 0xDF:
        length = 2
    elif 0xE0 <= lead <= 0xEF:
        length = 3
    elif 0xF0 <= lead <= 0xF4:
        length = 4
    else:
        return 0
    low = {0xE0: 0xA0, 0xF0: 0x90}.get(lead, 0x80)
    high = {0xED: 0x9F, 0xF4: 0x8F}.get(lead, 0xBF)
    for i, byte in enumerate(data[at + 1 : at + length]):
        if not (low <= byte <= high if i == 0 else 0x80 <= byte <= 0xBF):
            return 0
    return length
