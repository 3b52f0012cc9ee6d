# SPDX-License-Identifier: Apache-2.0
"""Facts with two sources: what transformers takes, or a refusal in one sentence; never silently another value.

The space of contradictions is drawn by hypothesis; every row of the table has a case of its own besides.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnllama.convert.config_facts import DEFAULTS
from cnllama.convert.facts import FACTS, NOTICE, REFUSED, from_hf, settle
from hf_reference import EMBED, HEAD, Tensors, assert_same, by_converter, by_transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import random_tensors, small_config, train_tokenizer, write_json, write_tokenizer, write_weights

from cnllama.errors import InputError

pytest.importorskip("transformers")
HIDDEN, HEADS, LENGTH = 32, 2, 64
UP = "model.layers.0.mlp.up_proj.weight"
Config = dict[str, Any]


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return train_tokenizer(["the cat and the dog sat on the mat"] * 8, 290)


def small(vocab: int, **changes: Any) -> Config:
    shape = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    return small_config(vocab, **shape, max_position_embeddings=LENGTH, **changes)


def write(directory: Path, tokenizer: bytes, config: Config, tensors: Tensors, **container: Any) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_json(directory / "config.json", config)
    write_weights(directory, tensors, **container)
    write_tokenizer(directory, tokenizer)
    return directory


def vocabulary(tokenizer: bytes) -> int:
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_proto=tokenizer).vocab_size())


# ---- the property

ABSENT = "absent"
ROPES: list[Any] = [
    ABSENT,
    None,
    {},
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"type": "linear", "factor": 2.0},
    {"type": "default", "rope_type": "linear", "factor": 4.0, "rope_theta": 700.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "finetuned": True},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0, "truncate": None},
    {"rope_type": "yarn", "factor": 2.0, "truncate": False, "beta_fast": 8, "beta_slow": None},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "factor": 2.0},
]
CONFIGS: dict[str, list[Any]] = {
    "model_type": ["llama", "mistral"],
    "architectures": [["LlamaForCausalLM"], ["MistralForCausalLM"], ["QWenLMHeadModel"], ABSENT],
    "tie_word_embeddings": [True, False, ABSENT],
    "attention_bias": [True, False, ABSENT],
    "mlp_bias": [True, ABSENT],
    "num_hidden_layers": [2, 1, 3],
    "num_key_value_heads": [1, ABSENT, 2],
    "head_dim": [ABSENT, None, 16],
    "max_position_embeddings": [LENGTH, ABSENT, 16],
    "sliding_window": [None, ABSENT, 32, 4096],
    "rms_norm_eps": [1e-5, ABSENT],
    "vocab_size": [None, 64, ABSENT],
    "rope_theta": [ABSENT, 10000.0, 5000.0],
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "original_max_position_embeddings": [ABSENT, 32, 16],
    "layer_types": [ABSENT, ["full_attention"] * 2, ["sliding_attention"] * 2],
    "is_causal": [ABSENT, True, False],
    "torch_dtype": ["float32", "float16", ABSENT],
    "pretraining_tp": [1, 2],
}
STORED: dict[str, list[str]] = {
    "head": ["own", "equal", "absent"],
    "embedding": ["there", "absent"],
    "biases": ["none", "zero", "some"],
    "spelling": ["full", "bare", "twice"],
    "copy": ["none", "equal", "other"],
    "container": ["one", "bin", "shards", "forgotten", "swapped"],
    "dtype": ["float32", "float16", "float64"],
}


def first_or_any(values: list[Any]) -> st.SearchStrategy[Any]:
    """Mostly the first: a checkpoint with twenty oddities would be refused for one of them every time."""
    return st.one_of(*[st.just(values[0])] * 12, st.sampled_from(values))


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[Config, dict[str, str]]:
    config = {key: draw(first_or_any(values)) for key, values in CONFIGS.items()}
    return config, {key: draw(first_or_any(values)) for key, values in STORED.items()}


def stored_tensors(config: Config, how: dict[str, str], rows: int) -> Tensors:
    """What the files hold: the tensors of two layers with the sizes that the config gives, but for what `how` says."""
    kv = config["num_key_value_heads"]
    shape = {"num_key_value_heads": HEADS if kv == ABSENT else kv, "attention_bias": how["biases"] != "none"}
    tensors = random_tensors(small(rows, tie_word_embeddings=False, **shape), seed=3)
    if how["biases"] == "zero":
        tensors = {name: value * (not name.endswith(".bias")) for name, value in tensors.items()}
    if how["head"] == "equal":
        tensors[HEAD] = tensors[EMBED]
    for key, name in (("head", HEAD), ("embedding", EMBED)):
        if how[key] == "absent":
            del tensors[name]
    if how["spelling"] == "bare":
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    elif how["spelling"] == "twice":
        tensors = {f"model.{name}": value for name, value in tensors.items()}
    if how["copy"] != "none":
        other = UP if how["spelling"] == "bare" else UP.removeprefix("model.")
        value = tensors[UP.removeprefix("model.") if how["spelling"] == "bare" else next(n for n in tensors if UP in n)]
        tensors[other] = value if how["copy"] == "equal" else value * 2
    return {name: value.astype(how["dtype"]) for name, value in tensors.items()}


def write_drawn(directory: Path, tokenizer: bytes, config: Config, how: dict[str, str]) -> Path:
    rows = vocabulary(tokenizer)
    full = {**small(rows), **{key: value for key, value in config.items() if value != ABSENT}}
    for key, value in config.items():
        if value == ABSENT:
            full.pop(key, None)
    if config["vocab_size"] is None:
        full["vocab_size"] = rows
    container = {"bin": {"kind": "bin"}, "one": {}}.get(how["container"], {"shards": 2})
    write(directory, tokenizer, full, stored_tensors(config, how, rows), **container)
    index = directory / "model.safetensors.index.json"
    if how["container"] in ("forgotten", "swapped"):
        content = json.loads(index.read_text())
        names, files = list(content["weight_map"]), sorted(set(content["weight_map"].values()))
        if how["container"] == "forgotten":
            del content["weight_map"][names[3]]
        else:
            content["weight_map"][names[3]] = next(f for f in files if f != content["weight_map"][names[3]])
        write_json(index, content)
    return directory


def check(directory: Path) -> str:
    """What became of a checkpoint: "refused", "both" or "ours alone"."""
    ours, theirs = by_converter(directory), by_transformers(directory)
    if isinstance(ours, str):
        assert "\n" not in ours.split("\nvocabulary sizes found:")[0]
        assert str(directory) in ours
        return "refused"
    if theirs is None:
        return "ours alone"
    assert_same(ours[0], theirs)
    return "both"


def test_never_silently_another_model(tmp_path: Path, tokenizer: bytes) -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(drawn=checkpoints())
    def holds(drawn: tuple[Config, dict[str, str]]) -> None:
        outcomes[check(write_drawn(tmp_path / "drawn", tokenizer, *drawn))] += 1

    holds()
    assert outcomes["both"] > 30, f"too few checkpoints were compared: {outcomes}"
    assert outcomes["refused"] > 20, f"too few were refused: {outcomes}"


def single_changes() -> list[tuple[str, Any]]:
    both = {**CONFIGS, **STORED}
    return [(key, value) for key, values in both.items() for value in values[1:]]


@pytest.mark.parametrize(("key", "value"), single_changes(), ids=lambda value: str(value)[:50])
def test_each_oddity_by_itself(tmp_path: Path, tokenizer: bytes, key: str, value: Any) -> None:
    config, how = ({k: values[0] for k, values in table.items()} for table in (CONFIGS, STORED))
    (config if key in config else how)[key] = value
    check(write_drawn(tmp_path / "base", tokenizer, config, how))


@pytest.mark.parametrize("pair", list(itertools.product([True, False], STORED["head"], STORED["embedding"])), ids=str)
def test_tied_embeddings_are_what_transformers_makes_of_them(
    tmp_path: Path, tokenizer: bytes, pair: tuple[bool, str, str]
) -> None:
    config, how = ({k: values[0] for k, values in table.items()} for table in (CONFIGS, STORED))
    config["tie_word_embeddings"], how["head"], how["embedding"] = pair
    directory = write_drawn(tmp_path / "base", tokenizer, config, how)
    loads = by_transformers(directory) is not None
    assert check(directory) == ("both" if loads else "refused")


# ---- every row of the table


def zeros_for(config: Config, key: str) -> Tensors:
    names = {name: np.zeros_like(value) for name, value in random_tensors(config | {key: True}).items()}
    return {name: value for name, value in names.items() if name.endswith(".bias")}


Change = Callable[[Config, Tensors], Any]


def put(**changes: Any) -> Change:
    return lambda config, tensors: config.update(changes)


def tensor(name: str, value: Callable[[Tensors], np.ndarray]) -> Change:
    return lambda config, tensors: tensors.update({name: value(tensors)})


def drop(name: str) -> Change:
    return lambda config, tensors: tensors.pop(name)


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
BIAS = "model.layers.1.self_attn.k_proj.bias"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
# name of the fact -> (what contradicts it, "" for what does not, words of the notice or of the refusal)
CASES: dict[str, list[tuple[Change, str, str]]] = {
    "architecture": [
        (put(architectures=["LlamaForCausalLM", "X"]), "", ""),
        (put(architectures=["InternLMForCausalLM"]), NOTICE, "model_type counts"),
        (put(auto_map={"AutoModel": "x.Y"}), NOTICE, "code of its own"),
        (put(model_type=None), "", ""),
        (put(model_type=None, architectures=["GPT2LMHeadModel"]), REFUSED, "model_type is None"),
        (put(model_type=["llama"]), REFUSED, "model_type is ['llama']"),
        (put(architectures="LlamaForCausalLM"), REFUSED, "expected a list of names"),
        (put(architectures=[7]), REFUSED, "expected a list of names"),
    ],
    "files": [
        (put(configuration_files=["config.4.0.0.json", "config.json"]), REFUSED, "rename the right one"),
        (put(configuration_files=["config.json"]), "", ""),
        (put(transformers_weights="other.safetensors"), REFUSED, "rename it to model.safetensors"),
    ],
    "features": [
        (put(quantization_config={"quant_method": "gptq"}), REFUSED, "quantized by gptq"),
        (put(quantization_config=0), REFUSED, "give the unquantized checkpoint"),
        (put(compression_config={"format": "pack-quantized"}), REFUSED, "give the unquantized checkpoint"),
        (put(hidden_act="gelu"), REFUSED, "only silu"),
        (put(hidden_act=None), REFUSED, "only silu"),
        (put(hidden_act="swish"), "", ""),
        (put(layer_types=["full_attention", "sliding_attention"]), REFUSED, "only full_attention"),
        (put(is_causal=False), REFUSED, "is_causal is False"),
        (put(is_causal=None), REFUSED, "is_causal is None"),
        (put(per_layer_config=[{}]), REFUSED, "this variant"),
        (put(attribute_map={"hidden_size": "x"}), REFUSED, "this variant"),
        (put(partial_rotary_factor=0.5), REFUSED, "partial_rotary_factor is 0.5"),
    ],
    "sizes": [
        (put(hidden_size=True), REFUSED, "hidden_size is True"),
        (put(num_hidden_layers=2.0), REFUSED, "num_hidden_layers is 2.0"),
        (put(vocab_size="300"), REFUSED, "vocab_size is '300'"),
        (put(max_position_embeddings=None), REFUSED, "max_position_embeddings is None"),
        (put(model_type="mistral", num_key_value_heads=None), REFUSED, "num_key_value_heads is None"),
        (put(tie_word_embeddings=1), REFUSED, "tie_word_embeddings is 1"),
        (put(attention_bias="no"), REFUSED, "attention_bias is 'no'"),
        (put(rms_norm_eps="1e-6"), REFUSED, "rms_norm_eps is '1e-6'"),
        (put(num_attention_heads=5), REFUSED, "not a multiple of num_attention_heads, 5"),
    ],
    "window": [
        (put(sliding_window=LENGTH - 1), REFUSED, f"less than the {LENGTH}"),
        (put(sliding_window=LENGTH), "", ""),
        (put(model_type="mistral", max_position_embeddings=4097), REFUSED, "4096 by default for model_type mistral"),
        (put(model_type="mistral", sliding_window=None, max_position_embeddings=4097), NOTICE, "model_type counts"),
        (put(sliding_window=True), REFUSED, "sliding_window is True"),
    ],
    "claimed type": [
        (put(torch_dtype="float8_e4m3fn"), REFUSED, "dtype is 'float8_e4m3fn'"),
        (put(dtype=7), REFUSED, "dtype is 7"),
        (put(dtype="torch.float32", torch_dtype="int8"), "", ""),
    ],
    "RoPE": [
        (put(rope_theta=5.0, rope_parameters={"rope_theta": 7.0, "rope_type": "default"}), NOTICE, "inner one counts"),
        (
            put(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "linear", "factor": 4.0}),
            NOTICE,
            "rope_scaling counts",
        ),
        (
            put(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "linear", "factor": 2.0}),
            "",
            "",
        ),
        (put(rope_scaling={"type": "yarn", "rope_type": "linear", "factor": 2.0}), NOTICE, "rope_type counts"),
        (put(rope_scaling={"type": "linear", "factor": 2.0, "alpha": 8}), NOTICE, "alpha, which is ignored"),
        (
            put(
                original_max_position_embeddings=32,
                rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
            ),
            NOTICE,
            "the outer one counts",
        ),
        (
            put(rope_scaling={"type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16}),
            NOTICE,
            "the factor counts",
        ),
        (put(rope_parameters={"full_attention": {"rope_type": "default"}}), REFUSED, "one RoPE for all layers"),
        (put(rope_scaling=[1]), REFUSED, "rope_scaling is [1]"),
        (put(rope_theta=None), REFUSED, "rope_theta is None"),
        (put(rope_theta=True), REFUSED, "rope_theta is True"),
        (put(rope_scaling={"type": "yarn", "factor": 2.0, "truncate": None}), REFUSED, "truncate is None"),
        (put(rope_scaling={"type": "linear", "factor": "2"}), REFUSED, "factor is '2'"),
        (put(rope_scaling={"type": "linear", "factor": 10**400}), REFUSED, "factor is 1000"),
        (put(rope_scaling={"type": ["linear"], "factor": 2}), REFUSED, "is not supported"),
    ],
    "names": [
        (drop(UP), REFUSED, f"tensor {UP} is missing"),
        (tensor("model.layers.0.mlp.odd", lambda t: t[UP]), REFUSED, "in no LLaMA of this config.json"),
        (put(num_hidden_layers=1), REFUSED, "set it to 2"),
        (put(num_hidden_layers=3), REFUSED, "the files hold 2 layers"),
        (drop(HEAD), REFUSED, "set tie_word_embeddings to true"),
    ],
    "shapes": [
        (put(intermediate_size=64), REFUSED, "config.json asks for [32, 64]"),
        (put(num_key_value_heads=2), REFUSED, "config.json asks for [32, 32]"),
        (put(head_dim=8), REFUSED, "config.json asks for [8, 32]"),
        (tensor("model.norm.weight", lambda t: np.ones((1, HIDDEN), np.float32)), REFUSED, "has shape [1, 32]"),
        (tensor("model.norm.weight", lambda t: np.ones((), np.float32)), REFUSED, "has shape []"),
    ],
    "types": [
        (put(torch_dtype="float16"), NOTICE, "says the weights are F16 but they are stored as F32"),
        (tensor("model.norm.weight", lambda t: np.ones(HIDDEN, np.int64)), REFUSED, "has dtype I64"),
        (tensor("model.norm.weight", lambda t: np.full(HIDDEN, 1 / 3)), "", ""),
    ],
    "copies": [
        (tensor(UP.removeprefix("model."), lambda t: t[UP]), "", ""),
        (tensor(UP.removeprefix("model."), lambda t: t[UP] * 2), REFUSED, "one tensor with two values"),
        (tensor(UP.removeprefix("model."), lambda t: t[UP][:1]), REFUSED, "has shape [1, 32]"),
    ],
    "tied embeddings": [
        (put(tie_word_embeddings=True), NOTICE, "they are not tied"),
        (lambda c, t: (c.update(tie_word_embeddings=True), t.update({HEAD: t[EMBED]})), "", ""),
        (lambda c, t: (c.update(tie_word_embeddings=True), t.pop(EMBED)), "", ""),
    ],
    "biases": [
        (lambda c, t: t.update(zeros_for(c, "attention_bias")), "", ""),
        (tensor(BIAS, lambda t: np.ones(16, np.float32)), REFUSED, '"attention_bias": true'),
        (put(attention_bias=True), NOTICE, "zero, as in transformers"),
        (put(mlp_bias=True), NOTICE, "zero, as in transformers"),
        (
            lambda c, t: (c.update(MISTRAL, attention_bias=True), t.update({BIAS: np.ones(16, np.float32)})),
            REFUSED,
            '"model_type": "llama"',
        ),
    ],
    "frequencies": [
        (tensor(FREQUENCIES, lambda t: (10000.0 ** -(np.arange(8) / 8)).astype(np.float16)), "", ""),
        (tensor(FREQUENCIES, lambda t: (5e5 ** -(np.arange(8) / 8)).astype(np.float32)), NOTICE, "rope_theta counts"),
        (tensor(FREQUENCIES, lambda t: np.ones(3, np.int32)), "", ""),
    ],
    "rows": [(put(vocab_size=77), NOTICE, "the rows count")],
}  # fmt: skip


def test_every_row_of_the_table_has_cases() -> None:
    assert {*CASES, "weights"} == {fact.name for fact in FACTS}
    for fact in FACTS:
        outcomes = {outcome for _, outcome, _ in CASES.get(fact.name, [])} - {""}
        for promised in (NOTICE, REFUSED):
            if fact.name in CASES and promised in fact.difference:
                assert promised in outcomes, f"{fact.name} promises {promised} and no case shows it"


@pytest.mark.parametrize(
    ("change", "outcome", "words"),
    [case for cases in CASES.values() for case in cases],
    ids=[f"{name}-{i}" for name, cases in CASES.items() for i in range(len(cases))],
)
def test_a_row_of_the_table(tmp_path: Path, tokenizer: bytes, change: Change, outcome: str, words: str) -> None:
    config = small(vocabulary(tokenizer)) | {"torch_dtype": "float32"}
    tensors = random_tensors(config)
    change(config, tensors)
    directory = write(tmp_path / "base", tokenizer, {k: v for k, v in config.items() if v is not ...}, tensors)
    if outcome == REFUSED:
        with pytest.raises(InputError) as caught:
            settle(directory)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    notices = settle(directory).notices
    assert len(notices) == (outcome == NOTICE), notices
    assert all(words in notice for notice in notices)
    assert check(directory) == "both" or outcome == NOTICE or config["model_type"] is None


@pytest.mark.parametrize("kind", DEFAULTS)
def test_an_absent_key_means_what_transformers_class_means(kind: str) -> None:
    from transformers import LlamaConfig, MistralConfig

    theirs = {"llama": LlamaConfig, "mistral": MistralConfig}[kind]()
    declared = set(type(theirs).__dataclass_fields__)
    for key, default in DEFAULTS[kind].items():
        assert key in declared or key in ("attention_bias", "sliding_window"), f"{kind} has no {key}"
        expected = getattr(theirs, key, None)
        if default is None and key != "sliding_window":  # it follows from the others
            ours = from_hf({"model_type": kind, "sliding_window": None}, "x")[key]
            assert ours == expected
        else:
            assert default == expected, key
    assert ("attention_bias" in DEFAULTS[kind]) == ("attention_bias" in declared)
