"""Quantise and dequantise as one differentiable function, for training through a quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.numerics.affine import dequantize, on_grid, on_line, quantize, unclipped, working_dtype
from fxcompress.numerics.blocks import inside, walk, widen
from fxcompress.numerics.formats import Format


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int]) -> Tensor:
    """y = dequantize(quantize(x)), bit for bit, with the straight-through gradient. Shapes, dtype and errors as in the two.

    With v = x / s and the code q unclipped: dy/dx = 1 where qmin <= q <= qmax, else 0; dy/ds = q - z - v there, else the bound - z, summed
    over the block. No factor 1 / sqrt(n qmax) is applied, no gradient goes to z. A float format: the same with q = cast(v). A log format: the
    same with the value 2^(-code / tau) for q, which counts as clipped above s and where it is 0.
    Source: LSQ (ICLR 2020), section 2.1, eq. 3 and 5.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, format, block)  # type: ignore[no-untyped-call]
    return result


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.format, ctx.block = format, block
        return dequantize(quantize(x, scale, zero_point, format, block), scale, zero_point, format, block)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        grad_x, grad_scale = _gradients(x, scale, zero_point, ctx.format, ctx.block, grad)
        return grad_x, grad_scale, None, None, None


def _gradients(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int], grad: Tensor
) -> tuple[Tensor, Tensor]:
    work = working_dtype(format, x.dtype, scale.dtype)
    grad_x, grad_scale = torch.empty_like(x), torch.zeros_like(scale, dtype=work)
    for (tile, at), (g, _), (out, _) in zip(*(walk(t, block, 1 << 18) for t in (x, grad, grad_x)), strict=True):
        s = widen(scale[at]).to(work)
        z = None if zero_point is None else widen(zero_point[at]).to(work)
        ratio, code = tile.to(work) / s, on_grid(tile.to(work), s, z, format)
        free = ratio if format.kind == "float" else unclipped(tile.to(work), s, z, format)
        inner = (free >= format.qmin) & (free <= format.qmax - (format.kind == "log"))
        out.copy_(g * inner)
        code = on_line(code, format, work)
        slope = (code if z is None else code - z) - ratio * inner
        grad_scale[at] += (g * slope).sum(inside(tile))
    return grad_x, grad_scale.to(scale.dtype)
