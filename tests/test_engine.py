# SPDX-License-Identifier: Apache-2.0
"""The native engine: against the NumPy oracle, and against itself where the bits must not change."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import models
import numpy as np
import pytest
from ops_reference import FIRST
from reference import Reference

from cnllama import _core

ISAS = _core.isas()
FLOAT_NOISE, INT8_NOISE = 1e-5, 0.04
SHAPES: dict[str, dict[str, Any]] = {
    "one-head": {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 1, "num_key_value_heads": 1},
    "three-heads": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20, "vocab_size": 331},
    "five-heads": {
        "hidden_size": 352,
        "intermediate_size": 600,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "num_hidden_layers": 2,
    },
    "two-groups": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": models.ROPE_SCALINGS["yarn"],
    },
    "tied": {"hidden_size": 288, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 72}
    | {"tie_word_embeddings": True, "rope_scaling": models.ROPE_SCALINGS["llama3"]},
    "alpaca-vocabulary": {"hidden_size": 40, "intermediate_size": 40, "num_hidden_layers": 1, "vocab_size": 49954}
    | {"num_attention_heads": 1, "num_key_value_heads": 1},
}


@dataclass
class Model:
    """A random packed model and 128 token ids for it."""

    config: dict[str, Any]
    tensors: dict[str, tuple[np.ndarray, str, int, int]]
    ids: np.ndarray

    def engine(self, **options: Any) -> Any:
        return _core.Engine(self.config, self.tensors, **({"threads": 1} | options))


@cache
def model(shape: str, scheme: str = "q4-a64") -> Model:
    config = models.small_config(**({"vocab": 131} | {k: v for k, v in SHAPES[shape].items() if k != "vocab_size"}))
    config["vocab_size"] = SHAPES[shape].get("vocab_size", 131)
    tensors = models.quantize_tensors(models.random_tensors(config, seed=len(shape)), scheme)
    ids = np.random.default_rng(7).integers(0, config["vocab_size"], 128).astype(np.int32)
    return Model(models.engine_config(config), tensors, ids)


@cache
def expected(shape: str, scheme: str = "q4-a64", kv_type: str = "fp16") -> np.ndarray:
    """The oracle's logits of the model's ids; a prefix of the ids has a prefix of them."""
    m = model(shape, scheme)
    count = 33 if shape == "alpaca-vocabulary" else 128
    return Reference(m.config, m.tensors, kv_type).logits(m.ids[:count].tolist())


def run(engine: Any, ids: np.ndarray, chunks: Sequence[int] = (), sequence: int | None = None) -> np.ndarray:
    """All logits [len(ids), vocab] of ids fed in these chunks, the rest in one."""
    sequence = engine.open() if sequence is None else sequence
    rows, at = [], 0
    for size in [*chunks, len(ids) - sum(chunks)]:
        if size:
            rows.append(engine.step([(sequence, ids[at : at + size], True)]))
            at += size
    return np.concatenate(rows)


def assert_close(ours: np.ndarray, oracle: np.ndarray) -> None:
    """Equal within float32 noise, in units of the logits' spread, until that noise tips a first value to its other int8
    or fp16 neighbour (seldom before the tenth token); from there on, within the noise of int8 activations.
    """
    error = row_errors(ours, oracle)
    tipped = np.flatnonzero(error > FLOAT_NOISE)
    first = int(tipped[0]) if tipped.size else len(error)
    assert first >= min(8, len(error)), f"token {first} is off by {error[first]:.1e}"


def row_errors(ours: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """The largest error of each row in units of the logits' spread; none is beyond the noise of int8 activations."""
    assert ours.shape == oracle.shape
    error = np.abs(ours - oracle).max(axis=-1) / oracle.std()
    assert np.sqrt((error**2).mean()) < INT8_NOISE
    assert error.max() < 4 * INT8_NOISE, f"token {error.argmax()} is off by {error.max():.2e}"
    return error


@pytest.mark.usefixtures("best_isa")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_isa_matches_the_oracle(shape: str, isa: str) -> None:
    oracle = expected(shape)
    _core.use_isa(isa)
    engine = model(shape).engine(context=256)
    for count in (1, 2, 7, 33, 128):
        if count <= len(oracle):
            assert_close(run(engine, model(shape).ids[:count]), oracle[:count])
            engine.close(0)


@pytest.mark.usefixtures("best_isa")
@pytest.mark.parametrize("isa", ISAS)
def test_many_short_sequences_match_the_oracle(isa: str) -> None:
    """128 tokens in one step, so early in their sequences that hardly any rounding has tipped over."""
    _core.use_isa(isa)
    m = model("two-groups")
    engine = m.engine(context=64, max_sequences=16)
    oracle = Reference(m.config, m.tensors)
    parts = np.split(m.ids, 16)
    ours = engine.step([(engine.open(), ids, True) for ids in parts])
    error = row_errors(ours, np.concatenate([oracle.logits(ids.tolist()) for ids in parts]))
    assert (error < FLOAT_NOISE).mean() > 0.9


@pytest.mark.parametrize("scheme", FIRST)  # test_schemes.py has the others
def test_every_scheme_matches_the_oracle(scheme: str) -> None:
    assert_close(run(model("three-heads", scheme).engine(), model("three-heads").ids), expected("three-heads", scheme))


@pytest.mark.parametrize("shape", ["three-heads", "five-heads"])
def test_int8_cache_matches_the_oracle(shape: str) -> None:
    assert_close(run(model(shape).engine(kv_type="int8"), model(shape).ids), expected(shape, kv_type="int8"))


def bits_of(shape: str, kv_type: str) -> np.ndarray:
    """The logits that every other way of running must give to the last bit: one chunk, one thread."""
    return run(model(shape).engine(kv_type=kv_type), model(shape).ids)


INVARIANT = pytest.mark.parametrize(
    ("shape", "kv_type"), [("three-heads", "fp16"), ("five-heads", "fp16"), ("two-groups", "int8"), ("tied", "int8")]
)


@pytest.mark.usefixtures("best_isa")
@INVARIANT
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_isa_and_threads_do_not_change_a_bit(shape: str, kv_type: str, isa: str, threads: int) -> None:
    bits = bits_of(shape, kv_type)
    _core.use_isa(isa)
    engine = model(shape).engine(kv_type=kv_type, threads=threads)
    assert engine.threads == threads
    np.testing.assert_array_equal(run(engine, model(shape).ids, [33, 1, 2]), bits)


@INVARIANT
@pytest.mark.parametrize("chunks", [[1] * 127, [5, 6, 7, 8], [63, 1], [64], [65, 60], [127]], ids=lambda c: str(c[:4]))
def test_where_the_prompt_is_cut_does_not_change_a_bit(shape: str, kv_type: str, chunks: list[int]) -> None:
    engine = model(shape).engine(kv_type=kv_type, threads=2)
    np.testing.assert_array_equal(run(engine, model(shape).ids, chunks), bits_of(shape, kv_type))


@INVARIANT
def test_a_long_sequence_decodes_as_it_prefills(shape: str, kv_type: str) -> None:
    """600 positions: more than two of the attention's chunks of keys, ten pages."""
    ids = np.resize(model(shape).ids, 600)
    whole = run(model(shape).engine(kv_type=kv_type, max_step_tokens=600, threads=2), ids)
    engine = model(shape).engine(kv_type=kv_type, threads=2)
    run(engine, ids[:560], [200, 200])
    np.testing.assert_array_equal(run(engine, ids[560:], [1] * 39, sequence=0), whole[560:])


@INVARIANT
def test_eight_ragged_sequences_are_each_as_alone(shape: str, kv_type: str) -> None:
    m = model(shape)
    prompts = [np.roll(m.ids, 3 * i)[:n] for i, n in enumerate((1, 2, 7, 33, 64, 65, 12, 50))]
    alone = [run(m.engine(kv_type=kv_type), ids) for ids in prompts]
    engine = m.engine(kv_type=kv_type, threads=2, context=256, max_sequences=8, max_step_tokens=256)
    sequences = [engine.open() for _ in prompts]

    logits = engine.step([(s, ids[:-1], True) for s, ids in zip(sequences, prompts, strict=True) if len(ids) > 1])
    np.testing.assert_array_equal(logits, np.concatenate([a[:-1] for a in alone]))
    backwards = list(zip(sequences, prompts, alone, strict=True))[::-1]
    logits = engine.step([(s, ids[-1:], False) for s, ids, _ in backwards])
    np.testing.assert_array_equal(logits, np.stack([a[-1] for _, _, a in backwards]))
    assert [engine.length(s) for s in sequences] == [len(ids) for ids in prompts]


def test_rows_come_in_batch_order_with_or_without_all_logits() -> None:
    m = model("three-heads")
    first, second = run(m.engine(), m.ids[:5]), run(m.engine(), m.ids[5:9])
    engine = m.engine(max_sequences=2)
    a, b = engine.open(), engine.open()
    logits = engine.step([(b, m.ids[5:9], False), (a, m.ids[:5], True)])
    np.testing.assert_array_equal(logits, np.concatenate([second[-1:], first]))


@INVARIANT
@pytest.mark.parametrize("length", [0, 1, 21, 64, 100])
def test_trim_and_extend_is_as_fresh(shape: str, kv_type: str, length: int) -> None:
    m = model(shape)
    engine = m.engine(kv_type=kv_type, threads=2)
    run(engine, np.roll(m.ids, 64))
    engine.close(0)  # its pages, full of another text, are used again
    run(engine, np.concatenate([m.ids[:length], np.roll(m.ids, 11)[: 110 - length]]), [9])
    engine.trim(0, length)
    assert engine.length(0) == length
    np.testing.assert_array_equal(run(engine, m.ids[length:], [3], sequence=0), bits_of(shape, kv_type)[length:])


def test_dynamic_ntk_is_fixed_when_a_sequence_is_opened() -> None:
    config = models.small_config(131, max_position_embeddings=64, rope_scaling=models.ROPE_SCALINGS["dynamic"])
    tensors = models.quantize_tensors(models.random_tensors(config))
    m = Model(models.engine_config(config), tensors, model("two-groups").ids)
    oracle = Reference(m.config, tensors)
    engine = m.engine(context=256, max_sequences=2)
    planned, short = engine.open(rope_length=200), engine.open()
    ours = run(engine, m.ids, [50, 1], sequence=planned)
    assert_close(ours, oracle.logits(m.ids.tolist(), rope_length=200))
    np.testing.assert_array_equal(run(engine, m.ids, sequence=short)[:10], run(m.engine(), m.ids[:10]))
    assert np.abs(run(m.engine(), m.ids) - ours).max() > 0.1, "the planned length changed nothing"


def test_two_engines_run_at_once_from_two_threads() -> None:
    m = model("five-heads")
    bits = bits_of("five-heads", "fp16")
    results: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        results[index] = run(m.engine(threads=2), m.ids, [30 + index])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index in range(2):
        np.testing.assert_array_equal(results[index], bits)


def test_errors_leave_the_cache_as_it_was() -> None:
    m = model("three-heads")
    engine = m.engine(context=64, max_sequences=2, max_step_tokens=100)
    a, b = engine.open(), engine.open()
    bits = run(m.engine(), m.ids[:60])
    engine.step([(a, m.ids[:40], False)])

    vocab = m.config["vocab_size"]
    refused: list[tuple[type[Exception], str, list[tuple[int, Any, bool]]]] = [
        (ValueError, f"{vocab}", [(a, np.array([1, vocab], np.int32), False)]),
        (ValueError, "-1", [(a, np.array([-1], np.int32), False)]),
        (ValueError, "no tokens", [(a, m.ids[:0], False)]),
        (ValueError, "100", [(a, np.resize(m.ids, 101), False)]),
        (ValueError, "100", [(a, m.ids[:60], False), (b, m.ids[:41], False)]),
        (ValueError, "twice", [(a, m.ids[:2], False), (a, m.ids[:2], False)]),
        (ValueError, "99", [(99, m.ids[:2], False)]),
        (ValueError, "-3", [(-3, m.ids[:2], False)]),
        (ValueError, "at least one", []),
    ]
    for error, words, batch in refused:
        with pytest.raises(error, match=words):
            engine.step(batch)
        assert (engine.length(a), engine.length(b)) == (40, 0)
    np.testing.assert_array_equal(engine.step([(a, m.ids[40:60], True)]), bits[40:])


def test_a_full_cache_says_both_numbers_and_changes_nothing() -> None:
    m = model("three-heads")
    engine = m.engine(context=64, max_sequences=2)
    a, b = engine.open(), engine.open()
    engine.step([(a, m.ids[:100], False)])  # two of the two pages
    with pytest.raises(RuntimeError, match=r"\d+.*\d+"):
        engine.step([(a, m.ids[100:110], False), (b, m.ids[:1], False)])
    assert (engine.length(a), engine.length(b)) == (100, 0)
    np.testing.assert_array_equal(engine.step([(a, m.ids[100:], True)]), run(m.engine(), m.ids)[100:])
    with pytest.raises(RuntimeError, match=r"\d+.*\d+"):
        engine.step([(a, m.ids[:1], False)])
    engine.trim(a, 3)
    engine.step([(b, m.ids[:64], False)])
    assert (engine.length(a), engine.length(b)) == (3, 64)


def test_sequences_that_are_not_open_are_refused() -> None:
    engine = model("one-head").engine()
    sequence = engine.open()
    engine.close(sequence)
    for call in (engine.close, engine.length, lambda s: engine.trim(s, 0)):
        for unknown in (sequence, 5, -1):
            with pytest.raises(ValueError, match=str(unknown)):
                call(unknown)
    sequence = engine.open()
    for length in (-1, 1):
        with pytest.raises(ValueError, match=str(length)):
            engine.trim(sequence, length)


def broken(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and tensors of a model with one thing wrong: a config key, or a tensor (None removes it)."""
    m = model("three-heads")
    config, tensors = dict(m.config), dict(m.tensors)
    for key, value in changes.items():
        target: dict[str, Any] = config if key in config else tensors
        if value is None:
            del target[key]
        else:
            target[key] = value
    return config, tensors


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 97}, "hidden_size|embed_tokens|97"),
        ({"num_attention_heads": 4}, "q_proj"),
        ({"num_attention_heads": 7, "num_key_value_heads": 2}, "multiple"),
        ({"head_dim": 21}, "even"),
        ({"head_dim": 0}, "head_dim"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({Q: None}, Q),
        ({"model.norm.weight": None}, "model.norm.weight"),
        ({Q: (np.zeros(10, np.uint8), "q4-a64", 60, 96)}, Q),
        ({Q: (np.zeros(1 << 16, np.uint8), "q5-k", 60, 96)}, "q5-k"),
        ({Q: (np.zeros(1 << 16, np.uint8), "q4-a64", 61, 96)}, "61"),
        ({"model.norm.weight": (np.zeros(96, np.uint8), "f32", 96, 1)}, "model.norm.weight"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    config, tensors = broken(**changes)
    with pytest.raises(ValueError, match=words):
        _core.Engine(config, tensors)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_type": "fp8"},
        {"context": 0},
        {"max_sequences": 0},
        {"max_step_tokens": 0},
        {"threads": -1},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        model("one-head").engine(**options)


def test_memory_adds_up() -> None:
    m = model("three-heads")
    sizes = {kv: m.engine(context=256, max_sequences=3, kv_type=kv).memory() for kv in ("fp16", "int8")}
    heads, dim = m.config["num_key_value_heads"], 32  # 20, padded to a multiple of 16
    layers = m.config["num_hidden_layers"]
    assert sizes["fp16"]["kv_per_token"] == layers * heads * 2 * dim * 2
    assert sizes["int8"]["kv_per_token"] == layers * heads * 2 * (dim + 2)
    for size in sizes.values():
        assert size["kv_reserved"] == size["kv_per_token"] * 256 * 3
        assert size["weights"] == sum(entry[0].nbytes for entry in m.tensors.values())
        assert size["scratch"] > 0
