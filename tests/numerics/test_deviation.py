"""What blocks lose, and what they may lose beyond rounding on their own range."""

from collections.abc import Callable
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.numerics.affine import dequantize, quantize
from fxcompress.numerics.deviation import Deviation
from fxcompress.numerics.formats import Format, format_of
from fxcompress.numerics.noise import ideal_sqnr, sqnr
from fxcompress.numerics.ranges import minmax_range, mse_range


def excess(x: Tensor, approx: Tensor, format: Format, block: tuple[int, ...], symmetric: bool) -> Tensor:
    seen = Deviation.of(x, approx, block)
    assert seen is not None
    return seen.excess(format, symmetric)


INT4, GROUP = format_of("int4"), (1, 16)
WEIGHT = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))


def rounded(scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    return dequantize(quantize(WEIGHT, scale, zero, format, GROUP), scale, zero, format, GROUP)


@pytest.mark.parametrize("search", [minmax_range, mse_range])
@pytest.mark.parametrize(("name", "symmetric"), [("int4", True), ("uint4", False), ("int8", True), ("float8_e4m3fn", True)])
def test_searched_grids_have_no_excess(search: Callable[..., Any], name: str, symmetric: bool) -> None:
    format = format_of(name)
    approx = rounded(*search(WEIGHT, format, symmetric, GROUP), format)
    assert excess(WEIGHT, approx, format, GROUP, symmetric).max() <= 1


def test_the_greatest_value_over_qmax_is_as_good() -> None:
    """Another usual grid: steps of max|x| / 7 where min-max rounding may have max|x| / 8."""
    scale = WEIGHT.reshape(32, 4, 16).abs().amax(-1) / 7
    assert excess(WEIGHT, rounded(scale, None, INT4), INT4, GROUP, True).max() <= 1


def test_excess_of_a_block_by_its_definition() -> None:
    scale, _ = minmax_range(WEIGHT, INT4, True, GROUP)
    right = rounded(scale, None, INT4)
    wrong = right.clone()
    wrong[5, 16:32] = 0
    result = excess(WEIGHT, wrong, INT4, GROUP, True)
    x, y = WEIGHT[5, 16:32].double(), right[5, 16:32].double()
    assert result[5, 1].item() == pytest.approx((x.square().sum() / (1.01 * (x - y).square().sum())).item(), rel=1e-4)
    assert (result > 1).sum() == 1


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.3, 2.0])
def test_one_wrong_scale_among_many_is_an_excess(factor: float) -> None:
    """The whole tensor's ratio hardly moves: 128 blocks."""
    scale, _ = minmax_range(WEIGHT, INT4, True, GROUP)
    scale[7, 2] *= factor
    result = excess(WEIGHT, rounded(scale, None, INT4), INT4, GROUP, True)
    assert (result > 1).nonzero().tolist() == [[7, 2]]


def test_a_float_grid_that_clips_a_little_is_an_excess() -> None:
    """The rest is rounded as well as ever, and twice the error of a row is more than what one clipped number adds."""
    format = format_of("float8_e4m3fn")
    scale, _ = minmax_range(WEIGHT, format, True, (1, -1))
    scale[7] *= 0.94
    approx = dequantize(quantize(WEIGHT, scale, None, format, (1, -1)), scale, None, format, (1, -1))
    lost = excess(WEIGHT, approx, format, (1, -1), True)
    assert lost[7] < 2 and (lost > 1).nonzero().tolist() == [[7, 0]]


def test_a_shifted_zero_point_is_an_excess() -> None:
    format = format_of("uint4")
    scale, zero = minmax_range(WEIGHT, format, False, GROUP)
    assert zero is not None
    assert (excess(WEIGHT, rounded(scale, zero + 1, format), format, GROUP, False) > 1).float().mean() > 0.9


def test_nothing_lost_is_no_excess() -> None:
    assert excess(torch.zeros(2, 16), torch.zeros(2, 16), INT4, GROUP, True).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 1.0), (torch.float16, 1e-3), *((d, s) for d in (torch.float32, torch.float64) for s in (1.0, 1e-25, 1e25))],
)
@pytest.mark.parametrize(
    ("shape", "block"), [((300, 500), (1, -1)), ((70, 500), (1, 32)), ((40, 7, 3, 3), (1, -1, -1, -1)), ((9, 8), (-1, -1)), ((900,), (1,))]
)
def test_one_look_sees_what_many_do(dtype: torch.dtype, size: float, shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    """Also of numbers whose squares no float32 holds, and of more than one tile."""
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=draw, dtype=torch.float64) * size).to(dtype)
    approx = (x.double() * (1 + 0.01 * torch.randn(shape, generator=draw))).to(dtype)
    seen = Deviation.of(x, approx, block)
    assert seen is not None
    wide, off = x.double(), (x - approx).double()
    for at in {(0,) * x.dim(), tuple(n - 1 for n in seen.lo.shape)}:
        inside = tuple(slice(None) if b == -1 else slice(i * b, (i + 1) * b) for i, b in zip(at, block, strict=True))
        assert (seen.lo[at], seen.hi[at]) == (wide[inside].min(), wide[inside].max())
        assert seen.greatest[at] == off[inside].abs().max()
        assert seen.squares[at].item() == pytest.approx(off[inside].square().sum().item(), rel=1e-4)
    assert seen.sqnr == pytest.approx(sqnr(x, approx), abs=1e-3)
    for name in ("int8", "float8_e4m3fn"):
        assert seen.ideal_sqnr(format_of(name), True) == pytest.approx(ideal_sqnr(x, format_of(name), block, True), abs=1e-5)


def test_what_was_found_is_no_more_than_it_is() -> None:
    scale, _ = minmax_range(WEIGHT, INT4, True, GROUP)
    seen = Deviation.of(WEIGHT, rounded(scale, None, INT4), GROUP)
    assert seen is not None
    assert seen.beyond(seen.squares).max() <= 1 < seen.beyond(seen.squares / 2).min()


@pytest.mark.parametrize("odd", [inf, -inf, torch.nan])
@pytest.mark.parametrize("which", ["x", "approx"])
def test_what_is_not_finite_has_no_deviation(odd: float, which: str) -> None:
    x, approx = WEIGHT.clone(), WEIGHT.clone()
    (x if which == "x" else approx)[3, 5] = odd
    assert Deviation.of(x, approx, GROUP) is None
