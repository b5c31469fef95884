"""How many peaks a distribution has."""

from __future__ import annotations

import numpy as np

from fxcompress.numerics.histogram import Histogram

POINTS, APART, LEAST = 128, 32, 0.01


def peaks(histogram: Histogram) -> int:
    """Peaks of the density: a Gaussian estimate with Scott's bandwidth at 128 points over the range, local maxima of at least a hundredth of
    all mass and 32 points apart, the higher first. 0 for a constant and for fewer than two values.

    Source: PTQ4SAM (arXiv 2405.03144), section 3.2, with the released code's numbers.
    """
    if histogram.total < 2 or not histogram.lo < histogram.hi:
        return 0
    centres, weights = histogram.centres().numpy(), histogram.counts.double().numpy()
    mean = np.average(centres, weights=weights)
    deviation = np.sqrt(np.average((centres - mean) ** 2, weights=weights))
    bandwidth = deviation * histogram.total ** (-1 / 5)
    if not bandwidth:
        return 0
    points = np.linspace(histogram.lo, histogram.hi, POINTS)
    density = np.exp(-0.5 * ((points[:, None] - centres) / bandwidth) ** 2) @ weights
    inner = np.flatnonzero((density[1:-1] > density[:-2]) & (density[1:-1] >= density[2:])) + 1
    kept: list[int] = []
    for at in sorted(inner[density[inner] >= LEAST * density.sum()], key=lambda i: -density[i]):
        if all(abs(at - other) >= APART for other in kept):
            kept.append(at)
    return len(kept)
