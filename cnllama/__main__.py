# SPDX-License-Identifier: Apache-2.0
"""Makes `python -m cnllama` the command line."""

from cnllama.start import main

raise SystemExit(main())
