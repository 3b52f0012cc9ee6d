# SPDX-License-Identifier: Apache-2.0
"""Trains SentencePiece in a process of its own: sentences in on stdin, the model out on stdout, its log on stderr.

SentencePiece holds the interpreter while it trains and can end the process; here it does neither to the caller.
Run as `python -m cnllama.adapt.sentencepiece_worker OPTIONS`, the options of SentencePieceTrainer.train as JSON.
"""

from __future__ import annotations

import io
import json
import sys


def main() -> int:
    """Reads one sentence a line; a failure is the last line of stderr."""
    import sentencepiece

    options = json.loads(sys.argv[1])
    seed = options.pop("random_seed", None)
    if seed is not None:
        sentencepiece.set_random_generator_seed(seed)
    model = io.BytesIO()
    sentences = (line.rstrip(b"\n").decode("utf-8") for line in sys.stdin.buffer)
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **options)
    except (RuntimeError, OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    sys.stdout.buffer.write(model.getvalue())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
