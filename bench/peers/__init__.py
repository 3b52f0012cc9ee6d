# SPDX-License-Identifier: Apache-2.0
"""Engines behind one interface: `plan(args)` says in the parent which rows a module adds, `Engine` runs in its worker.

Adding an engine: a module with both, and its name here.
"""

MODULES = ("cnl", "llamacpp", "hf", "ct2", "ort")
