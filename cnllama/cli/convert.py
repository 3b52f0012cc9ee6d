# SPDX-License-Identifier: Apache-2.0
"""`cnllama convert`: declared and run by cnllama.convert.command."""

from __future__ import annotations

from cnllama.convert.command import HELP, add_arguments, run

__all__ = ["HELP", "add_arguments", "run"]
