"""The op table: one relation per op, for all directions and all kinds of change. What stands in no table stops every change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from fxcompress.transport.facts import outputs
from fxcompress.transport.relations import contractions, gathers, norms, pointwise, reductions, views
from fxcompress.transport.solver import Solver

Relation = Callable[[Solver, fx.Node], None]

TABLE: Mapping[Any, Relation] = {
    **pointwise.TABLE,
    **views.TABLE,
    **gathers.TABLE,
    **contractions.TABLE,
    **norms.TABLE,
    **reductions.TABLE,
}


def relate(solver: Solver, node: fx.Node) -> None:
    """Push what the labels at one node imply."""
    if node.op == "call_function":
        TABLE.get(node.target, _unknown)(solver, node)
    elif solver.is_open:
        return
    elif node.op == "placeholder":
        solver.stop_all(node, [node], f"{node.name} is an input of the program")
    elif node.op == "output":
        solver.stop_all(node, solver.facts.results, "the value is an output of the program")


def _unknown(solver: Solver, node: fx.Node) -> None:
    solver.stop_all(node, [*node.all_input_nodes, node, *outputs(node).values()], f"{node.name}: unknown op {node.target}")
