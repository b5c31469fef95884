"""Log formats against the law written from scratch, and with faults that must be caught."""

import math

import pytest
import torch

from fxcompress.errors import RecipeError
from fxcompress.numerics import affine
from fxcompress.numerics.affine import dequantize, quantize
from fxcompress.numerics.formats import FORMATS, format_of
from fxcompress.numerics.ranges import minmax_range, mse_range, scale_from_range
from fxcompress.numerics.straight_through import fake_quantize

LOGS = [f for f in FORMATS.values() if f.kind == "log"]
SCALE = torch.full((1,), 0.75, dtype=torch.float64)
WHOLE = (-1,)


def sweep(format):
    """Numbers from above the scale to below the last level, nought and less among them."""
    powers = torch.linspace(-math.pi / 3, (format.qmax + math.e) / format.tau, 4001, dtype=torch.float64)  # no ties
    return torch.cat([SCALE * torch.exp2(-powers), torch.tensor([0.0, -0.0, -1.0, 1e-300], dtype=torch.float64)])


def loop(x, scale, format):
    """One number at a time; Python's round is ties to even."""
    for value in x.tolist():
        code = round(format.tau * math.log2(scale / value)) if value > 0 else format.qmax
        code = min(max(code, 0), format.qmax)
        yield code, 0.0 if code == format.qmax else 2 ** (-code / format.tau) * scale


@pytest.mark.parametrize("format", LOGS, ids=str)
def test_equals_the_scalar_loop(format):
    x = sweep(format)
    codes, values = zip(*loop(x, float(SCALE), format), strict=True)
    got = quantize(x, SCALE, None, format, WHOLE)
    assert got.dtype == torch.uint8 and got.tolist() == list(codes)
    torch.testing.assert_close(dequantize(got, SCALE, None, format, WHOLE), torch.tensor(values, dtype=torch.float64), rtol=1e-15, atol=0)


def distinct(format):
    x = sweep(format)
    return dequantize(quantize(x, SCALE, None, format, WHOLE), SCALE, None, format, WHOLE).unique()


@pytest.mark.parametrize("format", LOGS, ids=str)
def test_two_to_the_bits_values_at_most_and_the_last_code_is_nought(format):
    values = distinct(format)
    assert len(values) <= 2**format.bits
    assert values[0] == 0 and values[1] > 0
    assert dequantize(torch.tensor([format.qmax], dtype=torch.uint8), SCALE, None, format, WHOLE) == 0


@pytest.mark.parametrize("name", ["log4:1", "log4:2", "log4:8", "log6:4"])
def test_a_level_too_many_is_seen(name, monkeypatch):
    """The fault: code 2^b - 1 means a number, and what is smaller than that is set to 0 besides."""
    format = format_of(name)

    def one_more(codes, format, work):
        levels = torch.exp2(-torch.arange(format.qmax + 1, dtype=torch.float64) / format.tau)
        return levels[codes.long()]

    monkeypatch.setattr(affine, "on_line", one_more)
    values = distinct(format)
    assert values[0] > 0, "the last code is a number now"
    assert len(torch.cat([values, torch.zeros(1)]).unique()) == 2**format.bits + 1


@pytest.mark.parametrize("format", LOGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_levels_stay_what_they_are(format, dtype):
    scale = SCALE.to(dtype)
    codes = torch.arange(format.qmax + 1).to(torch.uint8)
    levels = dequantize(codes, scale, None, format, WHOLE)
    assert torch.equal(quantize(levels, scale, None, format, WHOLE), codes)
    powers = codes[: -1 : format.tau]
    assert torch.equal(dequantize(powers, scale, None, format, WHOLE), scale * torch.exp2(-torch.arange(len(powers)).to(dtype)))


def test_the_greatest_relative_error_is_that_of_half_a_code():
    for tau in (1, 2, 4, 8):
        format = format_of(f"log8:{tau}")
        x = SCALE * torch.exp2(-torch.linspace(0, 15, 20001, dtype=torch.float64))
        error = (dequantize(quantize(x, SCALE, None, format, WHOLE), SCALE, None, format, WHOLE) / x - 1).abs().max()
        assert float(error) == pytest.approx(2 ** (1 / (2 * tau)) - 1, rel=1e-3)


def test_every_block_has_a_scale():
    x = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    format = format_of("log4:2")
    scale, zero = minmax_range(x, format, True, (1, 16))
    assert zero is None and torch.equal(scale[0, 0], x[0, :16].max())
    got = quantize(x, scale, None, format, (1, 16))
    assert torch.equal(got[1:2, 16:32], quantize(x[1:2, 16:32], scale[1:2, 1:2], None, format, (-1, -1)))


def test_the_search_for_a_range_never_loses():
    x = torch.rand(500, generator=torch.Generator().manual_seed(1)) ** 6
    format = format_of("log4:1")

    def error(scale):
        return float((dequantize(quantize(x, scale, None, format, WHOLE), scale, None, format, WHOLE) - x).square().sum())

    assert error(mse_range(x, format, True, WHOLE)[0]) < error(minmax_range(x, format, True, WHOLE)[0])


def test_gradients_are_those_of_a_grid_and_agree_with_each_other():
    """1 for x inside, 0 where it is cut off above s or to 0. y is homogeneous in x and s: x dy/dx + s dy/ds = y."""
    format = format_of("log4:2")
    x = torch.tensor([2.0, 0.75, 0.4, 0.01, 1e-4, 0.0], dtype=torch.float64, requires_grad=True)
    scale = SCALE.clone().requires_grad_()
    y = fake_quantize(x, scale, None, format, WHOLE)
    assert torch.equal(y, dequantize(quantize(x, scale, None, format, WHOLE), scale, None, format, WHOLE))
    dx, ds = torch.autograd.grad(y.sum(), (x, scale))
    assert dx.tolist() == [0, 1, 1, 1, 0, 0]
    assert float((dx * x.detach()).sum() + ds * SCALE) == pytest.approx(float(y.sum().detach()), rel=1e-12)


def test_what_has_no_zero_point_gets_none():
    format = format_of("log4:2")
    with pytest.raises(ValueError, match="log4:2 takes no zero_point"):
        quantize(torch.ones(3), torch.ones(1), torch.zeros(1, dtype=torch.uint8), format, WHOLE)
    with pytest.raises(RecipeError, match="log4:2 has no zero point"):
        scale_from_range(torch.zeros(1), torch.ones(1), format, False)
    with pytest.raises(RecipeError, match="did you mean 'log4:2'"):
        format_of("log4:22")
