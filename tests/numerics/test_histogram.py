"""Histograms that are filled in pieces, and the ranges read from them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxcompress.numerics.affine import dequantize, quantize
from fxcompress.numerics.formats import FORMATS, Format, format_of
from fxcompress.numerics.histogram import Histogram, least_divergence, least_error, percentile
from fxcompress.numerics.ranges import scale_from_range
from tests.passes.helpers import seeded

FLOAT32 = st.floats(-(2.0**126), 2.0**126, width=32)
PIECES = st.lists(st.lists(FLOAT32, max_size=12), min_size=1, max_size=5).filter(any)
INTEGERS = [f for f in FORMATS.values() if f.kind == "int" and f.bits <= 8]


def of(*pieces: Tensor, bins: int = 64) -> Histogram:
    histogram = Histogram(bins)
    for piece in pieces:
        histogram.add(piece)
    return histogram


def state(histogram: Histogram) -> tuple[float, int, list[int], float, float]:
    return histogram.width, histogram.first, histogram.counts.tolist(), histogram.lo, histogram.hi


def bin_of(histogram: Histogram, value: float) -> int:
    return math.floor(value / histogram.width) - histogram.first


# pieces


def test_counts_by_hand() -> None:
    """0 .. 6 in 4 bins: width 1 would need 7, width 2 needs 4."""
    histogram = of(torch.tensor([0.0, 1.0, 6.0]), torch.tensor([[1.5], [2.0]]), bins=4)
    assert state(histogram) == (2.0, 0, [3, 1, 0, 1], 0.0, 6.0)
    assert histogram.total == 5
    assert histogram.centres().tolist() == [1, 3, 5, 6], "none beyond the extremes"


def test_pairs_of_bins_merge_at_even_places() -> None:
    """-3 .. 0 in bins [-3, -2), [-2, -1), [-1, 0), [0, 1); 2 needs bins of 2: [-4, -2), [-2, 0), [0, 2), [2, 4)."""
    histogram = of(torch.tensor([-3.0, -2.0, -1.0, 0.0]), bins=4)
    assert state(histogram)[:3] == (1.0, -3, [1, 1, 1, 1])
    histogram.add(torch.tensor([2.0]))
    assert state(histogram)[:3] == (2.0, -2, [1, 2, 1, 1])


@settings(deadline=None)
@given(pieces=PIECES, bins=st.sampled_from([2, 7, 64]), seed=st.randoms(use_true_random=False))
def test_neither_order_nor_cut_matters(pieces: list[list[float]], bins: int, seed: object) -> None:
    tensors = [torch.tensor(p) for p in pieces]
    whole = state(of(torch.cat(tensors), bins=bins))
    shuffled = tensors.copy()
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    assert state(of(*tensors, bins=bins)) == state(of(*shuffled, bins=bins)) == whole


@settings(deadline=None)
@given(pieces=PIECES, bins=st.sampled_from([2, 7, 64]))
def test_every_value_is_counted_in_its_bin(pieces: list[list[float]], bins: int) -> None:
    values = torch.tensor(list(itertools.chain(*pieces)))
    histogram = of(*(torch.tensor(p) for p in pieces), bins=bins)
    expected = [0] * len(histogram.counts)
    for value in values.tolist():
        expected[bin_of(histogram, value)] += 1
    assert histogram.counts.tolist() == expected
    assert len(expected) <= bins
    assert (histogram.lo, histogram.hi, histogram.total) == (values.min(), values.max(), len(values))
    assert math.frexp(histogram.width)[0] == 0.5, "a power of two"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    values = (8 * seeded(3, 50)).to(dtype)
    assert state(of(values)) == state(of(values.double()))


# extremes of range

ODD: dict[str, list[float]] = {
    "one value": [0.3],
    "one number": [5.0] * 9,
    "a huge number": [1e38] * 3,
    "a tiny number": [1e-38] * 3,
    "zeros": [0.0] * 4,
    "negative only": [-7.0, -3.0, -5.0],
    "huge and zero": [0.0, 3e38, -3e38],
    "huge and tiny": [1e-38, -1e-38, 1e38],
    "tiny": [1e-38, 2e-38, -1e-38],
    "subnormal": [1e-45, 3e-45, 2e-40],
    "neighbours": [1.0, 1.0 + 2**-23],
    "huge neighbours": [1e30, 1e30 * (1 + 2**-22)],
}


@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
def test_odd_values(values: list[float]) -> None:
    """At once and one by one; half of them lies at the median, all between the extremes."""
    tensor = torch.tensor(values)
    histogram = of(tensor)
    assert state(of(*tensor.split(1))) == state(of(*tensor.flip(0).split(1))) == state(histogram)
    assert histogram.total == len(values)
    assert histogram.width > 0
    assert ((histogram.centres() >= histogram.lo) & (histogram.centres() <= histogram.hi)).all()
    assert abs(histogram.quantile(0.5) - tensor.double().kthvalue(-(-len(values) // 2)).values) <= histogram.width
    assert percentile(histogram, 1) == (tensor.min(), tensor.max())
    lo, hi = least_error(histogram, format_of("uint8"), symmetric=False)
    assert min(histogram.lo, 0) <= lo <= 0 <= hi <= max(histogram.hi, 0)


@pytest.mark.parametrize("values", [[1e300, -1e300], [1.7e308, -1.7e308], [1e-320, 2e-320], [1.0, 1.0 + 2**-52]])
def test_float64_beyond_float32(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    histogram = of(tensor)
    assert state(of(*tensor.split(1))) == state(histogram)
    assert (histogram.total, histogram.quantile(0), histogram.quantile(1)) == (2, tensor.min(), tensor.max())


def test_zeros_first() -> None:
    """A first item of zeros says nothing about the width that is needed later."""
    assert state(of(torch.zeros(5), torch.tensor([-1e38, 1e38]))) == state(of(torch.tensor([-1e38, 1e38, 0, 0, 0, 0, 0])))


def test_nothing_yet() -> None:
    assert state(of(torch.zeros(0), torch.zeros(2, 0))) == (0.0, 0, [], math.inf, -math.inf)
    assert state(of(torch.zeros(0), torch.ones(1))) == state(of(torch.ones(1)))


# quantiles


@settings(deadline=None)
@given(values=st.lists(FLOAT32, min_size=1, max_size=60), share=st.floats(0, 1), bins=st.sampled_from([2, 16, 256]))
def test_a_quantile_is_the_order_statistic_to_within_a_bin(values: list[float], share: float, bins: int) -> None:
    histogram = of(torch.tensor(values), bins=bins)
    rank = max(1, math.ceil(share * len(values)))
    assert abs(histogram.quantile(share) - sorted(values)[rank - 1]) <= histogram.width


@settings(deadline=None)
@given(values=st.lists(FLOAT32, min_size=1, max_size=60), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_quantiles_rise(values: list[float], shares: tuple[float, float]) -> None:
    histogram = of(torch.tensor(values), bins=16)
    low, high = sorted(shares)
    assert min(values) <= histogram.quantile(low) <= histogram.quantile(high) <= max(values)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999])
def test_quantiles_are_those_of_torch(share: float) -> None:
    values = seeded(100_000, dtype=torch.float64)
    histogram = of(*values.split(999), bins=2048)
    assert histogram.quantile(share) == pytest.approx(torch.quantile(values, share).item(), abs=histogram.width)
    assert histogram.width < 0.01


def test_a_uniform_bin_is_cut_linearly() -> None:
    histogram = of(torch.arange(1000.0), bins=4)
    assert histogram.width == 256
    assert histogram.quantile(0.25) == pytest.approx(250, abs=1)


# ranges


def test_percentile() -> None:
    values = torch.arange(10_000, dtype=torch.float64)
    lo, hi = percentile(of(values, bins=4096), 0.99)
    assert (lo, hi) == (pytest.approx(50, abs=4), pytest.approx(9950, abs=4))
    assert percentile(of(values), 1) == (0, 9999)


@pytest.mark.parametrize(("share", "needed"), [(0.99, 200), (0.9, 20), (0.75, 8)])
def test_a_percentile_needs_values(share: float, needed: int) -> None:
    with pytest.raises(ValueError) as refused:
        percentile(of(torch.arange(float(needed - 1))), share)
    assert str(refused.value) == f"{needed - 1} values can't tell the {100 * share:g}th percentile: it needs {needed}"
    lo, hi = percentile(of(torch.arange(float(needed)), bins=4096), share)
    assert 0 <= lo <= 2 and needed - 3 <= hi <= needed - 1


def noise(histogram: Histogram, ends: tuple[float, float], format: Format, symmetric: bool, p: float) -> float:
    """Σ count |x - x̂|^p over the centres, with the quantiser that programs run."""
    lo, hi = (torch.tensor([v], dtype=torch.float64) for v in ends)
    scale, zero = scale_from_range(lo, hi, format, symmetric)
    grid = scale, zero, format, (-1,)
    centres = histogram.centres()
    return float(((dequantize(quantize(centres, *grid), *grid) - centres).abs().pow(p) * histogram.counts).sum())


VALUES = st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=60)


@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize("format", INTEGERS, ids=str)
@settings(deadline=None, max_examples=10)
@given(values=VALUES)
def test_the_least_error_is_never_worse_than_min_max(format: Format, p: float, values: list[float]) -> None:
    histogram = of(torch.tensor(values), bins=256)
    ends = least_error(histogram, format, format.signed, p)
    wide = min(histogram.lo, 0.0), max(histogram.hi, 0.0)
    assert wide[0] <= ends[0] <= 0 <= ends[1] <= wide[1]
    assert noise(histogram, ends, format, format.signed, p) <= noise(histogram, wide, format, format.signed, p)


def test_the_least_error_cuts_an_outlier_at_its_end_alone() -> None:
    """4 bits, one value at 40 among thousands in [-3, 3]: the upper end goes far below 40, the lower end stays."""
    values = torch.cat([seeded(20_000).clamp(-3, 3), torch.tensor([40.0])])
    lo, hi = least_error(of(values, bins=2048), format_of("uint4"), symmetric=False)
    assert -3 <= lo < -1.5
    assert hi < 20


def test_the_least_divergence_keeps_what_needs_no_cut() -> None:
    values = torch.linspace(-1, 1, 4096)
    assert least_divergence(of(values, bins=2048), format_of("uint8")) == (-1, 1)


def test_the_least_divergence_cuts_an_outlier() -> None:
    values = torch.cat([seeded(50_000), torch.tensor([60.0])])
    lo, hi = least_divergence(of(values, bins=2048), format_of("uint8"))
    assert lo > -5 and 3 < hi < 30
