# SPDX-License-Identifier: Apache-2.0
"""What training shows the model, what it learns, and its held-out loss: nothing left out, no batch size in it.

All of it is seen from outside: the command line, and what reaches the forward pass.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapt_data
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("transformers", reason="training needs transformers")
pytest.importorskip("peft", reason="training needs peft")

import adapt_matrix  # noqa: E402
import training_reference as reference  # noqa: E402
from test_adapt_pipeline import inside  # noqa: E402

SAMPLES, LENGTH = 29, 640
EXACT = 2e-6  # float32 against the reference


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, 29 samples of different lengths, a text, and held-out files of both kinds."""
    place = adapt_matrix.write_place(tmp_path_factory.mktemp("seen"))
    adapt_data.write_jsonl(place / "chat.jsonl", adapt_data.pairs(SAMPLES))
    adapt_data.write_jsonl(place / "held.jsonl", adapt_data.pairs(SAMPLES + 11)[SAMPLES:])
    lines = (place / "data/zh.txt").read_text().split("\n\n")
    (place / "text.txt").write_text("\n\n".join(lines[:41]) + "\n")
    (place / "held.txt").write_text("\n\n".join(lines[41:46]) + "\n")
    return place


@contextlib.contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What reaches the model while it trains, a forward pass after the other."""
    from transformers import LlamaForCausalLM

    calls: list[dict[str, Any]] = []
    forward = LlamaForCausalLM.forward

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            calls.append({name: value.clone() for name, value in kwargs.items() if torch.is_tensor(value)})
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", recording)
        yield calls


def words(place: Path, verb: str, out: str, *more: object) -> list[object]:
    data = place / ("text.txt" if verb == "pretrain" else "chat.jsonl")
    found = ["adapt", verb, place / "base", "-o", place / out, "--data", data, "--save-every", 0, "--lr", "1e-3"]
    return [*found, "--warmup", 0, "--log-every", 1, "--cache", place / "tokens", *more]


def samples_of(call: dict[str, Any]) -> list[tuple[int, ...]]:
    """The samples of a forward pass without padding: rows, or parts of packed rows."""
    found = []
    for row, ids in enumerate(call["input_ids"].tolist()):
        if "attention_mask" in call:
            found.append(tuple(ids[: int(call["attention_mask"][row].sum())]))
            continue
        starts = [i for i, position in enumerate(call["position_ids"][row].tolist()) if position == 0]
        found += [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return found


def all_samples(place: Path, name: str = "chat.jsonl") -> list[reference.Sample]:
    from cnllama.adapt.data import Source, prepare_chat
    from cnllama.adapt.tokenfile import open_vocabulary

    vocabulary = open_vocabulary(place / "base")
    data = prepare_chat([Source(place / name)], vocabulary, place / "tokens", max_length=LENGTH, shuffle=False)
    return [(data[i]["input_ids"].tolist(), data[i]["labels"].tolist()) for i in range(len(data))]


@pytest.mark.parametrize("more", [(), ("--pack",), ("--grad-accum", 3)], ids=str)
def test_sft_shows_every_sample_in_every_epoch(
    place: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...]
) -> None:
    """29 samples in batches of 4: none is left out, in no epoch, and none comes twice."""
    out = "sft" + "".join(map(str, more))
    with recorded(monkeypatch) as calls:
        inside(*words(place, "sft", out, "--block-size", LENGTH, "--batch-size", 4, "--epochs", 3, *more))
    shown = Counter(sample for call in calls for sample in samples_of(call))
    expected = {tuple(ids) for ids, _ in all_samples(place)}
    assert {sample: shown[sample] for sample in expected} == dict.fromkeys(expected, 3)
    records = [json.loads(line) for line in (place / out / "log.jsonl").read_text().splitlines()]
    assert records[-1]["epoch"] == 3.0
    assert records[-1]["tokens"] == 3 * sum(map(len, expected))


def test_pretraining_learns_every_token_in_every_epoch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 in batches of 4: the last block and the last batch have what is left."""
    with recorded(monkeypatch) as calls:
        inside(*words(place, "pretrain", "text", "--block-size", 64, "--batch-size", 4, "--epochs", 2))
    learned = torch.cat([row for call in calls for row in rows_of(call)])
    shown = Counter(learned.tolist())
    once = Counter(text_ids(place, "text.txt"))
    assert sum(once.values()) % 64 > 1
    assert shown == Counter({token: 2 * count for token, count in once.items()})
    result = json.loads((place / "text/result.json").read_text())
    assert result["tokens"] == 2 * sum(once.values())


def rows_of(call: dict[str, Any]) -> list[Any]:
    """The rows of a forward pass up to the last token of the text; what follows it is 0, which no document has."""
    return [row[: int(row.nonzero().max()) + 1] for row in call["input_ids"]]


def text_ids(place: Path, name: str) -> list[int]:
    from cnllama.adapt.data import Source, prepare_text
    from cnllama.adapt.tokenfile import open_vocabulary

    vocabulary = open_vocabulary(place / "base")
    data = prepare_text([Source(place / name)], vocabulary, place / "tokens", block_size=64, shuffle=False)
    ids: list[int] = data.files[0].tokens.tolist()
    return ids


@pytest.mark.parametrize("verb", ["sft", "pretrain"])
def test_a_quarter_is_another_quarter_each_time(place: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """After four epochs of a quarter, everything was shown once."""
    line = words(place, verb, f"quarter-{verb}", "--batch-size", 2, "--epochs", 4)
    line[line.index("--data") + 1] = f"{line[line.index('--data') + 1]}:0.25"
    with recorded(monkeypatch) as calls:
        inside(*line, "--block-size", LENGTH if verb == "sft" else 32)
    if verb == "sft":
        shown = Counter(sample for call in calls for sample in samples_of(call))
        assert {shown[tuple(ids)] for ids, _ in all_samples(place)} == {1}
        return
    tokens = Counter(token for call in calls for row in rows_of(call) for token in row.tolist())
    once = Counter(text_ids(place, "text.txt"))
    assert not tokens - once
    assert sum((once - tokens).values()) <= 4, "a single token at the end of an epoch has nothing to predict"


# the held-out loss


def held_out(place: Path, verb: str, block: int) -> float:
    """The truth: all losses over all tokens that have one."""
    config, weights = reference.read_weights(place / "base")
    if verb == "sft":
        samples = all_samples(place, "held.jsonl")
    else:
        ids = text_ids(place, "held.txt")
        parts = [ids[at : at + block] for at in range(0, len(ids), block)]
        assert len(parts[-1]) < block, "the last part is no whole block"
        samples = [(part, part) for part in parts]
    with torch.no_grad():
        total, count = reference.summed_loss(weights, config, samples)
    return float(total) / count


CASES = [
    ("pretrain", (), 48),
    ("pretrain", ("--full",), 48),
    ("sft", (), LENGTH),
    ("sft", ("--pack",), LENGTH),
]


def evaluation(place: Path, verb: str, more: tuple[object, ...], block: int, batch: int, out: str) -> list[object]:
    line = words(place, verb, out, *more, "--block-size", block, "--batch-size", batch, "--max-steps", 1)
    return [*line, "--eval", place / ("held.txt" if verb == "pretrain" else "held.jsonl")]


@pytest.mark.parametrize(("verb", "more", "block"), CASES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_held_out_loss_is_that_of_the_mean_token(
    place: Path, verb: str, more: tuple[object, ...], block: int, batch: int
) -> None:
    out = f"held-{verb}{''.join(map(str, more))}-{batch}"
    inside(*evaluation(place, verb, more, block, batch, out))
    result = json.loads((place / out / "result.json").read_text())
    assert result["held_out_loss_before"] == pytest.approx(held_out(place, verb, block), rel=EXACT)


def test_two_processes_share_the_work_of_one(place: Path) -> None:
    """Held-out losses, losses and weights of whole runs, whose last steps are not full; unpacked sft, too."""
    runs = {
        "sft": evaluation(place, "sft", ("--dropout", 0), LENGTH, 2, "two-sft"),
        "pack": evaluation(place, "sft", ("--pack", "--dropout", 0), LENGTH, 2, "two-pack"),
        "text": evaluation(place, "pretrain", ("--dropout", 0, "--grad-accum", 2), 48, 2, "two-text"),
    }
    for line in runs.values():
        line[line.index("--max-steps") : line.index("--max-steps") + 2] = ["--epochs", 2]
    adapt_matrix.launch(place, list(runs.values()))
    for line in runs.values():
        two = Path(str(line[line.index("-o") + 1]))
        one = two.with_name("one" + two.name[3:])
        line[line.index("-o") + 1], line[line.index("--batch-size") + 1] = one, 4
        inside(*line)
        results = [json.loads((out / "result.json").read_text()) for out in (one, two)]
        for key in ("held_out_loss_before", "held_out_loss"):
            assert results[1][key] == pytest.approx(results[0][key], rel=1e-4)
        assert results[0]["tokens"] == results[1]["tokens"]
        assert results[0]["steps"] == results[1]["steps"]
        curves = [curve(out) for out in (one, two)]
        np.testing.assert_allclose(curves[1], curves[0], rtol=2e-4)


def curve(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("verb", ["pretrain", "sft"])
def test_evaluation_does_not_change_the_training(place: Path, verb: str) -> None:
    """With dropout, whose random numbers nothing else may draw from."""
    block = LENGTH if verb == "sft" else 48
    plain = words(place, verb, f"plain-{verb}", "--block-size", block, "--batch-size", 4, "--max-steps", 4)
    inside(*plain)
    watched = [*plain, "--eval", place / ("held.txt" if verb == "pretrain" else "held.jsonl"), "--eval-every", 1]
    watched[watched.index("-o") + 1] = place / f"watched-{verb}"
    inside(*watched)
    files = [place / f"{name}-{verb}" / "adapter_model.safetensors" for name in ("plain", "watched")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert curve(files[0].parent) == curve(files[1].parent)


def test_what_is_left_out_of_held_out_files_is_said(place: Path) -> None:
    bad = place / "bad.jsonl"
    records = [
        *adapt_data.pairs(3),
        {"instruction": "长" * 900, "output": "短"},
        {"instruction": "短", "output": "长" * 900},
    ]
    adapt_data.write_jsonl(bad, [*records, {"output": 3}])
    line = words(place, "sft", "bad", "--block-size", LENGTH, "--max-steps", 1, "--eval", bad)
    said = inside(*line)
    assert f"{bad}: 4 entries" in said
    assert f"{bad}: 1 samples were cut at the maximum length" in said
    assert f"{bad}: 1 samples were skipped" in said
    assert "1 bad lines were left out" in said
    assert f"{bad}:6: " in said


def test_the_loss_does_not_depend_on_how_the_library_counts_tokens(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.0 counts the first token of every sequence, which has no loss: 0.875 of the truth at 8 tokens."""
    from transformers import Trainer

    def counted(self: Any, batches: list[dict[str, Any]], *_: Any) -> Any:
        return torch.stack([batch["labels"].ne(-100).sum() for batch in batches]).sum()

    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", counted)
    inside(*words(place, "pretrain", "short", "--stage", 1, "--block-size", 8, "--batch-size", 4, "--max-steps", 1))
    with monkeypatch.context():
        ids = first_blocks(place, 8, 4)
    config, weights = reference.read_weights(place / "base")
    with torch.no_grad():
        total, count = reference.summed_loss(weights, config, [(block, block) for block in ids])
    assert curve(place / "short")[0] == pytest.approx(float(total) / count, rel=EXACT)


def first_blocks(place: Path, size: int, count: int) -> list[list[int]]:
    from cnllama.adapt.data import Source, prepare_text
    from cnllama.adapt.tokenfile import open_vocabulary

    vocabulary = open_vocabulary(place / "base")
    data = prepare_text([Source(place / "text.txt")], vocabulary, place / "tokens", block_size=size)
    return [data[i]["input_ids"].tolist() for i in range(count)]
