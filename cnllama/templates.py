# SPDX-License-Identifier: Apache-2.0
"""Prompt templates as data, and the one function that turns a conversation into ids.

Text between two special tokens is encoded in one piece, as the reference implementations do; special tokens are put in
as ids, and nothing that a user writes can become one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cnllama.errors import InputError
from cnllama.tokenizer import Tokenizer

Message = Mapping[str, str]


@dataclass(frozen=True)
class Token:
    """A special token of a template: "bos", "eos" or the name of an added token, which is plain text where the
    vocabulary lacks it.
    """

    name: str


BOS, EOS = Token("bos"), Token("eos")
IM_START, IM_END = Token("<|im_start|>"), Token("<|im_end|>")

Parts = tuple[str | Token, ...]


@dataclass(frozen=True)
class Template:
    """How messages become one prompt.

    `first` opens the conversation, `bare` does so when the system text is empty, `later` is every following user turn
    and `answer` the model's turn between two of them; `{system}`, `{user}` and `{assistant}` stand for the texts.
    `sampling` holds defaults for SamplingParams, `stop` strings that end an answer, `stop_tokens` names of tokens that
    do. `fresh_answer`: the answer is a text of its own, so its leading space is not part of it.
    """

    name: str
    system: str
    first: Parts
    bare: Parts
    later: Parts
    answer: Parts
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    fresh_answer: bool = True


# The prompt that Chinese-Alpaca's own inference uses; its training joined the two parts with single line breaks, and
# its authors found this one to give better answers.
_ALPACA_TURN = "### Instruction:\n\n{user}\n\n### Response:\n\n"
_ALPACA2_TURN = "[INST] {user} [/INST]"
_CHATML_TURN: Parts = (IM_START, "user\n{user}", IM_END, "\n", IM_START, "assistant\n")
_REFERENCE_SAMPLING = {"temperature": 0.2, "top_k": 40, "top_p": 0.9, "repeat_penalty": 1.1}

TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        Template(
            name="alpaca",
            system="Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.",
            first=(BOS, "{system}\n\n" + _ALPACA_TURN),
            bare=(BOS, _ALPACA_TURN),
            later=("\n\n" + _ALPACA_TURN,),
            answer=("{assistant}",),
            sampling=_REFERENCE_SAMPLING,
            stop=("\n\n### Instruction:", "### Instruction:"),
        ),
        Template(
            name="alpaca-2",
            system="You are a helpful assistant. 你是一个乐于助人的助手。",
            first=(BOS, "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]"),
            bare=(BOS, _ALPACA2_TURN),
            later=(BOS, _ALPACA2_TURN),
            answer=(" {assistant}", EOS),
            sampling=_REFERENCE_SAMPLING,
        ),
        Template(
            name="chatml",
            system="You are a helpful assistant. 你是一个乐于助人的助手。",
            first=(BOS, IM_START, "system\n{system}", IM_END, "\n", *_CHATML_TURN),
            bare=(BOS, *_CHATML_TURN),
            later=("\n", *_CHATML_TURN),
            answer=("{assistant}", IM_END),
            sampling={"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repeat_penalty": 1.05},
            stop=("<|im_end|>",),
            stop_tokens=("<|im_end|>",),
        ),
        Template(
            name="raw",
            system="",
            first=(BOS, "{system}\n{user}"),
            bare=(BOS, "{user}"),
            later=("\n{user}",),
            answer=("{assistant}",),
            sampling={"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repeat_penalty": 1.1},
            fresh_answer=False,
        ),
    )
}

# Tokens of the templates besides "bos" and "eos": what a user types never becomes one.
CONTROL_NAMES = frozenset(
    part.name
    for template in TEMPLATES.values()
    for part in (*template.first, *template.bare, *template.later, *template.answer)
    if isinstance(part, Token) and part not in (BOS, EOS)
)


def get_template(name: str) -> Template:
    """The template called `name`. Raises InputError that lists all of them."""
    if name not in TEMPLATES:
        raise InputError(f"there is no template {name!r}: choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def default_template(vocab_size: int) -> str:
    """Name of the template for a model with that many tokens: the released vocabularies are told apart by it."""
    return {49954: "alpaca", 55296: "alpaca-2"}.get(vocab_size, "raw")


def join_input(instruction: str, text: str | None) -> str:
    """The user's turn of an Alpaca record: the input follows the instruction on a new line."""
    return f"{instruction}\n{text}" if text else instruction


def encode_chat(template: Template, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids of the prompt that asks for the next answer.

    messages: [{"role", "content"}]; an optional system message, then user and assistant in turn, the last one the
    user's. The ids begin with one BOS, unless the tokenizer adds none. Raises InputError for other messages.
    """
    system, turns = _read_messages(messages)
    system = template.system if system is None else system
    parts: list[tuple[str | Token, dict[str, str]]] = []
    for i, (user, assistant) in enumerate(turns):
        values = {"system": system, "user": user, "assistant": assistant or ""}
        opening = template.later if i else template.first if system else template.bare
        parts += [(part, values) for part in opening]
        if assistant is not None:
            parts += [(part, values) for part in template.answer]
    return _encode_parts(tokenizer, parts)


def _encode_parts(tokenizer: Tokenizer, parts: Sequence[tuple[str | Token, dict[str, str]]]) -> list[int]:
    begin: list[int] = []
    following: list[str | int] = []
    for part, values in parts:
        if isinstance(part, str):
            following.append(_fill(part, values))
            continue
        token = _resolve(tokenizer, part)
        if token is None:
            following.append(part.name if part not in (BOS, EOS) else "")
        elif part == BOS and not begin and not following:
            begin.append(token)  # the tokenizer's own: the text after it is the start of the text
        else:
            following.append(token)
    return begin + tokenizer.encode_parts(following)


def _resolve(tokenizer: Tokenizer, token: Token) -> int | None:
    if token == BOS:
        return tokenizer.bos_id if tokenizer.add_bos else None
    if token == EOS:
        return tokenizer.eos_id if tokenizer.eos_id >= 0 else None
    return tokenizer.special_id(token.name)


def _fill(part: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(system|user|assistant)\}", lambda match: values[match[1]], part)


def _read_messages(messages: Sequence[Message]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """(system text or None, [(user, assistant or None)])."""
    system: str | None = None
    turns: list[tuple[str, str | None]] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {i + 1} is no mapping: expected {{'role': ..., 'content': '...'}}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(content, str):
            raise InputError(f"message {i + 1} has no text: expected {{'role': ..., 'content': '...'}}")
        waiting = bool(turns) and turns[-1][1] is None
        if role == "system" and i == 0:
            system = content
        elif role == "user" and not waiting:
            turns.append((content, None))
        elif role == "assistant" and waiting:
            turns[-1] = (turns[-1][0], content)
        else:
            raise InputError(
                f"message {i + 1} has the role {role!r}: expected an optional system message, then user and assistant "
                "in turn"
            )
    if not turns or turns[-1][1] is not None:
        raise InputError("the last message must be the user's")
    return system, turns
