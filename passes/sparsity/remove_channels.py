"""Hidden channels that nobody reads are removed from every weight that has them.

    W2 f(W1 x),    W2[:, i] = 0  ->  row i of W1 and column i of W2 go

A site is a linear layer or convolution with input channels whose weights are all 0, as structured pruning leaves them. Which weights share the
channel is found from the dataflow, through activations, norms per channel, products and layouts; it goes only if every layer that reads it has
zeros there. Legal where no op sees the channels as a set; declined with the op that does. Attention is left alone: scores read channels
without a weight that could be 0. Exact: what goes was added as 0. Saves the rows, the columns and their arithmetic.
Source: structured pruning as in DepGraph (arXiv 2301.12900), by one change of channels instead of a table of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

from fxcompress.contract import Exact
from fxcompress.dataflow import WeightUse, weight_uses
from fxcompress.edit import Edit
from fxcompress.program import Program
from fxcompress.rewrite import Context, Reject, Transform
from fxcompress.transport import Kind, Plan, Seed, Transport

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.scaled_dot_product_attention.default)


class RemoveChannels(Transform):
    """Remove every hidden channel whose readers' weights are all 0."""

    name = "sparsity.remove_channels"
    contract = Exact()
    excludes = frozenset({"quantised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site per group of coupled channels, at the first layer that reads it."""
        declined: dict[str, Reject] = {}
        for use in list(unread_layers(on.program)):
            if on.admits(use.node) and has_unread(on.program, use):  # an earlier site may have done this one
                engine = Transport(on.program)
                if reject := remove(engine, use, edit):
                    declined[use.node.name] = reject
        return declined


def unread_layers(program: Program) -> Iterator[WeightUse]:
    """Linear layers and convolutions with input channels of zeros."""
    for leaf in program.graph.find_nodes(op="get_attr"):
        tensor = program.constants[str(leaf.target)]
        if tensor.is_floating_point() and tensor.dim() > 1:
            yield from (u for u in weight_uses(leaf, tensor)[0] if u.family != "embedding" and _unread(tensor, u).any())


def has_unread(program: Program, use: WeightUse) -> bool:
    """Whether the layer still has input channels of zeros."""
    leaf = _leaf(program, use.node)
    return leaf is not None and bool(_unread(program.constants[str(leaf.target)], use).any())


def remove(engine: Transport, use: WeightUse, edit: Edit) -> Reject | None:
    """Remove what is unread among the layer's input channels. Returns why nothing can go."""
    x = next(n for n in use.node.all_input_nodes if not engine.facts.is_constant(n))
    plan = engine.solve(Kind.REMOVE, Seed(x, (-1 if use.family == "linear" else 1,)))
    if product := next((u for n in plan.values for u in n.users if u.target in PRODUCTS), None):
        return Reject("{} reads the channels too, without a weight", product)
    if not plan.count:
        return Reject("{}", plan.reason())
    keep = kept(plan, edit.program)
    if keep.all() or not keep.any():
        return Reject("every channel is read by some layer" if keep.all() else "no channel would be left")
    try:
        plan.apply(edit, keep.numpy(), f"{int((~keep).sum())} of {len(keep)} channels are read by nobody", at=use.node)
    except ValueError as error:  # the form without them can't be written down
        return Reject("{}", error)
    return None


def kept(plan: Plan, program: Program) -> Tensor:
    """Per class whether a layer reads it: whether a weight with the channel among its inputs isn't 0 there."""
    tensors = {leaf: program.constants[str(leaf.target)] for leaf in plan.leaves}
    return plan.gather({leaf: t.abs() for leaf, t in tensors.items() if t.dim() > 1 and _reads(plan, leaf, t)}) != 0


def _reads(plan: Plan, leaf: fx.Node, tensor: Tensor) -> bool:
    """Whether a layer sums over the channels with this weight; one used in a way nobody knows may."""
    uses, others = weight_uses(leaf, tensor)
    return bool(others) or any(use.contraction in label.slot for use in uses for label in plan.leaves[leaf])


def _unread(tensor: Tensor, use: WeightUse) -> Tensor:
    return ~tensor.movedim(use.contraction, 0).flatten(1).any(1)


def _leaf(program: Program, node: fx.Node) -> fx.Node | None:
    """The weight of a layer, the constant of most axes it reads."""
    leaves = [n for n in node.all_input_nodes if n.op == "get_attr"]
    return max(leaves, key=lambda n: program.constants[str(n.target)].dim(), default=None)
