"""Faults in the nodes that an edit made, or gave other arguments."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxcompress.dataflow import ancestors
from fxcompress.edit import Edit, Site
from tests.faults.fault import Fault, Undo, given, in_turn, is_float, reading

Arguments = tuple[Any, Any]  # args, kwargs


def node_faults(edit: Edit) -> Iterator[Fault]:
    """Per such node: operands negated and swapped, numbers off by one or negated, lists in another order."""
    alive = ancestors([edit.program.output_node])
    for node, site in _changed_nodes(edit).items():
        if node in alive and node.op == "call_function":
            for kind, (args, kwargs) in wrong_arguments(node):
                yield Fault(kind, node.name, site.name, partial(given, node, args, kwargs))
            for operand in filter(is_float, node.all_input_nodes):
                yield Fault(f"negate {operand.name}", node.name, site.name, partial(_negating, node, operand))


def wrong_arguments(node: fx.Node) -> Iterator[tuple[str, Arguments]]:
    """The ways to get one argument wrong that need no other node."""
    flat, spec = pytree.tree_flatten((list(node.args), dict(node.kwargs)))
    for place, value in enumerate(flat):
        for kind, wrong in _wrong_numbers(value):
            args, kwargs = pytree.tree_unflatten([*flat[:place], wrong, *flat[place + 1 :]], spec)
            yield f"{kind} in argument {place}", (tuple(args), kwargs)
    if len(node.args) > 1 and all(isinstance(a, fx.Node) for a in node.args[:2]):
        yield "swap operands", ((*node.args[1::-1], *node.args[2:]), node.kwargs)
    for place, value in enumerate(node.args):
        if isinstance(value, list | tuple) and len(value) > 1:
            yield f"roll argument {place}", ((*node.args[:place], [*value[1:], value[0]], *node.args[place + 1 :]), node.kwargs)


def _changed_nodes(edit: Edit) -> dict[fx.Node, Site]:
    steps = {s.node: s for s in edit.before}
    made = {n: site for site in edit.sites for n in site.inserted}
    return made | {n: site for site in edit.sites for n in site.touched if n in steps and n.args != steps[n].args}


def _wrong_numbers(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, bool):
        yield "the opposite", not value
    elif isinstance(value, int):
        yield "one more", value + 1
    elif isinstance(value, float):
        yield "negate", -value


def _negating(node: fx.Node, operand: fx.Node) -> Undo:
    with node.graph.inserting_before(node):
        negated = node.graph.call_function(torch.ops.aten.neg.default, (operand,))
    return in_turn(partial(node.graph.erase_node, negated), reading(node, operand, negated))
