"""Quantise and dequantise as one differentiable function, for training through a quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.numerics.affine import check_operands, on_grid, on_line, unclipped, working_dtype
from fxcompress.numerics.blocks import inside, split, tiles, walk, widen
from fxcompress.numerics.formats import Format

TILE = 1 << 18
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int], kept: Tensor | None = None
) -> Tensor:
    """y = dequantize(quantize(x)), bit for bit, with the straight-through gradient. Shapes, dtype and errors as in the two.

    With v = x / s and the code q unclipped: dy/dx = 1 where qmin <= q <= qmax, else 0; dy/ds = q - z - v there, else the bound - z, summed
    over the block. No factor 1 / sqrt(n qmax) is applied, no gradient goes to z. A float format: the same with q = cast(v). A log format: the
    same with the value 2^(-code / tau) for q, which counts as clipped above s and where it is 0. kept: bool, of x's shape, the entries that
    pass as they are, with dy/dx = 1 and dy/ds = 0.
    Source: LSQ (ICLR 2020), section 2.1, eq. 3 and 5; QDrop (arXiv 2203.05740) for what is kept.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, format, block, kept)  # type: ignore[no-untyped-call]
    return result


class _FakeQuantize(torch.autograd.Function):
    """Slopes are made on the way forward, where all that they need is at hand. In place, and without bools: time goes into memory here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int], kept: Tensor | None
    ) -> Tensor:
        check_operands(x, scale, zero_point, format, block)
        y, slope, passed = _tiled(x, scale, zero_point, format, block)
        if kept is not None:
            keep(y, kept, x.to(y.dtype))
            slope.mul_(kept.logical_not().to(slope.dtype))
            passed.bitwise_or_(kept)
        ctx.save_for_backward(slope, passed, scale)
        ctx.dtype, ctx.block = x.dtype, block
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        slope, passed, scale = ctx.saved_tensors
        grad_x = passed.to(grad.dtype).mul_(grad).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, _summed(grad * slope, scale, ctx.block) if ctx.needs_input_grad[1] else None, None, None, None, None


def keep(x: Tensor, kept: Tensor, old: Tensor) -> Tensor:
    """x[kept] = old[kept] in place, by arithmetic on bits: a branch an entry, as of `where`, takes several times as long on a random mask.

    All of one shape, kept bool, x and old of one floating dtype. Gives x.
    """
    word = WORDS[x.element_size()]
    x.view(word).bitwise_xor_(old.view(word)).mul_(kept.logical_not().to(word)).bitwise_xor_(old.view(word))
    return x


def _tiled(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int]) -> tuple[Tensor, ...]:
    """(y, dy/ds, dy/dx as bytes), of x's shape."""
    places = list(tiles(x.shape, block, TILE))
    if len(places) == 1:
        return tuple(v.reshape(x.shape) for v in _tile(split(x, scale.shape), scale, zero_point, format))
    found = tuple(torch.empty_like(x, dtype=d) for d in (scale.dtype, working_dtype(format, x.dtype, scale.dtype), torch.uint8))
    for at, own in places:
        zero = None if zero_point is None else zero_point[own]
        for whole, part in zip(found, _tile(split(x[at], scale[own].shape), scale[own], zero, format), strict=True):
            whole[at] = part.reshape(whole[at].shape)
    return found


def _tile(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """As `_tiled`, of a `split` tile."""
    work, out = working_dtype(format, x.dtype, scale.dtype), working_dtype(format, scale.dtype)
    tile, s = x.to(work), widen(scale).to(work)
    z = None if zero_point is None else widen(zero_point).to(work)
    ratio = tile / s
    code, within = _code(tile, ratio, s, z, format)
    line = on_line(code, format, work) if z is None else code.sub_(z)
    y = (line.to(out) * s.to(out)).to(scale.dtype)
    return y, line.sub_(ratio.mul_(within)), within.to(torch.uint8)


def _code(x: Tensor, ratio: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> tuple[Tensor, Tensor]:
    """The codes as floats, and 1 where they aren't clipped, else 0. ratio: x / scale."""
    if format.kind == "float":
        return on_grid(x, scale, zero, format), ratio.clamp(format.qmin, format.qmax).eq_(ratio)
    if format.kind == "log":
        free = unclipped(x, scale, zero, format)
        return free.clamp(format.qmin, format.qmax), free.clamp(format.qmin, format.qmax - 1).eq_(free)
    free = ratio.round() if zero is None else ratio.round().add_(zero)
    code = free.clamp(format.qmin, format.qmax)
    return code, free.eq_(code)


def _summed(x: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    """The sum over each block, in the scale's shape and dtype."""
    if scale.numel() == 1:
        return x.sum().to(scale.dtype).view(scale.shape)
    found = torch.zeros_like(scale, dtype=x.dtype)
    for tile, at in walk(x, block, TILE):
        found[at] += tile.sum(inside(tile))
    return found.to(scale.dtype)
