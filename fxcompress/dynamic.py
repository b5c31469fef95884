"""Which axes of the inputs are dynamic, and the example at other sizes: what capture traces with and what it is verified on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from fxcompress.errors import CaptureError, nearest

Axes = tuple[frozenset[int], ...]  # per input: the axes to be dynamic


def default_axes(tensors: Sequence[Tensor]) -> Axes:
    """Axis 0 of every input that has the batch's size, and the sequence: every other axis of an integer or boolean input, axis 1 of a float
    matrix or sequence of vectors, axis 0 of an input without a batch. What the model's code fixes after all (channels) is found by export.
    """
    with_batch = set(batched(tensors))
    return tuple(_sequence(t) | {0} if i in with_batch else _unbatched(t) for i, t in enumerate(tensors))


def batched(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The inputs whose axis 0 is the batch: those with the commonest size there."""
    sizes = Counter(t.shape[0] for t in tensors if t.dim())
    batch = sizes.most_common(1)[0][0] if sizes else 0
    return tuple(i for i, t in enumerate(tensors) if t.dim() and t.shape[0] == batch)


def _unbatched(tensor: Tensor) -> frozenset[int]:
    return _sequence(tensor) | frozenset([0] if tensor.dim() and tensor.shape[0] > 1 else [])


def _sequence(tensor: Tensor) -> frozenset[int]:
    if not tensor.is_floating_point():
        return frozenset(range(1, tensor.dim()))
    return frozenset([1] if tensor.dim() in (2, 3) else [])


def asked_axes(dynamic: Mapping[str, Sequence[int]], names: Sequence[str], tensors: Sequence[Tensor]) -> Axes:
    """The axes a user asked for, by input name; an unlisted input is fixed. CaptureError for an unknown input or axis."""
    for name, axes in dynamic.items():
        if name not in names:
            raise CaptureError(f"dynamic= names an unknown input {name!r}", why=nearest(name, names))
        rank = tensors[names.index(name)].dim()
        if bad := [a for a in axes if not 0 <= a < rank]:
            raise CaptureError(f"dynamic= names axis {bad[0]} of {name!r}", why=f"it has {rank} axes", do="count axes from 0")
    return tuple(frozenset(dynamic.get(name, ())) for name in names)


def widened(tensors: Sequence[Tensor], axes: Axes) -> list[Tensor]:
    """The example with every dynamic axis of size 1 repeated to 2: a size of 1 would be traced as a constant."""
    return [_resized(t, [max(2, n) if i in free else n for i, n in enumerate(t.shape)], free) for t, free in zip(tensors, axes, strict=True)]


def at_sizes(tensors: Sequence[Tensor], shapes: Sequence[Sequence[Any]], sizes: Mapping[str, int]) -> list[Tensor]:
    """The example at other sizes: shapes are per input sizes or expressions in symbols, sizes gives each symbol a value."""
    values = {sympy.Symbol(k): v for k, v in sizes.items()}
    free = [{axis for axis, d in enumerate(shape) if not isinstance(d, int)} for shape in shapes]
    return [_resized(t, [size_at(d, values) for d in shape], f) for t, shape, f in zip(tensors, shapes, free, strict=True)]


def other_size(size: int, low: int, high: int) -> int:
    """Another size of an axis than the example's: one more, or one less where the range ends."""
    return size + 1 if size + 1 <= high else max(low, size - 1)


def size_at(dim: Any, values: Mapping[sympy.Symbol, int]) -> int:
    """The size of an axis (a number or an expression in symbols) where the symbols have these values."""
    return dim if isinstance(dim, int) else int(sympy.sympify(dim, locals={str(s): s for s in values}).subs(values))


def _resized(tensor: Tensor, shape: Sequence[int], free: Collection[int]) -> Tensor:
    """Entries again and again along every axis that grows, each time moved by one along the longest other axis: values stay legal (tokens,
    masks, timesteps) and repeated rows differ, so that rows taken for each other show. free: the axes that may grow. Integers are moved along
    batch and sequence alone: the corners of a box stay in their order."""
    for axis, size in enumerate(shape):
        length = tensor.shape[axis]
        if size > length:
            others = [a for a in range(tensor.dim()) if a != axis and tensor.shape[a] > 1]
            moving = others if tensor.is_floating_point() else [a for a in others if a in free and a < 2]
            along = max(moving, key=lambda a: tensor.shape[a], default=None)
            copies = [tensor if along is None else tensor.roll(turn, along) for turn in range(-(-size // length))]
            tensor = torch.cat(copies, axis)
        tensor = tensor.narrow(axis, 0, size)
    return tensor
