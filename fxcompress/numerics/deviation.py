"""What a quantiser did to each block of a tensor, beside what one of its format must do. The two tensors are read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf, log2

import torch
from torch import Tensor

from fxcompress.numerics.blocks import block_sizes, inside, scale_shape, walk
from fxcompress.numerics.formats import Format
from fxcompress.numerics.noise import decibel, ideal_noise
from fxcompress.numerics.ranges import quantisation_error, scale_from_range

_TILE = 1 << 17  # numbers, of which a few copies fit the cache
_REORDERED = 1.01  # times a sum of squares in float32


@dataclass(frozen=True, eq=False)
class Deviation:
    """x, and per block of it, of scale_shape: its least and greatest value in x's dtype; Σ x² (powers), max |x - approx| (greatest) and
    Σ (x - approx)² (squares) in float64. `of` makes it."""

    x: Tensor
    block: tuple[int, ...]
    lo: Tensor
    hi: Tensor
    powers: Tensor
    greatest: Tensor
    squares: Tensor

    @classmethod
    def of(cls, x: Tensor, approx: Tensor, block: Sequence[int]) -> Deviation | None:
        """x: floats, at least one. approx: of its shape and dtype. None if a number isn't finite."""
        shape = scale_shape(x.shape, block)
        lo, hi = x.new_full(shape, inf), x.new_full(shape, -inf)
        powers, greatest, squares = (x.new_zeros(shape, dtype=torch.float64) for _ in range(3))
        for (a, at), (b, _) in zip(walk(x, block, _TILE), walk(approx, block, _TILE), strict=True):
            axes = inside(a)
            lo[at], hi[at] = torch.minimum(lo[at], a.amin(axes)), torch.maximum(hi[at], a.amax(axes))
            off = (a - b).abs_()
            most = off.amax(axes).double()
            greatest[at] = torch.maximum(greatest[at], most)
            squares[at] += _squares(off, most, axes)
            powers[at] += _squares(a, torch.maximum(hi[at], -lo[at]), axes)
        if not (lo.isfinite() & hi.isfinite() & greatest.isfinite()).all():
            return None
        return cls(x, tuple(block), lo, hi, powers, greatest, squares)

    @property
    def sqnr(self) -> float:
        """10 log10(Σ x² / Σ (x - approx)²) in dB; inf for equal tensors."""
        return decibel(float(self.powers.sum()), float(self.squares.sum()))

    def ideal_sqnr(self, format: Format, symmetric: bool) -> float:
        """`noise.ideal_sqnr` of x."""
        return decibel(float(self.powers.sum()), ideal_noise(self.x, self.lo, self.hi, format, self.block, symmetric))

    def is_near(self, format: Format, symmetric: bool) -> Tensor:
        """Per block whether no value is off by more than half the greatest step of the block's own min-max grid, stretched to qmax + 1 codes a
        side."""
        scale, _ = scale_from_range(self.lo, self.hi, format, symmetric)
        rounding = torch.finfo(self.x.dtype).eps * torch.maximum(self.hi, -self.lo).double()
        return self.greatest <= scale.double() * _greatest_step(format) * (1 + 1 / format.qmax) / 2 + rounding

    def excess(self, format: Format, symmetric: bool) -> Tensor:
        """Per block the squared error of approx over the one it may have: that of rounding x on the block's own min-max grid.

        Of integers at most 1, without another look, where no value is off by more than half a step of that grid, stretched to qmax + 1 codes a
        side: rounding is nearest then, whatever the grid, and luck decides the sum. Of floats, whose steps vary, twice the error is allowed
        where no value is off by more than half the greatest step. So what clips must win by it. Rounding to x's dtype comes on top. Returns
        float64 of scale_shape.
        """
        x, block, is_near = self.x, self.block, self.is_near(format, symmetric)
        ratio = (self.greatest > 0).double()
        if format.kind == "int" and is_near.all():
            return ratio
        is_settled = is_near & (format.kind == "int")
        scale, zero = scale_from_range(self.lo, self.hi, format, symmetric)
        eps = torch.finfo(x.dtype).eps
        rows = (~is_settled).reshape(len(x), -1).any(1) if block[:1] == (1,) else slice(None)  # those of channels that are cut are few
        x, scale, zero, squares = x[rows], scale[rows], None if zero is None else zero[rows], self.squares[rows]
        allowed = quantisation_error(x, scale, zero, format, block).double() * torch.where(is_near[rows], 2, _REORDERED)
        lost = torch.where(squares == 0, 0, squares / (allowed.sqrt() + eps * self.powers[rows].sqrt()).square())
        ratio[rows] = torch.where(is_settled[rows], lost.clamp(max=1), lost)
        return ratio

    def beyond(self, found: Tensor) -> Tensor:
        """Per block the squared error of approx over another one of the same, summed in another order; what rounding to x's dtype may do to
        blocks of at most the greatest value comes on top. found: of scale_shape. Returns float64 of it."""
        greatest = max(float(self.hi.max()), -float(self.lo.min()))
        rounding = torch.finfo(self.x.dtype).eps * greatest * block_sizes(self.x.shape, self.block).double().sqrt()
        return torch.where(self.squares == 0, 0, self.squares / ((_REORDERED * found.double()).sqrt() + rounding).square())


def _squares(x: Tensor, most: Tensor, axes: list[int]) -> Tensor:
    """Σ x² in float64, |x| at most `most`; summed in float32 where it holds the squares."""
    is_far = ((most < 1e-12) & (most > 0) | (most > 1e15)).any()
    wide = x.double() if x.itemsize < 4 or is_far else x
    return wide.square().sum(axes).double()


def _greatest_step(format: Format) -> float:
    """Between the two greatest numbers of the format: 1 for integers."""
    return 1.0 if format.kind == "int" else 2.0 ** floor(log2(format.qmax)) * torch.finfo(format.container).eps
