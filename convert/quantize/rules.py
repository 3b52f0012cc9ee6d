# SPDX-License-Identifier: Apache-2.0
"""Which scheme a tensor gets: the names of --quant, and the exceptions of --quant-rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from cnllama import _core
from cnllama.config import EMBEDDING, LM_HEAD
from cnllama.errors import InputError

from ..merge import MergedTensor

DEFAULT_Q4 = "q4-a64"
EMBEDDINGS = "q8-s64"
_SHORT = {"q8": "q8-s64", "q6": "q6-s64", "q5": "q5-a64", "q4": DEFAULT_Q4, "q3": "q3-a64", "q2": "q2-a64"}


class Rule(NamedTuple):
    """The scheme of the matrices whose name matches the pattern."""

    pattern: str
    scheme: str


def quantizations() -> dict[str, str]:
    """What --quant takes -> scheme: the short names, then every scheme of this build by its own."""
    known = _core.schemes()
    return {short: scheme for short, scheme in _SHORT.items() if scheme in known} | {name: name for name in known}


def scheme_of(name: str, option: str) -> str:
    """The scheme that a name of --quant stands for. Raises InputError that lists the known ones."""
    known = quantizations()
    if name not in known:
        raise InputError(f"{option}: the scheme {name!r:.40} is unknown, expected one of {', '.join(known)}")
    return known[name]


def parse_rules(texts: Sequence[str]) -> list[Rule]:
    """The rules of "pattern=scheme,pattern=scheme", from one or several such texts. Raises InputError."""
    rules = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        pattern, equals, scheme = part.partition("=")
        if not (pattern and equals and scheme):
            raise InputError(f"--quant-rule {part!r:.80}: expected PATTERN=SCHEME, for example '*.down_proj=q8'")
        rules.append(Rule(pattern.strip(), scheme_of(scheme.strip(), f"--quant-rule {part!r:.80}")))
    return rules


def scheme_table(
    tensors: Mapping[str, MergedTensor], scheme: str, rules: Sequence[Rule] = ()
) -> dict[str, tuple[str, int, int]]:
    """name -> (scheme, rows, cols) of every tensor: the last rule that matches, else `scheme`, or EMBEDDINGS for
    embed_tokens and lm_head; vectors are "f32". Raises InputError for a pattern that matches no matrix.
    """
    table = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) == 1:
            table[name] = ("f32", tensor.shape[0], 1)
        else:
            table[name] = (EMBEDDINGS if name in (EMBEDDING, LM_HEAD) else scheme, tensor.shape[0], tensor.shape[1])
    matrices = [name for name, (kind, _, _) in table.items() if kind != "f32"]
    for rule in rules:
        matched = [name for name in matrices if any(fnmatchcase(alias, rule.pattern) for alias in _aliases(name))]
        if not matched:
            raise _no_match(rule, matrices)
        for name in matched:
            table[name] = (rule.scheme, *table[name][1:])
    return table


def _aliases(name: str) -> Iterator[str]:
    """What a pattern may match: the name with and without the model. before it and the .weight behind it."""
    for text in (name, name.removeprefix("model.")):
        yield text
        yield text.removesuffix(".weight")


def _no_match(rule: Rule, matrices: Sequence[str]) -> InputError:
    head = f"--quant-rule {rule.pattern}={rule.scheme}: no matrix of this model has such a name"
    if LM_HEAD not in matrices and fnmatchcase("lm_head", rule.pattern):
        return InputError(f"{head}: its embeddings are tied, so give the rule for embed_tokens")
    names = {alias: name for name in matrices for alias in _aliases(name)}
    close = get_close_matches(rule.pattern.replace("*", ""), names, n=12, cutoff=0)
    nearest = list(dict.fromkeys(names[alias].removesuffix(".weight") for alias in close))[:3]
    return InputError(f"{head}; the closest are {', '.join(nearest)}")
