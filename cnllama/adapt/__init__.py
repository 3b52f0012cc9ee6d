# SPDX-License-Identifier: Apache-2.0
"""The training road: tokenizers, resizing, pre-training, instruction tuning. Needs the extra `cnllama[adapt]`."""
