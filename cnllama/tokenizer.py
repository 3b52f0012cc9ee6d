# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back: SentencePiece, the checkpoint's added tokens, and a decoder that is fed one id at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from cnllama.added_tokens import MARKER, SPACES, AddedToken, AddedTokens
from cnllama.errors import InputError
from cnllama.sentencepiece_model import as_control, open_model, with_dummy_prefix

SPACE = "\u2581"
REPLACEMENT = "\ufffd"


class Tokenizer:
    """A SentencePiece model with the checkpoint's added tokens.

    model: the bytes of `tokenizer.model`. settings: the `tokenizer` metadata of a .cnl (docs/format.md), of which
    `add_bos`, `add_dummy_prefix`, `legacy`, `bos_token_id`, `eos_token_id`, `added_tokens` (text -> id) and
    `token_flags` are read. where: names the file, to begin an error. Raises InputError when the model cannot be read.
    """

    def __init__(self, model: bytes, settings: Mapping[str, Any] | None = None, where: str = "") -> None:
        settings = settings or {}
        self._where = f"{where}: " if where else ""
        dummy_prefix = settings.get("add_dummy_prefix")
        self._model = model if dummy_prefix is None or not model else with_dummy_prefix(model, bool(dummy_prefix))
        self._sp = self._load(self._model)
        self.pieces = int(self._sp.get_piece_size())
        self.added_tokens = {str(text): int(i) for text, i in settings.get("added_tokens", {}).items()}
        flags = settings.get("token_flags", {})
        self._added = [AddedToken.stored(text, i, flags.get(text)) for text, i in self.added_tokens.items()]
        self._added_by_id = {token.id: token for token in self._added}
        self._keep_control_pieces_out_of_text()
        self.bos_id = int(settings.get("bos_token_id", self._sp.bos_id()))
        self.eos_id = int(settings.get("eos_token_id", self._sp.eos_id()))
        self.add_bos = bool(settings.get("add_bos", True)) and self.bos_id >= 0
        self.legacy = bool(settings.get("legacy", True))
        probe = "".join(self._sp.encode("a  a", out_type=str))
        self.strips_space = probe.startswith(SPACE)
        self.removes_extra_spaces = SPACE * 2 not in probe
        self._found_in_any_text = any(not token.special for token in self._added)
        self._surfaces: dict[int, _Surface] = {}

    @property
    def size(self) -> int:
        """One more than the largest id that has a text."""
        return max([self.pieces, *(i + 1 for i in self._added_by_id)])

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`. With `special`, the names of control and added tokens in it become their ids; otherwise only
        those of tokens that were added as words do, so that what a user types never becomes a control token. Raises
        InputError for text that is not Unicode (lone surrogates).
        """
        ids = self._encode(text, special, True)
        return [self.bos_id] * (bos and self.bos_id >= 0) + ids + [self.eos_id] * (eos and self.eos_id >= 0)

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of texts, each as a user types it, with control tokens, given as ids, between them.

        They are those of the one text in which the tokens' names stand for the ids: what white space a token takes
        from its neighbours and whether the text after it begins with a space of its own is as the checkpoint says.
        """
        joined: list[str | int] = []
        for part in parts:
            if isinstance(part, str) and joined and isinstance(joined[-1], str):
                joined[-1] += part
            else:
                joined.append(part)
        ids: list[int] = []
        for i, part in enumerate(joined):
            if not isinstance(part, str):
                ids.append(part)
                continue
            before, after = (self._neighbour(joined, j) for j in (i - 1, i + 1))
            text = part.lstrip(SPACES) if before and before.rstrip else part
            text = text.rstrip(SPACES) if after and after.lstrip else text
            ids += self._encode(text, False, i == 0)
        return ids

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
        i = int(self._sp.piece_to_id(name))  # of unknown text where there is no such piece
        plain = self._sp.is_unknown(i) or self._sp.is_byte(i) or self._sp.id_to_piece(i) != name
        return i if not plain and MARKER.fullmatch(name) else None

    def piece(self, token: int) -> str:
        """The token's piece as the vocabulary spells it, for display. Raises InputError for an id without one."""
        added = self._added_by_id.get(token)
        return added.text if added else str(self._sp.id_to_piece(self._check(token)))

    def has(self, token: int) -> bool:
        """Whether the id has a text: rows of padding do not."""
        return 0 <= token < self.pieces or token in self._added_by_id

    def added(self, token: int) -> AddedToken | None:
        """What the checkpoint says of the added token with this id, None when it is none."""
        return self._added_by_id.get(token)

    def surface(self, token: int) -> _Surface:
        """How a token decodes. Raises InputError for an id without a text."""
        found = self._surfaces.get(token)
        if found is None:
            found = self._surfaces[token] = self._make_surface(token)
        return found

    def _make_surface(self, token: int) -> _Surface:
        added = self._added_by_id.get(token)
        if added is not None and (token >= self.pieces or not added.special):
            # Where every text between tokens begins with a space of its own, that one is not part of the text.
            begins_text = self.legacy and not added.special
            return _Surface(added.text if added.shown else "", None, False, begins_text)
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

    def _keep_control_pieces_out_of_text(self) -> None:
        """SentencePiece finds user-defined pieces in every text, also those that the checkpoint calls special."""
        ids = [t.id for t in self._added if t.special and t.id < self.pieces and not self._sp.is_control(t.id)]
        if ids:
            self._model = as_control(self._model, ids)
            self._sp = self._load(self._model)

    def _load(self, model: bytes) -> Any:
        return open_model(model, f"{self._where}the tokenizer")

    def _neighbour(self, parts: Sequence[str | int], index: int) -> AddedToken | None:
        part = parts[index] if 0 <= index < len(parts) else ""
        return None if isinstance(part, str) else self._added_by_id.get(part)

    def _encode(self, text: str, special: bool, at_start: bool) -> list[int]:
        """Ids of a text that begins the whole one or, not at_start, follows a token."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not valid Unicode at character {error.start}: decode it as UTF-8 or GBK first"
            ) from error
        if not special and not self._found_in_any_text:
            return self._encode_plain(text, at_start)
        ids: list[int] = []
        for begin, end, token in self._tokens_in_text.split(text, special):
            ids += [token.id] if token else self._encode_plain(text[begin:end], at_start and begin == 0)
        return ids

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        """transformers' `legacy`: whether a text after a token begins with a space of its own, as at the start."""
        if not text:
            return []
        processor = self._sp if at_start or self.legacy or not self.strips_space else self._without_prefix
        return [int(i) for i in processor.encode(text)]

    @cached_property
    def _without_prefix(self) -> Any:
        return self._load(with_dummy_prefix(self._model, False))

    @cached_property
    def _tokens_in_text(self) -> AddedTokens:
        """The added tokens, and the control pieces that are none."""
        ids = [i for i in range(self.pieces) if self._sp.is_control(i) or self._sp.is_unknown(i)]
        pieces = [AddedToken(str(self._sp.id_to_piece(i)), i) for i in ids]
        return AddedTokens([*(t for t in pieces if t.text not in self.added_tokens), *self._added])


class _Surface(NamedTuple):
    """What one token adds to the text: verbatim text, one byte, or a piece in which SPACE stands for a space.

    begins_text: what follows is decoded like the start of a text.
    """

    text: str
    byte: int | None
    is_piece: bool
    begins_text: bool = False


class StreamDecoder:
    """Decodes ids one at a time; the concatenation of what it returns is what SentencePiece's decode gives.

    Bytes of a character that spans tokens are held until it is complete. Bytes that can begin no character come out as
    U+FFFD, one each, as SentencePiece does; a character that is still incomplete at the end is left out. Control tokens
    have no text; where a file does not tell them, they are the added tokens named like markers (`<...>`, `[...]`).
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._held = b""
        self._strips = tokenizer.strips_space or tokenizer.removes_extra_spaces
        self._at_start = self._strips and not continues
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
        if surface.begins_text:
            self._at_start, self._started = self._strips, False
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
