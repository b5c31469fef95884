"""Quantise and dequantise as one differentiable function, for training through a quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.numerics.affine import check_operands, on_grid, on_line, unclipped, working_dtype
from fxcompress.numerics.blocks import inside, walk, widen
from fxcompress.numerics.formats import Format

TILE = 1 << 18


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
    """Slopes are made on the way forward, where all that they need is at hand."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int], kept: Tensor | None
    ) -> Tensor:
        check_operands(x, scale, zero_point, format, block)
        work, out = working_dtype(format, x.dtype, scale.dtype), working_dtype(format, scale.dtype)
        y, slope, passed = (torch.empty_like(x, dtype=d) for d in (scale.dtype, work, torch.bool))
        for (own, at), *parts in zip(*(walk(t, block, TILE) for t in (x, y, slope, passed)), strict=True):
            tile, s = own.to(work), widen(scale[at]).to(work)
            z = None if zero_point is None else widen(zero_point[at]).to(work)
            ratio = tile / s
            code, within = _code(tile, ratio, s, z, format)
            line = on_line(code, format, work) if z is None else code.sub_(z)
            for (part, _), value in zip(parts, (line.to(out) * s.to(out), line - ratio.mul_(within), within), strict=True):
                part.copy_(value)
        if kept is not None:
            y, slope, passed = torch.where(kept, x.to(y.dtype), y), torch.where(kept, 0, slope), passed | kept
        ctx.save_for_backward(slope, passed, scale)
        ctx.dtype, ctx.block = x.dtype, block
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        slope, passed, scale = ctx.saved_tensors
        grad_x = (grad * passed).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, _summed(grad * slope, scale, ctx.block) if ctx.needs_input_grad[1] else None, None, None, None, None


def _code(x: Tensor, ratio: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> tuple[Tensor, Tensor]:
    """The codes as floats, and which of them aren't clipped. ratio: x / scale."""
    if format.kind == "float":
        return on_grid(x, scale, zero, format), (ratio >= format.qmin) & (ratio <= format.qmax)
    if format.kind == "log":
        free = unclipped(x, scale, zero, format)
        return free.clamp(format.qmin, format.qmax), (free >= format.qmin) & (free < format.qmax)
    free = ratio.round() if zero is None else ratio.round().add_(zero)
    code = free.clamp(format.qmin, format.qmax)
    return code, code == free


def _summed(x: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    """The sum over each block, in the scale's shape and dtype."""
    found = torch.zeros_like(scale, dtype=x.dtype)
    for tile, at in walk(x, block, TILE):
        found[at] += tile.sum(inside(tile))
    return found.to(scale.dtype)
