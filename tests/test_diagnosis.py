# SPDX-License-Identifier: Apache-2.0
"""Wrong files, wrong names, wrong directories: the sentence names what stands there, and its mend works."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cnllama.convert import diagnosis
from cnllama.convert.pack import make_plan
from hf_reference import EMBED, HEAD, Tensors, refusal, small, write
from models import piece_count, random_tensors, write_json, write_weights

from cnllama.container import read_json
from cnllama.errors import InputError

UP = "model.layers.0.mlp.up_proj.weight"


GPTQ = ("qweight", "qzeros", "scales", "g_idx")


def renamed(tensors: Tensors, pattern: str, *replacements: str) -> Tensors:
    found: Tensors = {}
    for name, value in tensors.items():
        for replacement in replacements if re.search(pattern, name) else (None,):
            found[name if replacement is None else re.sub(pattern, replacement, name)] = value
    return found


PROJ = r"(\w+_proj)\.weight$"
NAMES: dict[str, tuple[tuple[str, ...], str]] = {
    "LoRA": ((PROJ, r"\1.base_layer.weight", r"\1.lora_A.default.weight"), "of a LoRA that was not merged"),
    "LoRA embedding": ((r"embed_tokens\.weight", "embed_tokens.lora_embedding_A", "embed_tokens.weight"), "LoRA"),
    "GPTQ": ((PROJ, *(rf"\1.{end}" for end in GPTQ)), "quantized by GPTQ or AWQ"),
    "MLX": ((PROJ, r"\1.weight", r"\1.scales", r"\1.biases"), "quantized by MLX"),
    "bitsandbytes": ((PROJ, r"\1.weight", r"\1.weight.absmax", r"\1.weight.quant_map"), "quantized by bitsandbytes"),
    "nf4": ((PROJ, r"\1.weight", r"\1.weight.quant_state.bitsandbytes__nf4"), "quantized by bitsandbytes"),
    "fp8": ((PROJ, r"\1.weight", r"\1.weight_scale_inv"), "quantized to 8-bit floats"),
    "packed": ((PROJ, r"\1.weight_packed", r"\1.weight_shape"), "of quantized weights"),
    "GGUF": ((r"model\.layers\.(\d)\.self_attn\.q_proj", r"blk.\1.attn_q"), "those of GGUF"),
    "Meta": ((r"model\.layers\.(\d)\.self_attn\.q_proj", r"layers.\1.attention.wq"), "convert_llama_weights_to_hf.py"),
    "InternLM2": ((r"self_attn\.q_proj", "attention.wqkv"), "those of InternLM2"),
    "experts": ((r"mlp\.up_proj", "block_sparse_moe.experts.0.w1"), "a mixture of experts"),
    "DeepSeek": ((r"self_attn\.k_proj", "self_attn.kv_a_proj_with_mqa"), "DeepSeek"),
    "Qwen3": ((r"q_proj\.weight", "q_proj.weight", "q_norm.weight"), "normalizes queries and keys"),
    "Gemma": ((r"post_attention_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"), "Gemma"),
    "Baichuan": ((r"q_proj", "W_pack"), "those of Baichuan"),
    "Phi-3": ((r"q_proj", "qkv_proj"), "those of fused matrices"),
    "NeoX": ((r"self_attn\.q_proj", "attention.query_key_value"), "GPT-NeoX"),
    "GPT-2": ((r"self_attn\.q_proj", "attn.c_attn"), "GPT-2"),
    "images": ((r"model\.norm\.", "model.norm.", "vision_tower.norm."), "a model with images"),
    "reward": ((r"lm_head\.", "score."), "a classifier, reward or value model"),
    "value": ((r"lm_head\.", "lm_head.", "v_head.summary."), "a classifier, reward or value model"),
    "optimizer": ((r"lm_head\.", "lm_head.", "optimizer.state.0."), "an optimizer's state"),
    "unknown": ((r"up_proj", "up_odd"), "in their place tensors model.layers.0.mlp.up_odd.weight"),
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_families_of_names(small_base: Path, kind: str, container: str) -> None:
    if container == "bin":
        pytest.importorskip("torch")
        (small_base / "model.safetensors").unlink()
    change, expected = NAMES[kind]
    config = read_json(small_base / "config.json")
    write_weights(small_base, renamed(random_tensors(config), *change), kind=container)
    sentence = refusal(small_base)
    assert expected in sentence
    assert "get all files of the checkpoint again" not in sentence


def test_every_family_has_a_case() -> None:
    shown = set()
    for change, _ in NAMES.values():
        unknown = set(renamed(random_tensors(small(300)), *change)) - set(random_tensors(small(300)))
        shown.add(next((f.what for f in diagnosis._FAMILIES if any(f.pattern.search(name) for name in unknown)), ""))
    assert shown >= {family.what for family in diagnosis._FAMILIES}


PREFIXES = ["module.", "_orig_mod.", "base_model.model.", "transformer.", "a.b.", "language_model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("part", [r"^", r"^(?!lm_head)"], ids=["all", "without lm_head"])
def test_a_prefix_is_named_and_taking_it_off_works(small_base: Path, prefix: str, part: str) -> None:
    config = read_json(small_base / "config.json")
    tensors = random_tensors(config)
    write_weights(small_base, renamed(tensors, part, prefix))
    sentence = refusal(small_base)
    assert f"names begin with {prefix!r}" in sentence
    mend = re.search(r"name\.removeprefix\('([^']+)'\)", sentence)
    assert mend is not None
    write_weights(
        small_base, {name.removeprefix(mend[1]): value for name, value in renamed(tensors, part, prefix).items()}
    )
    assert make_plan(small_base).notices == []


def test_mends_of_config_work(small_base: Path) -> None:
    """What the sentence says to set is set, and the checkpoint converts."""
    path = small_base / "config.json"
    good = read_json(path)
    tensors = random_tensors(good)
    write_json(path, good | {"num_hidden_layers": 1})
    found = re.search(r"set it to (\d+)", refusal(small_base))
    assert found is not None
    write_json(path, good | {"num_hidden_layers": int(found[1])})
    make_plan(small_base)
    write_weights(small_base, {name: value for name, value in tensors.items() if name != HEAD})
    assert "set tie_word_embeddings to true" in refusal(small_base)
    write_json(path, good | {"tie_word_embeddings": True})
    assert make_plan(small_base).config["tie_word_embeddings"] is True
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}
    write_weights(small_base, tensors | bias)
    write_json(path, good)
    assert 'set "attention_bias": true' in refusal(small_base)
    write_json(path, good | {"attention_bias": True})
    assert set(bias) <= set(make_plan(small_base).tensors)
    write_json(path, good | {"model_type": "mistral", "max_position_embeddings": 8192, "sliding_window": 4096})
    assert "set it to null" in refusal(small_base)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("consolidated.00.pth", "Meta's own .pth files"),
        ("consolidated.safetensors", "get the Hugging Face files"),
        ("model-q4_0.gguf", "a GGUF file for llama.cpp"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        ("mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        ("global_step100/x", "zero_to_fp32.py"),
        ("pytorch_model_fsdp.bin", "accelerate merge-weights"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "accelerate merge-weights"),
        ("tf_model.h5", "weights for TensorFlow"),
        ("flax_model.msgpack", "weights for Flax"),
        ("model.fp16.safetensors", "a variant of the weights"),
        ("model.safetensors.aria2", "an unfinished download"),
        ("model-00001-of-00002.safetensors", "get model.safetensors.index.json too"),
        ("pytorch_model-00001-of-00002.bin", "get pytorch_model.bin.index.json too"),
        ("llama-7b-4bit.safetensors", "no model.safetensors but llama-7b-4bit.safetensors"),
        ("adapter_model.safetensors", "no model.safetensors but adapter_model.safetensors"),
        ("checkpoint-5/config.json", "checkpoint-5"),
    ],
)
def test_weights_of_other_layouts(small_base: Path, file: str, expected: str) -> None:
    (small_base / "model.safetensors").unlink()
    (small_base / file).parent.mkdir(exist_ok=True)
    (small_base / file).write_bytes(b"x")
    assert expected in refusal(small_base)


def test_a_quantized_file_under_another_name(small_base: Path) -> None:
    (small_base / "model.safetensors").rename(small_base / "gptq_model-4bit-128g.safetensors")
    write_json(small_base / "quantize_config.json", {"bits": 4})
    assert "is quantized, as quantize_config.json says" in refusal(small_base)


def where_to_go(sentence: str) -> Path:
    """The directory that the sentence says to give instead."""
    found = re.search(r"(?:in it: |lies in |one of them: )(/\S+?)(?:, give that)?$", sentence)
    assert found is not None, sentence
    return Path(found[1])


@pytest.mark.parametrize("inside", ["", "snapshots", "refs", "blobs"])
@pytest.mark.parametrize("refs", [True, False])
def test_the_hubs_cache_names_the_snapshot(tmp_path: Path, small_base: Path, inside: str, refs: bool) -> None:
    top = tmp_path / "models--owner--name"
    for name in ("refs", "blobs", "snapshots/1111/sub", "snapshots/2222"):
        (top / name).mkdir(parents=True)
    (top / "snapshots" / "1111" / "sub").rmdir()
    for name in ("1111", "2222"):
        shutil.copytree(small_base, top / "snapshots" / name, dirs_exist_ok=True)
    if refs:
        (top / "refs" / "main").write_text("1111")
    sentence = refusal(top / inside)
    assert "this is a model in the hub's cache, give the snapshot in it" in sentence
    assert where_to_go(sentence).name == ("1111" if refs else "2222")
    make_plan(where_to_go(sentence))


def test_directories_one_step_off(tmp_path: Path, small_base: Path) -> None:
    assert where_to_go(refusal(tmp_path)) == small_base
    (small_base / "original").mkdir()
    assert f"it lies one step up, give {small_base}" in refusal(small_base / "original")
    shutil.copytree(small_base, tmp_path / "another")
    assert "several lie in it" in refusal(tmp_path)
    run = tmp_path / "run"
    for step in (5, 10):
        shutil.copytree(small_base, run / f"checkpoint-{step}")
    assert where_to_go(refusal(run)) == run / "checkpoint-10"
    write_json(run / "checkpoint-10" / "adapter_config.json", {})
    assert "give one of them with --lora" in refusal(run)
    assert "give the directory" in refusal(small_base / "model.safetensors")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    assert "this is a file (a GGUF file)" in refusal(tmp_path / "x.gguf")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text("{}")
    assert "convert_llama_weights_to_hf.py" in refusal(tmp_path / "meta")


def test_links_of_a_copied_cache_lead_nowhere(small_base: Path) -> None:
    (small_base / "model.safetensors").unlink()
    (small_base / "model.safetensors").symlink_to("../../blobs/0123")
    assert "this links to ../../blobs/0123, which is not there" in refusal(small_base)


def test_a_state_dict_one_level_down(small_base: Path) -> None:
    torch = pytest.importorskip("torch")
    (small_base / "model.safetensors").unlink()
    state = {
        name: torch.from_numpy(value) for name, value in random_tensors(read_json(small_base / "config.json")).items()
    }
    torch.save({"module": state, "lr_scheduler": {}, "global_steps": 5}, small_base / "pytorch_model.bin")
    found = re.search(r"save what lies under '(\w+)' alone", refusal(small_base))
    assert found is not None
    torch.save(torch.load(small_base / "pytorch_model.bin")[found[1]], small_base / "pytorch_model.bin")
    make_plan(small_base)


def test_what_else_lies_beside_the_weights_is_said(small_base: Path) -> None:
    for name in ("adapter_model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        (small_base / name).write_bytes(b"x")
    notices = make_plan(small_base).notices
    assert notices == [
        f"{small_base}: model.safetensors is read and consolidated.safetensors, pytorch_model.bin beside it not, as in "
        "transformers"
    ]


def test_an_adapter_beside_the_weights_is_not_overlooked(small_base: Path) -> None:
    write_json(small_base / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    assert "transformers would apply it; give the directory with --lora as well" in refusal(small_base)
    assert "there are no adapter weights" in refusal(small_base, loras=[small_base])


def test_shards_of_a_distributed_checkpoint_win_in_transformers(small_base: Path) -> None:
    (small_base / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"x")
    assert "save the gathered model" in refusal(small_base)


def test_an_index_that_forgets_a_tensor(tmp_path: Path, small_tokenizer: bytes) -> None:
    config = small(piece_count(small_tokenizer))
    directory = write(tmp_path / "base", small_tokenizer, config, random_tensors(config), shards=2)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][UP]
    write_json(index, content)
    plan = make_plan(directory)
    assert plan.notices == [f"{index}: does not name {UP}, which a shard holds; it is read, as in transformers"]
    assert np.array_equal(plan.tensors[UP].read(), random_tensors(config)[UP])
    assert EMBED in plan.tensors


def test_names_of_strangers_are_printed_without_control_characters(tmp_path: Path, small_tokenizer: bytes) -> None:
    config = small(piece_count(small_tokenizer)) | {"architectures": ["a\x1b[31m\nb"], "rope_scaling": {"\n\x1b": 1}}
    directory = write(tmp_path / "base", small_tokenizer, config, random_tensors(config), shards=2)
    notices = make_plan(directory).notices
    assert len(notices) == 2
    assert all(notice.isprintable() for notice in notices)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for name, file in (("a\n\x1bb", "model-00001-of-00002.safetensors"), ("a\nb", 5), ("x", "a\n\x1bb")):
        write_json(index, {"weight_map": content["weight_map"] | {name: file}})
        refusal(directory)


def test_a_directory_of_an_odd_name_does_not_break_the_sentence(tmp_path: Path, small_tokenizer: bytes) -> None:
    config = small(piece_count(small_tokenizer))
    directory = write(tmp_path / "a\nb\x1b[31m", small_tokenizer, config, random_tensors(config))
    write_json(directory / "config.json", config | {"num_hidden_layers": 3})
    refusal(directory)
    (directory / "model.safetensors").unlink()
    refusal(directory)
    write_json(directory / "config.json", config)
    write_weights(directory, random_tensors(small(piece_count(small_tokenizer) + 1)))
    with pytest.raises(InputError) as caught:
        make_plan(directory)
    assert str(caught.value).isprintable()
    assert caught.value.details[0] == "vocabulary sizes found:"
    assert all(line.isprintable() for line in caught.value.details)
