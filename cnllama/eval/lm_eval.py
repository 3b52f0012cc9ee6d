# SPDX-License-Identifier: Apache-2.0
"""Packed files in lm-evaluation-harness: `python -m cnllama.eval.lm_eval --model cnllama --model_args file=x.cnl ...`.

The harness finds no models outside its own package, so this module registers one and then runs the harness's command
line, whose options are all there. From Python it is enough to import this module before `simple_evaluate`.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"{error.name} is not installed; run: pip install lm_eval") from error
from tqdm import tqdm

from cnllama.errors import CnllamaError, InputError
from cnllama.eval.models import EngineScorer, Item
from cnllama.eval.numerics import target_logprobs
from cnllama.llm import LLM
from cnllama.sampling import SamplingParams
from cnllama.start import INTERRUPTED
from cnllama.stdio import say
from cnllama.templates import encode_chat

_log = logging.getLogger(__name__)

_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "repetition_penalty": "repeat_penalty", "seed": "seed"}  # fmt: skip
_DEFAULT_TOKENS = 256
_AUTO_BATCH = 4

# (text pair or None, ids of the context, ids of the continuation), as the harness's base class makes them
Request = tuple[Any, Sequence[int], Sequence[int]]


@register_model("cnllama")
class CnllamaLM(TemplateLM):
    """A packed file.

    file: a .cnl, the bundled model when it is left out. max_length: tokens of context and continuation, default the
    trained length, at most 4096. batch_size: sequences at once. add_bos_token: instead of what the file says. The
    harness's device and max_batch_size are taken and not used. Raises InputError for a wrong file or value.
    """

    def __init__(
        self,
        file: str | None = None,
        *,
        max_length: int | None = None,
        batch_size: int | str = 1,
        threads: int = 0,
        kv: str = "fp16",
        add_bos_token: bool | None = None,
        max_gen_toks: int = _DEFAULT_TOKENS,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        text = str(batch_size)
        self.batch_size = int(text) if text.isdecimal() and int(text) > 0 else _AUTO_BATCH
        # Scoring and generating keep their own sequences.
        self.llm = LLM(file, ctx=max_length, threads=threads, kv_type=kv, max_sequences=2 * self.batch_size)
        self.max_length: int = self.llm.context
        self.max_gen_toks = max_gen_toks
        self._bos = self.llm.tokenizer.add_bos if add_bos_token is None else bool(add_bos_token)

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self.llm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or the end token where there is none.

        Raises InputError for a tokenizer that has neither: the first token of a text would not be predicted, and the
        harness divides by all of its words and bytes.
        """
        found = next((i for i in (self.llm.tokenizer.bos_id, self.eot_token_id) if i >= 0), None)
        if found is None:
            raise InputError(f"{self.llm.path}: the tokenizer has neither BOS nor an end token to begin a text with")
        return found

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches: the tokenizer's hash."""
        return str(self.llm.file.tokenizer["sha256"])

    def get_model_info(self) -> dict[str, Any]:
        """What the harness stores beside the results."""
        from cnllama.eval.text_scores import describe_model

        return describe_model(self.llm)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with BOS before it unless told otherwise or the text brings its own."""
        tokenizer = self.llm.tokenizer
        bos = self._bos if add_special_tokens is None else add_special_tokens
        begin = tokenizer.piece(tokenizer.bos_id) if tokenizer.bos_id >= 0 else ""
        if begin and string.startswith(begin):  # the text after it is the start of the text, as in the templates
            return [tokenizer.bos_id, *tokenizer.encode(string[len(begin) :], special=True)]
        ids = tokenizer.encode(string, special=True)
        return ids if not bos or tokenizer.bos_id < 0 else [tokenizer.bos_id, *ids]

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self.llm.tokenizer.decode(tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name of the file's template, for the harness's records."""
        return self.llm.template.name if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the file's template, a text that tok_encode makes the template's ids of.

        Raises InputError for a history that does not end with the user.
        """
        if not add_generation_prompt:
            raise InputError("the template cannot continue an answer that was begun: leave out the prefilled text")
        tokenizer = self.llm.tokenizer
        text, plain = "", list[int]()
        for i in encode_chat(self.llm.template, tokenizer, chat_history):
            name = tokenizer.piece(i)
            if tokenizer.special_id(name) != i:
                plain.append(i)
                continue
            text += tokenizer.decode(plain) + name
            plain.clear()
        return text + tokenizer.decode(plain)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of whole texts, each token predicted once, the first after the prefix token."""
        parts: list[Request] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                parts.append((None, *make_disjoint_window(pair)))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._loglikelihood_tokens(parts, disable_tqdm), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log likelihood of the continuation, whether greedy decoding would give it) for every request.

        Requests that run the same tokens, such as the letters of a multiple choice, run once.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_text, context, continuation) in enumerate(requests):
            groups.setdefault(self._run_ids(context, continuation), []).append(number)
        keys = sorted(key for key in groups if key)
        items = [Item(key, min(len(key) - len(requests[number][2]) for number in groups[key])) for key in keys]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        total = sum(map(len, keys))
        with (
            EngineScorer(self.llm, self.batch_size) as model,
            tqdm(total=total, unit="tok", desc="cnllama", disable=disable_tqdm) as bar,
        ):
            for rows in model.rows(items, bar.update):
                for number in groups[keys[rows.item]]:
                    continuation = requests[number][2]
                    begin = max(rows.position, len(keys[rows.item]) - len(continuation))
                    logits = rows.logits[begin - rows.position :]
                    at = begin - (len(keys[rows.item]) - len(continuation))
                    targets = list(continuation[at : at + len(logits)])
                    if not targets:
                        continue
                    value, greedy = results[number]
                    value += float(target_logprobs(logits, targets).sum())
                    results[number] = (value, greedy and logits.argmax(axis=1).tolist() == targets)
        for request, result in zip(requests, results, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def _run_ids(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """What is run to predict the continuation; the context loses its beginning when it does not fit."""
        if len(continuation) > self.max_length:
            raise InputError(
                f"a continuation has {len(continuation)} tokens and max_length is {self.max_length}: raise max_length"
            )
        ids = (*context, *continuation)
        if len(ids) > self.max_length + 1:
            _log.warning("a context of %d tokens was cut on the left to fit %d", len(context), self.max_length)
        return ids[-(self.max_length + 1) : -1] if continuation else ()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to one of its stop strings or its number of tokens."""
        asked = [self._generation(*request.args) for request in requests]
        texts: list[str] = []
        bar = tqdm(total=len(asked), desc="cnllama", disable=disable_tqdm)
        for at in range(0, len(asked), self.batch_size):
            batch = asked[at : at + self.batch_size]
            done = self.llm.generate([ids for ids, _ in batch], [params for _, params in batch])
            texts += [self._first_piece(completion.text) for completion in done]
            bar.update(len(batch))
        bar.close()
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generation(self, context: str, options: Mapping[str, Any]) -> tuple[list[int], SamplingParams]:
        left = dict(options)
        until = left.pop("until", None) or []
        stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        lengths = [value for name in _TOKENS if (value := left.pop(name, None)) is not None]
        tokens = _count(lengths[0]) if lengths else self.max_gen_toks
        sampling = {name: left.pop(key) for key, name in _SAMPLING.items() if left.get(key) is not None}
        if not left.pop("do_sample", sampling.get("temperature", 0) > 0):
            sampling = {name: sampling[name] for name in ("repeat_penalty",) if name in sampling}
        else:
            sampling.setdefault("temperature", 1.0)
        if left:
            _log.warning("generation options that cnllama does not have: %s", ", ".join(left))
        room = self.max_length - tokens
        if room < 1:
            raise InputError(f"{tokens} tokens are to be generated and max_length is {self.max_length}: raise it")
        ids = self.tok_encode(context)
        if len(ids) > room:
            _log.warning("a context of %d tokens was cut on the left to %d", len(ids), room)
        return ids[-room:], SamplingParams(**sampling, max_tokens=tokens, stop=stop, repeat_last_n=-1)

    def _first_piece(self, text: str) -> str:
        """Without the space that SentencePiece puts before a text, as the harness's own model gives it."""
        return text.removeprefix(" ") if self.llm.tokenizer.strips_space else text


def _count(value: object) -> int:
    """A number of tokens, as a task's file or the command line may spell it. Raises InputError."""
    try:
        count = int(value) if isinstance(value, int | str) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        count = -1
    if isinstance(value, bool) or count < 0:
        raise InputError(f"{value!r:.40} tokens are to be generated, expected an integer, at least 0")
    return count


def main() -> None:
    """The harness's command line. Errors of ours end it with one sentence and their exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except CnllamaError as error:
        say(f"cnllama: {error}", *error.details)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        say("cnllama: interrupted")
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
