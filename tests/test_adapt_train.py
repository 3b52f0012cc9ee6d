# SPDX-License-Identifier: Apache-2.0
"""Training: going on after a kill, several processes, what is saved, and the refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import adapt_data
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")
pytest.importorskip("transformers", reason="training needs transformers")
pytest.importorskip("peft", reason="training needs peft")

from test_adapt_pipeline import cnllama, free_port, inside  # noqa: E402

STEPS, SAVE = 24, 5
TRAIN = ("--block-size", 48, "--batch-size", 4, "--lr", "3e-3", "--log-every", 1, "--save-every", SAVE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapt_data.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return adapt_data.small_base(tmp_path_factory.mktemp("base"), data)


def losses(out: Path) -> list[float]:
    """Training loss by step."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def command(base: Path, data: Path, out: Path, *more: object) -> list[object]:
    words = ["adapt", "pretrain", base, "-o", out, "--data", data / "zh.txt:3", "--max-steps", STEPS, *TRAIN]
    return [*words, "--cache", data / "tokens", *more]


def pretrain(base: Path, data: Path, out: Path, *more: object, expect: int = 0) -> str:
    return inside(*command(base, data, out, *more), expect=expect)


@pytest.mark.parametrize("mode", [(), ("--full",)], ids=["lora", "full"])
def test_killed_training_goes_on_with_the_same_loss_curve(
    base: Path, data: Path, tmp_path: Path, mode: tuple[str, ...]
) -> None:
    """SIGKILL between two checkpoints, in the second epoch, with dropout: every later loss is bit for bit the same."""
    cnllama(*command(base, data, tmp_path / "whole", *mode))
    out = tmp_path / "killed"
    words = [sys.executable, "-m", "cnllama", *map(str, command(base, data, out, *mode))]
    process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(read_lines(out / "log.jsonl")) < 2 * SAVE + 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it was still training"
    assert not (out / "result.json").exists()
    (out / "checkpoint-999").mkdir()  # one that was killed while it was written
    (out / "checkpoint-999" / "trainer_state.json").write_text("{")
    message = cnllama(*command(base, data, out, *mode)).stderr
    assert "going on from step" in message
    assert losses(out) == losses(tmp_path / "whole")
    file = "model.safetensors" if mode else "adapter_model.safetensors"
    assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_resuming_with_other_options_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    pretrain(base, data, tmp_path / "out")
    message = pretrain(base, data, tmp_path / "out", "--rank", 4, expect=2)
    assert "trained rank 8, this one has 4" in message
    assert "--restart" in message
    pretrain(base, data, tmp_path / "out", "--rank", 4, "--restart")


@pytest.mark.parametrize("mode", [(), ("--full",)], ids=["lora", "full"])
def test_run_killed_after_its_last_step_counts_what_it_did(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: tuple[str, ...]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cnllama.adapt.train._finish", interrupt)
        pretrain(base, data, tmp_path / "killed", *mode, expect=130)
    pretrain(base, data, tmp_path / "killed", *mode)
    pretrain(base, data, tmp_path / "whole", *mode)
    killed, whole = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("killed", "whole"))
    assert killed.pop("seconds") > 0
    assert killed == {key: value for key, value in whole.items() if key != "seconds"}


def test_held_out_set_may_be_smaller_than_a_batch(base: Path, data: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held.txt"
    held_out.write_text("".join((data / "zh.txt").read_text().splitlines(keepends=True)[:9]))
    pretrain(base, data, tmp_path / "out", "--eval", held_out)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert 0 < result["held_out_loss"] < result["held_out_loss_before"]


def test_two_processes_train_as_one(base: Path, data: Path, tmp_path: Path) -> None:
    """torchrun with two processes of batch 2 sees the batches of one process with batch 4."""
    words = ["adapt", "pretrain", base, "--stage", 1, "--data", data / "zh.txt:3", "--max-steps", 12, *TRAIN]
    words += ["--cache", data / "tokens"]
    inside(*words, "-o", tmp_path / "one")
    words[words.index("--batch-size") + 1] = 2
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    result = subprocess.run(
        [*launch, "-m", "cnllama", *map(str, words), "-o", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-4)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["tokens"] == two["tokens"]


def test_new_rows_only_leaves_the_old_ones_alone(base: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    old = 350
    pretrain(base, data, tmp_path / "out", "--train-new-rows-only", old, "--keep", 9)
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        trained = after["base_model.model." + name]
        assert torch.equal(trained[:old], before[name][:old])
        assert not torch.equal(trained[old:], before[name][old:])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    rows, width = before["lm_head.weight"].shape
    everything = tmp_path / "everything"
    pretrain(base, data, everything)
    saved = json.loads((everything / "result.json").read_text())["trained_parameters"] - result["trained_parameters"]
    assert saved == 2 * old * width
    assert rows > old


def test_loss_that_is_no_number_stops_and_names_the_batch(base: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bad = shutil.copytree(base, tmp_path / "bad")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    message = pretrain(bad, data, tmp_path / "out", "--full", expect=1)
    assert "the loss is nan at step 1" in message
    assert "items 0, 1, 2, 3 of epoch 0" in message
    record = json.loads((tmp_path / "out" / "bad_batch.json").read_text())
    assert np.array(record["input_ids"]).shape == (4, 48)
    assert not (tmp_path / "out" / "result.json").exists()


def prepared(base: Path, mode: str = "lora") -> Any:
    from transformers import LlamaForCausalLM

    from cnllama.adapt.lora import Trained, prepare

    return prepare(LlamaForCausalLM.from_pretrained(base), Trained(mode=mode))


def spoil_nothing(tensors: dict[str, Any]) -> None:
    """An adapter as it is before training."""


def spoil_names(tensors: dict[str, Any]) -> None:
    train_all(tensors)
    del tensors["base_model.model.lm_head.weight"]


def spoil_shape(tensors: dict[str, Any]) -> None:
    train_all(tensors)
    name = "base_model.model.lm_head.weight"
    tensors[name] = tensors[name][:-1].clone()


def spoil_values(tensors: dict[str, Any]) -> None:
    train_all(tensors)
    next(iter(tensors.values()))[0, 0] = float("nan")


def spoil_everything(tensors: dict[str, Any]) -> None:
    tensors.clear()


def train_all(tensors: dict[str, Any]) -> None:
    for tensor in tensors.values():
        tensor.add_(0.01)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_nothing, "every LoRA matrix B is zero"),
        (spoil_names, "lm_head.weight is missing"),
        (spoil_shape, "the model has"),
        (spoil_values, "NaN or infinity"),
        (spoil_everything, "holds no tensors"),
    ],
)
def test_saved_adapter_is_read_back_and_judged(base: Path, tmp_path: Path, spoil: Any, reason: str) -> None:
    from cnllama.adapt.lora import Trained, adapter_config, adapter_tensors, check_saved, save_adapter
    from cnllama.errors import CnllamaError

    model = prepared(base)
    tensors = adapter_tensors(model)
    train_all(tensors)
    save_adapter(tmp_path / "sound", tensors, adapter_config(Trained(), "base"))
    check_saved(tmp_path / "sound", model)
    tensors = adapter_tensors(model)
    spoil(tensors)
    save_adapter(tmp_path / "bad", tensors, adapter_config(Trained(), "base"))
    with pytest.raises(CnllamaError, match=reason):
        check_saved(tmp_path / "bad", model)


def test_adapter_comes_back_as_it_was_saved(base: Path, tmp_path: Path) -> None:
    from cnllama.adapt.lora import Trained, adapter_config, adapter_tensors, load_adapter, save_adapter

    for mode in ("embeddings", "lora"):
        model, other = prepared(base, mode), prepared(base, mode)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        save_adapter(tmp_path / mode, adapter_tensors(model), adapter_config(Trained(mode=mode), "base"))
        load_adapter(other, tmp_path / mode)
        for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(a, b), name


def test_packed_samples_do_not_see_each_other(base: Path, data: Path) -> None:
    """The loss of packed blocks is the loss of their samples, each alone."""
    from transformers import LlamaForCausalLM

    from cnllama.adapt.data import Source, prepare_chat
    from cnllama.adapt.sft import PackedChat
    from cnllama.adapt.tokenfile import open_vocabulary

    vocabulary = open_vocabulary(base)
    chat = prepare_chat([Source(data / "sft.jsonl", 0.05)], vocabulary, data / "tokens", max_length=400)
    packed = PackedChat(chat, 600, vocabulary.pad_id)
    assert len(packed) < len(chat)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def summed(item: dict[str, Any]) -> tuple[float, int]:
        batch = {name: torch.from_numpy(value)[None] for name, value in item.items()}
        count = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            return float(model(**batch).loss) * count, count

    alone = [summed(chat[i]) for i in range(len(chat))]
    together = [summed(packed[i]) for i in range(len(packed))]
    assert sum(count for _, count in together) == sum(count for _, count in alone)
    assert sum(loss for loss, _ in together) == pytest.approx(sum(loss for loss, _ in alone), rel=1e-4)


def test_gradient_checkpointing_trains_the_same(base: Path, data: Path, tmp_path: Path) -> None:
    pretrain(base, data, tmp_path / "plain", "--dropout", 0)
    pretrain(base, data, tmp_path / "twice", "--dropout", 0, "--gradient-checkpointing")
    np.testing.assert_allclose(losses(tmp_path / "twice"), losses(tmp_path / "plain"), rtol=1e-4)


def test_memory_plan_refuses_with_an_option_that_fits(base: Path) -> None:
    from transformers import LlamaConfig

    from cnllama.adapt.lora import Trained
    from cnllama.adapt.memory import Shape, plan_memory, refuse_unless_fits
    from cnllama.errors import InputError

    config = LlamaConfig(  # the shape of LLaMA-7B with the paper's vocabulary
        vocab_size=49953, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    shape = Shape(8, 512, 2, True, False, "adamw")
    plan = plan_memory(config, Trained(), shape)
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    lora = 8 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert plan.total == 2 * 49953 * 4096 + layers + 4096 + lora
    assert plan.trained == 2 * 49953 * 4096 + lora
    with pytest.raises(InputError, match="--gradient-checkpointing it needs"):
        refuse_unless_fits(config, Trained(), shape, 28 << 30, "test")
    with pytest.raises(InputError, match="adamw-8bit"):
        refuse_unless_fits(config, Trained(), shape, 19 << 30, "test")
    with pytest.raises(InputError, match="no option here"):
        refuse_unless_fits(config, Trained(), shape, 8 << 30, "test")
    rows_only = plan_memory(config, Trained(old_rows=32000), shape)
    assert rows_only.trained == plan.trained - 2 * 32000 * 4096


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--rank", 0), "--rank is 0"),
        (("--targets", "q_proj", "qkv"), "--targets has qkv"),
        (("--full", "--train-new-rows-only", 3), "exclude each other"),
        (("--train-new-rows-only", 99999), "the model has"),
        (("--batch-size", 0), "--batch-size is 0"),
        (("--lr", -1), "--lr is -1"),
        (("--warmup", 1.5), "--warmup is 1.5"),
        (("--full", "--dtype", "float16"), "--full trains every weight in float32"),
        (("--optimizer", "adamw-8bit"), "needs bitsandbytes"),
        (("--deepspeed", "z.json"), "needs deepspeed"),
        (("--batch-size", 100000), "--batch-size 1"),
        (("--adapter", "nowhere"), "nowhere"),
        (("--block-size", 50_000), "fewer than one block"),
    ],
)
def test_wrong_options_are_one_sentence(
    base: Path, data: Path, tmp_path: Path, options: tuple[object, ...], sentence: str
) -> None:
    import importlib.util

    if "bitsandbytes" in sentence and importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    if "deepspeed" in sentence and importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is installed")
    words = ["adapt", "pretrain", base, "-o", tmp_path / "out", "--data", data / "zh.txt", *options]
    message = inside(*words, expect=2)
    assert sentence in message
    assert "Traceback" not in message
