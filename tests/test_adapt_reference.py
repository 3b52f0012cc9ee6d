# SPDX-License-Identifier: Apache-2.0
"""Whole runs against plain PyTorch in float64: losses, gradients, learning rates and weights of every stage."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import adapt_data
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("transformers", reason="training needs transformers")
pytest.importorskip("peft", reason="training needs peft")

import adapt_matrix  # noqa: E402
import models  # noqa: E402
import training_reference as reference  # noqa: E402
from test_adapt_pipeline import inside  # noqa: E402

EPOCHS, BATCH, ACCUM, LR = 2, 3, 2, 1e-3
LENGTHS = {"pretrain": 48, "sft": 640}
SAMPLES = 22  # three full steps and one of four


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and one with tied embeddings, a text of several blocks and 22 samples."""
    place = adapt_matrix.write_place(tmp_path_factory.mktemp("reference"))
    config, weights = reference.read_weights(place / "base")
    tensors = {name: value.numpy().astype(np.float32) for name, value in weights.items() if name != reference.HEAD}
    model = (place / "base/tokenizer.model").read_bytes()
    models.make_llama(place / "tied", model, tensors=tensors, dtype="float32", **config | {"tie_word_embeddings": True})
    (place / "text.txt").write_text("\n\n".join((place / "data/zh.txt").read_text().split("\n\n")[:14]) + "\n")
    adapt_data.write_jsonl(place / "chat.jsonl", adapt_data.pairs(SAMPLES))
    return place


def steps(place: Path, verb: str, packed: bool) -> list[list[reference.Sample]]:
    """The samples of every step of two epochs: what the data sets give, in their order, six items to a step."""
    from cnllama.adapt.data import Source, prepare_chat, prepare_text
    from cnllama.adapt.datasets import PackedChat
    from cnllama.adapt.tokenfile import open_vocabulary

    vocabulary, items = open_vocabulary(place / "base"), BATCH * ACCUM
    if verb == "pretrain":
        data: Any = prepare_text([Source(place / "text.txt")], vocabulary, place / "tokens", block_size=LENGTHS[verb])
    else:
        step_items = 0 if packed else items
        sources = [Source(place / "chat.jsonl")]
        data = prepare_chat(sources, vocabulary, place / "tokens", max_length=LENGTHS[verb], step_items=step_items)
        data = PackedChat(data, LENGTHS[verb], vocabulary.pad_id) if packed else data
    found = []
    for epoch in range(EPOCHS):
        data.set_epoch(epoch)
        blocks = [data[i] for i in range(len(data))]
        samples = [
            adapt_matrix.unpacked(block) if packed else [(block["input_ids"].tolist(), block["labels"].tolist())]
            for block in blocks
        ]
        found += [list(chain(*samples[at : at + items])) for at in range(0, len(samples), items)]
        assert len(samples) % items, "the last step of an epoch is not full"
    return found


CASES = {
    "stage 1": ("embeddings", "base", 0, ("pretrain", "--stage", 1)),
    "stage 2": ("lora", "base", 0, ("pretrain",)),
    "full": ("full", "base", 0, ("pretrain", "--full")),
    "sft": ("lora", "base", 0, ("sft",)),
    "sft --pack": ("lora", "base", 0, ("sft", "--pack")),
    "sft --full --pack": ("full", "base", 0, ("sft", "--full", "--pack")),
    "new rows": ("lora", "base", 300, ("pretrain", "--train-new-rows-only", 300)),
    "tied, stage 1": ("embeddings", "tied", 0, ("pretrain", "--stage", 1)),
    "tied, stage 2": ("lora", "tied", 0, ("pretrain",)),
    "tied, full": ("full", "tied", 0, ("pretrain", "--full")),
    "tied, new rows": ("lora", "tied", 300, ("pretrain", "--train-new-rows-only", 300)),
    "tied, new rows, narrow": ("lora", "tied", 300, ("pretrain", "--train-new-rows-only", 300, "--dtype", "bfloat16")),
    "tied, stage 1, narrow": ("embeddings", "tied", 0, ("pretrain", "--stage", 1, "--dtype", "bfloat16")),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_run_is_that_of_the_reference(place: Path, case: str) -> None:
    """Two epochs with accumulation, whose last steps are not full: step by step, and what is saved."""
    mode, base, old_rows, (verb, *more) = CASES[case]
    out = place / "".join(c if c.isalnum() else "-" for c in case)
    data = place / ("text.txt" if verb == "pretrain" else "chat.jsonl")
    words = ["adapt", verb, place / base, "--data", data, "--block-size", LENGTHS[verb], *more]
    words += ["--dropout", 0, "--epochs", EPOCHS, "--batch-size", BATCH, "--grad-accum", ACCUM, "--lr", LR]
    words += ["--warmup", 0.3, "--log-every", 1, "--save-every", 0, "--cache", place / "tokens"]
    lora = first_lora(words, out.with_name(out.name + "-first")) if mode == "lora" else {}
    inside(*words, "-o", out)
    config, weights = reference.read_weights(place / base)
    given = steps(place, verb, "--pack" in more)
    frozen = torch.bfloat16 if "bfloat16" in more else torch.float64
    recipe = reference.Recipe(mode, LR, len(given), warmup=0.3, old_rows=old_rows, frozen=frozen)
    run = reference.train(config, weights, given, recipe, lora)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for name, values in (("loss", run.losses), ("grad_norm", run.norms), ("lr", run.rates)):
        np.testing.assert_allclose([record[name] for record in log], values, rtol=2e-5, err_msg=name)
    found = adapt_matrix.saved(out)
    before = weights | {name: value.double() for name, value in lora.items()}
    assert reference.update_error(found, run.weights, before) < 2e-3
    if base == "tied" and mode != "full":
        assert torch.equal(found[reference.EMBED], found[reference.HEAD])
    for name in (reference.EMBED, reference.HEAD):
        assert old_rows == 0 or torch.equal(
            found[name][:old_rows].double(), weights[reference.EMBED if base == "tied" else name][:old_rows]
        )


def first_lora(words: list[object], out: Path) -> dict[str, Any]:
    """The matrices A that a run begins with: those it saves after a step that is too small to change them."""
    line = [*words, "-o", out, "--max-steps", 1]
    line[line.index("--lr") + 1] = 1e-12
    inside(*line)
    return {name: value for name, value in adapt_matrix.saved(out).items() if "lora_A" in name}
