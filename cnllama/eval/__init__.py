# SPDX-License-Identifier: Apache-2.0
"""Evaluation of packed files: perplexity, divergence from the checkpoint, C-Eval and CMMLU, lm-evaluation-harness."""
