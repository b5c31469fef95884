"""CPU time of the machinery around passes: edits, contract checks, sweeps that find nothing. One thread, best of several runs.

    python -m tools.bench.passes [--nodes N]

The graph is a chain of small layers, x + relu(W x): the forward costs little, so what is measured is the machinery. Each row is in
milliseconds, as a ratio to the interpreter's forward over the same graph, and per site.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from fxcompress import checker, registry
from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.interpret import run
from fxcompress.manager import candidates
from fxcompress.program import Program
from fxcompress.rewrite import Context, Rewrite
from fxcompress.target import Target
from fxcompress.verify import verify
from tests.passes.helpers import chain

SITES, RUNS = 200, 5


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2000, help="of the graph that is edited; sweeps run on four times as many")
    nodes = parser.parse_args().nodes
    print(f"{'':40}{'ms':>8}{'/forward':>10}{'µs/site':>9}")
    changes(chain(nodes // 4))
    sweeps(chain(nodes))


def changes(program: Program) -> None:
    """Rows for one pass of `SITES` sites, step by step."""
    times: dict[str, list[float]] = {}
    for _ in range(RUNS):
        _timed(times, "forward", lambda: run(program, program.example))
        copy = program.copy()
        edit = _timed(times, "edit", lambda: edited(copy))  # noqa: B023
        _timed(times, "check, its forward included", lambda: checker.check(copy, edit, Exact(), program.example))  # noqa: B023
        _timed(times, "rollback", edit.rollback)
        edit = edited(copy)
        _timed(times, "verify", lambda: verify(copy))  # noqa: B023
        _timed(times, "commit", edit.commit)
    _show(f"{len(program.graph.nodes)} nodes, {SITES} sites", times, SITES)


def sweeps(program: Program) -> None:
    """Rows for passes that find nothing to do."""
    times: dict[str, list[float]] = {}
    for _ in range(RUNS):
        _timed(times, "forward", lambda: run(program, program.example))
        for name in registry.passes():
            if name.startswith("tidy."):
                _timed(times, f"{name} finds nothing", lambda: sweep(name, program))  # noqa: B023
    _show(f"{len(program.graph.nodes)} nodes", times)


def edited(program: Program) -> Edit:
    """An open edit that makes `SITES` layers anew."""
    edit = Edit(program)
    for old in [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default][:SITES]:
        with edit.site(old):
            edit.replace(old, edit.insert(old.target, *old.args, like=old, val=old.meta["val"]))
    return edit


def sweep(name: str, program: Program) -> None:
    """Ask a pass about the whole program, as the manager does."""
    item, context = registry.find_pass(name)(), Context(program, Target(name="bench"), program.example)
    if isinstance(item, Rewrite):
        found: list[Any] = [item.match(node, context) for node in candidates(program.graph, item)]
        assert not any(found), f"{name} finds something to do"
    else:
        edit = Edit(program)
        item.run(context, edit)
        assert not edit.sites, f"{name} finds something to do"


def _timed(times: dict[str, list[float]], name: str, work: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = work()
    times.setdefault(name, []).append((time.process_time() - start) * 1e3)
    return result


def _show(title: str, times: dict[str, list[float]], sites: int = 0) -> None:
    print(title)
    forward = min(times["forward"])
    for name, runs in times.items():
        per_site = f"{min(runs) / sites * 1e3:9.0f}" if sites and name != "forward" else ""
        print(f"  {name:38}{min(runs):8.2f}{min(runs) / forward:10.2f}{per_site}")


if __name__ == "__main__":
    main()
