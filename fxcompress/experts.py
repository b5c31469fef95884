"""Grouped matrix products of mixtures of experts, opened into one plain matrix product an expert.

    rows of x sorted by expert, offs[e] the first row after those of e:    out = Σ_e where(offs[e-1] <= row < offs[e], x, 0) W_e

The same numbers: each row gets one product and zeros. Every expert's weight becomes a constant of its own (a view, nothing is copied), so
that passes and backends see linears. Costs every expert on every row: a flat graph with fixed shapes has no way to skip rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.edit import fake_value, op_node

aten = torch.ops.aten
OPS = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")


def open_experts(graph: fx.Graph, constants: dict[str, Tensor]) -> None:
    """Replace every grouped product whose experts' weights are constants, in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) in OPS and len(node.args) >= 3:
            _open(graph, constants, node)


def _open(graph: fx.Graph, constants: dict[str, Tensor], node: fx.Node) -> None:
    x, weight, ends = node.all_input_nodes[:3]
    leaf, swapped = _leaf(weight)
    if leaf is None:
        return

    op = partial(op_node, graph, node)
    with graph.inserting_before(node):
        rows = op(aten.sym_size.int, x, 0)
        number = op(aten.arange.default, rows)
        before, out = None, None
        for expert in range(weight.meta["val"].shape[0]):
            own = _constant(graph, constants, leaf, expert)
            end = op(aten.select.int, ends, 0, expert)
            inside = op(aten.lt.Tensor, number, end)
            mine = inside if before is None else op(aten.logical_and.default, inside, op(aten.ge.Tensor, number, before))
            taken = op(aten.where.ScalarOther, op(aten.unsqueeze.default, mine, 1), x, 0.0)
            product = op(aten.mm.default, taken, op(aten.t.default, own) if swapped else own)
            before, out = end, product if out is None else op(aten.add.Tensor, out, product)
    if out is not None:
        node.replace_all_uses_with(out)
        graph.erase_node(node)


def _leaf(weight: Any) -> tuple[fx.Node | None, bool]:
    """The constant behind the weight and whether its two last axes are swapped on the way; None for any other way."""
    if weight.op == "get_attr":
        return weight, False
    if weight.target is aten.transpose.int and weight.args[0].op == "get_attr" and {a % 3 for a in weight.args[1:]} == {1, 2}:
        return weight.args[0], True
    return None, False


def _constant(graph: fx.Graph, constants: dict[str, Tensor], leaf: fx.Node, expert: int) -> fx.Node:
    name = f"{leaf.target}.{expert}"
    constants[name] = constants[str(leaf.target)][expert]
    node = graph.create_node("get_attr", name, name="".join(c if c.isalnum() else "_" for c in name))
    node.meta = {**leaf.meta, "val": fake_value(aten.select.int, (leaf, 0, expert), {})}
    return node
