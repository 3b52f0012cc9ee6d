# SPDX-License-Identifier: Apache-2.0
"""A .cnl as GGUF, the file that llama.cpp runs: the same weights bit for bit where a GGML type can hold them."""
