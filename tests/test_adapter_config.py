# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json from strangers: every option merged as PEFT does or refused by name, any type in any key."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapter_judge import CONFIG, Base, assert_judged, edit_config, judge, plan_of, random_base, save_adapter, sentence
from cnllama.convert.pack import make_plan

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base() -> Base:
    return random_base(attention_bias=True)


@pytest.fixture(scope="module")
def root(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base.save(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def adapter(base: Base, tmp_path: Path) -> Path:
    save_adapter(base.load(), tmp_path / "a", target_modules=["q_proj", "up_proj"], lora_alpha=16)
    return tmp_path / "a"


OTHER_KINDS = sorted(kind.value for kind in peft.PeftType if kind.value != "LORA")


@pytest.mark.parametrize("kind", [*OTHER_KINDS, "lora", "", None, 1, [], {"a": 1}, ...], ids=str)
def test_every_other_method_is_refused_by_name(root: Path, adapter: Path, kind: Any) -> None:
    edit_config(adapter, peft_type=kind)
    found = sentence(root, adapter)
    assert f"peft_type is {None if kind is ... else kind!r}, expected 'LORA'" in found
    if kind in OTHER_KINDS:
        assert ("merge_and_unload" in found) or ("train a LoRA" in found)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "PiSSA"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base's weights"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "give the base that LoftQ wrote"),
        ({"init_lora_weights": "newest"}, "init_lora_weights is 'newest', which PEFT does not know"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]], which cannot be merged here"),
        ({"alora_invocation_tokens": [3]}, "it acts on a part of the text only"),
        ({"kasa_config": {}}, "kasa_config is {}, which cannot be merged here; it changes the base's weights"),
        ({"velora_config": {"scale": 1}}, "merge_and_unload"),
        ({"use_bdlora": {"nblocks": 2}}, "merge_and_unload"),
        ({"monteclora_config": {"num_samples": 2}}, "merge_and_unload"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"arrow_config": {"top_k": 2}}, "it chooses between adapters for every token"),
        ({"use_qalora": True}, "train it on the unquantized base"),
        ({"megatron_config": {"a": 1}}, "export it from there"),
        ({"enable_lora": [True, False, True]}, "LLaMA has none"),
        ({"use_dora": True, "lora_bias": True}, "has use_dora and lora_bias, which PEFT does not combine"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "has lora_bias and init_lora_weights 'gaussian'"),
        ({"task_type": "TRANSLATION"}, "task_type is 'TRANSLATION', expected 'CAUSAL_LM'"),
        ({"bias": "boft_only"}, "bias is 'boft_only', expected one of none, all, lora_only"),
        ({"r": 0}, "r is 0, expected an integer from 1 to 1,048,576"),
        ({"r": None}, "r is None"),
        ({"r": 2**70}, "r is 1180591620717411303424, expected"),
        ({"r": True}, "r is True"),
        ({"r": 4.0}, "r is 4.0"),
        ({"r": 16}, "says rank 16; the two files are not of one adapter"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', expected a finite number"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": 10**399}, "expected a finite number"),
        ({"lora_alpha": 0}, "every LoRA matrix B (or A) is zero"),
        ({"lora_alpha": 1e40}, "scales its LoRA by 2.5e+39, expected at most 1e+15"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern of 'q_proj' is 'x', expected a finite number"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern of 'q_proj' is -1, expected an integer"),
        ({"rank_pattern": {"(": 4}}, "is no regular expression"),
        ({"rank_pattern": {"(?=q)": 4}}, "look-around"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj'], expected an object"),
        ({"rank_pattern": {str(i): 4 for i in range(10_001)}}, "an object of at most 10,000 patterns"),
        ({"target_modules": ["norm"]}, "target_modules names model.norm, expected linear layers"),
        ({"target_modules": []}, "target_modules names no layer of this base"),
        ({"target_modules": "q_proj"}, "target_modules names no layer of this base"),
        ({"target_modules": ".*", "exclude_modules": "x"}, "expected linear layers and embeddings"),
        ({"target_modules": ["q_proj", 5]}, "expected a list of names of modules"),
        ({"target_modules": 5}, "target_modules is 5"),
        ({"target_modules": "(.*)*q", "layers_to_transform": 1}, "a list of names beside layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern is 'layers', expected none"),
        ({"layers_to_transform": [-1]}, "target_modules names no layer of this base"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is ['0'], expected a list of numbers of layers"),
        ({"modules_to_save": "embed_tokens"}, "modules_to_save is 'embed_tokens', expected a list"),
        ({"modules_to_save": [""]}, "modules_to_save is ['']"),
        ({"modules_to_save": ["layers"], "target_modules": ["lm_head"]}, "names a whole stack of layers"),
        ({"modules_to_save": ["mlp", "gate_proj"]}, "modules_to_save names model.layers.0.mlp, and something in it"),
        ({"modules_to_save": ["attn"]}, "modules_to_save names model.layers.0.self_attn, and something in it"),
        ({"trainable_token_indices": [-1]}, "expected lists of token numbers from 0 on"),
        ({"trainable_token_indices": [3, 3]}, "expected every token once"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "names 'q_proj', expected each of embed_tokens and lm_head"),
        ({"trainable_token_indices": {}}, "expected at least one list"),
        (
            {"trainable_token_indices": [3], "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
            "target_modules and trainable_token_indices both act on model.embed_tokens",
        ),
        ({"a_setting_of_2031": 5}, "the setting 'a_setting_of_2031' is 5 and unknown here"),
        ({"a_setting_of_2031": {"a": 1}}, "unknown here"),
        ({"\u202e\x1b[2J" * 9: True}, "unknown here"),
    ],
    ids=lambda value: str(value)[:60].encode("ascii", "replace").decode(),
)
def test_what_is_refused_by_name(root: Path, adapter: Path, changes: dict[str, Any], expected: str) -> None:
    edit_config(adapter, **changes)
    found = sentence(root, adapter)
    assert expected in found
    assert str(adapter) in found
    assert len(found) < 700


@pytest.mark.parametrize(
    "changes",
    [
        {"a_setting_of_2031": None},
        {"a_setting_of_2031": False, "another": [], "third": {}},
        {"lorap_emb_lr": 1e-6, "lora_dtype": "bfloat16", "merge_weights": True},
        {"rank_pattern": None, "alpha_pattern": None, "exclude_modules": [], "modules_to_save": []},
        {"inference_mode": "yes", "lora_dropout": "none", "auto_mapping": 5, "runtime_config": [1]},
        {"layers_to_transform": [], "layers_pattern": ""},
        {"init_lora_weights": None, "ensure_weight_tying": None, "use_dora": None},
        {"lora_alpha": 1e-320},
        {"r": ..., "lora_alpha": ..., "rank_pattern": {".*": 4}},
        {"rank_pattern": {"q_proj": 4, "nothing": 7}, "alpha_pattern": {"(up|down)_proj": -0.5}},
    ],
    ids=str,
)
def test_what_is_accepted(base: Base, root: Path, adapter: Path, changes: dict[str, Any]) -> None:
    edit_config(adapter, **changes)
    plan = make_plan(root, [adapter])
    assert plan.notices == []
    # PEFT stumbles over null in these two, which older versions of other trainers write
    meant = {key: {} if value is None and key.endswith("_pattern") else value for key, value in changes.items()}
    edit_config(adapter, **(meant | {"lora_dropout": 0.0, "runtime_config": ...}))
    assert_judged(plan, judge(base, adapter))


@pytest.mark.parametrize(
    ("changes", "notice"),
    [
        ({"task_type": "SEQ_CLS"}, "task_type is SEQ_CLS"),
        ({"loftq_config": {"loftq_bits": 4}}, "the adapter fits the base that LoftQ wrote"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out ignored, as PEFT does"),
        ({"modules_to_save": ["score"]}, "modules_to_save names 'score', which is no module of this base"),
        ({"target_modules": ["q_proj", "up_proj", "Wqkv"]}, "target_modules names 'Wqkv'"),
        ({"target_modules": ["q_proj", "up_proj", "k_proj"]}, "and 1 more, whose LoRA is not in"),
        ({"bias": "all"}, "bias is 'all', but tensors model.layers.0.self_attn.k_proj.bias"),
    ],
    ids=str,
)
def test_what_peft_passes_over_is_said(
    base: Base, root: Path, adapter: Path, changes: dict[str, Any], notice: str
) -> None:
    edit_config(adapter, **changes)
    plan = make_plan(root, [adapter])
    assert any(notice in found for found in plan.notices)
    assert len(plan.notices) == 1
    assert_judged(plan, judge(base, adapter))


@pytest.mark.parametrize(
    "text", ["[]", "5", "null", '"x"', "{", '{"r": NaN}', '{"r": 1e400', "", "\xff", '{"r":1,"r":2}']
)
def test_a_file_that_is_no_object(root: Path, adapter: Path, text: str) -> None:
    (adapter / CONFIG).write_bytes(text.encode("latin-1"))
    assert str(adapter / CONFIG) in sentence(root, adapter)


@pytest.mark.parametrize("key", ["r", "target_modules", "a_new_key", "trainable_token_indices"])
def test_nested_as_deep_as_the_parser_goes_and_deeper(root: Path, tmp_path: Path, key: str) -> None:
    for depth in (10, *range(850, 1000, 10), 100_000):
        text = json.dumps({"peft_type": "LORA", key: "@"}).replace('"@"', "[" * depth + "]" * depth)
        (tmp_path / CONFIG).write_text(text)
        assert str(tmp_path / CONFIG) in sentence(root, tmp_path)


def test_every_setting_of_peft_is_known(root: Path, adapter: Path) -> None:
    """A default of the installed PEFT that is not falsy must not be taken for an unknown setting."""
    for key, value in peft.LoraConfig().to_dict().items():
        if key not in ("peft_type", "r", "lora_alpha", "target_modules"):
            edit_config(adapter, **{key: value})
    assert make_plan(root, [adapter]).notices == []


def test_infinite_alpha(root: Path, adapter: Path) -> None:
    (adapter / CONFIG).write_text((adapter / CONFIG).read_text().replace('"lora_alpha": 16', '"lora_alpha": 1e400'))
    assert "1e400 is larger than any number" in sentence(root, adapter)


KEYS = sorted({*peft.LoraConfig(task_type="CAUSAL_LM").to_dict(), "runtime_config", "a_new_key"})
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 4, 3.5, 2**70, 10**400, 1e308, -1e308, 1e-320, "", "a", "none", "all", "q_proj"),
    *(
        "all-linear",
        ".*",
        "(a+)+$",
        "[",
        "lora_only",
        "gaussian",
        "pissa",
        "eva",
        [],
        [0],
        [1],
        [-1],
        [True],
        ["q_proj"],
    ),
    *(["embed_tokens"], ["lm_head"], ["norm"], [""], [None], [[]], {}, {"a": 1}, {"q_proj": 4}, {"q_proj": None}),
    *({"embed_tokens": [1, 2]}, {"lm_head": []}, [1, 2], [10**9], "CAUSAL_LM", "LORA", "\ud800", "x" * 5000),
    *({"x": {"y": [{}]}}, "layers", ["layers"], ["self_attn"], ["model"], ["0"], "lm_head", "dummy-target-modules"),
)


def mutants(draw: random.Random) -> Iterator[dict[str, Any]]:
    for key in KEYS:
        for value in draw.sample(VALUES, 5):
            yield {key: value}


@pytest.mark.parametrize("seed", range(3))
def test_any_value_in_any_key_is_refused_or_means_what_peft_makes_of_it(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    base = random_base(seed, tied=bool(seed % 2), attention_bias=seed > 2)
    root = base.save(tmp_path / "base")
    options = [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}, {"lora_bias": True}, {"bias": "all"}]
    lora: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"] if seed % 3 == 2 else ["q_proj", "up_proj"]}
    save_adapter(base.load(), tmp_path / "a", **lora, **(options[seed % 5] if seed % 3 != 2 else {}))
    original = json.loads((tmp_path / "a" / CONFIG).read_text())
    accepted, started = 0, time.monotonic()
    for changes in mutants(draw):
        (tmp_path / "a" / CONFIG).write_text(json.dumps(original | changes))
        plan, refusal = plan_of(root, tmp_path / "a")
        if plan is None:
            assert "\n" not in refusal.split("\nvocabulary sizes found:")[0]
            continue
        try:
            judged = judge(base, tmp_path / "a", merge=False)
        except Exception:  # a type that PEFT stumbles over in a setting that does not matter
            assert set(changes) <= HARMLESS, changes
            continue
        assert_judged(plan, judged)
        accepted += 1
    assert accepted > len(KEYS)
    assert time.monotonic() - started < 60


# PEFT wants these to be of a type, whatever they say.
HARMLESS = {
    *("alpha_pattern", "arrow_config", "corda_config", "eva_config", "kasa_config", "lora_dropout", "lora_ga_config"),
    *("monteclora_config", "peft_version", "rank_pattern", "runtime_config", "use_bdlora", "velora_config"),
}
