# SPDX-License-Identifier: Apache-2.0
"""The fuzzers by name."""

from __future__ import annotations

from fuzz.engine import Target
from fuzz.targets.adapter import Adapter
from fuzz.targets.args import Arguments
from fuzz.targets.checkpoint import Checkpoint
from fuzz.targets.cnl import Cnl
from fuzz.targets.gguf import Gguf
from fuzz.targets.pickle_bin import PickleBin
from fuzz.targets.text import Text

TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (Cnl, Checkpoint, Adapter, PickleBin, Gguf, Text, Arguments)
}
