# SPDX-License-Identifier: Apache-2.0
"""`python tests/kills` and `python -m kills`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of libraries do not survive a fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_TESTS), str(_TESTS.parent / "bench")]

if __name__ == "__main__":
    from kills.command import main

    sys.exit(main())
