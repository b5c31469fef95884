"""Random sums of a weight's rows or columns: under changes that are linear in them they are what the rows are, and a wrong number in any row
moves them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

SUMS, RUN = 8, 128
LEAST = 1e-15  # whose square float32 holds
TILE = 1 << 16  # numbers that are squared while they are in the cache


def summed_axis(weight: Tensor, changes: Iterable[Any]) -> int | None:
    """The longer end of a weight, counted from behind, along which no recorded change mixes or moves places, and all are linear in the others;
    None if there is none, or it is short. Sums along an axis between others would copy the weight."""
    fixed = {axis for c in changes for axis in (c.axes if getattr(c, "is_linear", False) else range(-weight.dim(), 0))}
    last = next((axis for axis in range(-1, -weight.dim(), -1) if weight.shape[axis] > 1), -1)
    ends = {axis for axis in (-weight.dim(), last) if weight.dim() > 1 and axis not in fixed and weight.shape[axis] > 4 * SUMS}
    return max(ends, key=lambda axis: weight.shape[axis], default=None)


def factors(weight: Tensor, axis: int) -> Tensor | None:
    """[SUMS, places]: random factors of the places along a `summed_axis`, the same every time; a quiet place counts as much as a loud one. None
    where float32 doesn't hold how loud a place is."""
    random = torch.randn(SUMS, weight.shape[axis], generator=torch.Generator().manual_seed(0)).to(weight)
    norms = _norms(weight.reshape(len(weight), -1)) if axis == -weight.dim() else _norms_across(weight.reshape(-1, weight.shape[axis]))
    quiet = (norms < LEAST).nonzero().flatten()
    if not norms.isfinite().all() or weight.index_select(axis, quiet).any():
        return None
    return random / norms.masked_fill(norms == 0, 1)


def sums(weight: Tensor, axis: int, factors: Tensor) -> Tensor:
    """The sums of all places along the axis with each row of factors, in their place; in runs of RUN first, which rounds less."""
    runs = weight.shape[axis] // RUN
    even = runs * RUN
    rest: Tensor = torch.tensordot(factors[:, even:], weight.narrow(axis, even, weight.shape[axis] - even), dims=([1], [axis])).movedim(0, axis)
    if not runs:
        return rest
    if axis == -weight.dim():
        matrix = weight[:even].reshape(runs, RUN, -1)
        added = torch.bmm(factors[:, :even].reshape(SUMS, runs, RUN).transpose(0, 1), matrix).sum(0)
    else:
        matrix = weight.reshape(-1, weight.shape[axis])[:, :even].reshape(-1, runs, RUN).transpose(0, 1)
        added = torch.bmm(matrix, factors[:, :even].reshape(SUMS, runs, RUN).permute(1, 2, 0)).sum(0)
    return added.reshape(rest.shape) + rest


def _norms(matrix: Tensor) -> Tensor:
    """Of each row."""
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    return norms


def _norms_across(matrix: Tensor) -> Tensor:
    """Of each column; a few rows at a time."""
    squares = matrix.new_zeros(matrix.shape[1])
    for tile in torch.split(matrix, max(1, TILE // matrix.shape[1])):
        squares += tile.square().sum(0)
    return squares.sqrt_()
