"""Closed form of LSQ against autograd through x / s, clamp and a round whose derivative is one."""

import pytest
import torch

from fxcompress.numerics.affine import dequantize, quantize
from fxcompress.numerics.blocks import scale_shape
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.straight_through import fake_quantize, keep

CASES = [("int4", None), ("uint4", 5), ("int2", None), ("int8", 3)]


def problem(format, zero, block=(1, 16), shape=(3, 40)):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * (format.qmax - format.qmin) * 0.5
    scale = torch.rand(scale_shape(shape, block), generator=g, dtype=torch.float64) + 0.5
    return x, scale, None if zero is None else torch.full(scale.shape, zero, dtype=format.container), torch.randn(shape, generator=g).double()


def grads(fn, x, scale, weight):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    return torch.autograd.grad((fn(x, scale) * weight).sum(), (x, scale))


def by_autograd(format, zero, x, scale):
    """One scale an element, spread by plain indexing; rounding is added as a constant and clipping cuts the gradient."""
    spread = scale.repeat_interleave(16, 1)[:, : x.shape[1]]
    v, z = x / spread, 0 if zero is None else zero
    code = (v + (v.round() - v).detach() + z).clamp(format.qmin, format.qmax)
    return (code - z) * spread


@pytest.mark.parametrize(("name", "zero"), CASES)
def test_value_and_gradients_equal_autograd_on_ragged_blocks(name, zero):
    format = format_of(name)
    x, scale, z, weight = problem(format, zero)
    y = fake_quantize(x, scale, z, format, (1, 16))
    assert torch.equal(y, dequantize(quantize(x, scale, z, format, (1, 16)), scale, z, format, (1, 16)))
    got = grads(lambda a, s: fake_quantize(a, s, z, format, (1, 16)), x, scale, weight)
    expected = grads(lambda a, s: by_autograd(format, zero, a, s), x, scale, weight)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradient_is_one_inside_and_nought_outside():
    x, one = torch.tensor([-9.0, -8.4, 0.3, 7.4, 7.6]), torch.ones(1)
    inside = [0.0, 1.0, 1.0, 1.0, 0.0]
    dx, ds = grads(lambda a, s: fake_quantize(a, s, None, format_of("int4"), (-1,)), x, one, torch.ones(5))
    assert dx.tolist() == inside
    assert ds.item() == pytest.approx(-8 + 0.4 - 0.3 - 0.4 + 7, abs=1e-5)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float_formats_clip_beyond_the_greatest_value(name):
    format = format_of(name)
    x = torch.tensor([0.3, format.qmax * 1.0, format.qmax * 1.01, -format.qmax * 2.0], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    dx, ds = grads(lambda a, s: fake_quantize(a, s, None, format, (-1,)), x, one, torch.ones(4, dtype=torch.float64))
    assert dx.tolist() == [1, 1, 0, 0]
    cast = torch.tensor(0.3).to(format.container).double().item()
    assert ds.item() == pytest.approx(cast - 0.3 + format.qmax - format.qmax, abs=1e-9)


def test_gradients_come_in_the_dtypes_of_their_tensors():
    x, scale = torch.randn(2, 8, dtype=torch.float16, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    fake_quantize(x, scale, None, format_of("int4"), (1, -1)).sum().backward()
    assert (x.grad.dtype, scale.grad.dtype) == (torch.float16, torch.float32)


def test_what_is_kept_passes_as_it_is_and_moves_no_scale():
    format = format_of("uint4")
    x, scale, z, weight = problem(format, 5)
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    y = fake_quantize(x, scale, z, format, (1, 16), kept)
    assert torch.equal(y, torch.where(kept, x, fake_quantize(x, scale, z, format, (1, 16))))
    got = grads(lambda a, s: fake_quantize(a, s, z, format, (1, 16), kept), x, scale, weight)
    expected = grads(lambda a, s: torch.where(kept, a, by_autograd(format, 5, a, s)), x, scale, weight)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keep_is_where_bit_for_bit(dtype):
    new, old = (torch.randn(40, 7, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    new[0], old[1:3, :3] = float("inf"), torch.tensor([float("-inf"), float("nan"), -0.0], dtype=dtype)
    kept = torch.rand(40, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    wanted = torch.where(kept, old, new)
    assert torch.equal(keep(new, kept, old).view(torch.uint8), wanted.view(torch.uint8))
