"""What is learned: its value where training starts, what is settled, and that codes are what was learned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from fxcompress.calibrate.learned import Bias, Rounding, Scale
from fxcompress.numerics import affine
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.ranges import minmax_range
from tests.passes.helpers import seeded

NODE: fx.Node = fx.Graph().placeholder("x")
BLOCKS = [(1, -1), (-1, -1), (1, 4), (1, 5), (2, -1)]


def rounding(
    weight: Tensor, format: str = "int4", symmetric: bool = True, block: tuple[int, ...] = (1, -1)
) -> tuple[Rounding, Tensor, Tensor | None]:
    """A rounding with its scale and zero point."""
    scale, zero = minmax_range(weight, format_of(format), symmetric, block)
    return Rounding(NODE, weight, scale, zero, format_of(format), block, 0.1), scale, zero


class TestRounding:
    @pytest.mark.parametrize("block", BLOCKS)
    @pytest.mark.parametrize(("format", "symmetric"), [("int4", True), ("uint4", False), ("int8", True), ("int2", True)])
    def test_starts_at_the_weight(self, format: str, symmetric: bool, block: tuple[int, ...]) -> None:
        weight = seeded(6, 12)
        learned, _, _ = rounding(weight, format, symmetric, block)
        off = (learned.value() - weight).abs() / learned.scale
        assert float(off.max()) < (0.51 if format == "uint4" else 0.02)
        assert float(off.median()) < 0.02

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("block", BLOCKS)
    @pytest.mark.parametrize(("format", "symmetric"), [("int4", True), ("uint4", False), ("int8", True)])
    def test_settled_weights_have_the_codes_that_were_learned(
        self, format: str, symmetric: bool, block: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        weight = seeded(6, 12).to(dtype)
        learned, scale, zero = rounding(weight, format, symmetric, block)
        with torch.no_grad():
            learned.parameter.copy_(seeded(6, 12, seed=1))
        wanted = learned.floor + (learned.parameter >= 0)
        wanted = (wanted + (0 if learned.zero is None else learned.zero)).clamp(format_of(format).qmin, format_of(format).qmax)
        settled = learned.settled()
        assert settled.dtype == dtype
        codes = affine.quantize(settled, scale, zero, format_of(format), block)
        assert torch.equal(codes.double(), wanted.double())

    @pytest.mark.parametrize(("format", "symmetric"), [("int4", True), ("uint4", False), ("int2", True)])
    def test_slopes_are_those_of_autograd(self, format: str, symmetric: bool) -> None:
        learned, *_ = rounding(2 * seeded(6, 12), format, symmetric)
        with torch.no_grad():
            learned.parameter.copy_(3 * seeded(6, 12, seed=1))
        free, grid = learned.parameter.detach().clone().requires_grad_(), format_of(format)
        h = (free.sigmoid() * 1.2 - 0.1).clamp(0, 1)
        zero = 0 if learned.zero is None else learned.zero
        weight = ((learned.floor + h + zero).clamp(grid.qmin, grid.qmax) - zero) * learned.scale
        wanted = (weight * seeded(6, 12, seed=2)).sum() + 1 - (2 * h - 1).abs().pow(3.5).mean()
        wanted.backward()
        value = learned.value()
        learned.parameter.grad = learned.pull(3.5)
        (value * seeded(6, 12, seed=2)).sum().backward()
        torch.testing.assert_close(value, weight)
        torch.testing.assert_close(learned.parameter.grad, free.grad)

    def test_what_is_soft_is_pulled_to_whole_codes_and_what_is_whole_stays(self) -> None:
        learned, *_ = rounding(seeded(6, 12))
        assert learned.soft() > 0.9
        pull = learned.pull(2.5)
        assert bool((pull * learned.parameter <= 0).all())
        assert float(pull.abs().max()) > 0
        with torch.no_grad():
            learned.parameter.copy_(8 * seeded(6, 12).sign())
        assert not bool(learned.pull(2.5).any())
        assert learned.soft() == 0
        assert torch.equal(learned.value(), learned.settled())


class TestOthers:
    def test_a_scale_moves_by_shares(self) -> None:
        scale = Scale(NODE, torch.tensor([0.5, 2.0]), 0.1)
        assert torch.equal(scale.value(), torch.tensor([0.5, 2.0]))
        with torch.no_grad():
            scale.parameter.fill_(0.1)
        assert torch.allclose(scale.settled() / torch.tensor([0.5, 2.0]), torch.tensor(0.1).exp())
        assert not scale.settled().requires_grad
        assert scale.pull(2.5) is None

    def test_a_bias_moves_in_its_own_size_and_from_zero(self) -> None:
        for size in (1e-2, 10.0):
            bias = Bias(NODE, NODE, size * torch.tensor([1.0, -1.0]), 0.1)
            with torch.no_grad():
                bias.parameter.fill_(0.5)
            assert torch.allclose(bias.settled(), size * torch.tensor([1.5, -0.5]))
        zero = Bias(NODE, NODE, torch.zeros(2), 0.1)
        with torch.no_grad():
            zero.parameter.fill_(1.0)
        assert bool((zero.settled() > 0).all())
