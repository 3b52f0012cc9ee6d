# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints: config, generation config, index, weights and every file of the tokenizer."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import models

from cnllama.errors import CnllamaError
from fuzz import engine, mutate_bytes, mutate_json, mutate_proto, mutate_safetensors, seeds
from fuzz.case import Case, Content
from fuzz.engine import FindingError, Target

BASE, OTHER, GROWN, OUT = "base", "other", "grown", "out.cnl"
_TOKEN = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "special": True}
TEMPLATES = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "{{ ''.__class__.__mro__ }}", "{% for %}",
    "{% for x in range(10**9) %}{{ x }}{% endfor %}", "{{ 'a' * 10**10 }}", "[INST] {{ messages[0] }} [/INST]",
)  # fmt: skip
CONFIG_HINTS: mutate_json.Hints = {
    "architectures": [["LlamaForCausalLM"], ["GPT2LMHeadModel"], []],
    "model_type": ["llama", "mistral", "gpt2", None],
    "hidden_act": ["silu", "gelu", "swish"],
    "hidden_size": [32, 64, 33],
    "intermediate_size": [48, 64],
    "num_hidden_layers": [1, 2, 3, 1024],
    "num_attention_heads": [1, 2, 3, 1024],
    "num_key_value_heads": [None, 1, 2],
    "head_dim": [None, 16, 32, 1],
    "max_position_embeddings": [None, 1, 1 << 26],
    "vocab_size": [None, 330, 334, 384, 32000],
    "rms_norm_eps": [None, 1e-6, 1e-30],
    "rope_theta": [None, 1.0, 1e15],
    "rope_scaling": [None, seeds.YARN, seeds.LINEAR, {"type": "dynamic", "factor": 2.0}, {"rope_type": "default"}],
    "rope_parameters": [None, {"rope_type": "default", "rope_theta": 1e4}, seeds.YARN | {"rope_theta": 1e4}],
    "tie_word_embeddings": [True, False, None],
    "attention_bias": [True, False],
    "mlp_bias": [True, False],
    "sliding_window": [None, 4096],
    "quantization_config": [{"quant_method": "gptq"}],
    "partial_rotary_factor": [1.0, 0.5],
    "torch_dtype": ["float16", "bfloat16"],
    "dtype": ["float32"],
    "bos_token_id": [None, 1, [1, 2], 329],
    "eos_token_id": [None, 2, [2, 3], 0],
    "pad_token_id": [None, 0, -1],
    "transformers_version": ["5.0.0"],
}
GENERATION_HINTS: mutate_json.Hints = {
    "do_sample": [True, False],
    "temperature": [0, 0.7, None, 1e-320],
    "top_k": [0, -1, 40, 40.5, None],
    "top_p": [0, 1, 2, None],
    "min_p": [0, 2, None],
    "repetition_penalty": [0, 1.1, -1, None],
    "max_new_tokens": [None, 0, 10],
    "max_length": [4096],
    "eos_token_id": [None, 2, [2, 3], [], 10**400],
    "bos_token_id": [None, 1, -1, True],
    "stop_strings": [["a"]],
}
TOKENIZER_HINTS: mutate_json.Hints = {
    "add_bos_token": [True, False, None],
    "add_eos_token": [True, False],
    "add_prefix_space": [True, False, None],
    "legacy": [True, False, None],
    "bos_token": ["<s>", None, _TOKEN, "<none>"],
    "eos_token": ["</s>", _TOKEN],
    "unk_token": ["<unk>"],
    "pad_token": ["[PAD]", {"content": "[PAD]"}],
    "additional_special_tokens": [[], ["<|im_start|>"], [_TOKEN]],
    "added_tokens_decoder": [
        {},
        {"330": _TOKEN},
        {"1": _TOKEN},
        {"330": {"content": "x\ny"}},
        {"-1": _TOKEN},
        {"²": _TOKEN},
    ],
    "added_tokens": [[], [{"id": 330, "content": "x"}], [{"id": 1, "content": "<s>"}]],
    "chat_template": [*TEMPLATES, [{"name": "default", "template": "{{ messages }}"}]],
    "model": [None, {"type": "BPE", "vocab": {"a": 0}}, {"type": "Unigram", "vocab": [["a", -1.5], ["b"], []]}],
    "normalizer": [None, seeds.PREPEND, {"type": "Sequence", "normalizers": [seeds.PREPEND, {}, []]}],
    "pre_tokenizer": [None, seeds.METASPACE, {"type": "Sequence", "pretokenizers": [seeds.METASPACE]}],
    "post_processor": [seeds.BOS_FIRST, {"type": "Sequence", "processors": [seeds.BOS_FIRST]}],
    "tokenizer_class": ["LlamaTokenizer", "PreTrainedTokenizerFast", "CodeLlamaTokenizer"],
    "sp_model_kwargs": [{}, {"enable_sampling": True}],
    "clean_up_tokenization_spaces": [True, False],
    "[PAD]": [330, 331],
    "新": [330, 329, "330"],
}
TENSORS = (
    "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.rotary_emb.inv_freq",
    "layers.0.mlp.up_proj.weight",
    "model.layers.00.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.qweight", "transformer.wte.weight",
    "base_model.model.model.norm.weight", "model.layers.0.self_attn.q_proj.lora_A.weight", "embed_tokens.weight",
)  # fmt: skip
_FILES = (
    (22, "config.json"), (8, "generation_config.json"), (8, "model.safetensors.index.json"), (20, "weights"),
    (14, "tokenizer.model"), (10, "tokenizer_config.json"), (5, "special_tokens_map.json"), (6, "added_tokens.json"),
    (5, "tokenizer.json"), (2, "chat_template.jinja"), (1, "chat_template.json"),
)  # fmt: skip
_JSON_HINTS = {
    "config.json": CONFIG_HINTS,
    "generation_config.json": GENERATION_HINTS,
    "model.safetensors.index.json": {},
}
# padded: rows without a token. json: tokenizer.json here, the SentencePiece model elsewhere. headed: a tied matrix that
# is stored as lm_head.weight only.
_WAYS = ("plan", "convert", "command", "dry run", "values", "merge", "gguf", "resize")
_VARIANTS = ("plain", "full", "tied", "padded", "json", "headed")
# Directories called so must still be named in one line that a terminal can take.
ODD_NAMES = ("base\nx", "ba\x1b[31mse", "b\udcffse", "b ase", "基", "-base", "b%se{0}", "\u202ebase")


class Checkpoint(Target):
    name: ClassVar[str] = "checkpoint"
    share: ClassVar[int] = 5
    needs: ClassVar[tuple[str, ...]] = ("cnllama.llm", "cnllama.convert.pack", "cnllama.cli.convert", "models")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.found = {
            variant: {path.name: path.read_bytes() for path in sorted((folder / variant / BASE).iterdir())}
            for variant in _VARIANTS
        }

    @staticmethod
    def make_seeds(folder: Path) -> None:
        seeds.checkpoint(folder / "plain" / BASE)
        full = seeds.checkpoint(folder / "full" / BASE, shards=2, vocab_size=334, rope_scaling=seeds.YARN, head_dim=16)
        seeds.whole_tokenizer(full, 334)
        seeds.checkpoint(folder / "tied" / BASE, tie_word_embeddings=True, attention_bias=True, num_key_value_heads=2)
        padded = seeds.checkpoint(folder / "padded" / BASE, vocab_size=384, num_hidden_layers=1)
        seeds.whole_tokenizer(padded, 334)
        models.write_json(padded / "generation_config.json", seeds.GENERATION)
        (padded / "chat_template.jinja").write_text(TEMPLATES[0], encoding="ascii")
        seeds.whole_tokenizer(seeds.checkpoint(folder / "json" / BASE, vocab_size=334, num_hidden_layers=1), 334)
        seeds.only_head(seeds.checkpoint(folder / "headed" / BASE, tie_word_embeddings=True, num_hidden_layers=1))
        for variant in _VARIANTS:
            (folder / variant / OTHER).mkdir()
            (folder / variant / GROWN).mkdir()
            models.write_tokenizer(folder / variant / GROWN, seeds.grown_tokenizer())
            for path in (folder / variant / BASE).glob("*token*.*"):
                os.link(path, folder / variant / OTHER / path.name)
        (folder / "json" / BASE / "tokenizer.model").unlink()
        for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
            (folder / "json" / OTHER / name).unlink()

    def mutant(self, rng: random.Random) -> Case:
        variant = rng.choice(_VARIANTS)
        files: dict[str, Content] = {}
        steps: list[str] = []
        how = rng.choices(_WAYS, (80, 8, 5, 1, 3, 2, 2, 2))[0]
        name, override = BASE, rng.random() < (0.95 if variant == "json" else 0.08)
        if override:
            steps.append("with --tokenizer")
        for _ in range(rng.choice([1, 1, 1, 1, 2])):
            file, content, done = self._damage(rng, variant)
            own = "token" in file and override and rng.random() < 0.5
            files[f"{OTHER if own else BASE}/{file}"] = content
            steps += [f"{file}: {step}" for step in done]
            if file == "generation_config.json" or (file.startswith("tokenizer") and rng.random() < 0.4):
                how = rng.choice(["convert", "convert", "command", "vocabulary", "gguf"])
        if rng.random() < 0.02:
            name = rng.choice(ODD_NAMES)
            steps.append(f"the directory is called {name!a}")
        if rng.random() < 0.005:
            where, kind = rng.choice([BASE, OTHER]), mutate_bytes.special(rng)
            files, override = {where: kind}, where == OTHER
            steps = [f"{where} is a {kind.kind}"]
        return Case(variant, files, {"how": how, "name": name, "tokenizer": override}, steps)

    def _damage(self, rng: random.Random, variant: str) -> tuple[str, Content, list[str]]:
        found = self.found[variant]
        file = rng.choices([name for _, name in _FILES], [weight for weight, _ in _FILES])[0]
        if file == "weights":
            file = rng.choice([name for name in found if name.endswith(".safetensors")])
        if rng.random() < 0.03:
            special = rng.choice([None, mutate_bytes.special(rng)])
            return file, special, [special.kind if special else "removed"]
        data = found.get(file, b"{}")
        if file.endswith(".safetensors"):
            return file, *mutate_safetensors.mutate(rng, data, TENSORS)
        if file == "tokenizer.model":
            data = self.found["plain"][file]
            return file, *mutate_proto.mutate(rng, data)
        if file == "chat_template.jinja":
            text = rng.choice([*TEMPLATES, rng.choice(mutate_json.STRINGS)]).encode("utf-8", "surrogatepass")
            changed, step = mutate_bytes.mutate(rng, text)
            return file, changed, [step]
        return file, *damaged_json(rng, data, _JSON_HINTS.get(file, TOKENIZER_HINTS))

    def run(self, case: Case, folder: Path) -> str:
        base = folder / case.call["name"]
        if case.call["name"] != BASE:
            (folder / BASE).rename(base)
        tokenizer = folder / OTHER if case.call["tokenizer"] else None
        return run_conversion(case.call["how"], base, [], folder, tokenizer)

    def names(self, case: Case, folder: Path) -> tuple[str, ...]:
        return tuple(str(folder / name) for name in (case.call["name"], OTHER, GROWN, OUT))


def damaged_json(rng: random.Random, data: bytes, hints: mutate_json.Hints) -> tuple[bytes, list[str]]:
    """A JSON file changed as a tree, seldom as bytes."""
    if rng.random() < 0.12:
        changed, step = mutate_bytes.mutate(rng, data)
        return changed, [step]
    tree, steps = mutate_json.mutate(rng, json.loads(data), hints)
    return mutate_json.dump(tree), steps


def run_conversion(how: str, base: Path, loras: Sequence[Path], folder: Path, tokenizer: Path | None = None) -> str:
    """Plans or converts in one of the product's ways. Raises what it raises, and FindingError for what is wrong."""
    from cnllama.convert.pack import convert, make_plan, merged_tensors

    out = folder / OUT
    if how in ("command", "dry run"):
        given = [word for lora in loras for word in ("--lora", str(lora))]
        given += ["--tokenizer", str(tokenizer)] if tokenizer else []
        given += ["--dry-run"] if how == "dry run" else []
        code, _, _ = engine.command(
            ["convert", str(base), *given, "-o", str(out), "--quantizer", "rtn", "--threads", "1"]
        )
        check_written(out, done=code == 0 and how == "command")
        return f"{how} {code}"
    if how == "convert":
        try:
            report = convert(base, loras, out, threads=1, tokenizer=tokenizer)
        except CnllamaError:
            check_written(out, done=False)
            raise
        check_lines(report.warnings)
        check_written(out, done=True)
        return how
    if how == "merge":
        from cnllama.adapt.merge import merge_checkpoint

        merge_checkpoint(base, loras, folder / "merged", "bfloat16")
        try:
            make_plan(folder / "merged")
        except CnllamaError as error:
            raise FindingError("wrong", f"{error!s:.400}", "merged to a checkpoint that cannot be read") from error
        return how
    if how == "resize":
        from cnllama.adapt.resize import resize

        check_lines(resize(base, folder / GROWN, folder / "resized").warnings)
        return how
    if how == "vocabulary":
        from cnllama.adapt.tokenfile import open_vocabulary

        open_vocabulary(base).tokenizer.encode("从前有 a river,\n👋")
        return how
    plan = make_plan(base, loras, tokenizer)
    check_plan(plan)
    for file in (lora / "adapter_model.safetensors" for lora in loras):
        check_container(file)
    if how == "values":
        for name, values in merged_tensors(plan):
            if values.shape != plan.tensors[name].shape:
                raise FindingError("wrong", f"{name} is {values.shape}", "values of another shape")
    if how == "gguf":
        from cnllama.convert.gguf.from_checkpoint import write_checkpoint

        write_checkpoint(plan, folder / "out.gguf")
    return how


def check_plan(plan: Any) -> None:
    """A plan that was accepted says sensible things. Looked at by other code than the product's."""
    config = plan.config
    for key, value in config.items():
        if key in ("rope_theta", "rms_norm_eps"):
            good = type(value) in (int, float) and 0 < value < 1e16
        elif key in ("rope_scaling", "tie_word_embeddings"):
            good = value is None or isinstance(value, (dict, bool))
        else:
            good = type(value) is int and 0 < value <= 1 << 26
        if not good:
            raise FindingError("wrong", f"{key} is {value!r:.60}", f"planned with a wrong {key}")
    q = config["num_attention_heads"] * config["head_dim"]
    expected = {
        "model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
        "model.norm.weight": (config["hidden_size"],),
        "model.layers.0.self_attn.q_proj.weight": (q, config["hidden_size"]),
        "model.layers.0.mlp.down_proj.weight": (config["hidden_size"], config["intermediate_size"]),
    }
    for name, shape in expected.items():
        found = plan.tensors.get(name)
        if found is None or tuple(found.shape) != shape:
            raise FindingError("wrong", f"{name} is {found and found.shape}", "planned with a wrong shape")
    ids = plan.vocabulary.tokenizer.added.values()
    if not all(type(i) is int and 0 <= i < config["vocab_size"] for i in ids):
        raise FindingError("wrong", f"added ids are {list(ids)!r:.80}", "planned with ids outside the vocabulary")
    for file in {tensor.source.file for tensor in plan.tensors.values()}:
        check_container(file)


def check_container(file: Path) -> None:
    """The library that defines safetensors must take what we take."""
    if file.suffix != ".safetensors" or not file.exists():
        return
    import safetensors

    try:
        safetensors.deserialize(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise FindingError("wrong", f"safetensors: {error}", "accepted no safetensors file") from None


def check_lines(lines: Sequence[str]) -> None:
    """Each is one line that a terminal can take."""
    for line in lines:
        if not line.isprintable():
            raise FindingError("printed", f"a notice: {line!r:.300}", "a notice with control characters")


def check_written(out: Path, done: bool) -> None:
    """A conversion that says done made a file that runs; one that does not leaves nothing behind."""
    left = [path.name for path in out.parent.glob(f".{out.name}*")]
    if left or out.exists() != done:
        raise FindingError("wrong", f"there is {left or out.name}, done: {done}", "a file left behind, or none written")
    if not done:
        return
    from cnllama import LLM

    try:
        with LLM(out, ctx=16, threads=1) as llm:
            "".join(llm.stream("a", max_tokens=1))
    except CnllamaError as error:
        raise FindingError("wrong", f"{error!s:.400}", "converted to a file that does not run") from error
