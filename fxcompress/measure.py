"""How far two values are apart: the figures that capture, contracts and parity share."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fxcompress.numerics.noise import power

BINS, SAMPLE, LINE = 32, 1 << 14, 16
TILE = 1 << 18  # numbers that are read while they are in the cache
LEAST = 4  # numbers of a slice
_LEAST_RMS = 1e-15  # whose squares float32 still tells apart


def relative_error(old: Tensor, new: Tensor, floor: float = 0.0) -> float:
    """max |new - old| / rms(old), the rms in float64. Positions where both are the same, infinities too, count 0; inf if a NaN or shape
    differs.

    floor: taken in place of a smaller rms, for values that are rounding noise themselves. An all-zero old value gives max |new|, over the floor
    if there is one. Integers and booleans: 0 if equal, else inf.
    """
    if old.shape != new.shape:
        return float("inf")
    if not (old.is_floating_point() or old.is_complex()):
        return 0.0 if torch.equal(old, new) else float("inf")
    if not old.numel():
        return 0.0
    if _is_plain(old, new):
        worst, scale = _apart(old, new)
        if math.isfinite(worst) and scale > 0:
            return worst / max(floor, scale)
    if torch.equal(old, new):
        return 0.0
    a, b = old.to(_widest(old)), new.to(_widest(old))
    same = (a == b) | (a.isnan() & b.isnan())
    worst = torch.where(same, 0.0, (b - a).abs()).max().item()
    finite = a[a.isfinite()].abs()
    scale = max(floor, finite.square().mean().sqrt().item() if finite.numel() else 0.0)
    if math.isnan(worst):
        return float("inf")
    return float(worst / scale) if scale > 0 else float(worst)


def slice_error(old: Tensor, new: Tensor, noise: Tensor | None = None) -> float:
    """The greatest `relative_error`: of the value, or of a slice at one place of one axis beside that slice's own rms, since an error in a
    quiet channel or row drowns in loud ones. Slices of less than LEAST numbers may be small by chance, and aren't looked at; a slice of zeros
    counts as one of the least normal number.

    noise: how far rounding moves each number. Where `noise.max()` of a slice is more than its rms, that is taken in the place of the rms.
    """
    whole = relative_error(old, new, 0.0 if noise is None else float(noise.max()))
    if not 0 < whole < math.inf:
        return whole
    if _is_plain(old, new) and math.isfinite((new - old).sum()):
        sizes, off = old, (new - old).abs()
    else:
        sizes, b = old.to(_widest(old)), new.to(_widest(old))
        off = torch.where((sizes == b) | (sizes.isnan() & b.isnan()), 0.0, (b - sizes).abs())
        sizes = sizes.where(sizes.isfinite(), 0.0)
    axes = [axis for axis, n in enumerate(old.shape) if n > 1 and old.numel() >= LEAST * n]
    return max([whole, *(_worst_slice(sizes, off, noise, axis) for axis in axes)])


def _worst_slice(sizes: Tensor, off: Tensor, noise: Tensor | None, axis: int) -> float:
    """The greatest of off over the rms of sizes, among the slices at each place of an axis."""
    others = [a for a in range(sizes.dim()) if a != axis]
    count = sizes.numel() // sizes.shape[axis]
    rms = torch.linalg.vector_norm(sizes, dim=others) / math.sqrt(count)
    if not bool(((rms > _LEAST_RMS) & (rms < math.inf)).all()):  # their squares leave the range of the dtype
        rms = _rms(sizes, others).flatten()
    scale = rms.double().clamp(min=torch.finfo(torch.float32).tiny)
    if noise is not None:
        scale = torch.maximum(scale, noise.amax(others))
    return float((off.amax(others) / scale).max())


def error_along(old: Tensor, new: Tensor, axes: Collection[int]) -> float:
    """The greatest of |new - old| beside the rms of old along these axes, in their place; beside |old| along none. What is less than the least
    normal number counts as that. Positions where both are the same count 0; inf if a NaN or shape differs, or an integer."""
    if old.shape != new.shape or not (old.is_floating_point() or old.is_complex()) or not old.numel():
        return relative_error(old, new)
    if not axes and _is_plain(old, new) and (worst := _apart_by_number(old, new)) < math.inf:
        return worst
    if torch.equal(old, new):
        return 0.0
    least = torch.finfo(old.dtype).tiny
    if old.itemsize < 4:
        old, new = old.float(), new.float()
    off = torch.where((old == new) | (old.isnan() & new.isnan()), 0.0, (new - old).abs())
    sizes = old.abs() if not axes else _rms(torch.where(old.isfinite(), old, 0.0), list(axes))
    worst = float((off / sizes.clamp_(min=least)).max())
    return worst if worst < math.inf else math.inf  # also of NaN


def _apart_by_number(old: Tensor, new: Tensor) -> float:
    """The greatest |new - old| / |old|; NaN where one isn't finite."""
    least = torch.finfo(old.dtype).tiny
    tiles = zip(torch.split(old.reshape(-1), TILE), torch.split(new.reshape(-1), TILE), strict=True)
    worst = [float((b - a).abs_().div_(a.abs().clamp_(min=least)).max()) for a, b in tiles]
    return max(worst) if all(map(math.isfinite, worst)) else math.nan


def _rms(x: Tensor, axes: list[int]) -> Tensor:
    """Along axes, each of which keeps one place; in float64."""
    count = math.prod(x.shape[a] for a in axes)
    norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=_widest(x))
    return norm / math.sqrt(count)


def _widest(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64


def is_beyond(old: Tensor, new: Tensor, limit: float, noise: Tensor | None = None) -> bool:
    """Whether `slice_error` is above the limit; of values far apart no more than a part is looked at."""
    if old.shape == new.shape and _is_plain(old, new) and old.numel():
        first = old.reshape(-1)[:TILE], new.reshape(-1)[:TILE]
        scale = max(0.0 if noise is None else float(noise.max()), math.sqrt(power(old) / old.numel()))
        if 0 < scale < math.inf and limit * scale < _apart(*first)[0] < math.inf:
            return True
    return not slice_error(old, new, noise) <= limit


def _is_plain(old: Tensor, new: Tensor) -> bool:
    """Whether differences are as exact as they have to be in the values' own dtype."""
    return old.is_floating_point() and old.dtype == new.dtype and old.itemsize >= 4


def _apart(old: Tensor, new: Tensor) -> tuple[float, float]:
    """max |new - old|, NaN if one isn't finite, and rms(old), read once."""
    worst = squares = 0.0
    for a, b in zip(torch.split(old.reshape(-1), TILE), torch.split(new.reshape(-1), TILE), strict=True):
        low, high = (end.item() for end in torch.aminmax(b - a))
        if not math.isfinite(high - low):
            return math.nan, math.nan
        worst = max(worst, high, -low)
        squares += power(a)
    return worst, math.sqrt(squares / old.numel())


def rounded(value: Any, rng: torch.Generator) -> Any:
    """Every float moved by one rounding, up or down at random; zeros and infinities stay."""
    return pytree.tree_map(lambda x: _rounded(x, rng) if is_wide(x) else x, value)


def _rounded(x: Tensor, rng: torch.Generator) -> Tensor:
    sign = torch.randint(0, 2, x.shape, generator=rng).to(x.device, x.dtype) * 2 - 1
    info, wide = torch.finfo(x.dtype), x if x.itemsize >= 4 else x.float()
    step = (wide.abs() * info.eps).clamp(min=info.tiny * info.eps)  # of numbers below the least normal one too
    return torch.where((x == 0) | ~x.isfinite(), x, (wide + sign * step).to(x.dtype))


def distances(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| in float64 where both are finite; 0 elsewhere, and for what isn't floating point."""
    if not a.is_floating_point() or a.shape != b.shape:
        return torch.zeros(a.shape, dtype=torch.float64)
    return torch.where(a.isfinite() & b.isfinite(), a.double() - b.double(), 0.0).abs()


def is_wide(value: Any) -> bool:
    """Whether a value is a tensor of floats that an op computes with, not of codes."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.itemsize > 1


def has_zeros(value: Any) -> bool:
    """Whether a value is a tensor of floats with a 0 in it."""
    return is_wide(value) and not bool(value.all())


def has_numbers(x: Tensor) -> bool:
    """Whether anything but zeros is in it; no more of it is read than that takes."""
    flat = x.reshape(-1)
    return bool(flat[:SAMPLE].any()) or any(bool(part.any()) for part in torch.split(flat, TILE))


def filled(x: Tensor) -> Tensor:
    """The tensor with positive random numbers of its own size in place of zeros; the same ones every time."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).abs() * _size(x)
    return torch.where(x == 0, noise.to(x.device, x.dtype), x)


def is_flat(value: Any) -> bool:
    """Whether a value is a tensor of floats that doesn't change along one of its axes: what averages it there gives it back, whatever the
    weights."""
    if not is_wide(value) or not value.numel():
        return False
    return any(n > 1 and bool((value == value.narrow(axis, 0, 1)).all()) for axis, n in enumerate(value.shape))


def varied(x: Tensor) -> Tensor:
    """The tensor with random numbers of its own size added; the same ones every time."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * _size(x)
    return x + noise.to(x.device, x.dtype)


def _size(x: Tensor) -> float:
    """The rms of the finite numbers, 1 if that is 0."""
    finite = x if math.isfinite(x.sum()) else x[x.isfinite()]
    return math.sqrt(power(finite) / max(1, finite.numel())) or 1.0


class Histograms(NamedTuple):
    """How two values are spread: counts in equal bins from low to high."""

    low: float
    high: float
    before: tuple[int, ...]
    after: tuple[int, ...]


def _sample(flat: Tensor) -> Tensor:
    """At most SAMPLE of the numbers or a few more, from all over, in runs of a line of the cache."""
    if len(flat) <= SAMPLE:
        return flat
    runs = flat[: len(flat) // LINE * LINE].view(-1, LINE)
    return runs[:: max(1, len(runs) * LINE // SAMPLE) | 1].reshape(-1)


def histograms(old: Any, new: Any) -> Histograms | None:
    """The histograms of a floating-point value before and after, of at most SAMPLE of its entries; None for anything else, and where one
    isn't finite."""
    if not all(is_wide(v) and v.numel() for v in (old, new)):
        return None
    flat = [_sample(v.detach().reshape(-1)).float() for v in (old, new)]
    low, high = min(float(v.min()) for v in flat), max(float(v.max()) for v in flat)
    if not math.isfinite(high - low):
        return None
    counts = [tuple(torch.histc(v, BINS, low, high).int().tolist()) for v in flat]
    return Histograms(float(f"{low:.4g}"), float(f"{high:.4g}"), *counts)
