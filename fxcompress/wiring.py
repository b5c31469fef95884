"""Who reads what in an open edit, against what the edit says.

A node that was given no other arguments reads what it read before, or what the edit put in its place: nothing else, and never what was
replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch.utils._pytree as pytree
from torch import fx

from fxcompress.dataflow import ancestors
from fxcompress.edit import Edit, Step, version
from fxcompress.program import place_of


class Misread(NamedTuple):
    """A live node that reads what it shouldn't. site: the name of the site that is to blame, or of the node itself."""

    site: str
    node: fx.Node
    why: str


def misreads(edit: Edit) -> Iterator[Misread]:
    """Every old, live node that wasn't updated and whose arguments aren't the ones it had, with what `Edit.replace` put in place of some; and
    those that are another op, or a constant with other numbers, without a site that says so."""
    alive, known = ancestors([edit.program.output_node]), {name for site in edit.sites for name in site.constants}
    for step in edit.before:
        if step.node in alive and step.node not in edit.updated:
            if changed := _changed(edit, step, known):
                yield Misread(place_of(step.node), step.node, f"{changed} than before, and no site says so")
            wanted: Any = step.args, step.kwargs
            for old, new in edit.rewired.get(step.node, ()):
                wanted = fx.node.map_arg(wanted, lambda n: new if n is old else n)  # noqa: B023 - called before the next one
            if wanted != (step.node.args, step.node.kwargs):
                yield _misread(edit, step.node, wanted)


def _changed(edit: Edit, step: Step, known: Collection[str]) -> str:
    """How a node is another one than it was. known: constants that sites changed."""
    node, name = step.node, str(step.target)
    if node.target != step.target:
        return f"{node.name} is another op"
    if node.op != "get_attr":
        return ""
    if version(edit.constants_before[name]) != edit.versions_before[name]:
        return f"{name} was written in place, which nothing can undo or compare: it has other numbers"
    if name not in known and edit.program.constants[name] is not edit.constants_before[name]:
        return f"{name} has other numbers"
    return ""


def _misread(edit: Edit, node: fx.Node, wanted: Any) -> Misread:
    expected = [n for n in pytree.tree_leaves(wanted) if isinstance(n, fx.Node)]
    wrong = next((n for n in node.all_input_nodes if n not in expected), None)
    missing = next((n for n in expected if n not in node.all_input_nodes), None)
    site = next((s.name for s in edit.sites for old, new in s.replaced.items() if wrong is old or missing is new), place_of(node))
    if wrong is None or missing is None:
        return Misread(site, node, f"the arguments of {node.name} are others than before, and no site says so")
    return Misread(site, node, f"{node.name} reads {wrong.name} where {missing.name} belongs")
