from math import inf, isnan, log, log10

import pytest
import torch

from fxcompress.numerics.affine import dequantize, quantize
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.noise import ideal_sqnr, is_far, noise_power, sqnr, static_sqnr
from fxcompress.numerics.ranges import minmax_range


def uniform(*shape, lo=-1.0, hi=1.0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * (hi - lo) + lo


def measured(x, format, block, symmetric):
    scale, zero = minmax_range(x, format, symmetric, block)
    return sqnr(x, dequantize(quantize(x, scale, zero, format, block), scale, zero, format, block))


def test_sqnr_closed_forms():
    x = torch.tensor([3.0, 4.0])
    assert sqnr(x, x) == inf
    assert sqnr(x, x * 0.9) == pytest.approx(20, abs=1e-5)  # float32's 0.9
    assert sqnr(x * 0, x) == -inf
    assert isnan(sqnr(x, x * torch.nan))
    with pytest.raises(ValueError, match=r"reference is \(2,\), approx is \(1,\)"):
        sqnr(x, x[:1])


def test_noise_power_weighs_each_step_with_its_elements():
    step = torch.tensor([[2.0, 6.0]])  # ragged: 3 elements with step 2, 1 with step 6
    assert noise_power(step, (1, 3), (1, 4)) == pytest.approx((3 * 4 + 36) / 12 / 4, rel=1e-12)


@pytest.mark.parametrize(("format", "symmetric"), [("int8", True), ("uint8", False), ("uint4", False)])
def test_ideal_of_uniform_noise_is_six_decibels_a_bit(format, symmetric):
    """Uniform on [-1, 1]: signal 1 / 3, step 2 / (2^b - 1), so 20 log10(2^b - 1)."""
    x, f = uniform(1 << 18), format_of(format)
    assert ideal_sqnr(x, f, (-1,), symmetric) == pytest.approx(20 * log10(2**f.bits - 1), abs=0.02)


@pytest.mark.parametrize(("format", "mantissa"), [("float8_e4m3fn", 3), ("float8_e5m2", 2)])
def test_ideal_float_of_log_uniform_values_is_the_closed_form(format, mantissa):
    x = torch.exp2(uniform(1 << 18, lo=-6, hi=-1))
    x[0] = 0.875  # both formats end at 1.75 times a power of two: the scale is one too, and binades stay binades
    expected = 10 * log10(12 * 4**mantissa * 3 / (2 * log(2)))
    assert ideal_sqnr(x, format_of(format), (-1,), True) == pytest.approx(expected, abs=0.02)


CASES = [("int8", True), ("uint8", False), ("int4", True), ("uint4", False), ("float8_e4m3fn", True), ("float8_e5m2", True)]


@pytest.mark.parametrize(("format", "symmetric"), CASES)
@pytest.mark.parametrize("block", [(1, -1), (1, 100), (-1, -1)])
def test_a_min_max_quantiser_comes_within_a_decibel_of_the_ideal(format, symmetric, block):
    x = torch.randn((64, 576), generator=torch.Generator().manual_seed(0))
    f = format_of(format)
    assert measured(x, f, block, symmetric) == pytest.approx(ideal_sqnr(x, f, block, symmetric), abs=1.0)


FAULTS = {
    "scale times 1.5 when read": lambda s, z: (s * 1.5, z),
    "scale negated when read": lambda s, z: (-s, z),
    "scale of another row": lambda s, z: (s.roll(1, 0), z),
    "zero point off by one": lambda s, z: (s, z + 1),
    "zero point dropped": lambda s, z: (s, z * 0),
}


@pytest.mark.parametrize(
    ("format", "symmetric", "fault"), [(*case, fault) for case in CASES for fault in FAULTS if not (case[1] and "zero point" in fault)]
)
def test_the_limit_of_ideal_less_three_decibels_bites(format, symmetric, fault):
    f, block = format_of(format), (1, -1)
    x = torch.randn((64, 576), generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64)[:, None]
    scale, zero = minmax_range(x, f, symmetric, block)
    codes = quantize(x, scale, zero, f, block)
    limit = ideal_sqnr(x, f, block, symmetric) - 3
    assert sqnr(x, dequantize(codes, scale, zero, f, block)) > limit
    assert sqnr(x, dequantize(codes, *FAULTS[fault](scale, zero), f, block)) < limit


@pytest.mark.parametrize(("format", "symmetric"), CASES[:4])
def test_the_limit_tells_a_step_half_as_wide_again(format, symmetric):
    """20 log10 1.5 = 3.5 dB. Only integers: a float format's steps go with the values, not with the scale."""
    f, block, x = format_of(format), (-1,), uniform(1 << 16)
    scale, zero = minmax_range(x, f, symmetric, block)
    zero = zero if zero is None else zero // 3 * 2
    coarse = dequantize(quantize(x, scale * 1.5, zero, f, block), scale * 1.5, zero, f, block)
    assert sqnr(x, coarse) < ideal_sqnr(x, f, block, symmetric) - 3


@pytest.mark.parametrize("format", ["int4", "float8_e4m3fn"])
def test_zero_blocks_add_no_noise(format):
    x = uniform(2, 64)
    padded = torch.cat([x, torch.zeros_like(x)])
    f = format_of(format)
    assert ideal_sqnr(padded, f, (1, -1), True) == pytest.approx(ideal_sqnr(x, f, (1, -1), True), abs=1e-6)
    assert ideal_sqnr(x * 0, f, (1, -1), True) == inf


@pytest.mark.parametrize(("format", "symmetric"), CASES[:4])
def test_the_static_ideal_on_the_own_range_is_the_ideal(format, symmetric):
    x = uniform(1000, lo=-3, hi=5)
    expected = ideal_sqnr(x, format_of(format), (-1,), symmetric)
    assert static_sqnr(x, format_of(format), x.amin(), x.amax(), symmetric) == pytest.approx(expected, abs=1e-9)


def test_static_closed_forms():
    """[0, 255] in steps of 1: noise 1 / 12 an entry, and 45² for the one that is cut from 300 to 255. The range always holds 0."""
    x = torch.tensor([100.0, 200.0, 300.0])
    lo, hi = torch.tensor(10.0, dtype=torch.float64), torch.tensor(255.0, dtype=torch.float64)
    assert static_sqnr(x, format_of("uint8"), lo, hi, False) == pytest.approx(10 * log10(14e4 / (3 / 12 + 45**2)), abs=1e-9)
    assert static_sqnr(x, format_of("int8"), lo, hi, True) == pytest.approx(10 * log10(14e4 / (3 * 4 / 12 + 45**2)), abs=1e-9)
    assert static_sqnr(-x, format_of("uint8"), -hi, -lo, False) == pytest.approx(10 * log10(14e4 / (3 / 12 + 45**2)), abs=1e-9)
    assert static_sqnr(x * 0, format_of("uint8"), lo, hi, False) == -inf
    assert static_sqnr(x * 0, format_of("uint8"), lo * 0, hi * 0, False) == inf


@pytest.mark.parametrize("fault", ["twice as wide", "half as wide", "negated"])
@pytest.mark.parametrize(("format", "symmetric"), CASES[:4])
def test_the_static_limit_bites(format, symmetric, fault):
    x, f = uniform(4096, lo=-0.5, hi=1.0), format_of(format)
    lo, hi = x.double().amin(), x.double().amax()
    wrong = {"twice as wide": 2.0, "half as wide": 0.5, "negated": -1.0}[fault]
    scale, zero = minmax_range(x, f, symmetric, (-1,))
    limit = static_sqnr(x, f, lo, hi, symmetric) - 3
    assert sqnr(x, dequantize(quantize(x, scale, zero, f, (-1,)), scale, zero, f, (-1,))) > limit
    assert sqnr(x, dequantize(quantize(x, wrong * scale, zero, f, (-1,)), abs(wrong) * scale, zero, f, (-1,))) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measuring_changes_nothing(dtype: torch.dtype) -> None:
    """In float64 a cast is no copy."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    kept, rounded = x.clone(), (x * 4).round() / 4
    ideal_sqnr(x, format_of("int8"), (1, -1), symmetric=True)
    static_sqnr(x, format_of("int8"), x.min().double(), x.max().double(), symmetric=True)
    sqnr(x, rounded)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("limit", "expected"), [(-10.0, False), (0.0, True), (20.0, True)])
def test_a_part_tells_that_two_long_tensors_are_far_apart(limit: float, expected: bool) -> None:
    x = torch.randn(1 << 19, generator=torch.Generator().manual_seed(0))
    assert is_far(x, -x, limit) is expected  # -6 dB, -3 of its first half
    assert not is_far(x, x, limit)
    assert not is_far(x, torch.full_like(x, torch.nan), limit)
    assert not is_far(x[:100], -x[:100], limit)
