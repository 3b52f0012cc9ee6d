# SPDX-License-Identifier: Apache-2.0
"""Commands that write, ended at any moment: `python tests/kills --help`.

A case (cases.py) is a command with small inputs, in a place where other people's files and an earlier result lie. What
must hold after a kill, and after the same command again, is in promise.py, for all cases.
"""
