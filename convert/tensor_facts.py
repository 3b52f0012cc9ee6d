# SPDX-License-Identifier: Apache-2.0
"""What the stored tensors say, and config.json says otherwise. facts.py lists all facts."""

from __future__ import annotations

from collections import Counter

import numpy as np

from cnllama.config import EMBEDDING, LM_HEAD, Expected, expected_tensors
from cnllama.errors import InputError
from cnllama.paths import exists, same_file

from . import diagnosis
from .checkpoint import FLOATS, SourceTensor, open_checkpoint, same_values
from .config_facts import Reading

_FREQUENCY_TOLERANCE = 0.05  # they may be stored in half precision
_SMALLEST_FREQUENCY = 1e-3


def weights(r: Reading) -> None:
    """The files that transformers would read, opened; copies and tensors that the index forgot are still in them."""
    beside = r.directory / "adapter_config.json"
    if exists(beside) and not any(same_file(path, r.directory) for path in r.adapters):
        raise InputError(
            f"{beside}: an adapter lies beside the model, and transformers would apply it; give the directory with "
            "--lora as well, or move the adapter elsewhere if it is merged already"
        )
    r.checkpoint = open_checkpoint(r.directory)
    r.tensors = dict(r.checkpoint.tensors)
    r.notices += r.checkpoint.notices


def names(r: Reading) -> None:
    """Every tensor of the architecture is there and no other. One of a tied pair is enough."""
    expected = _expected(r)
    missing = [name for name, e in expected.items() if not e.optional and name not in r.tensors]
    unknown = [name for name in r.tensors if name not in expected]
    if r.config["tie_word_embeddings"] and len({EMBEDDING, LM_HEAD} & set(missing)) == 1:
        missing = [name for name in missing if name not in (EMBEDDING, LM_HEAD)]
    if missing == [LM_HEAD] and not unknown:
        raise InputError(
            f"{r.directory}: tensor {LM_HEAD} is missing, and config.json does not tie it to embed_tokens; set "
            "tie_word_embeddings to true if the model shares them, else get the file that holds it"
        )
    if missing or unknown:
        said = diagnosis.wrong_names(missing, unknown, expected, r.config["num_hidden_layers"])
        raise InputError(f"{r.directory}: {said}")


def shapes(r: Reading) -> None:
    """Hidden sizes, heads and layers in config.json fit the stored shapes. vocab.py compares rows of the vocabulary."""
    expected = _expected(r)
    for name, tensor in r.tensors.items():
        for copy in (tensor, *_copies(r, name)):
            if not fits(name, copy.shape, expected[name]):
                raise InputError(
                    f"{copy.file}: tensor {name} has shape {list(copy.shape)}, config.json asks for "
                    f"{list(expected[name].shape)}; the two are not of one model"
                )


def types(r: Reading) -> None:
    """Stored types are floats; where config.json claims another one, the stored values count."""
    found: Counter[str] = Counter()
    for name, tensor in r.tensors.items():
        for copy in (tensor, *_copies(r, name)):
            copy.check_dtype()
        found[tensor.dtype] += tensor.size
    most = found.most_common(1)[0][0]
    if r.claimed_type is not None and most != r.claimed_type:
        r.note(f"says the weights are {r.claimed_type} but they are stored as {most}; the stored values count")


def copies(r: Reading) -> None:
    """A tensor that is stored twice, in two shards or under two spellings of its name, has one value."""
    for name in r.tensors:
        for copy in _copies(r, name):
            first = r.tensors[name]
            if not same_values(first, copy):
                raise InputError(
                    f"{r.directory}: {first.name} of {first.file.name} and {copy.name} of {copy.file.name} are one "
                    "tensor with two values; remove the one that is not the model's"
                )


def tied(r: Reading) -> None:
    """embed_tokens and lm_head are tied where config.json says so, unless both are stored and differ."""
    if not r.config["tie_word_embeddings"]:
        return
    if EMBEDDING not in r.tensors:
        r.tensors[EMBEDDING] = r.tensors.pop(LM_HEAD)
    elif LM_HEAD in r.tensors:
        if same_values(r.tensors[EMBEDDING], r.tensors[LM_HEAD]):
            del r.tensors[LM_HEAD]
        else:
            r.config["tie_word_embeddings"] = False
            r.note("says tie_word_embeddings, but embed_tokens and lm_head are stored and differ; they are not tied")


def biases(r: Reading) -> None:
    """Biases are used where the config has them. Stored ones that it denies must be zero; absent ones are."""
    absent = []
    for name, expected in _expected(r).items():
        if not expected.optional:
            continue
        part = name.split(".")[3]
        if r.biased[part]:
            if name not in r.tensors:
                absent.append(name)
        elif name in r.tensors:
            tensor = r.tensors.pop(name)
            if np.any(tensor.read()):
                raise InputError(
                    f"{tensor.file}: {name} is not zero but config.json has no {_BIAS_KEYS[part]}, so transformers "
                    f"would drop it; {_BIAS_MENDS[r.kind].format(_BIAS_KEYS[part])}"
                )
    if absent:
        r.note(f"says that {absent[0]} exists, which no file holds ({len(absent)} such); zero, as in transformers")


_BIAS_KEYS = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
_BIAS_MENDS = {
    "llama": 'set "{0}": true if the model was trained with it, else remove the tensor',
    "mistral": 'set "model_type": "llama" and "{0}": true if the model was trained with it, else remove the tensor',
}


def frequencies(r: Reading) -> None:
    """Frequencies that an old transformers stored follow from rope_theta; if they do not, rope_theta counts."""
    stored = r.checkpoint.frequencies if r.checkpoint else None
    half = r.config["head_dim"] // 2
    if stored is None or stored.dtype not in FLOATS or stored.shape != (half,):
        return
    expected = float(r.config["rope_theta"]) ** (-np.arange(half) / half)
    visible = expected > _SMALLEST_FREQUENCY
    if np.any(np.abs(stored.read() - expected)[visible] > _FREQUENCY_TOLERANCE * expected[visible]):
        theta = r.config["rope_theta"]
        r.note(f"says rope_theta {theta!r:.40}, and {stored.name} is of another; rope_theta counts, as in transformers")


def rows(r: Reading) -> None:
    """The rows of embed_tokens count, whatever vocab_size says."""
    claimed, found = r.config["vocab_size"], r.tensors[EMBEDDING].shape[0]
    if claimed != found:
        absent = "" if "vocab_size" in r.hf else " by default"
        r.note(f"says vocab_size {claimed}{absent} but embed_tokens has {found} rows; the rows count")
    r.config["vocab_size"] = found


def fits(name: str, shape: tuple[int, ...], expected: Expected) -> bool:
    """Whether a tensor has the shape that config.json asks for, whatever the number of its rows is in a vocabulary."""
    if name in (EMBEDDING, LM_HEAD):
        return len(shape) == 2 and shape[1] == expected.cols
    return shape == expected.shape


def _expected(r: Reading) -> dict[str, Expected]:
    return dict(expected_tensors({**r.config, "tie_word_embeddings": False}))


def _copies(r: Reading, name: str) -> tuple[SourceTensor, ...]:
    return tuple(r.checkpoint.twice.get(name, ())) if r.checkpoint else ()
