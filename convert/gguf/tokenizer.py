# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and the chat template under llama.cpp's keys, and where llama.cpp cuts text otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cnllama.added_tokens import AddedToken
from cnllama.errors import InputError
from cnllama.sentencepiece_model import BPE, PieceType, SentencePieceModel, parse
from cnllama.templates import BOS, EOS, TEMPLATES, Template, Token
from cnllama.tokenizer import Tokenizer

from ..tokenizers import load_sentencepiece
from .chat_template import to_jinja
from .container import Value, boolean, float32s, int32s, text, texts, uint32

if TYPE_CHECKING:
    from .metadata import Described

_LONGEST_OVERLAP = 64  # characters


def tokenizer_metadata(file: Described, warnings: list[str]) -> dict[str, Value]:
    """The keys of the tokenizer; appends to `warnings` what llama.cpp will do otherwise than we do. Raises InputError
    for a tokenizer that llama.cpp cannot reproduce.
    """
    model = parse(file.tokenizer_model, str(file.path))
    _check_tokenizer(model, file, warnings)
    tokenizer = Tokenizer(file.tokenizer_model, file.tokenizer, str(file.path))
    template = TEMPLATES[file.template]
    names, scores, types = _vocabulary(model, tokenizer, file.vocab_size, warnings)
    _check_found_pieces(names[: tokenizer.pieces], types, tokenizer, warnings)
    values = {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.tokens": texts(names),
        "tokenizer.ggml.scores": float32s(scores),
        "tokenizer.ggml.token_type": int32s(types),
        "tokenizer.ggml.add_bos_token": boolean(tokenizer.add_bos),
        "tokenizer.ggml.add_eos_token": boolean(False),
        "tokenizer.ggml.add_space_prefix": boolean(_space_prefix(template, tokenizer, warnings)),
    }
    ids = _special_ids(file, template, tokenizer, warnings)
    values |= {f"tokenizer.ggml.{key}_token_id": uint32(i) for key, i in ids.items()}
    # Jinja's eos_token is the file's, which is another one where the tokenizer's own does not end an answer.
    named = tokenizer.eos_id >= 0 and ids.get("eos") != tokenizer.eos_id
    jinja = to_jinja(
        template,
        bos=tokenizer.add_bos,
        eos=tokenizer.eos_id >= 0,
        eos_name=tokenizer.piece(tokenizer.eos_id) if named else "",
    )
    return values if jinja is None else values | {"tokenizer.chat_template": text(jinja)}


def _check_tokenizer(model: SentencePieceModel, file: Described, warnings: list[str]) -> None:
    if model.model_type != BPE:
        raise InputError(
            f"{file.path}: its tokenizer is a SentencePiece model of type {model.model_type}, and llama.cpp cuts text "
            f"into the same tokens only for BPE, type {BPE}; this model cannot be exported"
        )
    if model.space_is_suffix:
        raise InputError(
            f"{file.path}: its tokenizer puts spaces at the end of words, which llama.cpp's does not; "
            "this model cannot be exported"
        )
    if model.normalizes:
        warnings.append("llama.cpp does not normalize text as this tokenizer does: some texts get other tokens there")
    if model.remove_extra_spaces:
        warnings.append("llama.cpp keeps repeated spaces, which this tokenizer removes")
    if PieceType.BYTE not in model.types:
        warnings.append("the tokenizer has no bytes: llama.cpp fails on characters that are not in the vocabulary")


def _vocabulary(
    model: SentencePieceModel, tokenizer: Tokenizer, rows: int, warnings: list[str]
) -> tuple[list[str], list[float], list[int]]:
    """(name, score, type) of every row: pieces, added tokens, and rows that belong to none. No name occurs twice."""
    names, scores, types = list(model.pieces), list(model.scores), [int(kind) for kind in model.types]
    for i in range(len(names)):
        if (added := tokenizer.added(i)) is not None:
            types[i] = int(_type_of(added))
    taken = set(names)
    for i in range(len(names), rows):
        added = tokenizer.added(i)
        name, kind = ("", PieceType.UNUSED) if added is None else (added.text, _type_of(added))
        if not name or name in taken:
            if name:
                warnings.append(f"the added token {name!r}, {i}, is spelt like a piece: llama.cpp will not know it")
            name, kind = f"[UNUSED{i}]", PieceType.UNUSED
            while name in taken or name in tokenizer.added_tokens:
                name += "_"
        taken.add(name)
        names.append(name)
        scores.append(0.0)
        types.append(int(kind))
    return names, scores, types


def _type_of(added: AddedToken) -> PieceType:
    """llama.cpp finds user-defined tokens in any text, control tokens only where special ones are wanted."""
    return PieceType.USER_DEFINED if added.shown else PieceType.CONTROL


def _added(tokenizer: Tokenizer) -> list[AddedToken]:
    return [token for i in sorted(tokenizer.added_tokens.values()) if (token := tokenizer.added(i)) is not None]


def _check_found_pieces(pieces: list[str], types: list[int], tokenizer: Tokenizer, warnings: list[str]) -> None:
    """Warns of the tokens that both programs find in any text, but not at the same places or with the same effect."""
    own = [name for name, kind in zip(pieces, types, strict=False) if kind == PieceType.USER_DEFINED]
    if own:
        warnings.append(
            f"llama.cpp takes user-defined pieces, {_some(own)}, out of a text before it cuts the rest: text around "
            "them gets other tokens there"
        )
    added = _added(tokenizer)
    strict = [t.text for t in added if t.lstrip or t.rstrip or t.single_word]
    if strict:
        warnings.append(
            f"llama.cpp does not know lstrip, rstrip and single_word, which {_some(strict)} have: text around them "
            "gets other tokens there"
        )
    crossing = _crossing([t.text for t in added if not t.special])
    if crossing:
        warnings.append(
            f"of added tokens that overlap in a text, as {' and '.join(map(repr, crossing))} can, llama.cpp takes the "
            "longest, not the first"
        )


def _crossing(names: list[str]) -> tuple[str, str] | None:
    """Two names of which a later, longer one begins with the end of the other, None where there are none."""
    lengths = {name: range(1, min(len(name), _LONGEST_OVERLAP + 1)) for name in names}
    by_prefix = {name[:length]: name for name in sorted(names, key=len) for length in lengths[name]}
    for name in names:
        for at in (len(name) - length for length in lengths[name]):
            other = by_prefix.get(name[at:])
            if other is not None and len(other) > len(name):
                return name, other
    return None


def _space_prefix(template: Template, tokenizer: Tokenizer, warnings: list[str]) -> bool:
    """Whether text begins with a space: llama.cpp knows always and never, as after every token so at the start."""
    if not tokenizer.strips_space or tokenizer.legacy:
        return tokenizer.strips_space
    if any(_follows_token(parts, tokenizer) for parts in (template.first, template.bare)):
        warnings.append(
            "llama.cpp cannot put a space before the start of a text and none after a token, as this tokenizer does: "
            "prompts of the chat template are the same, text without it begins with another token"
        )
        return False
    inner = [*template.first[1:], *template.bare[1:], *template.later, *template.answer]
    words = [token for token in _added(tokenizer) if not token.special]
    if words or any(_is_token(part, tokenizer) for part in inner):
        warnings.append("llama.cpp puts a space before text that follows a token, which this tokenizer does not")
    return True


def _follows_token(parts: Iterable[str | Token], tokenizer: Tokenizer) -> bool:
    """Whether the first text of a prompt comes after a token other than the one that begins every text."""
    after = False
    for part in parts:
        if not _is_token(part, tokenizer):
            return after
        after = after or part not in (BOS, EOS)
    return after


def _is_token(part: str | Token, tokenizer: Tokenizer) -> bool:
    """Whether a part of a template is a token here: without its id it is text."""
    return isinstance(part, Token) and (part in (BOS, EOS) or tokenizer.special_id(part.name) is not None)


def _special_ids(file: Described, template: Template, tokenizer: Tokenizer, warnings: list[str]) -> dict[str, int]:
    """Ids by GGUF's name for them; those the model lacks are left out."""
    processor = load_sentencepiece(file.tokenizer_model, str(file.path))
    stops = [i for name in template.stop_tokens if (i := tokenizer.special_id(name)) is not None]
    ends = [int(i) for i in file.generation["eos_token_ids"]] or [tokenizer.eos_id] * (tokenizer.eos_id >= 0)
    eos = tokenizer.eos_id if tokenizer.eos_id in ends else ends[0] if ends else -1
    others = [i for i in dict.fromkeys([*stops, *ends]) if i != eos]
    eot, eom = [*others, -1, -1][:2]
    if len(others) > 2:
        left = [_spelt(i, tokenizer) for i in others[2:]]
        warnings.append(f"a GGUF file has room for three end tokens: {_some(left)} will not end an answer there")
    pad = next((i for name in ("[PAD]", "<pad>", "<PAD>") if (i := tokenizer.special_id(name)) is not None), -1)
    ids = {
        "bos": tokenizer.bos_id,
        "eos": eos,
        "unknown": int(processor.unk_id()),
        "padding": pad if pad >= 0 else int(processor.pad_id()),
        "eot": eot,
        "eom": eom,
    }
    return {name: i for name, i in ids.items() if i >= 0}


def _spelt(token: int, tokenizer: Tokenizer) -> str:
    return f"{token} {tokenizer.piece(token)}" if tokenizer.has(token) else str(token)


def _some(names: list[str]) -> str:
    """The first few of several names."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
