"""Granularity: which elements of a tensor share one scale.

A block has one entry an axis: how many neighbours along that axis share a scale, -1 for all of them. The scale has the tensor's rank and
ceil(size / block) entries an axis, so a scale always says by its own shape what it belongs to:

    tensor [N, K]    per tensor (-1, -1) -> [1, 1]    per output channel (1, -1) -> [N, 1]    groups of g along K (1, g) -> [N, ceil(K / g)]

Where a block doesn't divide the axis, the last one is shorter; nothing is ever padded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from fxcompress.errors import RecipeError

Block = tuple[int, ...]
Index = tuple[slice, ...]

GRANULARITIES = ("tensor", "channel", "token", "group:64")


def block_of(granularity: str, shape: Sequence[int], channel_axis: int = 0, group_axis: int = -1) -> Block:
    """The block that a granularity's name means for a tensor of that shape.

    "tensor": one scale. "channel": one for each index of channel_axis. "token": one for each vector along the last axis.
    "group:G": one for each G neighbours along group_axis at every index of all other axes; G at least the axis means the whole axis.
    Raises RecipeError for any other name, for G < 1 and for an axis the tensor lacks.
    """
    group = re.fullmatch(r"group:([1-9]\d*)", granularity)
    rank = len(shape)
    if granularity == "tensor":
        return (-1,) * rank
    if granularity == "channel":
        return _with(rank, -1, channel_axis, 1)
    if granularity == "token":
        return _with(rank, 1, -1, -1)
    if group:
        axis = _axis(group_axis, rank)
        size = int(group[1])
        return _with(rank, 1, axis, -1 if size >= shape[axis] else size)
    raise RecipeError(f"unknown granularity {granularity!r}", do=f"one of {', '.join(GRANULARITIES)} (any positive group size)")


def scale_shape(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """ceil(size / block) an axis; 1 where block is -1. Raises ValueError if the ranks differ or an entry is neither -1 nor positive."""
    if len(shape) != len(block):
        raise ValueError(f"block {tuple(block)} has {len(block)} entries, the tensor of shape {tuple(shape)} has {len(shape)} axes")
    if any(b < 1 and b != -1 for b in block):
        raise ValueError(f"block {tuple(block)}: every entry must be -1 or positive")
    return tuple(1 if b == -1 else -(-size // b) for size, b in zip(shape, block, strict=True))


def block_sizes(shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """How many elements each scale serves: int64, of scale_shape."""
    counts = torch.ones((1,) * len(shape), dtype=torch.int64)
    for axis, (size, b, blocks) in enumerate(zip(shape, block, scale_shape(shape, block), strict=True)):
        along = torch.full((blocks,), size if b == -1 else b)
        if blocks and b != -1:
            along[-1] = size - (blocks - 1) * b
        counts = counts * along.reshape(_with(len(shape), 1, axis, -1))
    return counts


def tiles(shape: Sequence[int], block: Sequence[int], limit: int) -> Iterator[tuple[Index, Index]]:
    """Cut a tensor into tiles of about `limit` elements, each made of equal blocks: (index into the tensor, index into its scale).

    A tile holds whole blocks along an axis with several blocks, and may hold a part of the block along an axis with one. A shorter last
    block is a tile of its own, which is why no caller meets raggedness. A block larger than `limit` on an axis with several isn't cut.
    """
    if not shape:
        yield (), ()
        return
    rest = max(1, prod(shape[1:]))
    for rows, scales in _spans(shape[0], block[0], limit // rest):
        for inner, inner_scales in tiles(shape[1:], block[1:], max(1, limit // max(1, rows.stop - rows.start))):
            yield (rows, *inner), (scales, *inner_scales)


def walk(x: Tensor, block: Sequence[int], limit: int) -> Iterator[tuple[Tensor, Index]]:
    """The tiles of x as `split` views, each with its index into the scale."""
    shape = scale_shape(x.shape, block)
    for index, scales in tiles(x.shape, block, limit):
        yield split(x[index], _sizes(shape, scales)), scales


def split(x: Tensor, blocks: Sequence[int]) -> Tensor:
    """A view of a tile with every axis cut in two, (its number of blocks, elements of a block): the odd axes run inside a block."""
    return x.view([n for size, count in zip(x.shape, blocks, strict=True) for n in (count, size // count)])


def widen(scale: Tensor) -> Tensor:
    """A view of a tile's scale that broadcasts against `split` of the tile."""
    return scale.reshape([n for count in scale.shape for n in (count, 1)])


def expanded(scale: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """The scale of every element: scale_shape(shape, block) -> shape, without copies along axes with one block."""
    for axis, (size, b) in enumerate(zip(shape, block, strict=True)):
        if scale.shape[axis] > 1 and b > 1:
            scale = scale.repeat_interleave(b, axis).narrow(axis, 0, size)
    return scale.expand(tuple(shape))


def inside(x: Tensor) -> list[int]:
    """The axes of a `split` tile that run inside a block: a reduction over them has the scale's shape."""
    return list(range(1, x.dim(), 2))


def _sizes(shape: Sequence[int], index: Index) -> list[int]:
    return [len(range(*i.indices(n))) for i, n in zip(index, shape, strict=True)]


def _spans(size: int, block: int, limit: int) -> Iterator[tuple[slice, slice]]:
    whole = block == -1 or block >= size
    unit = 1 if whole else block
    step = max(unit, limit // unit * unit)
    even = size // unit * unit
    for start in range(0, even, step):
        stop = min(start + step, even)
        yield slice(start, stop), slice(0, 1) if whole else slice(start // unit, stop // unit)
    if even < size:
        yield slice(even, size), slice(even // unit, even // unit + 1)


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise RecipeError(f"no axis {axis} in a tensor of {rank} axes", do="name an axis of the tensor, or another granularity")
    return axis % rank


def _with(rank: int, default: int, axis: int, value: int) -> Block:
    axis = _axis(axis, rank)
    return tuple(value if i == axis else default for i in range(rank))
