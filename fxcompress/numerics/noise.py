"""Signal-to-noise ratios: what a quantiser did, and what an ideal one of its format must lose."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isnan, log10, nan

import torch
from torch import Tensor

from fxcompress.numerics.blocks import block_sizes, inside, scale_shape, walk, widen
from fxcompress.numerics.formats import Format
from fxcompress.numerics.ranges import extremes, minmax_range, quantisation_error

_TILE = 1 << 18


def sqnr(reference: Tensor, approx: Tensor) -> float:
    """10 log10(Σ reference² / Σ (reference - approx)²) in dB, in float64; inf for equal tensors, nan where either has a NaN.

    Raises ValueError if the shapes differ.
    """
    if reference.shape != approx.shape:
        raise ValueError(f"reference is {tuple(reference.shape)}, approx is {tuple(approx.shape)}")
    signal = noise = 0.0
    whole = (-1,) * reference.dim()
    for (a, _), (b, _) in zip(walk(reference, whole, _TILE), walk(approx, whole, _TILE), strict=True):
        signal += a.double().square().sum().item()
        noise += (a.double() - b.double()).square().sum().item()
    return decibel(signal, noise)


def excess(x: Tensor, approx: Tensor, format: Format, block: Sequence[int], symmetric: bool) -> Tensor:
    """Per block the squared error of approx over the one it may have: that of rounding x on the block's own min-max grid.

    1 where no value is off by more than half a step of that grid, stretched to qmax + 1 codes a side: rounding is nearest then, whatever the
    grid, and luck decides the sum. So what clips must win by it. Float formats, whose steps vary, may have twice the error. Rounding to x's
    dtype comes on top. Returns float64 of scale_shape; a fine grid gives less than 1. Errors: those of `minmax_range`.
    """
    scale, zero = minmax_range(x, format, symmetric, block)
    plain = quantisation_error(x, scale, zero, format, block).double()
    squares, greatest = _block_errors(x, approx, block)
    norm, bound = _block_errors(x, x.new_zeros(()).expand(x.shape), block)
    eps = torch.finfo(x.dtype).eps
    allowed = (plain * (2 if format.kind == "float" else 1.01)).sqrt() + eps * norm.sqrt()
    ratio = torch.where(squares == 0, 0, squares / allowed.square())
    half = scale.double() * (1 + 1 / format.qmax) / 2 + eps * bound
    return torch.where(greatest <= half, ratio.clamp(max=1), ratio) if format.kind == "int" else ratio


def _block_errors(reference: Tensor, approx: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Σ (reference - approx)² and max |reference - approx| of each block, in float64."""
    squares = torch.zeros(scale_shape(reference.shape, block), dtype=torch.float64, device=reference.device)
    greatest = torch.zeros_like(squares)
    for (a, at), (b, _) in zip(walk(reference, block, _TILE // 4), walk(approx, block, _TILE // 4), strict=True):
        error = (a.double() - b).abs_()
        greatest[at] = torch.maximum(greatest[at], error.amax(inside(a)))
        squares[at] += error.square_().sum(inside(a))
    return squares, greatest


def noise_power(step: Tensor, block: Sequence[int], shape: Sequence[int]) -> float:
    """Mean over the tensor of step² / 12: the noise of a uniform quantiser that doesn't clip, its error uniform over one step.

    step: scale_shape(shape, block), the distance between two neighbouring values. Source: Bennett, Spectra of quantized signals (1948).
    """
    counts = block_sizes(shape, block).to(step.device)
    return float((step.double().square() * counts).sum() / (12 * counts.sum()))


def static_sqnr(x: Tensor, format: Format, lo: Tensor, hi: Tensor, symmetric: bool) -> float:
    """The SQNR in dB of an ideal integer quantiser of the format on [lo, hi]: steps as in `ideal_sqnr`, and what of x lies outside is clipped.

    lo, hi: float64, broadcastable to x. inf for a tensor of zeros.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    span = 2 * torch.maximum(hi, -lo) if symmetric and format.signed else hi - lo
    step = span / (2**format.bits - 1)
    wide = x.double()
    outside = (wide - torch.minimum(torch.maximum(wide, lo), hi)).square()
    noise = (step.square() / 12 + outside).expand(x.shape).sum().item()
    return decibel(wide.square().sum().item(), noise)


def ideal_sqnr(x: Tensor, format: Format, block: Sequence[int], symmetric: bool) -> float:
    """The SQNR in dB of an ideal quantiser of the format on each block's min-max range; from x alone, no pass's scale enters.

    Integers: step = 2 max|x| / (2^b - 1) if symmetric and signed, else (max(hi, 0) - min(lo, 0)) / (2^b - 1), noise step² / 12.
    Floats with m mantissa bits and least normal number t, scaled so that max|x| is the greatest finite value: an element in
    [2^e, 2^(e+1)) has the step 2^(e - m), one below t has t 2^(-m), noise step² / 12 an element. With |x| log-uniform inside its binade
    that is 10 log10(12 · 4^m · 3 / (2 ln 2)) = 32.2 dB for m = 3, 26.2 dB for m = 2; subnormal values lower it.
    inf for a tensor of zeros. Raises ValueError as `extremes` does. Source: Bennett (1948); the float case derived here.
    """
    lo, hi = (v.double() for v in extremes(x, block))
    bound = torch.maximum(hi, -lo)
    if format.kind == "float":
        noise = _float_noise(x, format, block, bound / format.qmax)
    else:
        span = 2 * bound if symmetric and format.signed else hi.clamp(min=0) - lo.clamp(max=0)
        noise = noise_power(span / (2**format.bits - 1), block, x.shape)
    signal = sum(tile.double().square().sum().item() for tile, _ in walk(x, (-1,) * x.dim(), _TILE))
    return decibel(signal, noise * x.numel())


def _float_noise(x: Tensor, format: Format, block: Sequence[int], scale: Tensor) -> float:
    info = torch.finfo(format.container)
    total = 0.0
    for tile, at in walk(x, block, _TILE):
        s = widen(scale[at])
        normal = (tile.double().abs() / s).nan_to_num_().clamp_(min=info.tiny)  # a block of zeros has scale 0
        binade = normal / torch.frexp(normal).mantissa / 2  # the power of two at or below
        step = s * binade * info.eps
        total += step.square().sum().item() / 12
    return total / x.numel()


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two powers; inf without noise, -inf without signal or of infinite noise, nan where one is nan."""
    if noise == 0:
        return inf
    if isnan(signal) or isnan(noise):
        return nan
    return 10 * log10(signal / noise) if signal and noise != inf else -inf
