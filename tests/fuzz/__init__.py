# SPDX-License-Identifier: Apache-2.0
"""Fuzzers of everything that cnllama reads: `python tests/fuzz --help`.

A target (targets/) makes sound files once, damages them in ways that a seed and a number alone decide, and gives them
to the product in this process. An input may be accepted or refused in one sentence; whatever else happens is a finding.
"""
