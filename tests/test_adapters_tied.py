# SPDX-License-Identifier: Apache-2.0
"""Adapters on tied embeddings: what PEFT runs, in every way an adapter can touch one of the two matrices, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapter_judge import (
    EMBED,
    HEAD,
    assert_judged,
    check,
    edit_tensors,
    judge,
    pieces,
    random_base,
    relative,
    save_adapter,
)
from cnllama.convert.pack import make_plan
from models import write_json

from cnllama.errors import InputError

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
PREFIX = "base_model.model."

SAVED, LORA, TOKENS = "modules_to_save", "target_modules", "trainable_token_indices"
TIE = {"ensure_weight_tying": True}
# What the adapter trains, and whether PEFT still runs one matrix afterwards.
WAYS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    (TIE, True),
    ({SAVED: ["embed_tokens"]}, False),
    ({SAVED: ["lm_head"]}, False),
    ({SAVED: ["embed_tokens", "lm_head"]}, False),
    ({SAVED: ["embed_tokens"]} | TIE, True),
    ({SAVED: ["lm_head"]} | TIE, True),
    ({SAVED: ["embed_tokens", "lm_head"]} | TIE, True),
    ({LORA: ["q_proj", "embed_tokens"]}, False),
    ({LORA: ["q_proj", "lm_head"]}, False),
    ({LORA: ["embed_tokens", "lm_head"]}, False),
    ({LORA: ["q_proj", "embed_tokens"]} | TIE, True),
    ({LORA: ["q_proj", "lm_head"]} | TIE, True),
    ({LORA: ["embed_tokens", "lm_head"]} | TIE, True),
    ({LORA: ["embed_tokens"], "alpha_pattern": {"lm_head": 3}} | TIE, False),
    ({LORA: ["embed_tokens"], "rank_pattern": {"lm_head": 2}} | TIE, False),
    ({LORA: ["embed_tokens"], "use_dora": True} | TIE, False),
    ({LORA: ["embed_tokens", "lm_head"], "use_dora": True}, False),
    ({LORA: ".*(q_proj|embed_tokens)"} | TIE, True),
    ({LORA: "model.*(q_proj|embed_tokens)"} | TIE, False),
    ({LORA: "model.*q_proj|lm_head"} | TIE, True),
    ({LORA: "all-linear"} | TIE, True),
    ({SAVED: ["embed_tokens"], LORA: ["q_proj", "lm_head"]}, False),
    ({SAVED: ["embed_tokens"], LORA: ["q_proj", "embed_tokens"]}, False),
    ({TOKENS: [3, 39]}, True),
    ({TOKENS: {"embed_tokens": [3, 39]}}, True),
    ({TOKENS: {"embed_tokens": [3], "lm_head": [3]}}, True),
    ({TOKENS: {"embed_tokens": [3], "lm_head": [5, 6]}}, False),
    ({TOKENS: {"lm_head": [5, 6]}}, False),
    ({TOKENS: {"lm_head": [5, 6]}} | TIE, False),
    ({TOKENS: [3], LORA: ["q_proj", "lm_head"]}, False),
    ({TOKENS: {"lm_head": [5]}, SAVED: ["embed_tokens"]}, False),
]


@pytest.mark.parametrize(("way", "tied"), WAYS, ids=str)
def test_one_adapter(tmp_path: Path, way: dict[str, Any], tied: bool) -> None:
    plan = check(tmp_path, random_base(tied=True), way)
    assert plan.config["tie_word_embeddings"] is tied
    assert (HEAD in plan.tensors) is not tied
    assert any("no longer tied and lm_head is stored too" in notice for notice in plan.notices) is not tied


@pytest.mark.parametrize("second", range(len(WAYS)))
def test_two_adapters_of_which_the_first_unties_or_not(tmp_path: Path, second: int) -> None:
    """Each way after another one: the second stands on what the first left, tied or not."""
    first = WAYS[(second * 7 + 3) % len(WAYS)][0]
    check(tmp_path, random_base(second, tied=True), first, WAYS[second][0])


def test_merge_and_unload_differs_where_the_notice_says_so(tmp_path: Path) -> None:
    """The forward pass is the judge: LoRA on one of two tied matrices would be added to both by merge_and_unload."""
    base = random_base(tied=True)
    root = base.save(tmp_path / "base")
    save_adapter(base.load(), tmp_path / "a", target_modules=["embed_tokens"])
    judged = judge(base, tmp_path / "a")
    assert relative(judged.merged[HEAD].numpy(), judged.tensors[HEAD]) > 0.1
    plan = make_plan(root, [tmp_path / "a"])
    assert_judged(plan, judged)
    assert any("merge_and_unload would change the one tied matrix" in notice for notice in plan.notices)


def test_equal_copies_stay_one_matrix(tmp_path: Path) -> None:
    base = random_base(tied=True)
    root = base.save(tmp_path / "base")
    save_adapter(base.load(), tmp_path / "a", modules_to_save=["embed_tokens", "lm_head"])
    edit_tensors(
        tmp_path / "a", lambda t: t | {f"{PREFIX}lm_head.weight": t[f"{PREFIX}model.embed_tokens.weight"].clone()}
    )
    plan = make_plan(root, [tmp_path / "a"])
    assert_judged(plan, judge(base, tmp_path / "a"))
    assert plan.config["tie_word_embeddings"] is True
    assert HEAD not in plan.tensors
    assert plan.notices == []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_weights_that_no_setting_names_replace_the_base(tmp_path: Path, tied: bool, names: list[str]) -> None:
    """save_embedding_layers=True writes the base's own weights; on a tied base either of them is both."""
    import torch

    base = random_base(tied=tied)
    root = base.save(tmp_path / "base")
    save_adapter(base.load(), tmp_path / "a")
    new = torch.randn(base.rows, 32)
    keys = {"embed_tokens": f"{PREFIX}model.embed_tokens.weight", "lm_head": f"{PREFIX}lm_head.weight"}
    edit_tensors(tmp_path / "a", lambda t: t | {keys[name]: new for name in names})
    assert_judged(make_plan(root, [tmp_path / "a"]), judge(base, tmp_path / "a"))


GROWN: list[dict[str, Any]] = [
    {},
    {SAVED: ["embed_tokens"]},
    {SAVED: ["lm_head"]},
    {SAVED: ["embed_tokens", "lm_head"]},
    {SAVED: ["embed_tokens"]} | TIE,
    {LORA: ["q_proj", "embed_tokens"]},
    {LORA: ["q_proj", "lm_head"]},
    {LORA: ["embed_tokens", "lm_head"]},
    {LORA: ["embed_tokens"]} | TIE,
    {TOKENS: [3, 41]},
    {TOKENS: {"embed_tokens": [3, 41], "lm_head": [40]}},
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", GROWN, ids=str)
def test_a_grown_vocabulary(tmp_path: Path, way: dict[str, Any], tied: bool) -> None:
    """Resized embeddings, as PEFT saves them beside and under its wrappers; a new row without a value is refused."""
    base = random_base(tied=tied)
    root = base.save(tmp_path / "base")
    save_adapter(base.load(base.rows + 2), tmp_path / "a", embeddings=True, **way)
    write_json(tmp_path / "a" / "added_tokens.json", {f"[T{i}]": pieces() + i for i in (0, 1)})
    one, two = (judge(base, tmp_path / "a", base.rows + 2, seed) for seed in (1, 2))
    if any(relative(two.tensors[name].numpy(), one.tensors[name]) > 1e-6 for name in (EMBED, HEAD)):
        with pytest.raises(InputError, match="the new rows are missing"):
            make_plan(root, [tmp_path / "a"])
    else:
        plan = make_plan(root, [tmp_path / "a"])
        assert_judged(plan, one)
        assert plan.config["vocab_size"] == base.rows + 2


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_alone_grow_the_vocabulary(tmp_path: Path, tied: bool) -> None:
    """trainable_token_indices of every new row, saved without the rest of the matrix."""
    base = random_base(tied=tied)
    root = base.save(tmp_path / "base")
    new = [base.rows, base.rows + 1, 4]
    indices: Any = new if tied else {"embed_tokens": new, "lm_head": new[:2]}
    save_adapter(base.load(base.rows + 2), tmp_path / "a", embeddings=False, trainable_token_indices=indices)
    write_json(tmp_path / "a" / "added_tokens.json", {f"[T{i}]": pieces() + i for i in (0, 1)})
    plan = make_plan(root, [tmp_path / "a"])
    assert_judged(plan, judge(base, tmp_path / "a", base.rows + 2))
    assert plan.config["tie_word_embeddings"] is tied
    part = plan.tensors[EMBED].read(base.rows - 1, base.rows + 2)
    assert (part == plan.tensors[EMBED].read()[base.rows - 1 :]).all()


@pytest.mark.parametrize(
    ("way", "change", "expected"),
    [
        (
            {SAVED: ["embed_tokens"]} | TIE,
            lambda t: t | {f"{PREFIX}lm_head.weight": t[f"{PREFIX}lm_head.weight"] + 1},
            "stand for the same values and differ",
        ),
        (
            {LORA: ["embed_tokens"]} | TIE,
            lambda t: t | {f"{PREFIX}lm_head.lora_B.weight": t[f"{PREFIX}lm_head.lora_B.weight"] + 1},
            "stand for the same values and differ",
        ),
        (
            {LORA: ["embed_tokens"]} | TIE,
            lambda t: {name: value for name, value in t.items() if "embed_tokens.lora_" not in name},
            "gives model.embed_tokens and lm_head one LoRA, and the file lacks that of model.embed_tokens",
        ),
        (
            {},
            lambda t: (
                t
                | {f"{PREFIX}model.embed_tokens.weight": t[next(iter(t))].new_ones(pieces(), 32)}
                | {f"{PREFIX}lm_head.weight": t[next(iter(t))].new_full((pieces(), 32), 2)}
            ),
            "stand for the same values and differ",
        ),
        (
            {SAVED: ["embed_tokens", "lm_head"]},
            lambda t: {name: value for name, value in t.items() if "lm_head" not in name},
            "lm_head.weight is not in the file, but adapter_config.json has it in modules_to_save",
        ),
        (
            {TOKENS: [3]},
            lambda t: {name: value for name, value in t.items() if "token_adapter" not in name},
            "model.embed_tokens has no trainable_tokens_delta in the file",
        ),
    ],
)
def test_two_sources_that_disagree(tmp_path: Path, way: dict[str, Any], change: Any, expected: str) -> None:
    base = random_base(tied=True)
    root = base.save(tmp_path / "base")
    save_adapter(base.load(), tmp_path / "a", **way)
    edit_tensors(tmp_path / "a", change)
    with pytest.raises(InputError) as caught:
        make_plan(root, [tmp_path / "a"])
    assert expected in str(caught.value).split("\n", maxsplit=1)[0]
