# SPDX-License-Identifier: Apache-2.0
"""The `generation` metadata of a .cnl: end tokens by all the files that name one, and the authors' sampling values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnllama.container import is_count, read_json
from cnllama.paths import exists
from cnllama.sampling import GENERATION_NAMES, read_defaults
from cnllama.templates import BOS, EOS, TEMPLATES, Template

from .tokenizers import TokenizerFiles

if TYPE_CHECKING:
    from .pack import Plan

NAME = "generation_config.json"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # read by transformers only where it samples
# What transformers can do besides, with the values that mean "off".
_UNKNOWN: dict[str, tuple[object, ...]] = {
    "begin_suppress_tokens": ([],), "bad_words_ids": ([],), "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "guidance_scale": (1,), "min_length": (0,), "min_new_tokens": (0,), "no_repeat_ngram_size": (0,),
    "num_beams": (1,), "penalty_alpha": (0,), "sequence_bias": ({}, []), "stop_strings": ([], ""),
    "suppress_tokens": ([],), "top_h": (), "typical_p": (1,),
}  # fmt: skip


def generation_metadata(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """(the metadata, notices): who says what, and what of it cannot be kept."""
    files, rows = plan.vocabulary.tokenizer, plan.config["vocab_size"]
    path = plan.checkpoint.directory / NAME
    given = read_json(path) if exists(path) else {}
    said = [(path, given), (plan.checkpoint.directory / "config.json", plan.checkpoint.config)]
    notices: list[str] = []
    result: dict[str, Any] = {
        "eos_token_ids": _end_tokens(said, files, rows, notices),
        "bos_token_id": _begin_token(said, files, rows, notices),
    }
    return result | _sampling(path, given, rows, notices), notices


def _end_tokens(
    said: list[tuple[Path, Mapping[str, Any]]], files: TokenizerFiles, rows: int, notices: list[str]
) -> list[int]:
    """What generation_config.json says, else config.json, as in transformers; then the tokenizer's own."""
    stated = [(path, _ids(path, values.get("eos_token_id"), rows, notices)) for path, values in said]
    path, ids = next(((path, ids) for path, ids in stated if ids), (said[0][0], []))
    own = files.role_id("eos_token")
    if own is not None and own < rows and own not in ids:
        if ids:
            notices.append(
                f"{path}: its eos_token_id is {_named(ids, files)}, the tokenizer's eos token {_named([own], files)}: "
                "each of them ends an answer"
            )
        ids = [*ids, own]
    for other, more in stated:
        left = [i for i in more if i not in ids]
        if left:
            notices.append(f"{other}: its eos_token_id is {_named(left, files)}, {path.name} says otherwise and counts")
    return ids


def _begin_token(
    said: list[tuple[Path, Mapping[str, Any]]], files: TokenizerFiles, rows: int, notices: list[str]
) -> int | None:
    """The tokenizer's, which is the one that is put before a text."""
    own = files.role_id("bos_token")
    stated = [(path, _ids(path, values.get("bos_token_id"), rows, [])) for path, values in said]
    path, ids = next(((path, ids) for path, ids in stated if ids), (said[0][0], []))
    if own is None or own >= rows:
        return ids[0] if ids else None
    if ids and ids != [own]:
        notices.append(
            f"{path}: its bos_token_id is {_named(ids, files)}, but the tokenizer puts {_named([own], files)} before "
            "a text: the tokenizer's counts"
        )
    return own


def _ids(path: Path, value: object, rows: int, notices: list[str]) -> list[int]:
    """The ids of a value that may be one, several or none; says which are no ids of the model."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    ids = [i for i in items if isinstance(i, int) and is_count(i, 0, rows - 1)]
    if len(ids) < len(items):
        notices.append(f"{path}: its eos_token_id is {value!r:.60}, expected ids under {rows}: the others are ignored")
    return list(dict.fromkeys(ids))


def _named(ids: list[int], files: TokenizerFiles) -> str:
    return ", ".join(f"{i} {files.text_of(i)!r:.40}" for i in ids[:4])


def _sampling(path: Path, given: Mapping[str, Any], rows: int, notices: list[str]) -> dict[str, Any]:
    samples = given.get("do_sample", False)
    if not isinstance(samples, bool | None):
        notices.append(f"{path}: do_sample is {samples!r:.40}, expected true or false: taken as false")
    off = () if samples is True else _SAMPLING
    values, problems = read_defaults({key: given[key] for key in GENERATION_NAMES if key in given and key not in off})
    if values.get("top_k", 0) >= rows:
        values["top_k"] = 0  # all there are: off
    notices += [f"{path}: {problem}" for problem in problems.values()]
    left = [key for key, neutral in _UNKNOWN.items() if given.get(key) is not None and given[key] not in neutral]
    if left:
        notices.append(f"{path}: cnllama does not have {', '.join(left)}: ignored")
    return values


def tokenizer_notices(files: TokenizerFiles, chosen: str, asked: bool) -> list[str]:
    """What of the tokenizer is not as the user may think, with the prompt template `chosen`.

    asked: whether the template was named on the command line.
    """
    where = files.file.parent
    notices = []
    if files.chat_template is not None and not asked:
        others = ", ".join(name for name in TEMPLATES if name != chosen)
        notices.append(
            f"{files.chat_template}: the checkpoint's own chat template is not read; the template {chosen!r} is used, "
            f"--template NAME chooses {others}"
        )
    if files.legacy is None and _has_text_after_tokens(files, TEMPLATES[chosen]):
        notices.append(
            f"{where}: tokenizer_config.json does not say `legacy`: text after a token gets no space of its own, as in "
            'transformers 5; write "legacy": true there for a model made with transformers before 4.31'
        )
    ids = sorted(i for i in files.added.values() if i >= files.pieces)
    gap = next((i for i, found in enumerate(ids, files.pieces) if found != i), None)
    if gap is not None:
        notices.append(
            f"{where}: {files.size - files.pieces - len(ids)} ids before the last added token have no text, the first "
            f"is {gap}; the ids are kept, transformers 5 would number the tokens without gaps"
        )
    return notices


def _has_text_after_tokens(files: TokenizerFiles, template: Template) -> bool:
    """Whether a prompt can have text after a token other than the first: there `legacy` counts."""
    parts = (*template.first[1:], *template.bare[1:], *template.later, *template.answer)
    tokens = [part for part in parts if not isinstance(part, str)]
    words = [text for text, i in files.added.items() if i >= files.pieces and "special" not in files.stored_flags(text)]
    return bool(words) or any(part in (BOS, EOS) or files.id_of(part.name) is not None for part in tokens)
