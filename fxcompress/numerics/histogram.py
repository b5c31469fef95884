"""Histograms of values that arrive in pieces, and the quantisation ranges read from them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxcompress.numerics.formats import Format
from fxcompress.numerics.ranges import SHRINK, scale_from_range

LEAST_WIDTH = 2.0**-120
INDEX_BITS = 40  # the bins of a nearly constant value are no narrower than 2^-40 of it, so that their numbers stay exact


class Histogram:
    """Counts in at most `bins` bins (2 or more) [i w, (i + 1) w), w a power of two that doubles whenever the values span more.

    Pairs of bins are merged exactly and w depends on the extremes alone, so the order of the pieces doesn't matter.
    """

    def __init__(self, bins: int = 2048) -> None:
        self.bins, self.width, self.first = bins, 0.0, 0
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.lo, self.hi = math.inf, -math.inf

    def add(self, values: Tensor) -> None:
        """Count every entry; all must be finite."""
        flat = values.detach().reshape(-1)
        if not flat.numel():
            return
        lo, hi = (float(v) for v in torch.aminmax(flat))
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        self._widen()
        index = torch.floor(flat.double() / self.width).to(torch.int64).sub_(self.first)
        self.counts += torch.bincount(index, minlength=len(self.counts))

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    def centres(self) -> Tensor:
        """The middle of each bin, float64, none beyond the extremes."""
        left = (torch.arange(len(self.counts), dtype=torch.float64) + self.first) * self.width
        return (left + self.width / 2).clamp(self.lo, self.hi)

    def quantile(self, share: float) -> float:
        """The value that a share of all values doesn't exceed, to within a bin; linear inside it."""
        wanted = share * self.total
        reached = self.counts.cumsum(0).double()
        index = int(torch.searchsorted(reached, torch.tensor(wanted, dtype=torch.float64)).clamp(max=len(reached) - 1))
        inside = (wanted - float(reached[index] - self.counts[index])) / max(1, int(self.counts[index]))
        return min(max((self.first + index + inside) * self.width, self.lo), self.hi)

    def _widen(self) -> None:
        """Choose the least width that fits the extremes, and bring the counts to it."""
        width = max(self.width, _power_below(max(self.hi / self.bins - self.lo / self.bins, LEAST_WIDTH)))
        width = max(width, _power_below(max(self.hi, -self.lo)) / 2**INDEX_BITS)
        while math.floor(self.hi / width) - math.floor(self.lo / width) >= self.bins:
            width *= 2
        first, last = math.floor(self.lo / width), math.floor(self.hi / width)
        counts = torch.zeros(last - first + 1, dtype=torch.int64)
        if len(self.counts):
            halvings = math.frexp(width)[1] - math.frexp(self.width)[1]
            places = (torch.arange(len(self.counts)) + self.first >> min(halvings, 63)) - first  # 63: all that is left is the sign
            counts.index_add_(0, places, self.counts)
        self.width, self.first, self.counts = width, first, counts


def percentile(histogram: Histogram, share: float) -> tuple[float, float]:
    """The range that leaves (1 - share) / 2 of the values out at either end, share in (0.5, 1]; the extremes for 1.

    ValueError where the histogram counts fewer values than would leave one out.
    """
    if share == 1:
        return histogram.lo, histogram.hi
    outside = round((1 - share) / 2, 12)  # 1 - 0.9 is a little less than 0.1
    if histogram.total * outside < 1:
        raise ValueError(f"{histogram.total} values can't tell the {100 * share:g}th percentile: it needs {math.ceil(1 / outside)}")
    return histogram.quantile(outside), histogram.quantile(1 - outside)


def least_error(histogram: Histogram, format: Format, symmetric: bool, p: float = 2.0) -> tuple[float, float]:
    """The range [a lo, b hi] around 0 whose grid has the least Σ |x - x̂|^p, ends shrunk apart.

    The range from min to max is one of the candidates, so its error on the histogram is never exceeded.
    """
    centres, weights = histogram.centres(), histogram.counts.double()
    return _least(histogram, lambda lo, hi: _errors(centres, weights, lo, hi, format, symmetric, p))


def least_divergence(histogram: Histogram, format: Format) -> tuple[float, float]:
    """The range around 0, ends shrunk apart, whose grid keeps the distribution best: least KL divergence of the clipped histogram from its
    quantised one. Source: Migacz, 8-bit inference with TensorRT (2017)."""
    levels = format.qmax - format.qmin + 1
    counts, centres = histogram.counts.double(), histogram.centres()

    def costs(lo: Tensor, hi: Tensor) -> Tensor:
        ends = zip(lo.tolist(), hi.tolist(), strict=True)
        return torch.tensor([_divergence(counts, centres, a, b, levels) for a, b in ends], dtype=torch.float64)

    return _least(histogram, costs)


def _least(histogram: Histogram, costs: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """The cheapest of the shrunken ranges, the wider of equals: first both ends alike, then each alone."""
    least, greatest = min(histogram.lo, 0.0), max(histogram.hi, 0.0)
    factors = torch.tensor((1.0, *SHRINK), dtype=torch.float64)

    def best(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        at = costs(low * least, high * greatest).argmin()
        return low[at], high[at]

    low, high = best(factors, factors)
    low, high = best(torch.cat([low[None], factors]), high.expand(len(factors) + 1))
    low, high = best(low.expand(len(factors) + 1), torch.cat([high[None], factors]))
    return float(low) * least, float(high) * greatest


def _power_below(value: float) -> float:
    """The greatest power of two that isn't above a positive value; 0 for 0."""
    return 2.0 ** (math.frexp(value)[1] - 1) if value else 0.0


def _divergence(counts: Tensor, centres: Tensor, lo: float, hi: float, levels: int) -> float:
    inside = (centres >= lo) & (centres <= hi)
    kept = counts * inside
    if not inside.any():
        return math.inf
    edge = inside.nonzero()
    kept[edge[0]] += counts[: edge[0]].sum()
    kept[edge[-1]] += counts[edge[-1] + 1 :].sum()
    step = (hi - lo) / (levels - 1) or 1.0
    level = ((centres - lo) / step).round().clamp(0, levels - 1).long()
    occupied = (counts > 0) & inside
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, counts * inside)
    places = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, occupied.double())
    spread = (mass / places.clamp(min=1))[level] * occupied
    p, q = kept / kept.sum(), spread / spread.sum()
    both = p > 0
    return float((p[both] * (p[both] / q[both].clamp(min=1e-12)).log()).sum())


def _errors(centres: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, format: Format, symmetric: bool, p: float) -> Tensor:
    """Per range [lo, hi] the weighted sum of |error|^p over the centres."""
    scale, zero = scale_from_range(lo, hi, format, symmetric)
    s, offset = scale[:, None], 0.0 if zero is None else zero.double()[:, None]
    codes = (centres / s).round_().add_(offset).clamp_(format.qmin, format.qmax)
    return codes.sub_(offset).mul_(s).sub_(centres).abs_().pow_(p) @ weights
