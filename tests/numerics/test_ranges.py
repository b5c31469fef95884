import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import RecipeError
from fxcompress.numerics.affine import dequantize, quantize
from fxcompress.numerics.formats import FORMATS, format_of
from fxcompress.numerics.ranges import extremes, minmax_range, mse_range, quantisation_error, scale_from_range

INTEGERS = [f for f in FORMATS.values() if f.kind == "int" and f.bits <= 8]


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def round_trip(x, scale, zero, format, block):
    return dequantize(quantize(x, scale, zero, format, block), scale, zero, format, block)


def scalar(*values):
    return tuple(torch.tensor([v], dtype=torch.float64) for v in values)


@pytest.mark.parametrize(
    ("lo", "hi", "format", "symmetric", "scale", "zero"),
    [
        (-14, 14, "int4", True, 2, None),  # 14 / 7 beats 14 / 8
        (-16, 13, "int4", True, 2, None),  # 16 / 8 beats 13 / 7
        (-16, -4, "int4", True, 2, None),
        (0, 510, "uint8", True, 2, None),
        (-896, 100, "float8_e4m3fn", True, 2, None),
        (-10, 20, "uint4", False, 2, 5),
        (-10, 20, "int4", False, 2, -3),
        (6, 30, "uint4", False, 2, 0),  # widened to hold 0
        (-30, -6, "uint4", False, 2, 15),
        (0, 0, "int4", True, 1, None),
        (0, 0, "int8", False, 1, 0),
    ],
)
def test_closed_forms(lo, hi, format, symmetric, scale, zero):
    got, got_zero = scale_from_range(*scalar(lo, hi), format_of(format), symmetric)
    assert got.tolist() == [scale]
    assert (None if got_zero is None else got_zero.tolist()) == (None if zero is None else [zero])
    assert got_zero is None or got_zero.dtype == format_of(format).container


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", INTEGERS, ids=str)
@settings(deadline=None)
@given(lo=st.floats(-1e30, 1e30), width=st.floats(0, 1e30))
def test_the_grid_holds_the_range_to_half_a_step(format, symmetric, lo, width):
    lo = abs(lo) if symmetric and not format.signed else lo
    x = torch.tensor([lo, lo + width], dtype=torch.float64)
    scale, zero = minmax_range(x, format, symmetric, (-1,))
    assert (round_trip(x, scale, zero, format, (-1,)) - x).abs().max() <= scale * (0.5 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiny_and_huge_ranges_give_a_finite_positive_scale(dtype, symmetric):
    info = torch.finfo(dtype)
    ends = torch.tensor([[info.tiny * info.eps], [info.tiny], [info.max / 2]], dtype=dtype)  # the least subnormal first
    x = torch.cat([-ends, ends], 1)
    scale, zero = minmax_range(x, format_of("int4"), symmetric, (1, -1))
    assert scale.dtype == dtype and scale.isfinite().all() and (scale > 0).all()
    assert round_trip(x, scale, zero, format_of("int4"), (1, -1)).isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [minmax_range, mse_range])
def test_a_block_of_zeros_has_scale_one_and_codes_zero(search, symmetric):
    x = gaussian(2, 40)
    x[1, 16:32] = 0
    format, block = format_of("int4"), (1, 16)
    scale, zero = search(x, format, symmetric, block)
    codes = quantize(x, scale, zero, format, block)
    assert scale[1, 1] == 1 and not codes[1, 16:32].any()
    assert dequantize(codes, scale, zero, format, block).isfinite().all()


@pytest.mark.parametrize("block", [(1, 16), (2, 5), (-1, 1), (-1, -1)])
def test_extremes_of_ragged_blocks_equal_the_loop_and_know_no_padding(block):
    x = gaussian(5, 37) + 9  # all positive: a padded zero would show as the least value
    lo, hi = extremes(x, block)
    rows, columns = (n if b == -1 else b for n, b in zip(x.shape, block, strict=True))
    for i in range(lo.shape[0]):
        for j in range(lo.shape[1]):
            part = x[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            assert (lo[i, j], hi[i, j]) == (part.min(), part.max())
    assert lo.shape == (-(-5 // rows), -(-37 // columns))


@pytest.mark.parametrize(("format", "symmetric"), [("int4", True), ("uint4", False), ("int2", True), ("float8_e4m3fn", True)])
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_the_search_equals_brute_force_over_every_candidate(format, symmetric, p):
    f, block, grid = format_of(format), (1, 16), (0.9, 0.7, 0.5)
    x = gaussian(3, 40, dtype=torch.float64)
    scale, zero = mse_range(x, f, symmetric, block, grid, p)
    for i in range(3):
        for j in range(3):
            part = x[i, j * 16 : (j + 1) * 16]
            candidates = [scale_from_range(part.min()[None] * r, part.max()[None] * r, f, symmetric) for r in (1, *grid)]
            errors = [(round_trip(part, s, z, f, (-1,)) - part).abs().pow(p).sum() for s, z in candidates]
            s, z = candidates[int(torch.stack(errors).argmin())]
            assert scale[i, j] == s[0] and (zero is None or (z is not None and zero[i, j] == z[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("format", INTEGERS, ids=str)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), tail=st.sampled_from([1, 3]))
def test_the_search_is_never_worse_than_min_max_with_the_scale_as_stored(format, dtype, seed, tail):
    x = gaussian(4, 37, seed=seed).pow(tail).to(dtype)
    errors = [quantisation_error(x, *r(x, format, False, (1, 16)), format, (1, 16)) for r in (minmax_range, mse_range)]
    assert (errors[1] <= errors[0]).all()


def test_the_search_gains_what_theory_says_at_two_bits():
    """The best uniform 4-level grid with a code at 0 has about 8.7 dB on a gaussian; min-max of 1024 values has almost nothing."""
    x, f, block = gaussian(64, 1024), format_of("int2"), (1, -1)
    noise = [(round_trip(x, *r(x, f, True, block), f, block) - x).square().mean() for r in (minmax_range, mse_range)]
    assert noise[1] < 0.25 and noise[0] > 0.5


def test_the_error_bites():
    x, f, block = gaussian(8, 64), format_of("int4"), (1, 16)
    scale, _ = mse_range(x, f, True, block)
    best = quantisation_error(x, scale, None, f, block).sum()
    for fault in (scale * 1.5, scale.roll(1, 0), -scale):
        assert quantisation_error(x, fault, None, f, block).sum() > 1.2 * best


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_counted_and_placed(bad):
    x = gaussian(5, 6)
    x[3, 2] = x[4, 0] = bad
    with pytest.raises(ValueError, match=rf"^2 of 30 values aren't finite; the first is {bad} at \[3, 2\]$"):
        minmax_range(x, format_of("int4"), True, (1, -1))


@pytest.mark.parametrize(
    ("lo", "hi", "format", "symmetric", "error", "message"),
    [
        (1, -2, "int4", True, ValueError, r"lo <= hi; lo 1..1, hi -2..-2"),
        (0, torch.inf, "int4", True, ValueError, "must be finite"),
        (-3, 1, "uint4", True, ValueError, r"uint4 without a zero point holds nothing below 0; the least value is -3"),
        (-3, 1, "float8_e5m2", False, RecipeError, "float8_e5m2 has no zero point"),
    ],
)
def test_illegal_ranges_are_refused(lo, hi, format, symmetric, error, message):
    with pytest.raises(error, match=message):
        scale_from_range(*scalar(lo, hi), format_of(format), symmetric)


def test_an_empty_tensor_has_no_range():
    with pytest.raises(ValueError, match=r"shape \(0, 4\) has no range"):
        extremes(torch.empty(0, 4), (1, -1))


@pytest.mark.parametrize("grid", [(0.0,), (1.1,), (-0.5, 0.5)])
def test_factors_outside_the_unit_interval_are_refused(grid):
    with pytest.raises(ValueError, match=r"shrink factors lie in \(0, 1\]"):
        mse_range(gaussian(2, 8), format_of("int4"), True, (1, -1), grid)


@pytest.mark.parametrize("name", ["int4", "float8_e4m3fn"])
@pytest.mark.parametrize("size", [2.0**-90, 2.0**80])
def test_squared_errors_of_any_size(name: str, size: float) -> None:
    """float32 holds neither 2^-180 of them nor 2^160; by powers of two they are exactly those."""
    x, format = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), format_of(name)
    scale, _ = minmax_range(x, format, True, (1, 16))
    small = quantisation_error(x, scale, None, format, (1, 16)).double()
    assert torch.allclose(quantisation_error(x * size, scale * size, None, format, (1, 16)).double(), small * size**2, rtol=1e-5, atol=0)
