"""Hidden channels and attention heads that nobody reads, or that hold nothing but 0, are removed from every weight that has them.

    W2 f(W1 x),    W2[:, i] = 0,  or  W1[i] = 0 and b1[i] = 0 and f(0) = 0  ->  row i of W1 and column i of W2 go
    W_o concat_h(softmax(Q_h K_h^T) V_h),    all columns of W_o, or all rows of W_v, for head h are 0  ->  its rows and columns go from all four

A site is a product with input channels or rows of a weight that are all 0, as structured pruning leaves them, or a batch norm whose gain and
bias are (`zeros`). Which weights share the channel is found from the dataflow, through activations, norms per channel or head, products,
attention and layouts; it goes only if every layer that reads it has zeros there or is given zeros (`nulls`). Heads and experts go whole, heads
with those that share their keys and values, or else one of each that share; or equally many channels of each (`plans`). Sizes written in views
are rewritten, and the scale of attention stays. Legal where no op sees the channels as a set; declined with the op that does. Exact: what goes
was added as 0. Saves the rows, the columns and their arithmetic.
Source: structured pruning as in DepGraph (arXiv 2301.12900), by one change of channels instead of a table of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.passes.sparsity.nulls import Nulls
from fxcompress.passes.sparsity.zeros import Zeroed, zeroed
from fxcompress.rewrite import Context, Reject, Transform
from fxcompress.transport import Kind, Plan, Seed, Transport
from fxcompress.transport.labels import UNSET

aten = torch.ops.aten
COUPLED = "the channels that {} has zeros for go only together with others"
ROUTES = ("entries", "copies", "channels", "each")


class RemoveChannels(Transform):
    """Remove every hidden channel and attention head that contributes 0 to every layer that reads it."""

    name = "sparsity.remove_channels"
    contract = Exact()
    excludes = frozenset({"quantised"})

    def run(self, on: Context, edit: Edit) -> Mapping[str, Reject]:
        """One site per group of coupled channels, at the first layer that reads or makes it."""
        declined: dict[str, Reject] = {}
        engine = Transport(on.program)
        for node in [n for n in on.program.graph.nodes if n.op == "call_function" and on.admits(n)]:
            stuck = set[Seed]()
            while zeros := next((z for z in zeroed(engine.facts, node) if z.seed not in stuck), None):
                if reject := remove(engine, zeros, edit):
                    declined.setdefault(node.name, reject)
                    stuck.add(zeros.seed)
                else:  # some went, by one route; others may by another
                    engine = Transport(on.program)
        return declined


def remove(engine: Transport, zeros: Zeroed, edit: Edit) -> Reject | None:
    """Remove what nobody reads among the channels that meet zeros, by the first route that lets some go. Returns why nothing can."""
    rejects = dict[str, Reject]()
    for route, plan in plans(engine, zeros.seed):
        nulls = Nulls(plan, edit.program)
        keep = kept(nulls) if plan.count else None
        if keep is not None and route == "each":
            keep = even(plan, keep)
        if reject := _refused(zeros, plan, nulls, keep):
            rejects[route] = reject
            continue
        assert keep is not None
        edit.nulls.update(nulls.values())  # what reads them may have weights there
        try:
            site = plan.apply(edit, keep.numpy(), f"{int((~keep).sum())} of {len(keep)} channels are read by nobody", at=zeros.node)
        except ValueError as error:  # the form without them can't be written down
            rejects[route] = Reject("{}", error)
            continue
        site.places = []  # every layer that shares the channels would do it
        return None
    whole, alike = (rejects.get(route) for route in ("entries", "channels"))
    if whole and alike and alike.sentence != COUPLED and alike.reason != whole.reason:
        return Reject("{}; of all heads alike, {}", whole.reason, alike.reason)
    return next(iter(rejects.values()))


def plans(engine: Transport, seed: Seed) -> Iterator[tuple[str, Plan]]:
    """Ways to remove channels. Where there are heads, groups or experts: these as a whole, with all that share keys and values; of each that
    share them the same one; the same channels of each; equally many of each."""
    plan = engine.solve(Kind.REMOVE, seed)
    parted = [n for n, route in plan.choices.items() if route in ROUTES]
    if not parted:
        yield "", plan
    for route in ROUTES if parted else ():
        is_chosen = all(plan.choices[n] == route for n in parted)
        yield route, plan if is_chosen else engine.solve(Kind.REMOVE, seed, choices=dict.fromkeys(parted, route))
        if route == ROUTES[0] and not is_chosen:
            yield "", plan


def even(plan: Plan, keep: Tensor) -> Tensor:
    """Where channels lie in rows that must lose equally many, no more go from any than from the one that loses fewest."""
    for label in (label for labels in plan.values.values() for label in labels if len(label.slot) > 1):
        rows = plan.class_of(label.index).reshape(-1, label.index.shape[label.slot[-1]])
        gone = (rows != UNSET) & ~keep.numpy()[rows]
        keep[rows[gone & (gone.cumsum(-1) > gone.sum(-1).min())]] = True
    return keep


def kept(nulls: Nulls) -> Tensor:
    """Per class whether it stays."""
    return nulls.kept()


def _refused(zeros: Zeroed, plan: Plan, nulls: Nulls, keep: Tensor | None) -> Reject | None:
    """Why no channel can go by this plan, if none can."""
    if keep is None:
        return Reject("{}", plan.reason())
    if product := nulls.unreadable():
        return Reject("{} reads the channels too, in a way this pass can't tell", product)
    if not keep.any():
        return Reject("no channel would be left")
    if not keep.all():
        return None
    index, dead = plan.seeds[0][1].ravel(), zeros.zeros.numpy().ravel()
    classes = plan.class_of(index)
    if (classes[dead] == UNSET).all():
        return Reject("{}", next(stop.reason for stop, parameters in plan.pinned.items() if np.isin(index[dead], parameters).any()))
    if np.isin(classes[dead], classes[~dead]).all():
        return Reject(COUPLED, zeros.node)
    if zeros.node.target is aten.batch_norm.default:
        return Reject("{} makes channels whose gain is 0 its bias, {}, which is read", zeros.node, zeros.node.args[2])
    product = nulls.weightless()
    return Reject("{} reads the channels too, without a weight", product) if product else Reject("every channel is read by some layer")
