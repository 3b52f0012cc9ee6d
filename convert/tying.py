# SPDX-License-Identifier: Apache-2.0
"""What an adapter makes of embed_tokens and lm_head, tied or not, as PEFT runs it; decided before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from cnllama.config import EMBEDDING, LM_HEAD
from cnllama.errors import InputError

from .adapter_targets import EMBED_MODULE, HEAD_MODULE
from .adapters import Adapter, refuse_rank
from .checkpoint import SourceTensor
from .updates import Pair, Tokens

_NAMES = {EMBED_MODULE: EMBEDDING, HEAD_MODULE: LM_HEAD}
_LAST = {EMBED_MODULE: ("embed_tokens", EMBED_MODULE), HEAD_MODULE: ("lm_head",)}
# By what PEFT wraps a module in: where its own weight stands in the file, and where a trained copy of it.
OWN_PLACES = {
    "": ("",),
    "lora": ("base_layer",),
    "saved": ("original_module",),
    "tokens": ("token_adapter.base_layer",),
}
COPY_PLACES = ("", "modules_to_save", "base_layer")


@dataclass
class Matrix:
    """One of the two matrices after an adapter.

    base: the file's weight in place of the base's own; copy: a trained whole weight in place of both; then rows of
    tokens, then LoRA.
    """

    name: str
    wrapper: str = ""
    base: SourceTensor | None = None
    copy: SourceTensor | None = None
    tokens: Tokens | None = None
    pair: Pair | None = None

    @property
    def changed(self) -> bool:
        """Whether the adapter trains this matrix itself."""
        return self.copy is not None or self.tokens is not None or self.pair is not None

    @property
    def stated(self) -> SourceTensor | None:
        """The whole weight that the file gives it."""
        return self.base if self.copy is None else self.copy


@dataclass(frozen=True)
class Twins:
    """Two tensors of a file that stand for the same values, or for each other's transpose."""

    one: SourceTensor
    other: SourceTensor
    transposed: bool = False


@dataclass
class Embeddings:
    """Both matrices, whether one matrix is enough afterwards, and tensors of the file that have to be equal."""

    embed: Matrix
    head: Matrix
    tied: bool
    twins: list[Twins] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def on_embeddings(adapter: Adapter, tied: bool) -> Embeddings:
    """PEFT's forward pass, from the config and the names in the file. tied: whether the base has one matrix for both.

    Where PEFT's merge_and_unload differs, which adds a change of one of two tied matrices to both, the forward pass is
    what the adapter was trained with. Raises InputError for what PEFT refuses, starts at random or passes over.
    """
    found = Embeddings(Matrix(EMBEDDING), Matrix(LM_HEAD), tied)
    settings = adapter.settings
    if settings.ensure_tying and not tied and (settings.targets.ties_saved or settings.targets.ties_lora):
        found.warnings.append(f"{settings.where}: ensure_weight_tying ignored, as PEFT does: lm_head is not tied here")
    together = _wrap(adapter, found)
    for module, matrix in ((EMBED_MODULE, found.embed), (HEAD_MODULE, found.head)):
        _read_whole(adapter, module, matrix, found)
        if matrix.wrapper == "lora":
            matrix.pair = _pair(adapter, module, found, together == "lora")
        elif matrix.name in adapter.pairs:
            stray(adapter, adapter.pairs[matrix.name].a)
        delta = adapter.tokens.get(matrix.name)
        if matrix.wrapper != "tokens" and delta is not None:
            stray(adapter, delta)
    _read_tokens(adapter, found, together)
    if tied:
        _share(adapter, found, together)
    return found


class RowsError(InputError):
    """The numbers of rows in a file do not fit each other, or what the adapter follows."""


def rows_after(adapter: Adapter, found: Embeddings, rows: int) -> int:
    """Rows of both matrices after the adapter, which follows `rows` of them. Raises RowsError.

    PEFT grows the base before it loads the adapter, so that every new row needs a value in the file.
    """
    both = found.embed, found.head
    sizes = {m.name: {t.shape[0] for t in (m.base, m.copy) if t is not None} for m in both}
    stated = set().union(*sizes.values())
    if len(stated) > 1:
        first, second = (max(sizes[m.name] or stated) for m in both)
        raise RowsError(
            f"{adapter.file}: embed_tokens has {first} rows and lm_head {second if second != first else min(stated)}, "
            "expected equal numbers; the adapter is damaged, save it again"
        )
    after = max([*stated, *(i + 1 for m in both if m.tokens is not None for i in m.tokens.ids), 0 if stated else rows])
    if after < rows and stated:
        raise RowsError(
            f"{adapter.directory}: its vocabulary has {after} rows, but what it follows has {rows} already; the "
            "adapters are in the wrong order, or it was trained on another base"
        )
    for matrix, other in (both, both[::-1]):
        have = rows if matrix.stated is None else matrix.stated.shape[0]
        if matrix.pair is not None and matrix.pair.shape[0] != after:
            raise RowsError(
                f"{adapter.file}: its LoRA of {matrix.name} is for {matrix.pair.shape[0]} rows, but what it follows "
                f"has {after}; an adapter that must come before it is missing, or it was trained on another base"
            )
        ids = matrix.tokens.ids if matrix.tokens is not None else ()
        if after - have > len(ids) or not set(range(have, after)) <= set(ids):
            found_rows = (
                f"saves {after} rows of {other.name} and none of {matrix.name}, which has {have}"
                if other.stated is not None
                else f"trains token {after - 1}, but {matrix.name} has {have} rows"
            )
            raise RowsError(
                f"{adapter.file}: {found_rows}; the new rows are missing, save both matrices with modules_to_save or "
                "give the adapter that carries them first"
            )
    return after


def _wrap(adapter: Adapter, found: Embeddings) -> str:
    """Sets both wrappers; returns the one that PEFT puts on both matrices as one ("" for none)."""
    settings, targets = adapter.settings, adapter.settings.targets
    together = ""
    if found.tied and settings.ensure_tying:
        together = "saved" if targets.ties_saved else "lora" if targets.ties_lora else ""
    if together == "lora" and targets.excludes(EMBED_MODULE):
        raise InputError(
            f"{settings.where}: exclude_modules names {EMBED_MODULE}, to which ensure_weight_tying ties lm_head's "
            "LoRA, so that PEFT cannot load it; correct the wrong one"
        )
    for module, matrix in ((EMBED_MODULE, found.embed), (HEAD_MODULE, found.head)):
        kinds = [
            kind
            for kind, applies in (
                ("saved", targets.saves(module)),
                ("lora", targets.has_lora(module, unless_saved=not together)),
                ("tokens", module in tokens_by_module(adapter)),
            )
            if applies
        ]
        if together == "saved":
            kinds = sorted({*kinds, "saved"} - ({"lora"} if matrix is found.embed else set()))
        elif together == "lora":
            kinds = sorted({*kinds, "lora"})
        if len(kinds) > 1:
            names = {"saved": "modules_to_save", "lora": "target_modules", "tokens": "trainable_token_indices"}
            raise InputError(
                f"{settings.where}: {' and '.join(names[k] for k in kinds)} both act on {module}, which PEFT does not "
                "combine; correct the one that is wrong"
            )
        matrix.wrapper = kinds[0] if kinds else ""
    if not together and found.tied and found.embed.wrapper == "tokens":
        return _wrap_tied_tokens(adapter, found)
    return together


def _wrap_tied_tokens(adapter: Adapter, found: Embeddings) -> str:
    """PEFT lets lm_head follow the trained rows of a tied embed_tokens, unless it has other rows of its own."""
    settings, tokens, head = adapter.settings, tokens_by_module(adapter), found.head
    if head.wrapper == "tokens" and tokens[HEAD_MODULE] != tokens[EMBED_MODULE]:
        if settings.ensure_tying:
            raise InputError(
                f"{settings.where}: trainable_token_indices has other tokens for lm_head than for embed_tokens beside "
                "ensure_weight_tying, which PEFT does not combine; correct the one that is wrong"
            )
        return ""
    if head.wrapper == "saved" or (head.wrapper == "lora" and settings.dora):
        raise InputError(
            f"{settings.where}: the rows of trainable_token_indices are lm_head's too, because the base is tied, and "
            f"{'modules_to_save' if head.wrapper == 'saved' else 'DoRA'} acts on it as well, which PEFT cannot run; "
            "train it on an untied base"
        )
    if head.wrapper != "lora":
        head.wrapper = "tokens"
    return "tokens"


def tokens_by_module(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """trainable_token_indices by the two modules. Raises InputError for another module."""
    result: dict[str, tuple[int, ...]] = {}
    for name, ids in (adapter.settings.tokens or {}).items():
        module = next((module for module, names in _LAST.items() if name in names), None)
        if module is None or module in result:
            raise InputError(
                f"{adapter.settings.where}: trainable_token_indices names {name!r:.60}, expected each of embed_tokens "
                "and lm_head once; correct it"
            )
        result[module] = ids
    return result


def _read_whole(adapter: Adapter, module: str, matrix: Matrix, found: Embeddings) -> None:
    forms = dict(adapter.whole.get(matrix.name, {}))
    own, copies = OWN_PLACES[matrix.wrapper], COPY_PLACES if matrix.wrapper == "saved" else ()
    matrix.base = next((forms.pop(form) for form in own if form in forms), None)
    same = [forms.pop(form) for form in copies if form in forms]
    if same:
        matrix.copy = same[0]
        found.twins += [Twins(same[0], other) for other in same[1:]]
    elif matrix.wrapper == "saved":
        adapter.refuse(
            f"{module}.weight is not in the file, but {adapter.settings.where.name} has it in modules_to_save: it was "
            "lost on saving"
        )
    for tensor in forms.values():
        stray(adapter, tensor)


def _pair(adapter: Adapter, module: str, found: Embeddings, together: bool) -> Pair | None:
    pair = adapter.pairs.get(_NAMES[module])
    if pair is None:
        if not together or module == EMBED_MODULE:
            found.warnings += lacking_lora(adapter, [module])
        return None
    if pair.embedding != (module == EMBED_MODULE):
        stray(adapter, pair.a)
    if not together and pair.a.shape[0] != adapter.settings.rank_of(module):
        refuse_rank(adapter, module, pair.a, pair.b)
    if pair.bias is not None:
        adapter.refuse(
            f"{pair.bias.name} is a bias of {module}, which has no place for one in this engine",
            "train it without lora_bias",
        )
    return pair


def _read_tokens(adapter: Adapter, found: Embeddings, together: str) -> None:
    """The rows of trainable_token_indices of both matrices."""
    tokens = tokens_by_module(adapter)
    for module, matrix in ((EMBED_MODULE, found.embed), (HEAD_MODULE, found.head)):
        follows = matrix is found.head and together == "tokens"
        if matrix.wrapper != "tokens" and not follows:
            continue
        ids, delta = tokens.get(module) if not follows else tokens[EMBED_MODULE], adapter.tokens.get(matrix.name)
        if follows and found.embed.tokens is not None:
            if delta is not None:
                found.twins.append(Twins(found.embed.tokens.delta, delta))
            delta = found.embed.tokens.delta
        if delta is None or ids is None:
            adapter.refuse(
                f"{module} has no trainable_tokens_delta in the file, but {adapter.settings.where.name} has it in "
                "trainable_token_indices: it was lost on saving"
            )
        if len(delta.shape) != 2 or delta.shape[0] != len(ids):
            adapter.refuse(
                f"{delta.name} has shape {list(delta.shape)}, but {adapter.settings.where.name} lists {len(ids)} "
                "tokens; the two files are not of one adapter",
                "get both again",
            )
        matrix.tokens = Tokens(ids, delta)


def _share(adapter: Adapter, found: Embeddings, together: str) -> None:
    """One stored weight stands under both matrices of a tied base; afterwards they may differ."""
    embed, head = found.embed, found.head
    if embed.base is not None and head.base is not None:
        found.twins.append(Twins(embed.base, head.base))
    embed.base = head.base = embed.base or head.base
    found.tied = not embed.changed and not head.changed
    if together == "saved" and embed.copy is not None and head.copy is not None:
        found.twins.append(Twins(embed.copy, head.copy))
        head.copy, found.tied = embed.copy, True
    elif together == "tokens":
        found.tied = head.pair is None
    elif together == "lora" and (embed.pair or head.pair):
        if embed.pair is None or head.pair is None:
            adapter.refuse(
                f"ensure_weight_tying gives {EMBED_MODULE} and lm_head one LoRA, and the file lacks that of "
                f"{EMBED_MODULE if embed.pair is None else HEAD_MODULE}",
                "get the whole file again",
            )
        found.twins += [Twins(embed.pair.b, head.pair.a, True), Twins(embed.pair.a, head.pair.b, True)]
        # DoRA's norms are of the columns of one matrix and of the rows of the other.
        found.tied = embed.pair.magnitude is None and embed.pair.scale == head.pair.scale


def lacking_lora(adapter: Adapter, modules: list[str]) -> list[str]:
    """The warning about targets whose LoRA the file lacks. Raises InputError where PEFT would start it at random."""
    settings, more = adapter.settings, len(modules) - 1
    found = (
        f"{settings.where}: target_modules names {modules[0]}{f' and {more} more' if more else ''}, whose LoRA is not "
        f"in {adapter.file.name}"
    )
    if not settings.zero_start:
        raise InputError(f"{found}, and init_lora_weights would start it at random; get the whole file again")
    return [f"{found}: the base's weights stay, as in PEFT; was a part lost on saving?"]


def stray(adapter: Adapter, tensor: SourceTensor) -> NoReturn:
    """Refuses a tensor of the file that the config has no place for."""
    adapter.refuse(
        f"{tensor.name} is in the file but {adapter.settings.where.name} has no place for it, so that PEFT would pass "
        "over it; the two files are not of one adapter",
        "get both again",
    )
