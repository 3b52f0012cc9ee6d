# SPDX-License-Identifier: Apache-2.0
"""A calibrated file beside a plain one: the text that was kept apart decides which of the two the user gets."""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from cnllama.errors import CnllamaError, InputError
from cnllama.files import Output, move
from cnllama.paths import real_path
from cnllama.scratch import scratch_beside
from cnllama.space import check_space

CONTEXT = 512
_SURE = 2.0  # standard errors


class TooLargeError(CnllamaError):
    """The files are sound and cannot be run here."""


@dataclass(frozen=True)
class Verdict:
    """Perplexities per token on the held-out text; kept: the name of the quantizer whose file the user gets.

    difference: mean of the tokens' losses less rtn's, nats, and the standard error of that mean.
    """

    quantizer: str
    perplexity: float
    rtn_perplexity: float
    difference: float
    standard_error: float
    tokens: int
    kept: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Trial:
    """Two temporary files beside `output`; keep() gives one its name, leaving the block removes the rest.

    A killed process leaves at most the two, which the next trial for the same name removes. Raises InputError at once
    where `output` cannot be written, and CnllamaError where there is no room for two files of `size` bytes.
    """

    def __init__(self, output: Path, quantizer: str, size: int) -> None:
        Output(output).discard()
        check_space(output, 2 * size, "the two files to compare")
        self._output, self._quantizer = output, quantizer
        self._stack = ExitStack()

    def __enter__(self) -> Trial:
        scratch = self._stack.enter_context(scratch_beside(self._output))
        self.calibrated, self.plain = scratch / f"model.{self._quantizer}", scratch / "model.rtn"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def keep(self, path: Path) -> None:
        """Renames one of the two files to the output's name."""
        move(path, real_path(self._output))


def judge(calibrated: Path, plain: Path, text: str, quantizer: str, threads: int = 0) -> Verdict:
    """Runs both files on `text` with the engine; plain is kept when calibrated predicts the text worse.

    Worse by more than the noise of so few tokens, that is: a small change of a model moves the perplexity of a page up
    or down by chance. Both files have passed their own check. Raises TooLargeError where they do not fit into memory,
    and CnllamaError for a file that gives no numbers.
    """
    ours, theirs = (_losses(path, text, threads) for path in (calibrated, plain))
    difference = ours - theirs
    mean, error = float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))
    kept = quantizer if mean <= _SURE * error else "rtn"  # a loss that is no number is worse, too
    return Verdict(quantizer, _perplexity(ours), _perplexity(theirs), mean, error, len(ours), kept)


def _perplexity(losses: npt.NDArray[np.float64]) -> float:
    return math.exp(min(float(losses.mean()), 700.0))


def _losses(path: Path, text: str, threads: int) -> npt.NDArray[np.float64]:
    """Negative log likelihood of every token of the text, nats, in windows of CONTEXT with half of it before them."""
    from cnllama.eval.models import EngineScorer
    from cnllama.eval.numerics import target_logprobs
    from cnllama.eval.text_scores import progress_bar, tokenizer_of
    from cnllama.eval.texts import windows
    from cnllama.format import open_cnl
    from cnllama.llm import LLM

    file = open_cnl(path)
    context = min(CONTEXT, int(file.config["max_position_embeddings"]))
    parts = windows(tokenizer_of(file), [text], context, max(1, context // 2))
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            llm = LLM(path, ctx=context, threads=threads)
        except InputError as error:
            raise TooLargeError(str(error)) from None
    total = sum(len(part.ids) for part in parts)
    with llm, EngineScorer(llm) as model, progress_bar(f"checking{path.suffix}", total) as progress:
        for rows in model.rows(parts, progress):
            window = parts[rows.item]
            at = rows.position - window.begin
            losses.append(-target_logprobs(rows.logits, window.targets[at : at + len(rows.logits)]))
    return np.concatenate(losses)


def verdict_sentence(verdict: Verdict) -> str:
    """Why the calibrated file was not kept."""
    return (
        f"the {verdict.quantizer} file was not kept: its perplexity on the held-out text is {verdict.perplexity:.4f}, "
        f"rtn's {verdict.rtn_perplexity:.4f} ({verdict.tokens:,} tokens; losses differ by {verdict.difference:.4f} "
        f"±{verdict.standard_error:.4f})"
    )


def unchecked_sentence(quantizer: str, problem: TooLargeError) -> str:
    """Why nobody knows whether the calibrated file is the better one."""
    return f"the {quantizer} file was not checked against rtn: {problem}"
