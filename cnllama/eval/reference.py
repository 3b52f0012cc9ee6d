# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that was packed, run by transformers: what the engine is compared with. Torch is needed only here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnllama.errors import InputError, os_errors_explained
from cnllama.eval.models import Item, Progress, Rows, shared_length
from cnllama.eval.stored import Statistics
from cnllama.verify import Statistics as WeightStatistics

DTYPES = ("float32", "bfloat16", "float16")
_ROWS = 256


class TorchScorer:
    """A LlamaForCausalLM; an item that begins like the one before it continues its cache.

    tensors: statistics of its weights, as in a .cnl's fingerprint.
    """

    def __init__(self, model: Any, tensors: Statistics | None = None) -> None:
        self.vocab_size: int = model.config.vocab_size
        self.tensors = tensors or {}
        self._model = model
        scaling = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
        # With this scaling the keys of a longer text differ from those of its beginning.
        self._reuses = scaling.get("rope_type", scaling.get("type")) != "dynamic"
        self._tokens: list[int] = []
        self._cache: Any = None

    def rows(self, items: Sequence[Item], progress: Progress | None = None) -> Iterator[Rows]:
        """See Scorer; one item after the other."""
        import torch

        for number, item in enumerate(items):
            with torch.inference_mode():
                begin, hidden = self._run(item)
            for position in range(item.begin, len(item.ids), _ROWS):
                with torch.inference_mode():
                    at = position - begin
                    logits = self._model.lm_head(hidden[at : at + _ROWS]).float().numpy()
                yield Rows(number, position, logits)
            if progress:
                progress(len(item.ids))

    def _run(self, item: Item) -> tuple[int, Any]:
        """(position of the first row, hidden states [n, hidden] from there to the end)."""
        import torch
        from transformers import DynamicCache

        keep = min(shared_length(self._tokens, item.ids), item.begin) if self._reuses else 0
        if self._cache is None or keep == 0:
            self._cache, keep = DynamicCache(), 0
        elif keep < len(self._tokens):
            self._cache.crop(keep - len(self._tokens))  # a negative number: so many are dropped
        ids = torch.tensor([list(item.ids[keep:])])
        result = self._model.model(ids, past_key_values=self._cache, use_cache=True)
        self._tokens = list(item.ids)
        return keep, result.last_hidden_state[0]


def check_reference(base: Path, loras: Sequence[Path] = (), dtype: str = "float32") -> Any:
    """What the converter makes of these directories, before a weight of the base is read: a pack.Plan.

    Raises InputError as open_reference: for a mistake that should not be found out after hours.
    """
    if dtype not in DTYPES:
        raise InputError(f"the reference's type is {dtype!r}, expected one of {', '.join(DTYPES)}")
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--reference needs {name}, which is not installed; run: pip install 'cnllama[eval]'")
    from cnllama.convert.pack import make_plan

    with os_errors_explained(base):
        return make_plan(base, loras)


def open_reference(base: Path, loras: Sequence[Path] = (), dtype: str = "float32") -> TorchScorer:
    """The checkpoint with its adapters merged tensor by tensor, as the converter does it, before quantization.

    dtype: what it is held and run in, one of DTYPES; float32 takes 4 bytes a weight. Raises InputError for a wrong
    directory, and when torch or transformers is missing.
    """
    plan = check_reference(base, loras, dtype)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cnllama.convert.fingerprint import record
    from cnllama.convert.merge import bias_settings
    from cnllama.convert.pack import merged_tensors

    found: dict[str, Mapping[str, float]] = {}
    with os_errors_explained(base):
        config = LlamaConfig.from_pretrained(base)
        config.vocab_size = plan.config["vocab_size"]
        config.tie_word_embeddings = plan.config["tie_word_embeddings"]
        config.update(bias_settings(plan.tensors))
        with torch.device("meta"):  # no memory and no random numbers for weights that are overwritten
            model = LlamaForCausalLM(config)
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
        for name, values in merged_tensors(plan):
            statistics = WeightStatistics()
            statistics.add(values)
            found[name] = record(statistics, 0.0)
            tensor = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
            model.load_state_dict({name: tensor}, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    missing = [name for name, weight in model.named_parameters() if weight.is_meta]
    if missing:
        raise InputError(f"{base}: {missing[0]} is missing; get all files of the checkpoint again")
    return TorchScorer(model.eval(), found)
