# SPDX-License-Identifier: Apache-2.0
"""Turn a LLaMA into a Chinese model and run it at 4 bits.

from cnllama import LLM
llm = LLM("model.cnl")
for piece in llm.stream("写一首关于春天的诗", temperature=0.7): print(piece, end="")
"""

from __future__ import annotations

TYPE_CHECKING = False  # not imported from typing: until start.py runs, an interrupt is a traceback
if TYPE_CHECKING:
    from typing import Any

    from cnllama.errors import CnllamaError, InputError
    from cnllama.llm import LLM
    from cnllama.request import Completion, Stream, TokenLogprob, Usage
    from cnllama.sampling import SamplingParams

__all__ = [
    "LLM",
    "CnllamaError",
    "Completion",
    "InputError",
    "SamplingParams",
    "Stream",
    "TokenLogprob",
    "Usage",
    "__version__",
]

_HOME = {
    "LLM": "llm",
    "Stream": "request",
    "SamplingParams": "sampling",
    "Completion": "request",
    "TokenLogprob": "request",
    "Usage": "request",
    "CnllamaError": "errors",
    "InputError": "errors",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: `import cnllama` itself costs next to nothing."""
    import importlib

    if name == "__version__":
        from importlib.metadata import version

        return version("cnllama")
    if name not in _HOME:
        raise AttributeError(f"module 'cnllama' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cnllama.{_HOME[name]}"), name)
    globals()[name] = value
    return value
