"""Signal-to-noise ratios: what a quantiser did, and what an ideal one of its format must lose."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isnan, log10, nan

import torch
from torch import Tensor

from fxcompress.numerics.blocks import block_sizes, walk, widen
from fxcompress.numerics.formats import Format
from fxcompress.numerics.ranges import extremes

_TILE = 1 << 18


def sqnr(reference: Tensor, approx: Tensor) -> float:
    """10 log10(Σ reference² / Σ (reference - approx)²) in dB; inf for equal tensors, nan where either has a NaN.

    Raises ValueError if the shapes differ.
    """
    if reference.shape != approx.shape:
        raise ValueError(f"reference is {tuple(reference.shape)}, approx is {tuple(approx.shape)}")
    signal = noise = 0.0
    whole = (-1,) * reference.dim()
    for (a, _), (b, _) in zip(walk(reference, whole, _TILE), walk(approx, whole, _TILE), strict=True):
        signal += power(a)
        noise += power(a - b if a.dtype == b.dtype == torch.float32 else a.double() - b.double())
    return decibel(signal, noise)


def is_far(reference: Tensor, approx: Tensor, limit: float) -> bool:
    """Whether a part of two long tensors already tells that `sqnr` is below a limit, in dB."""
    if reference.shape != approx.shape or reference.numel() <= _TILE:
        return False
    first, second = (x.reshape(-1)[:_TILE] for x in (reference, approx))
    return decibel(power(reference), power(first.double() - second.double())) < limit


def power(x: Tensor) -> float:
    """Σ x² to six digits, in tiles, as long as sums in float32 may get: in float32 where x is, unless the squares leave the middle of float32's
    range; else in float64."""
    return sum(map(_tile_power, torch.split(x.reshape(-1), _TILE)))


def _tile_power(flat: Tensor) -> float:
    if flat.dtype == torch.float32 and 1e-25 * len(flat) < (squares := torch.dot(flat, flat).item()) < inf:
        return squares
    flat = flat.double()
    return torch.dot(flat, flat).item()


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
    rounding = step.square().sum().item() / 12 * x.numel() / step.numel()
    least, most = x.aminmax() if x.numel() else (lo, hi)
    is_inside = bool((least >= lo).all() and (most <= hi).all())
    wide = x if is_inside else x.to(torch.promote_types(x.dtype, torch.float32))
    clipped = 0.0 if is_inside else power(wide - torch.minimum(torch.maximum(wide, lo.to(wide.dtype)), hi.to(wide.dtype)))
    return decibel(power(x), rounding + clipped)


def ideal_sqnr(x: Tensor, format: Format, block: Sequence[int], symmetric: bool) -> float:
    """The SQNR in dB of an ideal quantiser of the format on each block's min-max range; from x alone, no pass's scale enters.

    Integers: step = 2 max|x| / (2^b - 1) if symmetric and signed, else (max(hi, 0) - min(lo, 0)) / (2^b - 1), noise step² / 12.
    Floats with m mantissa bits and least normal number t, scaled so that max|x| is the greatest finite value: an element in
    [2^e, 2^(e+1)) has the step 2^(e - m), one below t has t 2^(-m), noise step² / 12 an element. With |x| log-uniform inside its binade
    that is 10 log10(12 · 4^m · 3 / (2 ln 2)) = 32.2 dB for m = 3, 26.2 dB for m = 2; subnormal values lower it.
    inf for a tensor of zeros. Raises ValueError as `extremes` does. Source: Bennett (1948); the float case derived here.
    """
    return decibel(power(x), ideal_noise(x, *extremes(x, block), format, block, symmetric))


def ideal_noise(x: Tensor, lo: Tensor, hi: Tensor, format: Format, block: Sequence[int], symmetric: bool) -> float:
    """The noise of that quantiser, summed over x. lo, hi: the extremes of its blocks."""
    lo, hi = lo.double(), hi.double()
    bound = torch.maximum(hi, -lo)
    if format.kind == "float":
        return _float_noise(x, format, block, bound / format.qmax)
    span = 2 * bound if symmetric and format.signed else hi.clamp(min=0) - lo.clamp(max=0)
    return noise_power(span / (2**format.bits - 1), block, x.shape) * x.numel()


def _float_noise(x: Tensor, format: Format, block: Sequence[int], scale: Tensor) -> float:
    info = torch.finfo(format.container)
    total = 0.0
    for tile, at in walk(x, block, _TILE):
        s = widen(scale[at])
        normal = (tile.double().abs() / s).nan_to_num_().clamp_(min=info.tiny)  # a block of zeros has scale 0
        binade = normal / torch.frexp(normal).mantissa / 2  # the power of two at or below
        step = s * binade * info.eps
        total += step.square().sum().item() / 12
    return total


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two powers; inf without noise, -inf without signal or of infinite noise, nan where one is nan."""
    if noise == 0:
        return inf
    if isnan(signal) or isnan(noise):
        return nan
    return 10 * log10(signal / noise) if signal and noise != inf else -inf
