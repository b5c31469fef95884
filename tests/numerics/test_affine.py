"""Against scalar loops over Python floats, written from the law alone."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.numerics.affine import dequantize, quantize
from fxcompress.numerics.blocks import scale_shape
from fxcompress.numerics.formats import FORMATS, format_of

INTEGERS = [f for f in FORMATS.values() if f.kind == "int" and f.bits <= 16]
FLOATS = [f for f in FORMATS.values() if f.kind == "float"]


def problem(shape, block, format, seed=0):
    """x past both ends of the grid, positive scales and zero points of every block."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * (format.qmax - format.qmin) / 2
    scale = torch.rand(scale_shape(shape, block), generator=g, dtype=torch.float64) + 0.5
    zero = torch.randint(format.qmin, format.qmax + 1, scale.shape, generator=g).to(format.container)
    return x, scale, zero


def brute_force(x, scale, zero, format, block):
    """Codes and values one element at a time; Python's round is ties to even."""
    codes, values = torch.empty(x.shape, dtype=torch.int64), torch.empty_like(x)
    for at in product(*(range(n) for n in x.shape)):
        owner = tuple(0 if b == -1 else i // b for i, b in zip(at, block, strict=True))
        s, z = scale[owner].item(), 0 if zero is None else int(zero[owner])
        code = min(max(round(x[at].item() / s) + z, format.qmin), format.qmax)
        codes[at], values[at] = code, (code - z) * s
    return codes, values


def check(x, scale, zero, format, block, used_scale=None, used_zero=None):
    """The assertion of this file; the used_... are what a faulty quantizer would have used instead."""
    codes, values = brute_force(x, scale, zero, format, block)
    args = (scale if used_scale is None else used_scale, zero if used_zero is None else used_zero, format, block)
    got = quantize(x, *args)
    assert got.dtype == format.container and torch.equal(got.long(), codes)
    assert torch.equal(dequantize(got, *args), values)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", INTEGERS, ids=str)
@pytest.mark.parametrize(
    ("shape", "block"), [((3, 37), (1, 16)), ((7, 10), (3, 4)), ((4, 6), (-1, 1)), ((5, 6), (-1, -1)), ((2, 3, 5, 4), (1, 2, -1, 3))]
)
def test_equals_the_scalar_loop(shape, block, format, symmetric):
    x, scale, zero = problem(shape, block, format)
    check(x, scale, None if symmetric else zero, format, block)


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_equals_the_scalar_loop_in_any_shape(shape, data):
    block = tuple(data.draw(st.sampled_from([-1, 1, 2, 3, 7])) for _ in shape)
    format = format_of("int4")
    check(*problem(shape, block, format, seed=data.draw(st.integers(0, 99))), format, block)


FAULTS = {
    "zero point off by one": lambda s, z: {"used_zero": z + 1},
    "zero point dropped": lambda s, z: {"used_zero": torch.zeros_like(z)},
    "scale times 1.5": lambda s, z: {"used_scale": s * 1.5},
    "scale negated": lambda s, z: {"used_scale": -s},
    "scale of the next block": lambda s, z: {"used_scale": s.roll(1, 1)},
    "block axes swapped": lambda s, z: {"used_scale": s.T, "used_zero": z.T},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_catches(fault):
    format, block = format_of("uint4"), (2, 2)
    x, scale, _ = problem((6, 6), block, format)
    zero = torch.full(scale.shape, 7, dtype=torch.uint8)
    check(x, scale, zero, format, block)
    with pytest.raises(AssertionError):
        check(x, scale, zero, format, block, **FAULTS[fault](scale, zero))


def test_swapped_block_axes_of_unequal_size_do_not_fit():
    x, scale, zero = problem((6, 6), (2, 3), format_of("uint4"))
    with pytest.raises(ValueError, match=r"scale is \(3, 2\); a tensor \(6, 6\) in blocks \(3, 2\) needs \(2, 3\)"):
        quantize(x, scale, zero, format_of("uint4"), (3, 2))


def test_ties_go_to_even_and_the_ends_saturate():
    x = torch.tensor([-1e30, -3.5, -2.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, torch.inf])
    expected = [-128, -4, -2, 0, 0, 2, 2, 126, 127, 127]
    one = torch.ones(1)
    assert quantize(x, one, None, format_of("int8"), (-1,)).tolist() == expected


def test_32_bit_codes_saturate_and_round_in_float64():
    x = torch.tensor([-1e12, 2.0**24 + 1, 1e12], dtype=torch.float64)
    codes = quantize(x, torch.ones(1), None, format_of("int32"), (-1,))
    assert codes.tolist() == [-(2**31), 2**24 + 1, 2**31 - 1]
    assert dequantize(codes, torch.ones(1, dtype=torch.float64), None, format_of("int32"), (-1,)).tolist() == codes.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32_and_rounded_once(dtype):
    format, block = format_of("int16"), (1, 5)
    x, scale, zero = (v.to(dtype) if v.is_floating_point() else v for v in problem((4, 12), block, format))
    scale = scale * 0 + torch.tensor(0.37, dtype=dtype)
    wide = quantize(x.float(), scale.float(), zero, format, block)
    assert torch.equal(quantize(x, scale, zero, format, block), wide)
    got = dequantize(wide, scale, zero, format, block)
    assert got.dtype == dtype and torch.equal(got, dequantize(wide, scale.float(), zero, format, block).to(dtype))


@pytest.mark.parametrize("format", FLOATS, ids=str)
def test_all_256_float8_codes_survive_and_equal_torchs_cast(format):
    codes = torch.arange(256, dtype=torch.uint8).view(format.container)
    values = codes.float()
    finite = values[values.isfinite()]
    assert len(finite) == {"float8_e4m3fn": 254, "float8_e5m2": 248}[format.name]
    got = quantize(finite * 0.25, torch.tensor([0.25]), None, format, (-1,))
    assert torch.equal(got.view(torch.uint8), codes[values.isfinite()].view(torch.uint8))
    assert torch.equal(dequantize(got, torch.tensor([0.25]), None, format, (-1,)), finite * 0.25)


@pytest.mark.parametrize("format", FLOATS, ids=str)
def test_float8_rounds_to_the_nearest_value_ties_to_the_even_code(format):
    """Midpoints of all neighbours and a hair on either side, against a table of the finite values."""
    levels = torch.arange(256, dtype=torch.uint8).view(format.container).float()
    table = levels[levels.isfinite()].unique()
    middle = (table[1:] + table[:-1]) / 2
    even = (table[:-1].to(format.container).view(torch.uint8) & 1) == 0
    x = torch.cat([middle, middle * (1 - 1e-6), middle * (1 + 1e-6)])
    low, high = table[:-1], table[1:]
    inward, outward = torch.where(middle > 0, low, high), torch.where(middle > 0, high, low)
    expected = torch.cat([torch.where(even, low, high), inward, outward])
    got = dequantize(quantize(x, one := torch.ones(1), None, format, (-1,)), one, None, format, (-1,))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("format", FLOATS, ids=str)
def test_float8_saturates_at_the_greatest_finite_value(format):
    x = torch.tensor([-torch.inf, -1e9, format.qmax * 1.2, 1e9, torch.inf])
    assert quantize(x, torch.ones(1), None, format, (-1,)).float().tolist() == [format.qmin, format.qmin, *[format.qmax] * 3]


def test_memory_layout_is_kept_and_views_are_read_in_place():
    format, block = format_of("int8"), (1, -1, -1, -1)
    x, scale, _ = problem((2, 3, 4, 5), block, format)
    last = x.contiguous(memory_format=torch.channels_last)
    codes = quantize(last, scale, None, format, block)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(codes, quantize(x, scale, None, format, block))


@pytest.mark.parametrize(
    ("scale", "zero", "format", "message"),
    [
        (torch.ones(2, 1), None, "int8", r"scale is \(2, 1\); a tensor \(3, 8\) in blocks \(1, 4\) needs \(3, 2\)"),
        (torch.ones(3, 2), torch.zeros(3, 1), "int8", r"zero_point is \(3, 1\), scale is \(3, 2\)"),
        (torch.ones(3, 2), torch.zeros(3, 2), "float8_e5m2", "float8_e5m2 takes no zero_point"),
    ],
)
def test_operands_that_do_not_fit_are_refused(scale, zero, format, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(3, 8), scale, zero, format_of(format), (1, 4))


def test_codes_of_another_container_are_refused():
    with pytest.raises(ValueError, match=r"codes of int4 are torch\.int8, not torch\.int64"):
        dequantize(torch.ones(3, 8, dtype=torch.int64), torch.ones(3, 2), None, format_of("int4"), (1, 4))
