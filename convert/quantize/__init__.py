# SPDX-License-Identifier: Apache-2.0
"""From float32 weights to packed ones: rounding, GPTQ and activation-aware scaling behind one interface (base.py)."""
