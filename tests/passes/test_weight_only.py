"""quant.weight_only: the arithmetic by hand, a site for every layout of a weight, every refusal, and what its contract catches."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.checker import check
from fxcompress.contract import Bounded
from fxcompress.edit import Edit
from fxcompress.errors import ContractViolation, RecipeError
from fxcompress.interpret import run as interpret
from fxcompress.manager import Manager
from fxcompress.numerics import affine
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.noise import sqnr
from fxcompress.numerics.ranges import mse_range
from fxcompress.passes.quant import weight_only
from fxcompress.program import Program
from fxcompress.recipe import Step, build, load_recipe
from fxcompress.report import PassReport
from fxcompress.rewrite import Context
from fxcompress.target import Target, WeightKernel
from tests.passes.helpers import (
    captured,
    declined,
    error,
    function,
    lines,
    named,
    node,
    planted,
    run,
    seeded,
    text,
    unchanged_by_second_run,
    zoo,
)
from tests.zoo import ZOO

NAME = "quant.weight_only"
X = seeded(2, 4)
KERNEL = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


def of(body: Callable[..., Any], x: Tensor, w: Tensor) -> Program:
    """The body of an input x and a constant w."""

    def forward(x: Tensor, w: Tensor) -> Any:  # torch's own functions have no signature
        return body(x, w)

    return function(forward, x, w=w)


def linear(w: Tensor) -> Program:
    return of(nn.functional.linear, seeded(2, w.shape[1], dtype=w.dtype), w)


def on_target(program: Program, target: Target, **options: Any) -> tuple[Program, PassReport]:
    item = named(NAME, **options)
    manager = Manager(program.copy(), target, program.example)
    return manager.program, manager.run([(Step(use=NAME), item)])[0]


def changed(report: PassReport) -> set[str]:
    """Names of the constants that were quantised."""
    return {c.removesuffix(".scale") for change in report.changes for c in change.constants if c.endswith(".scale")}


# the arithmetic


def test_numbers_by_hand() -> None:
    """s = max(hi / 127, -lo / 128) a row: 0.01 and 0.02; codes round(w / s)."""
    w = torch.tensor([[1.27, -0.503, 0.0], [0.21, -2.56, 0.017]])
    after, report = run(linear(w), NAME, weights="int8/channel", range="minmax")
    assert text(after) == lines("""
        quantize_default = fxc.quantize(%w, %w.scale, None, int8, [1, -1])
        dequantize_default = fxc.dequantize(quantize_default, %w.scale, None, int8, [1, -1])
        linear = linear(x, dequantize_default)
        return linear""")
    assert torch.allclose(after.constants["w.scale"], torch.tensor([[0.01], [0.02]]), rtol=1e-6, atol=0)
    seen: dict[str, Tensor] = {}
    interpret(after, after.example, lambda n, v: seen.update({n.name: v}))
    assert seen["quantize_default"].tolist() == [[127, -50, 0], [10, -128, 1]]
    assert torch.allclose(seen["dequantize_default"], torch.tensor([[1.27, -0.5, 0.0], [0.2, -2.56, 0.02]]), rtol=1e-6, atol=0)
    assert torch.equal(after.constants["w"], w), "the weight itself stays until finalize"
    assert report.changes[0].reason == "int8 in blocks of [1, -1]"


def test_zero_points_by_hand() -> None:
    """s = (3 - 0) / 15, z = -8: a row without negative values uses all sixteen codes."""
    w = torch.tensor([[0.0, 3.0, 0.6, 1.41]])
    after, _ = run(linear(w), NAME, weights="int4/channel", symmetric=False, range="minmax")
    assert torch.allclose(after.constants["w.scale"], torch.tensor([[0.2]]), rtol=1e-6, atol=0)
    assert after.constants["w.zero_point"].tolist() == [[-8]]
    seen: dict[str, Tensor] = {}
    interpret(after, after.example, lambda n, v: seen.update({n.name: v}))
    assert seen["quantize_default"].tolist() == [[-8, 7, -5, -1]]


def test_a_ragged_last_group_has_its_own_scale() -> None:
    """7 inputs in groups of 3: 3, 3 and 1."""
    w = torch.tensor([[1.0, 0, 0, 10, 0, 0, 100]]) * 127
    after, _ = run(linear(w), NAME, weights="int8/group:3", range="minmax")
    assert after.constants["w.scale"].tolist() == [[1.0, 10.0, 100.0]]


def test_the_range_is_searched_for_the_least_squared_error() -> None:
    w = seeded(4, 64)
    results = {r: run(linear(w), NAME, weights="int4/channel", range=r)[0].constants["w.scale"] for r in ("mse", "minmax")}
    loss = {r: (w - (w / s).round().clamp(-8, 7) * s).square().sum(1) for r, s in results.items()}
    assert (loss["mse"] <= loss["minmax"]).all()
    assert loss["mse"].sum() < 0.95 * loss["minmax"].sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_have_the_weights_dtype(dtype: torch.dtype) -> None:
    after, report = run(linear(seeded(3, 4, dtype=dtype)), NAME)
    assert after.constants["w.scale"].dtype == dtype
    assert interpret(after, after.example)[0].dtype == dtype
    assert [c.verdict for c in report.checks] == ["held"]


# layouts: per op the block, so that one scale serves exactly what is summed into one output


Body = Callable[..., Tensor]
LAYOUTS: dict[str, tuple[Body, Sequence[int], Sequence[int], list[int], list[int]]] = {
    # op: body, shape of x, shape of w, block per channel, block in groups of 2
    "linear": (nn.functional.linear, (2, 4), (3, 4), [1, -1], [1, 2]),
    "x @ w": (lambda x, w: x @ w, (2, 4), (4, 3), [-1, 1], [2, 1]),
    "w @ x": (lambda x, w: w @ x.t(), (2, 4), (3, 4), [1, -1], [1, 2]),
    "x @ w.t()": (lambda x, w: x @ w.t(), (2, 4), (3, 4), [1, -1], [1, 2]),
    "x @ w.t().contiguous()": (lambda x, w: x @ w.t().contiguous(), (2, 4), (3, 4), [1, -1], [1, 2]),
    "addmm": (lambda x, w: torch.addmm(x[0, :3], x, w), (2, 4), (4, 3), [-1, 1], [2, 1]),
    "bmm": (torch.bmm, (2, 3, 4), (2, 4, 5), [1, -1, 1], [1, 2, 1]),
    "one expert of many": (lambda x, w: nn.functional.linear(x, w[1]), (2, 4), (5, 3, 4), [1, 1, -1], [1, 1, 2]),
    "permuted": (lambda x, w: torch.bmm(x, w.permute(2, 1, 0)), (2, 3, 4), (5, 4, 2), [1, -1, 1], [1, 2, 1]),
    "embedding": (lambda x, w: nn.functional.embedding((x > 0).long(), w), (2, 4), (5, 4), [1, -1], [1, 2]),
    "conv1d": (nn.functional.conv1d, (2, 4, 9), (3, 4, 5), [1, -1, -1], [1, 2, -1]),
    "conv2d": (nn.functional.conv2d, (2, 4, 9, 9), (3, 4, 5, 5), [1, -1, -1, -1], [1, 2, -1, -1]),
    "conv2d same": (lambda x, w: nn.functional.conv2d(x, w, padding="same"), (2, 4, 9, 9), (3, 4, 5, 5), [1, -1, -1, -1], [1, 2, -1, -1]),
    "conv3d": (nn.functional.conv3d, (2, 4, 5, 5, 5), (3, 4, 2, 2, 2), [1, -1, -1, -1, -1], [1, 2, -1, -1, -1]),
    "depthwise": (lambda x, w: nn.functional.conv2d(x, w, groups=4), (2, 4, 9, 9), (4, 1, 3, 3), [1, -1, -1, -1], [1, -1, -1, -1]),
    "transposed conv": (nn.functional.conv_transpose2d, (2, 4, 5, 5), (4, 3, 2, 2), [-1, 1, -1, -1], [2, 1, -1, -1]),
    "transposed conv1d": (nn.functional.conv_transpose1d, (2, 4, 5), (4, 3, 2), [-1, 1, -1], [2, 1, -1]),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_scale_for_each_output_channel(layout: tuple[Body, Sequence[int], Sequence[int], list[int], list[int]]) -> None:
    body, x, w, channel, grouped = layout
    before = of(body, seeded(*x), seeded(*w))
    for granularity, block in (("channel", channel), ("group:2", grouped), ("tensor", [-1] * len(w))):
        after, report = run(before, NAME, weights=f"int8/{granularity}")
        quantise = node(after, "quantize_default")
        assert (report.fired, declined(report)) == (1, [])
        assert quantise.args[4] == block
        shape = [1 if b == -1 else -(-n // b) for n, b in zip(w, block, strict=True)]
        assert list(after.constants["w.scale"].shape) == shape
        assert 0 < error(before, after) < 0.1
    unchanged_by_second_run(before, NAME, weights="int8/group:2")


def test_one_channels_range_stays_its_own() -> None:
    """An output channel a thousand times larger doesn't cost the others a bit: each is as exact as alone."""
    for body, x, w, channel, _ in LAYOUTS.values():
        axis = channel.index(1) if 1 in channel else 0
        weight = seeded(*w)
        large = weight.clone()
        large.select(axis, 0).mul_(1000)
        scales = [run(of(body, seeded(*x), v), NAME)[0].constants["w.scale"] for v in (weight, large)]
        ratio = (scales[1] / scales[0]).flatten()
        assert ratio.max() > 900
        assert (ratio > 1.1).sum() * weight.shape[axis] <= ratio.numel()


FORMATS = ["int2", "int4", "int8"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", [*FORMATS, "uint2", "uint4", "uint8"])
def test_every_integer_format(format: str, symmetric: bool) -> None:
    if format.startswith("u") and symmetric:
        pytest.skip("refused as an option")
    after, report = run(linear(seeded(3, 64)), NAME, weights=f"{format}/group:16", symmetric=symmetric)
    assert ("w.zero_point" in after.constants) is not symmetric
    seen: dict[str, Tensor] = {}
    interpret(after, after.example, lambda n, v: seen.update({n.name: v}))
    limits = format_of(format)
    codes = seen["quantize_default"].int()
    assert codes.unique().numel() <= 2**limits.bits
    assert limits.qmin <= codes.min() <= codes.max() <= limits.qmax
    assert [c.verdict for c in report.checks] == ["held"]


@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float_format(format: str) -> None:
    _, report = run(linear(seeded(3, 64)), NAME, weights=f"{format}/channel")
    assert [c.verdict for c in report.checks] == ["held"]


# which constants


def test_embeddings_have_their_own_format() -> None:
    body = lambda ids, table, w: nn.functional.linear(nn.functional.embedding(ids, table), w)  # noqa: E731
    before = function(body, torch.tensor([[0, 2, 1]]), table=seeded(5, 4), w=seeded(3, 4))
    after, _ = run(before, NAME, weights="int4/group:2", embeddings="int8/channel")
    grids = {n.args[0].target: n.args[3:] for n in after.graph.nodes if n.target is torch.ops.fxc.quantize.default}
    assert grids == {"table": ("int8", [1, -1]), "w": ("int4", [1, 2])}


def test_a_tied_table_is_one_site_with_the_embeddings_format() -> None:
    body = lambda ids, table: nn.functional.linear(nn.functional.embedding(ids, table), table)  # noqa: E731
    after, report = run(function(body, torch.tensor([[0, 2, 1]]), table=seeded(5, 4)), NAME, weights="int4", embeddings="int8/channel")
    assert report.fired == 1
    assert text(after) == lines("""
        quantize_default = fxc.quantize(%table, %table.scale, None, int8, [1, -1])
        dequantize_default = fxc.dequantize(quantize_default, %table.scale, None, int8, [1, -1])
        embedding = embedding(dequantize_default, ids)
        linear = linear(embedding, dequantize_default)
        return linear""")


UNTOUCHED: dict[str, Body] = {
    "an addition": lambda x, w: x + w,
    "a product, entry by entry": lambda x, w: x * w,
    "a bias": lambda x, w: nn.functional.linear(x, x, w[0, :2]),
    "nothing but the output": lambda x, w: (x, w),
    "integers": lambda x, w: x + nn.functional.embedding(w.gt(0.5).long(), x).sum(),
}


@pytest.mark.parametrize("body", UNTOUCHED.values(), ids=UNTOUCHED)
def test_what_is_no_weight_is_nobodys_business(body: Body) -> None:
    before = of(body, X, seeded(2, 4).abs())
    after, report = run(before, NAME)
    assert text(after) == text(before)
    assert (report.fired, declined(report)) == (0, [])


REFUSED: dict[str, tuple[Body, Tensor, str]] = {
    "read otherwise too": (lambda x, w: nn.functional.linear(x, w) + w.sum(), seeded(3, 4), "w is also read by sum_1, not as a weight"),
    "given back too": (lambda x, w: (nn.functional.linear(x, w), w), seeded(3, 4), "w is also read by output, not as a weight"),
    "all zeros": (nn.functional.linear, torch.zeros(3, 4), "w is all zeros"),
    "summed over either axis": (
        lambda x, w: nn.functional.linear(x @ w, w),
        seeded(4, 4),
        "w is summed over different axes by matmul and linear",
    ),
}


@pytest.mark.parametrize(("body", "w", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses(body: Body, w: Tensor, reason: str) -> None:
    before = of(body, X, w)
    after, report = run(before, NAME)
    assert text(after) == text(before)
    assert after.constants.keys() == before.constants.keys()
    assert declined(report) == [("w", reason)]


TINY = Target(
    name="tiny",
    kernels=(
        WeightKernel(families=("linear",), formats=("int4",), least_group=16, power_of_two=True, ragged=False, asymmetric=False),
        WeightKernel(families=("embedding",), formats=("int8",)),
    ),
)
LIMITED: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"weights": "int8/group:16"}, "w: tiny has no int8 kernel for linear weights, only int4"),
    "a small group": ({"weights": "int4/group:8"}, "w: tiny: groups of 8 are below the least of 16"),
    "an odd group": ({"weights": "int4/group:24"}, "w: tiny: groups of 24 are not a power of two"),
    "a ragged group": ({"weights": "int4/group:32"}, "w: tiny: groups of 32 don't divide 48"),
    "zero points": ({"weights": "int4/group:16", "symmetric": False}, "w: tiny: zero points are not supported"),
}


@pytest.mark.parametrize(("options", "reason"), LIMITED.values(), ids=LIMITED)
def test_what_the_target_has_no_kernel_for(options: dict[str, Any], reason: str) -> None:
    before = linear(seeded(3, 48))
    after, report = on_target(before, TINY, **options)
    assert text(after) == text(before)
    assert declined(report) == [("w", reason)]


def test_what_the_target_has_a_kernel_for() -> None:
    _, report = on_target(linear(seeded(3, 48)), TINY, weights="int4/group:16")
    assert (report.fired, declined(report)) == (1, [])
    _, report = on_target(of(nn.functional.conv1d, seeded(2, 4, 9), seeded(3, 4, 5)), TINY, weights="int4")
    assert declined(report) == [("w", "w: tiny has no n-bit kernel for conv weights")]


def test_a_tied_table_needs_a_kernel_for_both_uses() -> None:
    body = lambda ids, table: nn.functional.linear(nn.functional.embedding(ids, table), table)  # noqa: E731
    _, report = on_target(function(body, torch.tensor([[0, 2, 1]]), table=seeded(5, 16)), TINY, weights="int4", embeddings="int8")
    assert declined(report) == [("table", "table: tiny has no int8 kernel for linear weights, only int4")]


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a format": ({"weights": "int5"}, "weights: unknown number format 'int5'; did you mean 'uint5'?"),
    "a granularity": (
        {"weights": "int8/row"},
        "weights: unknown granularity 'row'; one of tensor, channel, token, group:64 (any positive group size)",
    ),
    "no group": (
        {"weights": "int8/group:0"},
        "weights: unknown granularity 'group:0'; one of tensor, channel, token, group:64 (any positive group size)",
    ),
    "tokens": ({"weights": "int8/token"}, "weights: a weight has no tokens; one of tensor, channel, group:64"),
    "wide codes": ({"embeddings": "int16"}, "embeddings: codes of int16 are wider than a byte and can't be packed"),
    "unsigned without zero points": ({"weights": "uint4"}, "symmetric: uint4 holds nothing below 0 without zero points; say symmetric: false"),
    "unsigned embeddings": (
        {"weights": "int4", "embeddings": "uint8"},
        "symmetric: uint8 holds nothing below 0 without zero points; say symmetric: false",
    ),
    "floats with zero points": (
        {"weights": "float8_e4m3fn", "symmetric": False},
        "symmetric: float8_e4m3fn has no zero points; say symmetric: true",
    ),
    "a range": ({"range": "max"}, "range: Input should be 'minmax' or 'mse'"),
}


@pytest.mark.parametrize(("options", "why"), OPTIONS.values(), ids=OPTIONS)
def test_options_are_checked_before_anything_runs(options: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build(load_recipe({"passes": [{NAME: options}, "quant.finalize"]}))
    assert str(caught.value) == (
        f"an option is not valid\n  where pass 1, quant.weight_only\n  why   {why}\n"
        "  do    fields: weights, embeddings, symmetric, range, storage"
    )


# the contract


def quantised(w: Tensor) -> Tensor:
    scale = mse_range(w, format_of("int8"), True, (1, -1))[0]
    return (w / scale).round().clamp(-128, 127) * scale


def broken(figure: float, limit: float) -> str:
    return (
        "quant.weight_only breaks its bounded contract at 1 of 1 sites\n"
        "  where fc  (linear)\n"
        f"  why   {figure:.3g} dB at dequantize_default on the probe inputs, limit {limit:.3g}\n"
        "  state program as before this pass; 0 finished passes are kept\n"
        '  do    - quant.weight_only: {where: {exclude: ["fc"]}}'
    )


class Square(nn.Module):
    """One linear whose axes can be taken for one another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16, bias=False)
        self.fc.weight.data = seeded(16, 16) * torch.logspace(0, 1, 16)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def ideal(w: Tensor) -> float:
    """Signal over step² / 12 of each row's own symmetric grid, in dB, less the 3 dB allowed."""
    step = 2 * w.double().abs().amax(1) / 255
    return 10 * math.log10(w.double().square().mean() / (step.square() / 12).mean()) - 3


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": lambda v: -v,
    "scale x 1.5 on one side": lambda v: 1.5 * v,
    "scale / 1.5 on one side": lambda v: v / 1.5,
    "one step off": lambda v: v + quantised(SQUARE).diff(dim=1).abs().masked_fill(quantised(SQUARE).diff(dim=1) == 0, 9).amin(1, keepdim=True),
    "other rows": lambda v: v.roll(1, 0),
    "other axis": lambda v: v.t(),
    "zeros": torch.zeros_like,
}
SQUARE = Square().fc.weight.data


@pytest.mark.parametrize("fault", VALUES.values(), ids=VALUES)
def test_contract_bites_on_values(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], Tensor]) -> None:
    before = captured(Square(), seeded(2, 16))
    was = text(before)
    planted(monkeypatch, affine, "dequantize", fault)
    with pytest.raises(ContractViolation) as caught:
        run(before, NAME)
    assert str(caught.value) == broken(sqnr(SQUARE, fault(quantised(SQUARE))), ideal(SQUARE))
    assert text(before) == was


def shifted(codes: Tensor) -> Tensor:
    return (codes.int() + 1).clamp(-128, 127).to(codes.dtype)


def test_contract_bites_on_shifted_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, affine, "quantize", shifted)
    with pytest.raises(ContractViolation, match=r"breaks its bounded contract at 1 of 1 sites\n  where fc  \(linear\)"):
        run(captured(Square(), seeded(2, 16)), NAME)


def test_contract_bites_on_a_zero_point_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = affine.dequantize
    monkeypatch.setattr(affine, "dequantize", lambda codes, scale, zero, *rest: right(codes, scale, zero + 1, *rest))
    with pytest.raises(ContractViolation, match=r"breaks its bounded contract at 1 of 1 sites\n  where fc  \(linear\)"):
        run(captured(Square(), seeded(2, 16)), NAME, symmetric=False)


SCALES: dict[str, Callable[..., Any]] = {
    "scale x 1.5": lambda w, *grid: (mse_range(w, *grid)[0] * 1.5, None),
    "scale / 1.5": lambda w, *grid: (mse_range(w, *grid)[0] / 1.5, None),
    "scales of the other axis": lambda w, *grid: mse_range(w.t().contiguous(), *grid),
    "scales of the neighbours": lambda w, *grid: (mse_range(w, *grid)[0].roll(1, 0), None),
    "one scale for all": lambda w, *grid: (mse_range(w, *grid)[0].mean().expand(16, 1), None),
}


@pytest.mark.parametrize("fault", SCALES.values(), ids=SCALES)
def test_contract_bites_on_scales(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any]) -> None:
    monkeypatch.setattr(weight_only, "mse_range", fault)
    with pytest.raises(ContractViolation, match=r"breaks its bounded contract at 1 of 1 sites\n  where fc  \(linear\)"):
        run(captured(Square(), seeded(2, 16)), NAME)


class Weight(nn.Module):
    """x W^T."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_contract_bites_on_scales_that_are_others_than_the_search_found() -> None:
    """With its neighbour's scale each channel of a smooth weight still loses less than on its own range."""
    weight = seeded(16, 64).clamp(-2, 2)
    weight[:, 0] = 4 * torch.linspace(1, 1.02, 16)
    program = captured(Weight(weight), seeded(2, 64))
    edit, item = Edit(program), weight_only.WeightOnly(weight_only.WeightOnlyOptions(weights="int4"))
    (leaf,) = program.graph.find_nodes(op="get_attr")
    item.apply(item.match(leaf, Context(program, Target(name="test"))), edit)
    assert {m.verdict for m in check(program, edit, Bounded(), program.example)} == {"held"}
    (scale,) = (name for name in program.constants if name.endswith(".scale"))
    program.constants[scale] = program.constants[scale].roll(1, 0)
    (found,) = check(program, edit, Bounded(), program.example)
    assert found.verdict == "broken" and found.why.endswith("what the pass found that it loses")


def test_the_guilty_site_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three weights gets a wrong scale."""
    program = captured(nn.Sequential(*(nn.Linear(16, 16 + i, bias=False) for i in (0,)), nn.Linear(16, 8), nn.Linear(8, 3)), seeded(2, 16))
    monkeypatch.setattr(weight_only, "mse_range", lambda w, *g: (mse_range(w, *g)[0] * (2 if w.shape[0] == 8 else 1), None))
    with pytest.raises(ContractViolation) as caught:
        run(program, NAME)
    assert str(caught.value).startswith("quant.weight_only breaks its bounded contract at 1 of 3 sites\n  where 1  (linear_1)\n")


# real models


def kernels(model: nn.Module, program: Program) -> set[str]:
    """Weights of the model's linears, convolutions, embeddings and transposed linears that the program reads, tied ones once."""
    from transformers.pytorch_utils import Conv1D

    owners = {name: m for name, m in model.named_modules() if isinstance(m, (*KERNEL, Conv1D))}
    return {f"{name}.weight" for name in owners if f"{name}.weight" in program.constants}


def fused(model: nn.Module, names: Sequence[str]) -> set[str]:
    """Parameters that hold one matrix for each expert."""
    return {f"{k}.{e}" for k, p in model.named_parameters() if k.endswith(tuple(names)) and p.dim() == 3 for e in range(p.shape[0])}


REAL: dict[str, tuple[Sequence[str], set[str], set[str]]] = {
    # model: fused parameters, weights that aren't in a kernel's module, weights of kernel modules that the model doesn't multiply by
    "unet2d_cond": ((), set(), set()),
    "dit": ((), set(), set()),
    "vae_decoder": ((), set(), set()),
    "llama": ((), set(), set()),
    "gpt2": ((), set(), set()),
    "bert": ((), set(), set()),
    "mixtral": (("gate_up_proj", "down_proj"), {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"}, set()),
    "detr": ((), set(), {"model.query_position_embeddings.weight"}),  # added to the queries
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models(name: str) -> None:
    model, before = ZOO[name]()[0], zoo(name)
    parts, more, less = REAL[name]
    after, report = run(before, NAME, weights="int8/channel")
    expected = (kernels(model, before) | fused(model, parts) | more) - less
    assert changed(report) == expected
    assert report.fired == len(expected) > 9
    assert declined(report) == []
    assert {c.verdict for c in report.checks} == {"held"}
    assert all(c.limit - 1 < c.figure - 3 for c in report.checks if c.figure), "within a decibel of ideal"
    assert 25 < report.output_sqnr < 50
    again, second = run(after, NAME, weights="int8/channel")
    assert (second.fired, text(again)) == (0, text(after))


@pytest.mark.slow
def test_a_tied_head_of_a_real_model_is_one_site() -> None:
    model, _ = ZOO["gpt2"]()
    assert model.lm_head.weight is model.transformer.wte.weight
    _, report = run(zoo("gpt2"), NAME, embeddings="int8/group:32", weights="int4/group:32")
    tied = [c for c in report.changes if "transformer.wte.weight.scale" in c.constants or "lm_head.weight.scale" in c.constants]
    assert [c.reason for c in tied] == ["int8 in blocks of [1, 32]"]
    assert report.fired == 2 + 2 * 4  # wte with its head, wpe, and per block c_attn, c_proj, c_fc, c_proj


MEMORY = """
from pathlib import Path
from torch import nn
from fxcompress.capture import capture
from tests.passes.helpers import run, seeded

def status(field):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

def peak(action):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = action()
    print((status("VmHWM") - before) / (1024 * 1024 * 4))
    return result

model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24))).eval()
program = capture(model, (seeded(1, 1024),))
quantised, _ = peak(lambda: run(program, "quant.weight_only", weights="int8/group:64"))
peak(lambda: run(quantised, "quant.finalize"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
def test_peak_memory_is_that_of_few_weights() -> None:
    """24 weights of 4 MB: each pass works on one at a time; quantising keeps scales, finalize the codes, a quarter of the model."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # what is freed leaves the process at once
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=root, env=environment, capture_output=True, text=True, check=True)
    quantising, finalising = (float(line) for line in done.stdout.split())
    assert quantising < 6, "in weights"
    assert finalising < 24 / 4 + 3, "in weights"


@pytest.mark.parametrize("range", ["minmax", "mse"])
@pytest.mark.parametrize("weights", ["uint4/group:32", "uint4/channel", "uint8/tensor"])
def test_weights_of_two_values_are_as_far_from_the_grid_as_may_be(weights: str, range: str) -> None:
    """All of them half a step off, where others are so by chance only."""
    _, report = run(linear(seeded(64, 64).sign()), NAME, weights=weights, symmetric=False, range=range)
    assert report.fired == 1 and {c.verdict for c in report.checks} == {"held"}


@pytest.mark.parametrize("range", ["minmax", "mse"])
@pytest.mark.parametrize("weights", ["int8/channel", "int4/group:32", "float8_e4m3fn/channel"])
@pytest.mark.parametrize(("all_of_it", "one_row"), [(1.0, 1e-30), (1.0, 1e-25), (1e-25, 1.0), (1e25, 1.0)])
def test_weights_whose_squares_float32_does_not_hold(all_of_it: float, one_row: float, weights: str, range: str) -> None:
    w = seeded(64, 64) * all_of_it
    w[3] *= one_row
    _, report = run(linear(w), NAME, weights=weights, range=range)
    assert report.fired == 1 and {c.verdict for c in report.checks} == {"held"}
