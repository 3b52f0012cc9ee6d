# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face LLaMA and its adapters in, one packed .cnl out: checked, merged, quantized and written in a stream."""
