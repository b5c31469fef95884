"""Uniform affine quantisation: code = clip(round(x / scale) + zero_point), value = (code - zero_point) * scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.numerics.blocks import scale_shape, split, tiles, widen
from fxcompress.numerics.formats import Format

TILE = 1 << 20


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int]) -> Tensor:
    """code = clip(round(x / scale) + zero_point, qmin, qmax), ties to even; a float format: cast(clip(x / scale)), ties to even.

    x: any float dtype; scale: scale_shape(x.shape, block), float; zero_point: the same shape, integer, None for 0 (always, for a float
    format). Returns codes of x's shape in format.container. Computed in float32, in float64 where an operand or 32-bit codes need it;
    torch's cast takes a float64 to float8 by way of float32. Infinities saturate; the code of a NaN is undefined.
    Raises ValueError if the shapes don't fit.
    """
    _check(x, scale, zero_point, format, block)
    work = working_dtype(format, x.dtype, scale.dtype)
    codes = torch.empty_like(x, dtype=format.container)
    for index, scales in tiles(x.shape, block, TILE):
        tile = split(x[index], scale[scales].shape).to(work)
        grid = on_grid(tile, *_operands(scale, zero_point, scales, work), format)
        codes[index] = grid.reshape(x[index].shape).to(format.container)
    return codes


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int]) -> Tensor:
    """value = (code - zero_point) * scale, rounded once to scale's dtype, which is the result's.

    Shapes as in `quantize`. Raises ValueError if they don't fit or codes aren't in format.container.
    """
    _check(codes, scale, zero_point, format, block)
    if codes.dtype != format.container:
        raise ValueError(f"codes of {format} are {format.container}, not {codes.dtype}")
    work = working_dtype(format, scale.dtype)
    out = torch.empty_like(codes, dtype=scale.dtype)
    for index, scales in tiles(codes.shape, block, TILE):
        s, z = _operands(scale, zero_point, scales, work)
        tile = split(codes[index], scale[scales].shape).to(work)
        tile = tile * s if z is None else tile.sub_(z).mul_(s)
        out[index] = tile.reshape(codes[index].shape)
    return out


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format) -> Tensor:
    """The codes of x as floats, in x's dtype: `quantize` without blocks and without the container. The operands broadcast."""
    ratio = x / scale
    if format.kind == "float":
        return ratio.clamp_(format.qmin, format.qmax).to(format.container).to(x.dtype)
    ratio.round_()
    if zero_point is not None:
        ratio.add_(zero_point)
    return ratio.clamp_(format.qmin, format.qmax)


def working_dtype(format: Format, *operands: torch.dtype) -> torch.dtype:
    """float64 if an operand has it or the codes exceed float32's 24 bits, else float32: halves are never computed in."""
    return torch.float64 if torch.float64 in operands or format.bits > 24 else torch.float32


def _operands(scale: Tensor, zero_point: Tensor | None, index: tuple[slice, ...], work: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return widen(scale[index]).to(work), None if zero_point is None else widen(zero_point[index]).to(work)


def _check(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int]) -> None:
    expected = scale_shape(x.shape, block)
    if tuple(scale.shape) != expected:
        raise ValueError(f"scale is {tuple(scale.shape)}; a tensor {tuple(x.shape)} in blocks {tuple(block)} needs {expected}")
    if zero_point is not None and tuple(zero_point.shape) != expected:
        raise ValueError(f"zero_point is {tuple(zero_point.shape)}, scale is {expected}: they must be equal")
    if zero_point is not None and format.kind == "float":
        raise ValueError(f"{format} is symmetric: it takes no zero_point")
