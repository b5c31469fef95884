"""Which part of a long probe tells all of an op that does one and the same to every row: elementwise ops, norms of the last axes, linear ones,
and attention, to which every query is a row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
LINEAR, ATTENTION = aten.linear.default, aten.scaled_dot_product_attention.default
NORMS, MEANS = (aten.layer_norm.default, aten.rms_norm.default), (aten.mean.dim, aten.sum.dim_IntList)
ROWS, LEAST = 16, 8  # how many rows tell one op, and how many stay along the axis that is thinned


@dataclass(frozen=True)
class Operands:
    """along: operands with the result's rows, or one row for all; whole: those that every row reads. axes: of the result, from the end, along
    which it has rows; None for all before the last."""

    along: tuple[fx.Node, ...]
    whole: tuple[fx.Node, ...] = ()
    axes: tuple[int, ...] | None = None
    last: int = 1  # how many axes are one row

    @property
    def is_plain(self) -> bool:
        """Whether the rows are those of every op before and behind it."""
        return self.axes is None and self.last == 1


def operands(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Operands | None:
    """None for an op that may not do the same to every row."""
    nodes = [a if isinstance(a, fx.Node) else None for a in args]
    if any(isinstance(v, fx.Node) for v in kwargs.values()):
        return None
    if target is LINEAR:
        return Operands(_present(nodes[:1]), _present(nodes[1:]))
    if target is ATTENTION:
        is_causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
        return None if is_causal else Operands(_present([nodes[0], *nodes[3:4]]), _present(nodes[1:3]), axes=(-2,))
    if target in NORMS:
        return Operands(_present(nodes), last=len(args[1]))
    if target in MEANS:
        return Operands(_present(nodes)) if list(args[1:]) == [[-1], True] else None
    is_elementwise = target is aten.to.dtype or torch.Tag.pointwise in getattr(target, "tags", ())
    return Operands(_present(nodes)) if is_elementwise else None


@dataclass(frozen=True)
class Reads:
    """What a value is computed from: `along` and `whole` as in Operands, by old values; constants that every row reads, and those that lend
    rows of their own."""

    along: set[fx.Node]
    whole: set[fx.Node]
    weights: tuple[fx.Node, ...]
    fixed: tuple[fx.Node, ...]
    of: Operands


def reads(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], frontier: Mapping[fx.Node, fx.Node] | None = None) -> Reads | None:
    """None for an op that may not do the same to every row. frontier: the values that a new op and what was inserted before it are computed
    from, each with the old value it stands for; None: of an old op."""
    of = operands(target, args, kwargs)
    if of is None:
        return None
    along, fixed, roots = set[fx.Node](), [], {} if frontier is None else frontier
    for node in of.along:
        if node.op == "get_attr":
            fixed.append(node)
        elif frontier is None or node in roots:
            along.add(roots.get(node, node))
        elif (inner := reads(node.target, node.args, node.kwargs, frontier)) and not inner.whole and inner.of.is_plain:
            along |= inner.along
            fixed += inner.fixed
        else:
            return None
    values = [n for n in of.whole if n.op != "get_attr"]
    if frontier is not None and not roots.keys() >= set(values):
        return None
    return Reads(along, {roots.get(n, n) for n in values}, tuple(n for n in of.whole if n.op == "get_attr"), tuple(fixed), of)


def part_of(result: Tensor, reads: Reads, fixed: Collection[int]) -> tuple[int, int]:
    """(an axis, counted from the end; n): every n-th place along it is enough. n is 1 where there are few rows. fixed: axes left whole."""
    axes = reads.of.axes or range(-reads.of.last - 1, -result.dim() - 1, -1)
    axis = max((a for a in axes if a not in fixed and -a <= result.dim()), key=lambda a: result.shape[a], default=0)
    if not axis:
        return -1, 1
    return axis, max(1, min(result.shape[:-1].numel() // ROWS, result.shape[axis] // LEAST))


def length(value: Any, axis: int) -> int:
    """The size along an axis counted from the end; 1 where there is none, as in a number."""
    return int(value.shape[axis]) if isinstance(value, Tensor) and value.dim() >= -axis else 1


def places(values: Iterable[Any], axis: int, size: int, n: int) -> Tensor:
    """Every n-th place along the axis, and in each value the one with the number of greatest size: what a few tokens of a language model have
    may be thousands of times what the others have."""
    found = set(range(0, size, n))
    for value in values:
        if length(value, axis) == size and value.numel() and not value.is_complex():
            others = [a for a in range(-value.dim(), 0) if a != axis]
            found.add(int(torch.maximum(value.amax(others), -value.amin(others)).argmax()))
    return torch.tensor(sorted(found))


def at(value: Any, axis: int, places: Tensor) -> Any:
    """The value at some places of the axis; all of one that is the same along it."""
    return value if length(value, axis) == 1 else value.index_select(axis, places)


def is_mask(value: Any) -> bool:
    """Whether a value says of each row what is done to it."""
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _present(nodes: Iterable[fx.Node | None]) -> tuple[fx.Node, ...]:
    return tuple(n for n in nodes if n is not None)
