"""Ctrl-C while the command line is still importing: one line and exit 130.

The imports take seconds, and the exception that Python raises by itself ends in a traceback, or in nothing where an import catches everything.
Nothing has been written yet, so the process can end where it stands. A program that imports fxcompress keeps its own signals.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import PurePath
from typing import Any

_NAMES = ("fxcompress", "fxcompress.cli")


def is_command() -> bool:
    """Whether this process is the command line: its script, or `python -m`, which imports the package before any line of the command runs."""
    if sys.argv[:1] == ["-m"]:
        return sys.orig_argv[len(sys.orig_argv) - len(sys.argv)].removeprefix("-m") in _NAMES
    return bool(sys.argv) and PurePath(sys.argv[0]).stem == _NAMES[0]


def stop(*_: Any) -> None:
    """End the process as a stopped command ends."""
    os.write(2, b"stopped; nothing was written\n")
    os._exit(130)


def started() -> None:
    """From here on Ctrl-C is an exception again; who catches it says what is kept."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)
