# SPDX-License-Identifier: Apache-2.0
"""Our prompt templates as Jinja, which GGUF files carry: made from the same data that the run time reads."""

from __future__ import annotations

import re

from cnllama.templates import BOS, EOS, Parts, Template, Token

_SLOT = re.compile(r"\{(system|user|assistant)\}")
_NAMES = {"system": "system", "user": "message['content']", "assistant": "message['content']"}


def to_jinja(template: Template, *, bos: bool, eos: bool, eos_name: str = "") -> str | None:
    """The Jinja text of a template for `messages`, an optional system message, then user and assistant in turn.

    bos, eos: whether the tokenizer has these tokens; without, nothing stands for them. eos_name: the end token's, where
    Jinja's eos_token is another one. None for the raw template, which only passes text on. Everything printed is an
    expression, so that no engine's rule for white space around blocks matters.
    """
    if template.name == "raw":
        return None
    first, bare, later, answer = (
        _expression(parts, bos, _quoted(eos_name) if eos_name else "eos_token" if eos else "")
        for parts in (template.first, template.bare, template.later, template.answer)
    )
    return (
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        "{% else %}"
        f"{{% set system = {_quoted(template.system)} %}}{{% set turns = messages %}}"
        "{% endif %}"
        "{% for message in turns %}"
        "{% if message['role'] == 'user' %}"
        f"{{% if not loop.first %}}{later}{{% elif system %}}{first}{{% else %}}{bare}{{% endif %}}"
        f"{{% else %}}{answer}{{% endif %}}"
        "{% endfor %}"
    )


def _expression(parts: Parts, bos: bool, eos: str) -> str:
    terms: list[str] = []
    for part in parts:
        if isinstance(part, Token):
            if part in (BOS, EOS):
                terms += ["bos_token"] * (part == BOS and bos) + [eos] * (part == EOS and bool(eos))
            else:
                terms.append(_quoted(part.name))
            continue
        for i, piece in enumerate(_SLOT.split(part)):
            if i % 2:
                terms.append(_NAMES[piece])
            elif piece:
                terms.append(_quoted(piece))
    return "".join(f"{{{{ {term} }}}}" for term in terms)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
