# SPDX-License-Identifier: Apache-2.0
"""The text that a quantizer is calibrated with: samples of equal length, and a part kept apart to judge by."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnllama.errors import InputError
from cnllama.tokenizer import Tokenizer

BUNDLED = Path(__file__).with_name("calibration.txt")
DEFAULT_TOKENS = (128, 512)
HELD_OUT = 0.1  # of the text, its end
_HELD_OUT_CHARACTERS = 1 << 14  # more would take long on a large model and change no verdict
_CHARACTERS_PER_TOKEN = 6  # more than any tokenizer packs into one on average
_LIMIT = 1 << 20
_SHORTEST = 16


@dataclass(frozen=True)
class Calibration:
    """samples: int32 [samples, length] token ids. held_out: a text that has none of them. sha256: of the whole text."""

    samples: npt.NDArray[np.int32]
    held_out: str
    sha256: str
    notices: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """For the file's metadata."""
        return {"text_sha256": self.sha256, "tokens": int(self.samples.size)}


def parse_tokens(text: str) -> tuple[int, int]:
    """(samples, length) of "128x512". Raises InputError."""
    found = re.fullmatch(r"([0-9]{1,7})[xX×]([0-9]{1,7})", text.strip())
    count, length = map(int, found.groups()) if found else (0, 0)
    if not (1 <= count <= _LIMIT and _SHORTEST <= length <= _LIMIT):
        raise InputError(
            f"--calibrate-tokens is {text!r:.40}, expected SAMPLESxLENGTH with a length of {_SHORTEST} or more tokens, "
            "such as 128x512"
        )
    return count, length


def read_calibration(
    path: Path | None, tokenizer: Tokenizer, config: Mapping[str, Any], tokens: tuple[int, int] = DEFAULT_TOKENS
) -> Calibration:
    """Samples spread over the text, each beginning with BOS where the model has one; fewer when the text is short.

    path: text or .jsonl, None for the bundled text. tokens: (samples, length). Raises InputError for a text that is too
    short and for samples longer than the model's context.
    """
    from cnllama.eval.texts import read_text

    count, length = tokens
    context = config["max_position_embeddings"]
    if length > context:
        raise InputError(f"--calibrate-tokens asks for samples of {length} tokens, the model was trained on {context}")
    given = path or BUNDLED
    text, problems = read_text(given, characters=count * length * _CHARACTERS_PER_TOKEN)
    whole = "\n".join(text.documents)
    cut = _line_end(whole, round(len(whole) * (1 - HELD_OUT)))
    kept, held_out = whole[:cut], whole[cut:].strip("\n")[:_HELD_OUT_CHARACTERS]
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    samples = _samples(tokenizer.encode(kept), start, count, length)
    if samples is None or not held_out.strip():
        raise InputError(
            f"{given}: {len(whole):,} characters are too few to calibrate with; give a text of a page or more "
            "(--calibrate)"
        )
    notices = list(problems)
    if path is not None and samples.size < count * length:
        notices.append(f"{given}: the text has {samples.size:,} of the {count * length:,} tokens to calibrate with")
    return Calibration(samples, held_out, hashlib.sha256(whole.encode()).hexdigest(), tuple(notices))


def _line_end(text: str, position: int) -> int:
    """The end of the line that `position` is in, or `position` where no other line follows."""
    end = text.find("\n", position)
    return position if end < 0 or not text[end:].strip() else end


def _samples(ids: list[int], start: list[int], count: int, length: int) -> npt.NDArray[np.int32] | None:
    """Windows spread evenly over the ids, without overlap; None when there are too few ids for a short one."""
    own = min(length - len(start), len(ids))
    if own < _SHORTEST:
        return None
    count = min(count, len(ids) // own)
    begins = [i * (len(ids) - own) // max(1, count - 1) for i in range(count)]
    return np.array([start + ids[begin : begin + own] for begin in begins], np.int32)
