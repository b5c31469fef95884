"""One model after the other, each in a fork of this process: a crash or an endless loop of one is a row, and libraries are loaded once."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Row = dict[str, Any]


def forked(work: Callable[[str], list[Row]], name: str, limit: float) -> list[Row]:
    """The rows that `work` gives for a model; one row with a verdict where it raises, dies or takes more than `limit` seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, name, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return [{"name": name, "verdict": "out of time", "why": f"more than {limit:.0f} s"}]
        rows: list[Row] = receiver.recv()
        return rows
    except EOFError:
        process.join()
        return [{"name": name, "verdict": "crashed", "why": f"exit code {process.exitcode}", "trace": []}]
    finally:
        process.kill()
        process.join()


def _run(work: Callable[[str], list[Row]], name: str, sender: Connection) -> None:
    try:
        sender.send(work(name))
    except BaseException as error:  # whatever it is, it is this model's row
        lines = traceback.format_exc().splitlines()[-30:]
        sender.send([{"name": name, "verdict": "crashed", "why": f"{type(error).__name__}: {error}", "trace": lines}])
