"""Products of probabilities and values, found by what softmax normalised and what the product sums over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxcompress.dataflow import VIEWS, is_move
from fxcompress.passes.quant.grids import DEQUANTIZE, QUANTIZE
from fxcompress.passes.quant.sites import MatmulSite, matmul_sites, source_of
from fxcompress.program import Program
from fxcompress.rewrite import Reject

aten = torch.ops.aten
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
PASSED = (  # what may stand between a softmax and its product, number by number
    *(aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    *(aten._to_copy.default, aten.to.dtype, QUANTIZE, DEQUANTIZE),
)


@dataclass(frozen=True)
class Attention:
    """node: the product. probabilities: where a quantiser of them stands, reader: what reads them there, both before moves. left, right: what
    the product multiplies."""

    node: fx.Node
    probabilities: fx.Node
    reader: fx.Node
    left: fx.Node
    right: fx.Node


@dataclass(frozen=True)
class Normalised:
    """softmax: the op that a value comes from. axis: of the value, the one whose numbers it made sum to 1; None where a move hides it."""

    softmax: fx.Node
    axis: int | None


def attentions(program: Program) -> Iterator[tuple[fx.Node, Attention | Reject]]:
    """Every product of probabilities and values, in order, with why they can't be quantised where they can't."""
    for site in matmul_sites(program):
        if site.family == "product" and site.node.target is not aten.linear.default:
            left, right = (site.activations[i] for i in sorted(site.activations))
            if found := normalised(left):
                yield site.node, _refused(site, left, found) or Attention(site.node, *source_of(left, site.node), left, right)


def normalised(value: fx.Node) -> Normalised | None:
    """The softmax that a value comes from, moved, masked, cast and quantised at most."""
    if value.target in SOFTMAXES:
        return Normalised(value, int(value.args[1]) % value.meta["val"].dim())  # type: ignore[arg-type]
    if not (is_move(value) or value.target in PASSED or _is_inactive_dropout(value)):
        return None
    for operand in value.all_input_nodes:
        if found := normalised(operand):
            return Normalised(found.softmax, None if found.axis is None else _followed(found.axis, operand, value))
    return None


def _refused(site: MatmulSite, left: fx.Node, found: Normalised) -> Reject | None:
    source, summed = source_of(left, site.node)[0], left.meta["val"].dim() - 1
    if source.target is DEQUANTIZE:
        return Reject("{} reads probabilities that are {} already", site.node, source.args[3])
    if found.axis is None:
        return Reject("{} reads {} after moves behind which the axis it normalised isn't known", site.node, found.softmax)
    if found.axis != summed:
        return Reject("{} sums over axis {} of {}, {} normalised axis {}", site.node, summed, left, found.softmax, found.axis)
    return None


def _followed(axis: int, before: fx.Node, after: fx.Node) -> int | None:
    """Where an axis of an operand is in the op's result, None where the op may mix it with others."""
    if after.target in VIEWS:
        axes = VIEWS[after.target](tuple(range(before.meta["val"].dim())), *after.args[1:])
        return axes.index(axis) if axis in axes else None
    old, new = before.meta["val"].shape, after.meta["val"].shape
    if len(old) == len(new) and (after.target is aten.slice.Tensor or not is_move(after)):
        return axis
    behind = len(old) - axis
    return len(new) - behind if old[axis:] == new[len(new) - behind :] else None


def _is_inactive_dropout(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and not node.args[2]
