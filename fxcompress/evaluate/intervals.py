"""How sure a figure is: bootstrap intervals, and what the same figure says about real data against real data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.errors import InputError

Metric = Callable[..., float]


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval. low, high: value ± 1.96 standard errors, so about 95 % if the figure is nearly normal."""

    value: float
    low: float
    high: float


def bootstrap(metric: Metric, *samples: Tensor, resamples: int = 200, seed: int = 0) -> Estimate:
    """metric(*samples), with the standard error that resampling the rows of every sample with replacement shows.

    samples: [N_i, ...] each, resampled independently. The interval stands around the figure itself: one of percentiles wouldn't hold it
    for a distance, which rows drawn twice make greater. InputError for fewer than two resamples or an empty sample.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), sections 6 and 12.
    """
    if resamples < 2 or not samples or min(map(len, samples)) == 0:
        why = f"{resamples} resamples of samples of {[len(s) for s in samples]} rows"
        raise InputError("there is nothing to resample", why=why, do="pass rows and resamples >= 2")
    draw = torch.Generator().manual_seed(seed)
    drawn = [metric(*(s[torch.randint(len(s), (len(s),), generator=draw)] for s in samples)) for _ in range(resamples)]
    value, error = metric(*samples), float(torch.tensor(drawn, dtype=torch.float64).std())
    return Estimate(value, value - 1.96 * error, value + 1.96 * error)


def noise_floor(metric: Metric, real: Tensor, size: int, against: int | None = None, seeds: tuple[int, ...] = (0, 1)) -> tuple[float, ...]:
    """metric(a, b) per seed, a and b disjoint draws of `size` and `against` (default `size`) rows of the real data.

    What a perfect model would score by chance: a distance is read as a multiple of this. Sizes must be those of the comparison it is put
    beside, since distances grow as samples shrink. InputError when `real` has fewer than size + against rows, and for sizes < 1.
    """
    other = size if against is None else against
    if min(size, other) < 1 or len(real) < size + other:
        why = f"two disjoint draws of {size} and {other}, 1 or more each, need {size + other}, there are {len(real)}"
        raise InputError("too few real rows", why=why)
    floors = []
    for seed in seeds:
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
        floors.append(metric(real[order[:size]], real[order[size : size + other]]))
    return tuple(floors)
