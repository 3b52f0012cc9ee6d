# SPDX-License-Identifier: Apache-2.0
"""LLM: a packed model, opened and ready to answer."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from cnllama.device import choose, engine_class, gpu_memory, step_tokens
from cnllama.errors import CnllamaError, FileChangedError, InputError
from cnllama.format import open_cnl
from cnllama.plan import Plan, make_plan, refuse_unless_fits, trained_length
from cnllama.prompts import Prompt, read_ids, read_prompt, read_prompts, read_text
from cnllama.request import Completion, Request, Stream
from cnllama.sampling import SamplingParams, file_defaults
from cnllama.scheduler import Scheduler, SlotPool
from cnllama.templates import Message, Template, encode_chat, get_template
from cnllama.textio import tr
from cnllama.tokenizer import Tokenizer
from cnllama.values import integer, real, shown
from cnllama.weights import WeightMemory, check_mode

if TYPE_CHECKING:
    from cnllama import _core

Progress = Callable[[int, int], None]

MAX_THREADS = 1024


def bundled_model() -> Path:
    """The demonstration model that lies beside this module. Raises InputError when this installation has none."""
    found = sorted((Path(__file__).parent / "demo").glob("*.cnl"))
    if not found:
        raise InputError(
            tr(
                "no model was given: make one with `cnllama convert BASE [--lora DIR]... -o model.cnl` from a Hugging "
                "Face LLaMA directory, then name it with -m model.cnl",
                "没有指定模型：请先用 `cnllama convert BASE [--lora DIR]... -o model.cnl` 从 Hugging Face 的 LLaMA 目录"
                "转换出一个，再用 -m model.cnl 指定它",
            )
        )
    return found[0]


class LLM:
    """A model ready to answer. Several may be open at once, and one may be used from several threads.

    path: a .cnl, None for the bundled demonstration model. ctx: positions of a sequence, None for the trained length,
    at most 4096 and at most what fits into memory. threads: 0 for the machine's physical cores as far as this process
    may use them. kv_type: "fp16" or "int8". max_sequences: how many run at once. template: a name of templates.py
    instead of the file's own. speculate: "lookup" guesses tokens from what the prompt and the answer said before and
    runs several in one step; the answers are the same, token for token, and those that quote or repeat come faster. The
    attribute of that name may be changed; it holds for requests made afterwards. device: "cuda" for an NVIDIA GPU; the
    answers are the same. weights: "map" leaves them in the file's map, "copy" moves them to memory of the process's own
    while the first answer is written, "auto" does what decodes faster (weights.py). `defaults` are the parameters of a
    request that sets none; `unusable_defaults` says, by parameter, which of the file's values are not among them.

    Raises InputError for a file that is not sound, an option out of range and a model that does not fit into memory.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        ctx: int | None = None,
        threads: int = 0,
        kv_type: str = "fp16",
        max_sequences: int = 1,
        template: str | None = None,
        speculate: str | None = None,
        device: str = "cpu",
        weights: str = "auto",
    ) -> None:
        begin = time.perf_counter()
        threads = _count("threads", threads, 0, MAX_THREADS)
        for name, value in (("kv_type", kv_type), ("template", template), ("device", device)):
            if not isinstance(value, str) and (name != "template" or value is not None):
                raise InputError(f"{name} is {shown(value)}, expected a name")
        if speculate not in (None, "lookup"):
            raise InputError(
                tr(
                    f"speculation is {speculate!r}: choose lookup, or leave it out",
                    f"推测方式 {speculate!r} 不存在：请用 lookup，或不给",
                )
            )
        self.speculate = speculate
        self.device = choose(device)
        weights = check_mode(weights, self.device)
        self.path = _path(path) if path is not None else bundled_model()
        self.file = open_cnl(self.path)
        self.vocab_size: int = self.file.vocab_size
        self.template: Template = get_template(template or self.file.template)
        self.tokenizer = Tokenizer(self.file.tokenizer_model, self.file.tokenizer, str(self.file.path))
        self.plan: Plan = make_plan(
            self.file.config,
            sum(entry[0].nbytes for entry in self.file.engine_tensors().values()),
            context=ctx,
            kv_type=kv_type,
            sequences=max_sequences,
            available=gpu_memory() if self.device == "cuda" else None,
        )
        self._refuse_unless_fits()
        self.context = self.plan.context
        self._warn_long_context()
        self.engine = self._open_engine(threads, kv_type, max_sequences)
        self.threads: int = self.engine.threads
        self.check_weights()
        self.weight_memory = self._weight_memory(weights)
        # Not methods of this object: it is freed, weights and all, when its last user lets it go.
        check = self.file.check_unchanged if self.device == "cpu" else _nothing
        self._scheduler: Scheduler | None = Scheduler(
            self.engine,
            self._make_pool(max_sequences),
            self.engine if self.device == "cuda" else None,
            check=check,
            explain=partial(_explain, self.path, check),
            before_step=self.weight_memory.before_step if self.weight_memory else _nothing,
        )
        self._ends = self._end_tokens()
        self._silent = [i for i in range(self.tokenizer.pieces, self.vocab_size) if not self.tokenizer.has(i)]
        self.defaults, self.unusable_defaults = file_defaults(self.template.sampling, self.file.generation)
        self.load_seconds = time.perf_counter() - begin

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        progress: Progress | None = None,
        **changes: Any,
    ) -> Stream:
        """The answer piece by piece. prompt: text or messages, which go through the template, or token ids, which do
        not. params: None for the model's defaults; `changes` are single fields of it. An explicit temperature of 0
        drops the default truncation and penalty, so that it means the most likely token. progress: called with (prompt
        tokens done, all). Raises InputError for a prompt that does not fit and for a wrong parameter.
        """
        request = self._request(prompt, self._params(params, changes), progress)
        return Stream(self._step, request)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **changes: Any,
    ) -> list[Completion]:
        """Answers to several prompts, up to max_sequences of them running at once, in the order of the prompts.

        prompts: several, or one of them alone. params: one for all, or one for each. See `stream` for the rest. The
        tokens do not depend on what runs together.
        """
        batch = read_prompts(prompts)
        single = params is None or isinstance(params, SamplingParams) or not isinstance(params, Iterable)
        each: list[Any] = [params] * len(batch) if single else list(params)  # type: ignore[arg-type]
        if len(each) != len(batch):
            raise InputError(f"there are {len(batch)} prompts and {len(each)} sampling parameters")
        settled = [self._params(p, changes) for p in each]
        requests: list[Request] = []
        try:
            for prompt, chosen in zip(batch, settled, strict=True):
                requests.append(self._request(prompt, chosen, None))
            streams = [Stream(self._step, request) for request in requests]
            for stream in streams:
                for _ in stream:
                    pass
        finally:
            for request in requests:
                request.cancel()
        return [request.completion() for request in requests]

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **changes: Any) -> Completion:
        """The next answer of a conversation [{"role", "content"}]; what the cache still holds is not run again."""
        stream = self.stream(messages, params, **changes)
        for _ in stream:
            pass
        return stream.completion

    def logits(self, ids: Sequence[int]) -> _core.FloatArray:
        """float32 [len(ids), vocab_size]: the logits after every token. No template, nothing added.

        -inf for an id between added tokens that no token has. Rows that a checkpoint was padded with after its last
        token are not in the file, and vocab_size does not count them.
        """
        tokens = self._check_ids(ids)
        if not tokens:
            raise InputError("there are no token ids: give at least one")
        self._check_length(len(tokens))
        out = np.empty((len(tokens), self.vocab_size), np.float32)
        self._open_scheduler().all_logits(tokens, out)
        out[:, self._silent] = -np.inf
        return out

    def tokenize(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Ids of a text; see Tokenizer.encode."""
        return self.tokenizer.encode(read_text(text), bos, eos, special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids; see Tokenizer.decode."""
        return self.tokenizer.decode(read_ids(ids))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids that `stream` runs for a prompt."""
        return self._read(prompt)[0]

    def _read(self, prompt: Prompt) -> tuple[list[int], bool]:
        """(ids, whether they come out of the template)."""
        found = read_prompt(prompt)
        messages: Sequence[Message] | None = None
        if isinstance(found, str):
            messages = [{"role": "user", "content": found}]
        elif found and isinstance(found[0], Mapping):
            messages = found
        if messages is not None:
            return encode_chat(self.template, self.tokenizer, messages), True
        return self._check_ids(found), False

    def check_weights(self) -> None:
        """Raises FileChangedError when the weights are no longer those that were opened. On a GPU they are a copy."""
        if self.device == "cpu":
            self.file.check_unchanged()

    def close(self) -> None:
        """Frees the cache and the threads. Requests that still run end with an error."""
        if self._scheduler is not None:
            self._scheduler.close()  # waits for a step of another thread
            self._scheduler = None
            self.weight_memory = None
            self.__dict__.pop("engine", None)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, prompt: Prompt, params: SamplingParams, progress: Progress | None) -> Request:
        ids, templated = self._read(prompt)
        if progress is not None and not callable(progress):
            raise InputError(f"progress is {shown(progress)}, expected a function of two integers")
        if params.logprobs is not None and params.logprobs > self.vocab_size:
            raise InputError(f"logprobs is {params.logprobs}, over the {self.vocab_size} tokens of the vocabulary")
        if not ids:
            raise InputError("the prompt is empty and the model puts no token before it: give some text")
        self._check_length(len(ids))
        room = self.context - len(ids) + 1
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        model_ends = () if params.ignore_eos else self._ends
        stop = params.stop if params.ignore_eos or not templated else (*params.stop, *self.template.stop)
        request = Request(
            ids,
            params,
            self.tokenizer.stream(continues=not (templated and self.template.fresh_answer)),
            limit=limit,
            ends=frozenset(i for i in (*model_ends, *params.stop_token_ids) if i < self.vocab_size),
            banned=self._silent,
            stop=stop,
            progress=progress,
            speculate=self.speculate is not None,
        )
        if not request.finished:
            self._open_scheduler().add(request, len(ids) + limit - 1)
        return request

    def _step(self) -> None:
        self._open_scheduler().step()

    def _params(self, params: SamplingParams | None, changes: Mapping[str, Any]) -> SamplingParams:
        if not isinstance(params, SamplingParams | None):
            raise InputError(f"the sampling parameters are {shown(params)}, expected SamplingParams")
        if params is None:
            greedy = real(changes.get("temperature")) == 0
            if not greedy:
                self._warn_unusable_defaults(changes)
            params = SamplingParams(max_tokens=self.defaults.max_tokens) if greedy else self.defaults
        return params.with_changes(**changes)

    def _warn_unusable_defaults(self, changes: Mapping[str, Any]) -> None:
        """Once for each value of the file that would have counted here."""
        for name in [name for name in self.unusable_defaults if name not in changes]:
            problem = self.unusable_defaults.pop(name)
            warnings.warn(f"{self.path}: among the file's sampling defaults {problem}", stacklevel=4)

    def _end_tokens(self) -> tuple[int, ...]:
        ends = [int(i) for i in self.file.generation.get("eos_token_ids", [])]
        if not ends and self.tokenizer.eos_id >= 0:
            ends = [self.tokenizer.eos_id]
        named = (self.tokenizer.special_id(name) for name in self.template.stop_tokens)
        return tuple(dict.fromkeys([*ends, *(i for i in named if i is not None)]))

    def _refuse_unless_fits(self) -> None:
        refuse_unless_fits(self.plan, self.path)

    def _open_engine(self, threads: int, kv_type: str, max_sequences: int) -> Any:
        try:
            return engine_class(self.device)(
                self.file.config,
                self.file.engine_tensors(),
                threads=threads,
                context=self.context,
                max_sequences=max_sequences,
                max_step_tokens=step_tokens(self.device),
                kv_type=kv_type,
            )
        except ValueError as error:
            raise InputError(f"{self.path}: {error}") from error
        except RuntimeError as error:
            raise CnllamaError(f"{self.path}: {error}") from error

    def _weight_memory(self, mode: str) -> WeightMemory | None:
        if self.device != "cpu":
            return None
        return WeightMemory(self.engine, self.file, mode, self.plan.kv + self.plan.scratch)

    def _make_pool(self, size: int) -> SlotPool:
        scaling = self.file.config.get("rope_scaling") or {}
        dynamic = scaling.get("rope_type", scaling.get("type")) == "dynamic"
        return SlotPool(self.engine, size, int(self.file.config["max_position_embeddings"]) if dynamic else None)

    def _warn_long_context(self) -> None:
        trained = trained_length(self.file.config)
        if self.context > trained:
            warnings.warn(
                tr(
                    f"the context of {self.context} is over the {trained} positions that the model was trained for: "
                    "text beyond them will be poor",
                    f"上下文长度 {self.context} 超过了模型训练时的 {trained}：超出部分的质量会很差",
                ),
                stacklevel=3,
            )

    def _check_length(self, count: int) -> None:
        if count > self.context:
            raise InputError(
                tr(
                    f"the prompt has {count} tokens and the context holds {self.context}: shorten it or raise the "
                    "context (--ctx)",
                    f"提示有 {count} 个词元，而上下文只能容纳 {self.context} 个：请缩短提示或加大上下文（--ctx）",
                )
            )

    def _check_ids(self, ids: Any) -> list[int]:
        tokens = read_ids(ids)
        bad = next((i for i in tokens if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise InputError(f"token id {bad} is outside the vocabulary, 0 to {self.vocab_size - 1}")
        return tokens

    def _open_scheduler(self) -> Scheduler:
        if self._scheduler is None:
            raise CnllamaError("this LLM was closed: open the file again")
        return self._scheduler


def _nothing() -> None:
    """For weights that were copied to a GPU."""


def _explain(path: Path, check: Callable[[], None], error: Exception) -> CnllamaError:
    """What the native code refuses in the middle of a run, as a sentence that names the file."""
    try:
        check()  # zeros in place of what was cut off may be what it refuses
    except FileChangedError as changed:
        return changed
    return CnllamaError(f"{path}: {error}; check the file with: cnllama verify {path}")


def _count(name: str, value: object, low: int, high: int) -> int:
    count = integer(value)
    if count is None or not low <= count <= high:
        raise InputError(f"{name} is {shown(value)}, expected an integer from {low} to {high:,}")
    return count


def _path(path: object) -> Path:
    if not isinstance(path, str | bytes | os.PathLike):
        raise InputError(f"the model is {shown(path)}, expected the path of a .cnl file")
    return Path(os.fsdecode(path))
