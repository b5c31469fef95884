"""Faults in who reads what an edit put in place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, fx

from fxcompress.dataflow import ancestors
from fxcompress.edit import Edit
from tests.faults.fault import Fault, Undo, in_turn, reading


def reader_faults(edit: Edit) -> Iterator[Fault]:
    """Per reader of a replaced value, and of a constant with other numbers: it keeps the old one. Neighbours' values swapped."""
    alive, old_nodes = ancestors([edit.program.output_node]), {s.node for s in edit.before}
    replaced = [(old, new, site) for site in edit.sites for old, new in site.replaced.items() if old in old_nodes and new in alive]
    for old, new, site in replaced:
        for reader in (u for u in new.users if u in alive and (old, new) in edit.rewired.get(u, ())):
            yield Fault(f"{reader.name} keeps reading", old.name, site.name, partial(reading, reader, new, old))
    for (_, one, site), (_, other, _) in itertools.pairwise(replaced):
        if one is not other and _form(one) == _form(other):
            yield Fault(f"swap with {other.name}", one.name, site.name, partial(_swapped, one, other, old_nodes))
    for site in edit.sites:
        for name in (c for c in site.constants if c in edit.constants_before):
            leaf = next(n for n in edit.graph.nodes if n.op == "get_attr" and n.target == name)
            for reader in leaf.users if len(leaf.users) > 1 else ():
                yield Fault(f"{reader.name} keeps reading the old", name, site.name, partial(_reading_old, edit, reader, leaf))


def _swapped(one: fx.Node, other: fx.Node, old_nodes: set[fx.Node]) -> Undo:
    first, second = ([u for u in n.users if u in old_nodes] for n in (one, other))
    return in_turn(*(reading(u, one, other) for u in first), *(reading(u, other, one) for u in second if u not in first))


def _reading_old(edit: Edit, reader: fx.Node, leaf: fx.Node) -> Undo:
    name, constants = f"{leaf.target}.stale", edit.program.constants
    constants[name] = edit.constants_before[str(leaf.target)]
    with edit.graph.inserting_before(reader):
        stale = edit.graph.create_node("get_attr", name)
    return in_turn(partial(constants.__delitem__, name), partial(edit.graph.erase_node, stale), reading(reader, leaf, stale))


def _form(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None
