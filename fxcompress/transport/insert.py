"""What can take a change where nothing else can: an explicit op, x * 1, x + 0, x I, or a copy of a constant for one of its readers.

A plan seeded on the op's result lands in its constant, one that stopped because a constant is shared lands in the copy. Costs an op at run time
or the bytes of a tensor; a pass that asks for it says so in its report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.edit import Edit
from fxcompress.transport.labels import Kind

aten = torch.ops.aten


def insert(edit: Edit, node: fx.Node, kind: Kind, axis: int = -1, readers: Sequence[fx.Node] = ()) -> fx.Node:
    """The node's value through a neutral op with a constant along the axis, read by `readers` (all, if none are named); inside a site.

    A scale or sign gets ones [C], a shift zeros [C], a rotation the identity [C, C] (last axis only). ValueError for kinds that move channels
    and for an axis of dynamic size. Make a new Transport afterwards.
    """
    value = node.meta["val"]
    axis %= value.dim()
    size = value.shape[axis]
    if not isinstance(size, int) or kind in (Kind.PERMUTE, Kind.REMOVE) or (kind == Kind.ROTATE and axis != value.dim() - 1):
        raise ValueError(f"no op takes a {kind} along axis {axis} of {node.name}{list(value.shape)}")
    place = node.next
    op, neutral = _neutral(kind, size, value.dim() - 1 - axis)
    constant = edit.constant(f"{node.name}.{kind}", neutral.to(value.dtype), like=node, before=place)
    new = edit.insert(op, node, constant, like=node, before=place, val=value)
    if not readers:
        edit.replace(node, new)
    for reader in readers:
        args, kwargs = fx.node.map_arg((reader.args, reader.kwargs), lambda n: new if n is node else n)
        edit.update(reader, *args, **kwargs)
    return new


def untie(edit: Edit, leaf: fx.Node, readers: Sequence[fx.Node]) -> fx.Node:
    """A copy of a constant, read by `readers` in place of it; inside a site. Make a new Transport afterwards."""
    copy = edit.constant(str(leaf.target), edit.program.constants[str(leaf.target)], like=readers[0], before=min(readers))
    copy.meta = {**copy.meta, "val": leaf.meta["val"]}
    for reader in readers:
        args, kwargs = fx.node.map_arg((reader.args, reader.kwargs), lambda n: copy if n is leaf else n)
        edit.update(reader, *args, **kwargs)
    return copy


def _neutral(kind: Kind, size: int, trailing: int) -> tuple[Any, torch.Tensor]:
    if kind == Kind.ROTATE:
        return aten.linear.default, torch.eye(size)
    shape = (size, *(1,) * trailing)
    return (aten.add.Tensor, torch.zeros(shape)) if kind == Kind.SHIFT else (aten.mul.Tensor, torch.ones(shape))
