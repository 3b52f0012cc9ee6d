# SPDX-License-Identifier: Apache-2.0
"""The first code of every command: from here to the end of the process Ctrl-C is one line and exit code 130.

It imports nothing that the interpreter has not loaded before. Until the command's own code is there, an interrupt ends
the process at once: an exception would come out of some half-imported library as an error of that library.
"""

from __future__ import annotations

import os
import sys
import time

INTERRUPTED = 130
_AGAIN = 0.01  # seconds

interrupted_at = float("-inf")
"""time.monotonic() of the last Ctrl-C since the command began its work."""


class _Interrupt(KeyboardInterrupt):
    """One of its own kind: after a KeyboardInterrupt that passes through native code Python kills itself at its end."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line of this process, or `argv`, and returns its exit code."""
    try:
        import signal

        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            return _work(argv)  # ignored, as in the background of a script, or the caller's own affair
        signal.signal(signal.SIGINT, _leave)
        from cnllama.cli import main as _  # noqa: F401

        sys.unraisablehook = _raise_again
        signal.signal(signal.SIGINT, _interrupt)
        code = _work(argv)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done, its output flushed: what is left takes no time
        return code
    except KeyboardInterrupt:
        _leave()
    return INTERRUPTED


def run_main() -> int:
    """`cnllama-run ...` is `cnllama run ...`."""
    return main(["run", *sys.argv[1:]])


def _work(argv: list[str] | None) -> int:
    from cnllama.cli.main import main as work

    return work(argv)


def _leave(*_: object) -> None:
    """Ends the process. Not by an exit that cleans up: this may be the middle of an import, or of the cleaning."""
    chinese = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "").lower().startswith("zh")
    try:
        os.write(2, ("cnllama: 已中断\n" if chinese else "cnllama: interrupted\n").encode())
    finally:
        os._exit(INTERRUPTED)


def _interrupt(*_: object) -> None:
    global interrupted_at  # noqa: PLW0603  (a signal handler has no other place)
    interrupted_at = time.monotonic()
    raise _Interrupt


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    """An interrupt that fell into a destructor, where Python only reports it, comes again a moment later."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    import signal
    import threading

    again = threading.Timer(_AGAIN, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    again.daemon = True
    again.start()
