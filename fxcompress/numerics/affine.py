"""Quantisation, a number at a time.

    integers    code = clip(round(x / scale) + zero_point)      value = (code - zero_point) * scale
    floats      code = cast(clip(x / scale))                    value = code * scale
    logs        code = clip(round(tau log2(scale / x)))         value = 2^(-code / tau) * scale, 0 for the last code

Log formats are for numbers that aren't negative; what is 0 or less has the last code, and so has what is too small for the last but one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxcompress.numerics.blocks import scale_shape, split, tiles, widen
from fxcompress.numerics.formats import Format

TILE = 1 << 20


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int]) -> Tensor:
    """The codes of x by the law of the format's kind, ties to even.

    x: any float dtype; scale: scale_shape(x.shape, block), float; zero_point: the same shape, integer, None for 0 (always, but for
    integers). Returns codes of x's shape in format.container. Computed in float32, in float64 where an operand or 32-bit codes need it;
    torch's cast takes a float64 to float8 by way of float32. Infinities saturate; the code of a NaN is undefined.
    Raises ValueError if the shapes don't fit.
    """
    check_operands(x, scale, zero_point, format, block)
    work = working_dtype(format, x.dtype, scale.dtype)
    codes = torch.empty_like(x, dtype=format.container)
    for index, scales in tiles(x.shape, block, TILE):
        tile = split(x[index], scale[scales].shape).to(work)
        grid = on_grid(tile, *_operands(scale, zero_point, scales, work), format)
        codes[index].copy_(grid.reshape(x[index].shape))
    return codes


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int]) -> Tensor:
    """The values of codes by the law of the format's kind, rounded once to scale's dtype, which is the result's.

    Shapes as in `quantize`. Raises ValueError if they don't fit or codes aren't in format.container.
    """
    check_operands(codes, scale, zero_point, format, block)
    if codes.dtype != format.container:
        raise ValueError(f"codes of {format} are {format.container}, not {codes.dtype}")
    work = working_dtype(format, scale.dtype)
    out = torch.empty_like(codes, dtype=scale.dtype)
    for index, scales in tiles(codes.shape, block, TILE):
        s, z = _operands(scale, zero_point, scales, work)
        tile = on_line(split(codes[index], scale[scales].shape), format, work)
        tile = tile * s if z is None else tile.sub_(z).mul_(s)
        out[index] = tile.reshape(codes[index].shape)
    return out


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format) -> Tensor:
    """The codes of x as floats, in x's dtype: `quantize` without blocks and without the container. The operands broadcast."""
    if format.kind == "float":
        return (x / scale).clamp_(format.qmin, format.qmax).to(format.container).to(x.dtype)
    return unclipped(x, scale, zero_point, format).clamp_(format.qmin, format.qmax)


def unclipped(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format) -> Tensor:
    """The codes of x as floats before they are clipped; inf of what is 0 or less in a log format. Not for float formats."""
    if format.kind == "log":
        return (x.clamp(min=0) / scale).log_().div_(-math.log(2) / format.tau).round_()
    ratio = (x / scale).round_()
    return ratio if zero_point is None else ratio.add_(zero_point)


def on_line(codes: Tensor, format: Format, work: torch.dtype) -> Tensor:
    """What codes say before zero point and scale, in the dtype `work`: the codes themselves, or 2^(-code / tau) and 0 of a log format."""
    if format.kind != "log":
        return codes.to(work)
    levels = torch.exp2(-torch.arange(format.qmax + 1, dtype=torch.float64) / format.tau)
    levels[-1] = 0
    return levels.to(codes.device, work)[codes.long()]


def working_dtype(format: Format, *operands: torch.dtype) -> torch.dtype:
    """float64 if an operand has it or the codes exceed float32's 24 bits, else float32: halves are never computed in."""
    return torch.float64 if torch.float64 in operands or format.bits > 24 else torch.float32


def _operands(scale: Tensor, zero_point: Tensor | None, index: tuple[slice, ...], work: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return widen(scale[index]).to(work), None if zero_point is None else widen(zero_point[index]).to(work)


def check_operands(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, block: Sequence[int]) -> None:
    """ValueError unless scale and zero point fit."""
    expected = scale_shape(x.shape, block)
    if tuple(scale.shape) != expected:
        raise ValueError(f"scale is {tuple(scale.shape)}; a tensor {tuple(x.shape)} in blocks {tuple(block)} needs {expected}")
    if zero_point is not None and tuple(zero_point.shape) != expected:
        raise ValueError(f"zero_point is {tuple(zero_point.shape)}, scale is {expected}: they must be equal")
    if zero_point is not None and format.kind != "int":
        raise ValueError(f"{format} takes no zero_point: only integers have one")
