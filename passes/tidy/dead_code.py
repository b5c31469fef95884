"""Nodes whose values nobody reads go, and constants with them.

In a functional graph an op has no effect but its value, so one that no output depends on may go. Inputs stay: they are the signature. Costs
nothing. Capture leaves no dead code; passes that give an op other arguments do.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.program import Program
from fxcompress.rewrite import Context, Reject, Transform


class DeadCode(Transform):
    """Erase what no output depends on."""

    name = "tidy.dead_code"
    whole = "what nobody reads makes no difference"
    contract = Exact(limit=0.0)

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site per node, readers before what they read."""
        for node in dead(on.program):
            with edit.site(node, "nobody reads it"):
                edit.erase(node)
        return {}


def dead(program: Program) -> list[fx.Node]:
    """Nodes that no output depends on, last first; inputs are never dead."""
    found: dict[fx.Node, None] = {}
    for node in reversed(program.graph.nodes):
        if node.op not in ("placeholder", "output") and node.users.keys() <= found.keys():
            found[node] = None
    return list(found)
