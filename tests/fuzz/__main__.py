# SPDX-License-Identifier: Apache-2.0
"""`python tests/fuzz` and `python -m fuzz`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of libraries do not survive a fork, and the processes are many
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a busy machine threads that spin take 20 times as long
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_TESTS), str(_TESTS.parent / "bench")]

if __name__ == "__main__":
    from fuzz.command import main

    sys.exit(main())
