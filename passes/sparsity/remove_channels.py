"""Hidden channels and attention heads that nobody reads, or that hold nothing but 0, are removed from every weight that has them.

    W2 f(W1 x),    W2[:, i] = 0,  or  W1[i] = 0 and b1[i] = 0 and f(0) = 0  ->  row i of W1 and column i of W2 go
    W_o concat_h(softmax(Q_h K_h^T) V_h),    all columns of W_o, or all rows of W_v, for head h are 0  ->  its rows and columns go from all four

A site is a linear layer or convolution with input channels or rows that are all 0, as structured pruning leaves them. Which weights share the
channel is found from the dataflow, through activations, norms per channel, products, attention and layouts; it goes only if every layer that
reads it has zeros there or is given zeros (`nulls`). Heads go whole, with those that share keys and values; sizes written in views are
rewritten, and the scale of attention stays. Legal where no op sees the channels as a set; declined with the op that does. Exact: what goes was
added as 0. Saves the rows, the columns and their arithmetic.
Source: structured pruning as in DepGraph (arXiv 2301.12900), by one change of channels instead of a table of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, fx

from fxcompress.contract import Exact
from fxcompress.dataflow import WeightUse, weight_uses
from fxcompress.edit import Edit
from fxcompress.passes.sparsity.nulls import Nulls
from fxcompress.program import Program
from fxcompress.rewrite import Context, Reject, Transform
from fxcompress.transport import Kind, Seed, Transport


class RemoveChannels(Transform):
    """Remove every hidden channel and attention head that contributes 0 to every layer that reads it."""

    name = "sparsity.remove_channels"
    contract = Exact()
    excludes = frozenset({"quantised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site per group of coupled channels, at the first layer that reads or makes it."""
        declined: dict[str, Reject] = {}
        for use, side in list(zeroed_layers(on.program)):
            if not on.admits(use.node) or not is_zeroed(on.program, use, side):  # an earlier site may have done this one
                continue
            if reject := remove(Transport(on.program), use, side, edit):
                declined.setdefault(use.node.name, reject)
        return declined


def zeroed_layers(program: Program) -> Iterator[tuple[WeightUse, str]]:
    """Linear layers and convolutions with input channels ("in") or rows ("out") of zeros."""
    for leaf in program.graph.find_nodes(op="get_attr"):
        tensor = program.constants[str(leaf.target)]
        if tensor.is_floating_point() and tensor.dim() > 1:
            layers = [u for u in weight_uses(leaf, tensor)[0] if u.family != "embedding"]
            yield from ((u, side) for side in ("in", "out") for u in layers if _zeros(tensor, u, side).any())


def is_zeroed(program: Program, use: WeightUse, side: str) -> bool:
    """Whether the layer still has input channels or rows of zeros."""
    leaf = _leaf(program, use.node)
    return leaf is not None and bool(_zeros(program.constants[str(leaf.target)], use, side).any())


def remove(engine: Transport, use: WeightUse, side: str, edit: Edit) -> Reject | None:
    """Remove what nobody reads among the layer's input channels, or its own. Returns why nothing can go."""
    x = use.node if side == "out" else next((n for n in use.node.all_input_nodes if not engine.facts.is_constant(n)), None)
    if x is None:
        return Reject("{} reads constants only", use.node)
    plan = engine.solve(Kind.REMOVE, Seed(x, (-1 if use.family == "linear" else 1,)))
    if not plan.count:
        return Reject("{}", plan.reason())
    nulls = Nulls(plan, edit.program)
    if product := nulls.unreadable():
        return Reject("{} reads the channels too, in a way this pass can't tell", product)
    keep = kept(nulls)
    if keep.all():
        product = nulls.weightless()
        return Reject("{} reads the channels too, without a weight", product) if product else Reject("every channel is read by some layer")
    if not keep.any():
        return Reject("no channel would be left")
    edit.nulls.update(nulls.values())  # what reads them may have weights there
    try:
        site = plan.apply(edit, keep.numpy(), f"{int((~keep).sum())} of {len(keep)} channels are read by nobody", at=use.node)
        site.places = []  # every layer that shares the channels would do it
    except ValueError as error:  # the form without them can't be written down
        return Reject("{}", error)
    return None


def kept(nulls: Nulls) -> Tensor:
    """Per class whether it stays."""
    return nulls.kept()


def _zeros(tensor: Tensor, use: WeightUse, side: str) -> Tensor:
    axis = use.contraction if side == "in" else use.channel
    return ~tensor.movedim(axis, 0).flatten(1).any(1)


def _leaf(program: Program, node: fx.Node) -> fx.Node | None:
    """The weight of a layer, the constant of most axes it reads."""
    leaves = [n for n in node.all_input_nodes if n.op == "get_attr"]
    return max(leaves, key=lambda n: program.constants[str(n.target)].dim(), default=None)
