# SPDX-License-Identifier: Apache-2.0
"""`python -m cnllama.convert` is `cnllama convert`."""

from __future__ import annotations

import sys

from cnllama.start import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
