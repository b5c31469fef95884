"""Ops that arrange axes: an index array goes through them as the value does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.transport.facts import grouped, runs
from fxcompress.transport.labels import Index, Kind
from fxcompress.transport.solver import Solver

aten = torch.ops.aten


def mapped(s: Solver, node: fx.Node, source: Any, forth: Callable[[Index], Index], back: Callable[[Index], Index]) -> None:
    """The value's labels through `forth`, the result's through `back`."""
    for label in s.labels(source):
        s.put(node, forth(label.index), label.power)
    for label in s.labels(node):
        s.put(source, back(label.index), label.power)


def permute(s: Solver, node: fx.Node) -> None:
    """Axes in another order."""
    x, order = node.args[0], _order(s, node)
    mapped(s, node, x, lambda i: i.transpose(order), lambda i: i.transpose(np.argsort(order)))


def _order(s: Solver, node: fx.Node) -> list[int]:
    rank, args = len(s.shape(node)), tuple[Any, ...](node.args)
    if node.target is aten.permute.default:
        return [a % rank for a in args[1]]
    order = list(range(rank))
    if rank > 1:
        a, b = args[1:3] if len(args) == 3 else (-2, -1)
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return order


def reshape(s: Solver, node: fx.Node) -> None:
    """Axes split and merged: within a group of axes of equal product positions keep their order."""
    x: Any = node.args[0]
    _lent(s, node)
    groups = s.facts.groups(node, x)
    before, after = s.shape(x), s.shape(node)
    swapped = [(b, a) for a, b in groups]
    mapped(s, node, x, lambda i: reshaped(s, i, groups, before, after), lambda i: reshaped(s, i, swapped, after, before))


def _lent(s: Solver, node: fx.Node) -> None:
    """A form taken from another value loses what that one loses."""
    if s.kind == Kind.REMOVE and node.target in LENT:
        mapped(s, node, node.args[1], lambda i: i, lambda i: i)


def reshaped(s: Solver, index: Index, groups: Any, before: Any, after: Any) -> Index:
    """The index in the other shape. Where a group holds a dynamic size, positions that the two shapes don't count alike share one parameter."""
    kept = runs(groups, before, after)
    index = s.coarsen(index, {a for mine, _ in groups for a in mine}.difference(*(mine for mine, *_ in kept)))
    full, target = [1] * len(before), [1] * len(after)
    split, wide = list[int](), list[int]()
    for mine, theirs, outer, inner in kept:
        if any(index.shape[a] > 1 for a in mine):
            for sizes, shape, axes, parts in ((full, before, mine, split), (target, after, theirs, wide)):
                for a in axes:
                    sizes[a] = shape[a]
                parts.extend((outer, prod(shape[a] for a in axes) // (outer * inner), inner))
    index = s.coarsen(np.broadcast_to(index, full).reshape(split), range(1, len(split), 3))
    return np.broadcast_to(index, wide).reshape(target)


def expand(s: Solver, node: fx.Node) -> None:
    """Repetition along axes of size 1: the value knows one parameter for all copies, and nothing of copies that go."""
    x: Any = node.args[0]
    _lent(s, node)
    for label in s.labels(x):
        s.put(node, label.index, label.power)
    for label in s.labels(node):
        if s.kind == Kind.REMOVE:
            shape = s.shape(x)
            copied = [a for a in label.slot if a < label.index.ndim - len(shape) or shape[a - label.index.ndim] == 1]
            if (index := parted(s, node, label.index, copied)) is not None:
                s.put(node, index, label.power)
                continue
        if not s.is_unmoved(node, x, label.index):
            s.put(x, label.index, label.power)


def parted(s: Solver, node: fx.Node, index: Index, copied: Collection[int]) -> Index | None:
    """Of an index over originals and the axes of their copies the part over the copies, if these are what goes; None if all copies go with
    their original."""
    others = [a for a, n in enumerate(index.shape) if n > 1 and a not in copied]
    if not copied or (others and s.choices.setdefault(node, "entries") != "copies"):
        return None
    return s.coarsen(index, others)


def shuffle(s: Solver, node: fx.Node) -> None:
    """[.., C r r, H, W] to [.., C, H r, W r] or back."""
    deep, wide = (node.args[0], node) if node.target is aten.pixel_shuffle.default else (node, node.args[0])
    before, after, r = s.shape(deep), s.shape(wide), s.args(node)["upscale_factor" if deep is node.args[0] else "downscale_factor"]
    lead, height, width = after[:-2], before[-2], before[-1]
    parted, mixed, rank = (*lead, r, r, height, width), (*lead, height, r, width, r), len(lead)
    order = [*range(rank), rank + 2, rank, rank + 3, rank + 1]

    whole = s.kind == Kind.REMOVE  # the factor stays: all r r go or none

    def forth(i: Index) -> Index:
        """From deep to wide."""
        i = reshaped(s, i, grouped(before, parted), before, parted)
        i = (s.coarsen(i, (rank, rank + 1)) if whole else i).transpose(order)
        return reshaped(s, i, grouped(mixed, after), mixed, after)

    def back(i: Index) -> Index:
        """From wide to deep."""
        i = reshaped(s, i, grouped(after, mixed), after, mixed).transpose(np.argsort(order))
        i = s.coarsen(i, (rank, rank + 1)) if whole else i
        return reshaped(s, i, grouped(parted, before), parted, before)

    mapped(s, node, node.args[0], *((forth, back) if deep is not node else (back, forth)))


def as_complex(s: Solver, node: fx.Node) -> None:
    """Real and imaginary part share a parameter."""
    if not _is_linear_in_pairs(s, node, node.args[0]):
        return
    mapped(s, node, node.args[0], lambda i: s.coarsen(i, [i.ndim - 1])[..., 0], lambda i: i[..., None])


def as_real(s: Solver, node: fx.Node) -> None:
    """Real and imaginary part share a parameter."""
    if not _is_linear_in_pairs(s, node, node.args[0]):
        return
    mapped(s, node, node.args[0], lambda i: i[..., None], lambda i: s.coarsen(i, [i.ndim - 1])[..., 0])


def _is_linear_in_pairs(s: Solver, node: fx.Node, x: Any) -> bool:
    if s.kind in ("shift", "rotate"):
        s.stop_all(node, [x, node], f"{node.name} pairs real numbers into complex ones")
        return False
    return True


LENT = (aten.view_as.default, aten.reshape_as.default, aten.expand_as.default)
TABLE: Mapping[Any, Any] = {
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default, aten.swapaxes.default), permute),
    **dict.fromkeys(
        (
            *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_as.default, aten.reshape_as.default),
            *(aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default),
            *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
        ),
        reshape,
    ),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default, aten.broadcast_to.default), expand),
    aten.pixel_shuffle.default: shuffle,
    aten.pixel_unshuffle.default: shuffle,
    aten.view_as_complex.default: as_complex,
    aten.view_as_real.default: as_real,
}
