# SPDX-License-Identifier: Apache-2.0
"""Vocabularies that grow, that do not fit, and that claim what is not there: decided before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_judge import edit_config, edit_tensors
from cnllama.convert import checkpoint as checkpoint_module
from cnllama.convert.pack import Plan, convert, make_plan, merged_tensors
from models import (
    chinese_lines,
    command,
    english_lines,
    load_transformers,
    make_adapter,
    make_llama,
    merge_tokenizers,
    piece_count,
    train_tokenizer,
    write_json,
    write_weights,
)

from cnllama.errors import InputError
from cnllama.format import open_cnl

pytest.importorskip("peft")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Recipe:
    """base -> LLaMA-Plus (more pieces) -> Alpaca-Plus ([PAD] added), in small; and peft's result."""

    def __init__(self, directory: Path, tokenizer: bytes, chinese: bytes, **config: Any) -> None:
        self.tokenizers = tokenizer, merge_tokenizers(tokenizer, chinese)
        self.small, self.large = map(piece_count, self.tokenizers)
        self.base = make_llama(directory / "base", tokenizer, dtype="float32", **config)
        self.first, self.second = directory / "llama-plus", directory / "alpaca-plus"
        model = load_transformers(json.loads((self.base / "config.json").read_text()), self.tensors())
        grown = make_adapter(model, self.first, self.tokenizers[1], seed=1)
        final = make_adapter(grown, self.second, self.tokenizers[1], added_tokens={"[PAD]": self.large}, seed=2)
        self.merged = {name: value.numpy() for name, value in final.state_dict().items()}

    def tensors(self) -> dict[str, np.ndarray]:
        from safetensors.numpy import load_file

        return load_file(self.base / "model.safetensors")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    english, chinese = train_tokenizer(english_lines(), 400), train_tokenizer(chinese_lines(), 900)
    return Recipe(tmp_path_factory.mktemp("recipe"), english, chinese)


@pytest.fixture
def mine(recipe: Recipe, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Copies of base, first and second adapter."""
    sources = recipe.base, recipe.first, recipe.second
    return tuple(Path(shutil.copytree(s, tmp_path / s.name)) for s in sources)  # type: ignore[return-value]


def refusal(base: Path, *adapters: Path, **options: Any) -> str:
    """The error of a plan, which must come before any weight is read."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (checkpoint_module._MappedTensor, checkpoint_module._TorchTensor):
            patch.setattr(kind, "read", lambda *_: pytest.fail("a weight was read"))
        with pytest.raises(InputError) as caught:
            make_plan(base, adapters, **options)
    return "\n".join([str(caught.value), *caught.value.details])


def with_rows(directory: Path, embed: int, head: int) -> None:
    """Changes the rows of a base or of what an adapter saves."""
    from safetensors.torch import load_file, save_file

    path = next(directory.glob("*.safetensors"))
    tensors = load_file(path)
    for name, rows in (("embed_tokens.weight", embed), ("lm_head.weight", head)):
        key = next(key for key in tensors if key.endswith(name))
        tensors[key] = tensors[key].new_ones((rows, tensors[key].shape[1]))
    save_file(tensors, path)


def assert_equals_peft(plan: Plan, merged: dict[str, np.ndarray]) -> None:
    for name, values in merged_tensors(plan):
        assert np.linalg.norm(values - merged[name]) <= 1e-6 * np.linalg.norm(merged[name]), name


def check_recipe(recipe: Recipe, tmp_path: Path) -> None:
    plan = make_plan(recipe.base, [recipe.first, recipe.second])
    assert plan.config["vocab_size"] == recipe.large + 1
    assert_equals_peft(plan, recipe.merged)
    report = convert(recipe.base, [recipe.first, recipe.second], tmp_path / "x.cnl")
    file = open_cnl(tmp_path / "x.cnl")
    assert file.vocab_size == report.vocab_size == recipe.large + 1
    assert file.tokenizer["pieces"] == recipe.large
    assert file.tokenizer["added_tokens"] == {"[PAD]": recipe.large}
    assert file.tokenizer_model == recipe.tokenizers[1]
    assert file.source["adapters"] == ["llama-plus", "alpaca-plus"]


def test_two_steps_grow_the_vocabulary(recipe: Recipe, tmp_path: Path) -> None:
    assert recipe.small < recipe.large
    check_recipe(recipe, tmp_path)


def test_the_released_recipe(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "tokenizers"
    llama, chinese = (folder / name for name in ("llama.model", "chinese_sp_20k.model"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = Recipe(tmp_path, llama.read_bytes(), chinese.read_bytes(), **small, num_key_value_heads=2)
    assert (recipe.small, recipe.large) == (32000, 49953)
    check_recipe(recipe, tmp_path)
    assert open_cnl(tmp_path / "x.cnl").template == "alpaca"
    found = refusal(recipe.base, recipe.second, recipe.first)
    assert f"the right order is --lora {recipe.first} --lora {recipe.second}" in found
    for size in ("32000", "49953", "49954"):
        assert size in found.split("vocabulary sizes found:")[1]


def test_wrong_order_says_the_right_one(recipe: Recipe) -> None:
    found = refusal(recipe.base, recipe.second, recipe.first)
    sentence, table = found.split("\n", 1)
    assert (
        f"{recipe.first}: its vocabulary has {recipe.large} rows, but what it follows has {recipe.large + 1}"
        in sentence
    )
    assert sentence.endswith(f"the right order is --lora {recipe.first} --lora {recipe.second}")
    lines = [line.split() for line in table.splitlines()]
    assert ["config.json", "vocab_size", str(recipe.small)] in lines
    assert [EMBED, str(recipe.large + 1)] in lines
    assert ["tokenizer", str(recipe.small)] in lines


def test_command_prints_the_table(recipe: Recipe, tmp_path: Path) -> None:
    done = command(
        "cnllama.convert", recipe.base, "--lora", recipe.second, "--lora", recipe.first, "-o", tmp_path / "x.cnl"
    )
    assert done.returncode == 2
    assert "vocabulary sizes found:" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_second_adapter_alone_brings_its_own_rows(recipe: Recipe) -> None:
    plan = make_plan(recipe.base, [recipe.second])
    assert plan.config["vocab_size"] == recipe.large + 1


def test_stale_config_is_a_warning_and_the_rows_win(recipe: Recipe, mine: tuple[Path, Path, Path]) -> None:
    base = mine[0]
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", config | {"vocab_size": 32000})
    plan = make_plan(base)
    assert plan.config["vocab_size"] == recipe.small
    assert [n for n in plan.notices if f"says vocab_size 32000 but embed_tokens has {recipe.small} rows" in n]
    assert make_plan(recipe.base).notices == []


@pytest.mark.parametrize("short", [EMBED, HEAD])
def test_one_matrix_short_names_the_wrong_one(recipe: Recipe, mine: tuple[Path, Path, Path], short: str) -> None:
    base, rows = mine[0], recipe.small
    with_rows(base, rows - (short == EMBED), rows - (short == HEAD))
    found = refusal(base)
    assert f"{base / 'model.safetensors'}: {short} has {rows - 1} rows, expected the {rows} of" in found


def test_tokenizer_larger_than_the_rows(recipe: Recipe, mine: tuple[Path, Path, Path]) -> None:
    base = mine[0]
    (base / "tokenizer.model").write_bytes(recipe.tokenizers[1])
    found = refusal(base)
    assert f"{base / 'tokenizer.model'}: the tokenizer has {recipe.large} tokens" in found
    assert f"the model has {recipe.small} rows: the new rows are missing" in found


def test_tokenizer_smaller_than_the_rows(recipe: Recipe, mine: tuple[Path, Path, Path]) -> None:
    base = mine[0]
    with_rows(base, recipe.large, recipe.large)
    found = refusal(base)
    assert f"the tokenizer has {recipe.small} tokens but the model has {recipe.large} rows" in found
    assert "--tokenizer DIR" in found
    assert make_plan(base, tokenizer=recipe.first).vocabulary.tokenizer.pieces == recipe.large


def keep_lora_only(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {k: v for k, v in tensors.items() if "lora_" in k})
    edit_config(adapter, modules_to_save=None)


def test_adapter_with_a_tokenizer_but_no_rows(recipe: Recipe, mine: tuple[Path, Path, Path]) -> None:
    _, first, _ = mine
    keep_lora_only(first)
    found = refusal(recipe.base, first)
    assert f"{first / 'tokenizer.model'}: the tokenizer has {recipe.large} tokens" in found
    assert "new rows are missing" in found


def test_adapter_that_saves_half_of_the_new_rows(recipe: Recipe, mine: tuple[Path, Path, Path]) -> None:
    _, first, second = mine
    edit_tensors(first, lambda tensors: {k: v for k, v in tensors.items() if "lm_head" not in k})
    assert "lm_head.weight is not in the file, but adapter_config.json has it in modules_to_save" in refusal(
        recipe.base, first
    )
    edit_config(first, modules_to_save=["embed_tokens"])
    assert f"saves {recipe.large} rows of {EMBED} and none of {HEAD}" in refusal(recipe.base, first)
    with_rows(second, recipe.large + 1, recipe.large)
    assert f"embed_tokens has {recipe.large + 1} rows and lm_head {recipe.large}" in refusal(recipe.base, second)


def test_lora_on_rows_that_are_not_there(recipe: Recipe, tmp_path: Path) -> None:
    """An adapter trained on the grown model, given without the one that grew it."""
    grown = make_llama(tmp_path / "grown", recipe.tokenizers[1], dtype="float32")
    from safetensors.numpy import load_file

    model = load_transformers(json.loads((grown / "config.json").read_text()), load_file(grown / "model.safetensors"))
    targets = ["q_proj", "lm_head"]
    make_adapter(model, tmp_path / "a", recipe.tokenizers[1], target_modules=targets, modules_to_save=None)
    keep_lora_only(tmp_path / "a")  # new versions of peft save the matrix under the LoRA as well
    found = refusal(recipe.base, tmp_path / "a")
    assert f"its LoRA of {HEAD} is for {recipe.large} rows, but what it follows has {recipe.small}" in found
    assert make_plan(recipe.base, [recipe.first, tmp_path / "a"]).config["vocab_size"] == recipe.large
    assert f"the right order is --lora {recipe.first} --lora {tmp_path / 'a'}" in refusal(
        recipe.base, tmp_path / "a", recipe.first
    )


def test_tokenizer_of_another_model_of_the_same_size(recipe: Recipe, mine: tuple[Path, Path, Path]) -> None:
    _, first, _ = mine
    other = train_tokenizer([line[::-1] for line in english_lines()], 400)
    merged = merge_tokenizers(other, recipe.tokenizers[1])
    (first / "tokenizer.model").write_bytes(merged)
    assert "this is the tokenizer of another model" in refusal(recipe.base, first)
    (first / "tokenizer.model").write_bytes(b"no model at all")
    assert "this is no SentencePiece model" in refusal(recipe.base, first)


def test_only_a_tokenizer_json(recipe: Recipe, mine: tuple[Path, Path, Path]) -> None:
    base = mine[0]
    (base / "tokenizer.model").unlink()
    assert "there is no tokenizer.model; give its directory with --tokenizer DIR" in refusal(base)
    write_json(base / "tokenizer.json", {"added_tokens": []})
    assert "there is only a tokenizer.json" in refusal(base)
    assert "there is no tokenizer.model, expected a directory with one" in refusal(base, tokenizer=base)
    assert make_plan(base, tokenizer=recipe.base).config["vocab_size"] == recipe.small


@pytest.mark.parametrize(
    "file", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"]
)
def test_every_way_to_add_a_token_counts(recipe: Recipe, mine: tuple[Path, Path, Path], file: str) -> None:
    base, rows = mine[0], recipe.small
    for leftover in ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        (base / leftover).unlink(missing_ok=True)
    decoder = {"1": {"content": "<s>"}, str(rows): {"content": "[PAD]"}}
    write_json(
        base / file,
        {
            "added_tokens.json": {"[PAD]": rows},
            "tokenizer_config.json": {"added_tokens_decoder": decoder},
            "tokenizer.json": {"added_tokens": [{"id": 2, "content": "</s>"}, {"id": rows, "content": "[PAD]"}]},
            "special_tokens_map.json": {"pad_token": {"content": "[PAD]"}, "bos_token": "<s>", "eos_token": ""},
        }[file],
    )
    if file == "special_tokens_map.json":
        plan = make_plan(base)
        assert any("'[PAD]' has no id and the model no row for it: ignored" in notice for notice in plan.notices)
        assert plan.vocabulary.tokenizer.added == {}
    else:
        found = refusal(base)
        assert f"the tokenizer has {rows + 1} tokens ({rows} pieces and 1 added)" in found
    with_rows(base, rows + 1, rows + 1)
    settings = make_plan(base).vocabulary.tokenizer.settings()
    assert settings["added_tokens"] == {"[PAD]": rows}
    assert settings["pieces"] == rows


def test_added_tokens_that_contradict(recipe: Recipe, mine: tuple[Path, Path, Path]) -> None:
    base, rows = mine[0], recipe.small
    write_json(base / "added_tokens.json", {"[PAD]": rows})
    write_json(base / "tokenizer_config.json", {"added_tokens_decoder": {str(rows + 1): {"content": "[PAD]"}}})
    assert "gives the token '[PAD]' the id" in refusal(base)
    write_json(base / "added_tokens.json", {"[PAD]": 5})
    write_json(base / "tokenizer_config.json", {})
    assert "these files belong to different tokenizers" in refusal(base)
    write_json(base / "added_tokens.json", {"[PAD]": "5"})
    assert "added token '[PAD]' has id '5'" in refusal(base)


def test_tokenizer_settings_are_kept(mine: tuple[Path, Path, Path]) -> None:
    base = mine[0]
    write_json(base / "tokenizer_config.json", {"add_bos_token": False, "add_prefix_space": False, "legacy": True})
    settings = make_plan(base).vocabulary.tokenizer.settings()
    assert (settings["add_bos"], settings["add_dummy_prefix"], settings["legacy"]) == (False, False, True)
    (base / "tokenizer_config.json").unlink()
    settings = make_plan(base).vocabulary.tokenizer.settings()
    assert (settings["add_bos"], settings["add_dummy_prefix"]) == (True, True)
    assert settings["legacy"] is False  # what transformers 5 takes where no file tells


def test_rows_of_an_old_merge_in_bin_shards(recipe: Recipe, tmp_path: Path) -> None:
    """A merged checkpoint whose config.json still says the old size."""
    base = tmp_path / "merged"
    base.mkdir()
    write_weights(base, recipe.merged, kind="bin", shards=2)
    write_json(base / "config.json", json.loads((recipe.base / "config.json").read_text()))
    (base / "tokenizer.model").write_bytes(recipe.tokenizers[1])
    write_json(base / "added_tokens.json", {"[PAD]": recipe.large})
    convert(base, [], tmp_path / "x.cnl")
    assert open_cnl(tmp_path / "x.cnl").vocab_size == recipe.large + 1


def test_only_the_last_adapter_carries_a_tokenizer(recipe: Recipe, mine: tuple[Path, Path, Path]) -> None:
    _, first, second = mine
    (first / "tokenizer.model").unlink()
    write_json(first / "tokenizer_config.json", {"add_bos_token": True})
    assert_equals_peft(make_plan(recipe.base, [first, second]), recipe.merged)
    assert f"the tokenizer has {recipe.small} tokens but the model has {recipe.large} rows" in refusal(
        recipe.base, first
    )


def test_added_token_of_an_adapter_without_a_model(recipe: Recipe, mine: tuple[Path, Path, Path]) -> None:
    """[PAD] in the Alpaca step's added_tokens.json, the pieces from the step before it."""
    second = mine[2]
    (second / "tokenizer.model").unlink()
    files = make_plan(recipe.base, [recipe.first, second]).vocabulary.tokenizer
    assert files.file == recipe.first / "tokenizer.model"
    assert files.settings()["added_tokens"] == {"[PAD]": recipe.large}
