"""quant.insert: the graphs it makes, the numbers against fake quantisation written here, every refusal, and what its contract catches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import fxcompress as fxc
from fxcompress import store
from fxcompress.calibrate.statistics import Statistics
from fxcompress.contract import MEASURED
from fxcompress.dataflow import VIEWS, is_move
from fxcompress.edit import Edit
from fxcompress.errors import CalibrationError, ContractViolation, RecipeError
from fxcompress.interpret import run as interpret
from fxcompress.manager import CheckMode, Manager
from fxcompress.measure import relative_error
from fxcompress.numerics import affine
from fxcompress.numerics.ranges import mse_range
from fxcompress.passes.quant import grids, insert, weight_only
from fxcompress.passes.quant.sites import matmul_sites
from fxcompress.program import Program
from fxcompress.recipe import Step, Where, build, load_recipe
from fxcompress.report import PassReport
from fxcompress.rewrite import Pass
from fxcompress.target import ActivationKernel, Target
from tests.passes.helpers import captured, declined, function, lines, named, node, ops, seeded, text, zoo
from tests.passes.helpers import run as run_pass
from tests.zoo import ZOO

aten = torch.ops.aten
NAME = "quant.insert"
REFERENCE = Target(name="test")
Body = Callable[..., Any]


def run(
    program: Program,
    *items: Sequence[Tensor],
    target: Target = REFERENCE,
    check: CheckMode = "each",
    where: Where | None = None,
    use: Pass | None = None,
    **options: Any,
) -> tuple[Program, PassReport]:
    """(a copy of the program after the pass, its report). items: flat inputs of the feed, else the example and half of it; the first is the
    probe too."""
    feed = items or (program.example, [v / 2 if v.is_floating_point() else v for v in program.example])
    manager = Manager(program.copy(), target, feed[0], check, Statistics(feed))
    step = Step(use=NAME, where=where or Where())
    return manager.program, manager.run([(step, use or named(NAME, **options))])[-1]


def linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


def conv1d(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.conv1d(x, w, b)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def sites(report: PassReport) -> list[str]:
    """Per change the reason, in order."""
    return [c.reason for c in report.changes]


# fake quantisation, written out


def grid(values: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of uint8 on [min(x, 0), max(x, 0)], in x's dtype."""
    lo, hi = values.amin().clamp(max=0), values.amax().clamp(min=0)
    scale = ((hi.double() - lo.double()) / 255).to(values.dtype)
    return scale, (-lo.double() / scale.double()).round()


def fake(x: Tensor, scale: Tensor, zero: Tensor | float = 0.0, least: int = 0, greatest: int = 255) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    scale, zero = scale.to(wide.dtype), zero.to(wide.dtype) if isinstance(zero, Tensor) else zero
    codes = ((wide / scale).round() + zero).clamp(least, greatest)
    return ((codes - zero) * scale).to(x.dtype)


def weight_scale(w: Tensor, axis: int) -> Tensor:
    """int8, one scale an index of the axis: of max(hi / 127, -lo / 128) times 1, 0.98 .. 0.2 the one with the least squared error."""
    other = [a for a in range(w.dim()) if a != axis]
    widest = torch.maximum(w.amax(other, keepdim=True) / 127, w.amin(other, keepdim=True) / -128)
    best, least = widest, torch.full_like(widest, math.inf)
    for step in range(41):
        scale = widest * (1 - step / 50)
        loss = (fake(w, scale, 0.0, -128, 127) - w).square().sum(other, keepdim=True)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best


# graphs


def test_a_linear_layer() -> None:
    before = function(lambda x, w, b: F.linear(x, w, b).relu(), seeded(4, 6), w=seeded(3, 6), b=seeded(3))
    assert text(before) == lines("""
        linear = linear(x, %w, %b)
        relu = relu(linear)
        return relu""")
    after, report = run(before)
    assert text(after) == lines("""
        quantize_default = fxc.quantize(x, %x.scale, %x.zero_point, uint8, [-1, -1])
        dequantize_default = fxc.dequantize(quantize_default, %x.scale, %x.zero_point, uint8, [-1, -1])
        quantize_default_1 = fxc.quantize(%w, %w.scale, None, int8, [1, -1])
        dequantize_default_1 = fxc.dequantize(quantize_default_1, %w.scale, None, int8, [1, -1])
        linear = linear(dequantize_default, dequantize_default_1, %b)
        relu = relu(linear)
        return relu""")
    assert (report.fired, sites(report)) == (2, ["x as uint8/tensor", "int8 in blocks of [1, -1]"])
    assert {c.verdict for c in report.checks} == {"held"}


def test_signed_activations_have_no_zero_point() -> None:
    before = function(lambda x, w: x @ w, seeded(4, 6), w=seeded(6, 3))
    after, _ = run(before, activations="int8/tensor")
    assert text(after) == lines("""
        quantize_default = fxc.quantize(x, %x.scale, None, int8, [-1, -1])
        dequantize_default = fxc.dequantize(quantize_default, %x.scale, None, int8, [-1, -1])
        quantize_default_1 = fxc.quantize(%w, %w.scale, None, int8, [-1, 1])
        dequantize_default_1 = fxc.dequantize(quantize_default_1, %w.scale, None, int8, [-1, 1])
        matmul = matmul(dequantize_default, dequantize_default_1)
        return matmul""")
    x = before.example[0]
    assert torch.allclose(after.constants["x.scale"], torch.maximum(x.max() / 127, -x.min() / 128).reshape(1, 1), rtol=1e-6, atol=0)


def test_tokens() -> None:
    before = function(linear, seeded(2, 4, 6), w=seeded(3, 6))
    after, report = run(before, activations="int8/token")
    assert text(after) == lines(f"""
        abs_default = abs(x)
        amax_default = amax(abs_default, [-1], True)
        div_tensor = div.Tensor(amax_default, 127)
        clamp_min_default = clamp_min(div_tensor, {2.0**-126})
        quantize_default = fxc.quantize(x, clamp_min_default, None, int8, [1, 1, -1])
        dequantize_default = fxc.dequantize(quantize_default, clamp_min_default, None, int8, [1, 1, -1])
        quantize_default_1 = fxc.quantize(%w, %w.scale, None, int8, [1, -1])
        dequantize_default_1 = fxc.dequantize(quantize_default_1, %w.scale, None, int8, [1, -1])
        linear = linear(dequantize_default, dequantize_default_1)
        return linear""")
    assert {c.verdict for c in report.checks} == {"held"}


def test_a_convolution_has_its_bias_on_the_grid_of_the_products() -> None:
    before = function(conv1d, seeded(2, 3, 9), w=seeded(4, 3, 2), b=seeded(4))
    after, report = run(before)
    assert text(after) == lines("""
        quantize_default = fxc.quantize(x, %x.scale, %x.zero_point, uint8, [-1, -1, -1])
        dequantize_default = fxc.dequantize(quantize_default, %x.scale, %x.zero_point, uint8, [-1, -1, -1])
        quantize_default_1 = fxc.quantize(%w, %w.scale, None, int8, [1, -1, -1])
        dequantize_default_1 = fxc.dequantize(quantize_default_1, %w.scale, None, int8, [1, -1, -1])
        reshape_default = reshape(%x.scale, [-1])
        reshape_default_1 = reshape(%w.scale, [-1])
        mul_tensor = mul.Tensor(reshape_default_1, reshape_default)
        quantize_default_2 = fxc.quantize(%b, mul_tensor, None, int32, [1])
        dequantize_default_2 = fxc.dequantize(quantize_default_2, mul_tensor, None, int32, [1])
        conv1d = conv1d(dequantize_default, dequantize_default_1, dequantize_default_2)
        return conv1d""")
    final, _ = run_pass(after, "quant.finalize")
    assert torch.equal(final.constants["b.scale"], after.constants["x.scale"].flatten() * after.constants["w.scale"].flatten())
    assert torch.equal(final.constants["b.codes"], (before.constants["b"].double() / final.constants["b.scale"]).round().int())
    assert sites(report)[2] == "bias on the grid of the products"


def test_attention() -> None:
    """Both products have both operands quantised; the mask and the softmax stay float."""
    q, k, v = (seeded(2, 2, 5, 4, seed=s) for s in range(3))
    opened, _ = run_pass(function(attention, q, k, v), "tidy.open_attention")
    after, report = run(opened)
    assert text(after) == lines("""
        quantize_default_1 = fxc.quantize(k, %k.scale, %k.zero_point, uint8, [-1, -1, -1, -1])
        dequantize_default_1 = fxc.dequantize(quantize_default_1, %k.scale, %k.zero_point, uint8, [-1, -1, -1, -1])
        transpose_int = transpose.int(dequantize_default_1, -2, -1)
        quantize_default = fxc.quantize(q, %q.scale, %q.zero_point, uint8, [-1, -1, -1, -1])
        dequantize_default = fxc.dequantize(quantize_default, %q.scale, %q.zero_point, uint8, [-1, -1, -1, -1])
        matmul_default = matmul(dequantize_default, transpose_int)
        mul_tensor = mul.Tensor(matmul_default, 0.5)
        softmax_int = softmax.int(mul_tensor, -1)
        quantize_default_2 = fxc.quantize(softmax_int, %softmax_int.scale, %softmax_int.zero_point, uint8, [-1, -1, -1, -1])
        dequantize_default_2 = fxc.dequantize(quantize_default_2, %softmax_int.scale, %softmax_int.zero_point, uint8, [-1, -1, -1, -1])
        quantize_default_3 = fxc.quantize(v, %v.scale, %v.zero_point, uint8, [-1, -1, -1, -1])
        dequantize_default_3 = fxc.dequantize(quantize_default_3, %v.scale, %v.zero_point, uint8, [-1, -1, -1, -1])
        matmul_default_1 = matmul(dequantize_default_2, dequantize_default_3)
        return matmul_default_1""")
    assert report.fired == 4
    fq = {n: fake(t, *grid(t)) for n, t in {"q": q, "k": k, "v": v}.items()}
    scores = (fq["q"] @ fq["k"].mT / 2).softmax(-1)
    top = ((q @ k.mT) / 2).softmax(-1)
    half = ((q @ k.mT) / 8).softmax(-1)
    scale, zero = grid(torch.cat([top.flatten(), half.flatten()]))
    assert relative_error(fake(scores, scale, zero) @ fq["v"], interpret(after, after.example)[0]) < 1e-5
    assert run(opened, products=False)[1].fired == 0


def test_a_value_read_by_several_sites_and_in_float() -> None:
    """One quantiser for both layers; the residual, and the result, keep the float value."""

    def body(x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = x.tanh()
        return h + F.linear(h, v) * F.linear(h, w), h

    after, report = run(function(body, seeded(4, 6), v=seeded(6, 6), w=seeded(6, 6, seed=1)))
    assert text(after) == lines("""
        tanh = tanh(x)
        quantize_default = fxc.quantize(tanh, %tanh.scale, %tanh.zero_point, uint8, [-1, -1])
        dequantize_default = fxc.dequantize(quantize_default, %tanh.scale, %tanh.zero_point, uint8, [-1, -1])
        quantize_default_1 = fxc.quantize(%v, %v.scale, None, int8, [1, -1])
        dequantize_default_1 = fxc.dequantize(quantize_default_1, %v.scale, None, int8, [1, -1])
        linear = linear(dequantize_default, dequantize_default_1)
        quantize_default_2 = fxc.quantize(%w, %w.scale, None, int8, [1, -1])
        dequantize_default_2 = fxc.dequantize(quantize_default_2, %w.scale, None, int8, [1, -1])
        linear_1 = linear(dequantize_default, dequantize_default_2)
        mul = mul.Tensor(linear, linear_1)
        add = add.Tensor(tanh, mul)
        return add, tanh""")
    assert report.fired == 3


ADDS_CODES = Target(
    name="test",
    activations=(ActivationKernel(families=("conv",), activations=("uint8/tensor",), needs_output=True),),
    sums=("uint8/tensor",),
)


@pytest.mark.parametrize("target", [ADDS_CODES, ADDS_CODES.model_copy(update={"sums": ()})], ids=["sums", "none"])
def test_a_residual_is_added_in_codes_where_the_target_can(target: Target) -> None:
    """What is added to a convolution is read as codes by it anyway, and what comes of the sum is quantised for the next one."""

    def body(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        h = x.tanh()
        return F.conv1d((F.conv1d(h, b) + h).relu(), c) * F.conv1d(h, a)

    program = function(body, seeded(2, 3, 5), **{name: seeded(3, 3, 1, seed=s) for s, name in enumerate("abc")})
    after, _ = run(program, target=target)
    kinds = {operand.target is insert.DEQUANTIZE for operand in node(after, "add").all_input_nodes}
    assert kinds == ({True} if target.sums else {True, False})


def test_a_tied_weight_is_one_site() -> None:
    def body(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(x, w).relu(), w)

    after, report = run(function(body, seeded(4, 6), w=seeded(6, 6)))
    assert sites(report) == ["x as uint8/tensor", "relu as uint8/tensor", "int8 in blocks of [1, -1]"]
    weight = {node(after, n).args[1] for n in ("linear", "linear_1")}
    assert [n.target for n in weight] == [insert.DEQUANTIZE]


def test_a_table_tied_to_a_head() -> None:
    """The gather keeps reading whole rows, from the same codes."""
    ids = torch.arange(8).reshape(2, 4)
    before = function(lambda ids, w: F.linear(F.embedding(ids, w).tanh(), w), ids, w=seeded(8, 6))
    after, report = run(before, [ids], [ids.flip(0)])
    assert sites(report) == ["tanh as uint8/tensor", "int8 in blocks of [1, -1]"]
    assert node(after, "embedding").args[0] is node(after, "linear").args[1]


def test_one_value_times_itself() -> None:
    after, report = run(function(lambda x: x @ x, seeded(5, 5)))
    assert sites(report) == ["x as uint8/tensor"]
    assert ops(after) == ["fxc.quantize", "fxc.dequantize", "matmul"]


def test_a_second_run_changes_nothing() -> None:
    def body(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        h = F.conv1d(x, w, b).mT @ v
        return (h @ h.mT).softmax(-1)

    before = function(body, seeded(2, 3, 9), w=seeded(4, 3, 2), b=seeded(4), v=seeded(4, 5))
    integers = kernels("linear", "conv", "product", activations=("uint8/tensor",), needs_output=True)
    for activations, target in (("uint8/tensor", REFERENCE), ("int8/tensor", REFERENCE), ("uint8/tensor", integers)):
        once, first = run(before, activations=activations, target=target)
        twice, report = run(once, activations=activations, target=target)
        assert first.fired > 4
        assert (report.fired, declined(report), text(twice)) == (0, [], text(once))
        assert twice.constants.keys() == once.constants.keys()


# numbers


LAYERS: dict[str, tuple[Body, Sequence[int], Sequence[int], int, int]] = {
    # op: body, shape of x after the batch, shape of w, axis of w with the output channels, how often its channels repeat
    "linear": (F.linear, (6,), (5, 6), 0, 1),
    "linear of rank 4": (F.linear, (2, 3, 6), (5, 6), 0, 1),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (6,), (6, 5), 1, 1),
    "transposed": (lambda x, w, b: x @ w.t() + b, (6,), (5, 6), 0, 1),
    "conv1d": (F.conv1d, (6, 9), (5, 6, 2), 0, 1),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 2, 1), (3, 7, 7), (5, 3, 3, 3), 0, 1),
    "grouped": (lambda x, w, b: F.conv1d(x, w, b, groups=2), (6, 9), (4, 3, 2), 0, 1),
    "depthwise": (lambda x, w, b: F.conv2d(x, w, b, padding="same", groups=6), (6, 5, 5), (6, 1, 3, 3), 0, 1),
    "conv_transpose1d": (F.conv_transpose1d, (6, 5), (6, 4, 2), 1, 1),
    "conv_transpose2d": (lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1), (3, 4, 4), (3, 5, 3, 3), 1, 1),
    "grouped conv_transpose": (lambda x, w, b: F.conv_transpose1d(x, w, b, groups=3), (6, 5), (6, 2, 2), 1, 3),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_layer_at_another_batch_size_is_eager_fake_quantisation(layer: tuple[Body, Sequence[int], Sequence[int], int, int]) -> None:
    body, shape, kernel, axis, repeats = layer
    w, b = seeded(*kernel, seed=1), seeded(kernel[axis] * repeats, seed=2)
    w.select(axis, 0).mul_(9)  # channels of unequal size, so that a wrong axis shows
    items = [[seeded(n, *shape, seed=n)] for n in (2, 3, 1)]

    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:  # torch's own functions have no signature
        return body(x, w, b)

    before = function(forward, items[0][0], dynamic={"x": [0]}, w=w, b=b)
    after, report = run(before, *items)
    assert declined(report) == []
    x = 1.2 * seeded(5, *shape, seed=9)
    s_x, zero = grid(torch.cat([i.flatten() for (i,) in items]))
    s_w = weight_scale(w, axis)
    s_b = (s_x * s_w.flatten()).repeat(repeats)
    quantised = (b / s_b).round() * s_b if "conv" in str(ops(before)) else b
    wanted = body(fake(x, s_x, zero), fake(w, s_w, 0.0, -128, 127), quantised)
    assert relative_error(wanted, interpret(after, [x])[0]) < 1e-5
    assert relative_error(body(x, w, b), wanted) > 1e-3, "the comparison sees quantisation"
    final, _ = run_pass(after, "quant.finalize")
    assert torch.equal(interpret(final, [x])[0], interpret(after, [x])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("activations", ["uint8/tensor", "int8/tensor", "int8/token"])
def test_other_precisions(dtype: torch.dtype, activations: str) -> None:
    before = function(linear, seeded(4, 8, dtype=dtype), w=seeded(5, 8, dtype=dtype))
    after, report = run(before, activations=activations)
    scales = [n.args[1].meta["val"].dtype for n in after.graph.nodes if n.target is insert.QUANTIZE]
    assert scales == [dtype, dtype]
    assert {c.verdict for c in report.checks} == {"held"}
    assert interpret(after, after.example)[0].dtype == dtype
    assert relative_error(interpret(before, before.example)[0].double(), interpret(after, after.example)[0].double()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tokens_of_any_size(dtype: torch.dtype) -> None:
    """A vector of zeros gives zeros, and a small one keeps its 8 bits, whatever stands beside it."""
    x = seeded(1, 4, 16, dtype=dtype)
    x[0, 1] = 0
    x[0, 2] *= 1e-3
    before = function(linear, x, w=torch.eye(16, dtype=dtype))
    after, report = run(before, activations="int8/token")
    got = interpret(after, [x])[0]
    assert got.isfinite().all() and not got[0, 1].any()
    step = x.double().abs().amax(-1, keepdim=True) / 127
    assert ((got.double() - x.double()).abs() <= step * 0.51 + x.double().abs() * 2e-3).all()
    assert report.fired == 2


def test_tokens_are_eager_fake_quantisation_at_other_sizes() -> None:
    w = seeded(5, 6)
    before = function(linear, seeded(2, 3, 6), dynamic={"x": [0, 1]}, w=w)
    after, _ = run(before, activations="int8/token")
    x = seeded(3, 7, 6, seed=4)
    wanted = F.linear(fake(x, x.abs().amax(-1, keepdim=True) / 127, 0.0, -128, 127), fake(w, weight_scale(w, 0), 0.0, -128, 127))
    assert relative_error(wanted, interpret(after, [x])[0]) < 1e-5


@pytest.mark.parametrize("how", ["minmax", "mse", "entropy", "percentile:99"])
def test_the_range_is_found_as_asked(how: str) -> None:
    """min-max holds the outlier; the others give it up for the many."""
    x = torch.cat([seeded(999, 8).clamp(-3, 3), torch.full((1, 8), 200.0)])
    before = function(linear, x[:4], dynamic={"x": [0]}, w=seeded(5, 8))
    after, _ = run(before, [x], range=how, activations="uint4/tensor", check="off")
    scale = after.constants["x.scale"].item()
    lo, hi = (float(v) for v in node(after, "dequantize_default").meta[MEASURED])
    assert scale == pytest.approx((max(hi, 0) - min(lo, 0)) / 15, rel=1e-6)
    if how == "minmax":
        assert (lo, hi) == (x.min(), 200)
    elif how == "percentile:99":
        assert (lo, hi) == tuple(pytest.approx(x.quantile(q).item(), abs=0.2) for q in (0.005, 0.995))
    else:
        assert hi < 200


def test_the_measured_range_is_part_of_the_program() -> None:
    x = seeded(4, 6)
    after, _ = run(function(lambda x, w: x @ w, x, w=seeded(6, 3)), [x], [3 * x])
    assert [float(v) for v in node(after, "dequantize_default").meta[MEASURED]] == [3 * x.min(), 3 * x.max()]


# refusals


CONSTANT = torch.full((4, 6), 0.5)


def kernels(*families: str, activations: tuple[str, ...] = ("uint8/tensor",), needs_output: bool = False, **more: Any) -> Target:
    return Target(name="device", activations=(ActivationKernel(families=families, activations=activations, needs_output=needs_output, **more),))


REFUSALS: dict[str, tuple[Callable[[], Program], Target, dict[str, Any], list[tuple[str, str]]]] = {
    "no kernel for the family": (
        lambda: function(linear, seeded(4, 6), w=seeded(3, 6)),
        kernels("conv", "product"),
        {},
        [("linear", "linear: device has no integer kernel for linear with activations uint8/tensor and weights int8; its weight is quantised")],
    ),
    "no kernel for the formats": (
        lambda: function(linear, seeded(4, 6), w=seeded(3, 6)),
        kernels("linear", activations=("int8/token", "uint8/tensor"), weights=("int8",)),
        {"weights": "int4/channel"},
        [
            (
                "linear",
                "linear: device has no integer kernel for linear with activations uint8/tensor and weights int4, "
                "only for int8/token by int8, uint8/tensor by int8; its weight is quantised",
            )
        ],
    ),
    "integers": (
        lambda: function(lambda x, y: x.round().int() @ y.round().int(), seeded(4, 6), seeded(6, 3)),
        REFERENCE,
        {},
        [("matmul", "matmul multiplies to, which is of torch.int32")],
    ),
    "tokens of a convolution": (
        lambda: function(conv1d, seeded(2, 3, 9), w=seeded(4, 3, 2)),
        REFERENCE,
        {"activations": "int8/token"},
        [("conv1d", "conv1d sums over other axes than the last one of x, so its tokens can't have scales; its weight is quantised")],
    ),
    "tokens of a right operand": (
        lambda: function(lambda x, y: x @ y, seeded(4, 6), seeded(6, 3)),
        REFERENCE,
        {"activations": "int8/token"},
        [("matmul", "matmul sums over other axes than the last one of y, so its tokens can't have scales")],
    ),
    "a result in float": (
        lambda: function(lambda x, w: F.conv1d(x, w).relu(), seeded(2, 3, 9), w=seeded(4, 3, 2)),
        kernels("conv", needs_output=True),
        {},
        [("conv1d", "relu is a result of the model; device computes conv only into integers; its weight is quantised")],
    ),
    "a weight that is computed": (
        lambda: function(lambda x, w: F.linear(x, w.tanh()), seeded(4, 6), w=seeded(3, 6)),
        REFERENCE,
        {},
        [("linear", "linear multiplies x by a weight that stays in float")],
    ),
    "a weight that is read otherwise": (
        lambda: function(lambda x, w: F.linear(x, w) + w.sum(), seeded(4, 6), w=seeded(3, 6)),
        REFERENCE,
        {},
        [("w", "w is also read by sum_1, not as a weight"), ("linear", "linear multiplies x by a weight that stays in float")],
    ),
    "a constant on the left": (
        lambda: function(lambda x, w: F.linear(w, x), seeded(4, 6), w=seeded(3, 6)),
        REFERENCE,
        {},
        [("linear", "linear multiplies x by a weight that stays in float")],
    ),
    "one value that never changes": (
        lambda: function(lambda x, v, w: F.linear(x, w) + F.linear(x * 0 + 0.5, v), seeded(4, 6), v=seeded(3, 6), w=seeded(3, 6, seed=1)),
        kernels("linear"),
        {},
        [("linear_1", "add is 0.5 everywhere on the calibration feed; its weight is quantised")],
    ),
    "a value without entries": (
        lambda: function(lambda x, v, w: F.linear(x, w).sum() + F.linear(x[:0], v), seeded(4, 6), v=seeded(3, 6), w=seeded(3, 6, seed=1)),
        kernels("linear"),
        {},
        [("linear_1", "slice_1 is empty on the calibration feed; its weight is quantised")],
    ),
    "hardly ever anything but 0": (
        lambda: function(lambda x, v, w: F.linear(x, w) + F.linear((x - 2.5).relu(), v), seeded(99, 8), v=seeded(3, 8), w=seeded(3, 8, seed=1)),
        kernels("linear"),
        {"range": "percentile:95"},
        [("linear_1", "relu is 0 on the calibration feed but for what percentile:95 leaves out; its weight is quantised")],
    ),
}


@pytest.mark.parametrize(("make", "target", "options", "expected"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(make: Callable[[], Program], target: Target, options: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    """No activation of a declined site has a quantiser; its weight may have one, as with quant.weight_only."""
    before = make()
    after, report = run(before, target=target, **options)
    assert declined(report) == expected
    read = {
        n: {a.name for a in node(after, n).all_input_nodes if a.op != "get_attr" and a.target is not insert.DEQUANTIZE}
        for n, _ in expected
        if node(after, n).op == "call_function"
    }
    assert all(names for names in read.values()), "what it multiplies is read as it was"


def test_a_feed_on_which_nothing_changes() -> None:
    before = function(lambda x, v, w: F.linear(F.linear(x, v).relu() * 0, w), torch.ones(4, 6), v=torch.ones(3, 6), w=seeded(2, 3))
    with pytest.raises(CalibrationError) as refused:
        run(before, [torch.ones(4, 6)], [torch.ones(2, 6)])
    assert str(refused.value) == (
        "no value changes on the calibration feed\n"
        "  where <root>  (x)\n"
        "  why   x is 1 everywhere on the calibration feed; quant.insert can use none of the 2 values it would quantise\n"
        "  state program as before this pass; 0 finished passes are kept\n"
        "  do    pass items that differ from one another, as the model meets them in use"
    )


def test_a_feed_too_small_for_the_percentile() -> None:
    with pytest.raises(CalibrationError) as refused:
        run(function(linear, seeded(4, 6), w=seeded(3, 6)), range="percentile:99.99")
    assert str(refused.value) == (
        "the calibration feed is too small\n"
        "  where <root>  (x)\n"
        "  why   48 values can't tell the 99.99th percentile: it needs 20000\n"
        "  state program as before this pass; 0 finished passes are kept\n"
        "  do    pass more items, or ask quant.insert for a lower percentile, as percentile:99.9"
    )


def test_no_calibration() -> None:
    program = function(linear, seeded(4, 6), w=seeded(3, 6))
    with pytest.raises(CalibrationError, match="there is no calibration data"):
        run_pass(program, NAME)
    assert run_pass(program, NAME, activations="int8/token")[1].fired == 2, "tokens need none"


def test_what_the_recipe_excludes_is_neither_changed_nor_declined() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    before = captured(model, seeded(4, 6))
    after, report = run(before, where=Where(exclude=("0",)), target=kernels("product"))
    assert [d[0] for d in declined(report)] == ["linear_1"]
    after, report = run(before, where=Where(exclude=("2",)))
    assert sites(report) == ["input_1 as uint8/tensor", "int8 in blocks of [1, -1]"]
    assert [a.name for a in node(after, "linear_1").all_input_nodes] == ["relu", "_2_weight", "_2_bias"]


def test_a_tied_weight_with_one_reader_excluded_stays() -> None:
    """Its readers share its codes, so one that must read the float weight keeps it for both."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    before = captured(Tied(), seeded(4, 6))
    after, report = run(before, where=Where(exclude=("b",)))
    assert (report.fired, text(after)) == (0, text(before))
    assert declined(report) == [("linear", "linear multiplies input by a weight that stays in float".replace("input", "x"))]


# kernels that give integers


def test_integer_results_are_quantised_behind_the_clamp() -> None:
    def body(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        h = F.conv1d(x, v).relu()
        return F.conv1d(h, w) + h[:, :2, :7]

    before = function(body, seeded(2, 3, 9), v=seeded(4, 3, 2), w=seeded(2, 4, 2))
    after, report = run(before, target=kernels("conv", needs_output=True))
    assert declined(report) == []
    assert sites(report) == ["x as uint8/tensor", "relu as uint8/tensor", "conv1d_1 as uint8/tensor", *["int8 in blocks of [1, -1, -1]"] * 2]
    relu, pair = node(after, "relu"), node(after, "conv1d_1").args[0]
    assert [u.target for u in relu.users] == [insert.QUANTIZE], "every reader takes the integers"
    assert pair.target is insert.DEQUANTIZE and len(pair.users) == 2
    assert [u.target for u in node(after, "conv1d").users] == [aten.relu.default]


# bias


def test_biases_that_stay_in_float() -> None:
    """Zero; beyond 2^31 steps; one channel of products on several scales."""
    zero = function(conv1d, seeded(2, 3, 9), w=seeded(4, 3, 2), b=torch.zeros(4))
    large = function(conv1d, seeded(2, 3, 9), w=seeded(4, 3, 2), b=torch.tensor([1.0, 2.0, -1e9, 3.0]))
    grouped = function(conv1d, seeded(2, 4, 9), w=seeded(4, 4, 2), b=seeded(4))
    for program, options in ((zero, {}), (large, {}), (grouped, {"weights": "int8/group:2"})):
        after, report = run(program, **options)
        assert report.fired == 2
        assert node(after, "conv1d").args[2].target == "b"


def test_a_kernel_read_through_a_view_keeps_its_bias_in_float() -> None:
    _, report = run(function(lambda x, w, b: F.conv1d(x, w.permute(2, 1, 0), b), seeded(2, 3, 9), w=seeded(2, 3, 4), b=seeded(4)))
    assert (report.fired, declined(report)) == (2, [])


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_few_channels_can_all_be_rounded_by_half_a_step(channels: int) -> None:
    """An ideal quantiser loses step² / 12 in the mean; a single value may lose step² / 4, 4.8 dB more, and nothing is wrong."""
    for seed in range(12):
        before = function(conv1d, seeded(2, 3, 9, seed=seed), w=seeded(channels, 3, 2, seed=seed + 50), b=seeded(channels, seed=seed + 99))
        _, report = run(before)
        assert {c.verdict for c in report.checks} == {"held"}


# options


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown format": ({"activations": "uint9/tensor"}, "activations: unknown number format 'uint9'; did you mean 'uint8'?"),
    "an unknown granularity": (
        {"activations": "uint8/row"},
        "activations: unknown granularity 'row'; one of tensor, channel, token, group:64 (any positive group size)",
    ),
    "channels": ({"activations": "uint8/channel"}, "activations: an activation has one scale in all or one a token: tensor or token"),
    "unsigned tokens": (
        {"activations": "uint8/token"},
        "activations: uint8 holds nothing below 0 without zero points, which tokens don't have; say int8/token",
    ),
    "static floats": (
        {"activations": "float8_e4m3fn/tensor"},
        "activations: float8_e4m3fn has no calibrated range; say float8_e4m3fn/token",
    ),
    "weights": ({"weights": "int9"}, "weights: unknown number format 'int9'; did you mean 'int8'?"),
    "unsigned weights": ({"weights": "uint8"}, "weights: uint8 holds nothing below 0 without zero points"),
    "wide weights": ({"embeddings": "int16"}, "embeddings: codes of int16 are wider than a byte and can't be packed"),
    "a method": ({"range": "max"}, "range: 'max': one of minmax, mse, entropy, percentile:99.99"),
    "a percentile without its number": ({"range": "percentile"}, "range: 'percentile': one of minmax, mse, entropy, percentile:99.99"),
    "a percentile that is too low": ({"range": "percentile:50"}, "range: a percentile lies above 50, up to 100"),
    "no number": ({"range": "percentile:high"}, "range: could not convert string to float: 'high'"),
    "an unknown field": ({"activation": "uint8"}, "activation: unknown, did you mean 'activations'?"),
}


@pytest.mark.parametrize(("options", "why"), OPTIONS.values(), ids=OPTIONS)
def test_options_are_checked_before_anything_runs(options: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build(load_recipe({"passes": [{NAME: options}, "quant.finalize"]}))
    assert str(caught.value) == (
        f"an option is not valid\n  where pass 1, quant.insert\n  why   {why}\n"
        "  do    fields: weights, embeddings, activations, products, range, storage"
    )


# the contract


def square() -> Program:
    """A layer whose operands and axes can be taken for one another, all channels of the weight of other sizes, with many biases."""
    x = seeded(32, 32, 4) + 0.5
    return function(conv1d, x, w=seeded(32, 32, 1) * torch.logspace(0, 1, 32)[:, None, None], b=seeded(32))


def scaled(factor: float, of: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The pass gives the scale of that value times a factor to both ends of its quantiser."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = Edit.constant
        patch.setattr(Edit, "constant", lambda edit, name, tensor, **at: right(edit, name, tensor * factor if name == of else tensor, **at))

    return plant


def zero_point(step: int) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        right = affine.dequantize
        patch.setattr(affine, "dequantize", lambda codes, scale, zero, *rest: right(codes, scale, None if zero is None else zero + step, *rest))

    return plant


def other_axis(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_only, "mse_range", lambda w, *grid: mse_range(w.transpose(0, 1).contiguous(), *grid))


def bias_scale(patch: pytest.MonkeyPatch) -> None:
    right = Edit.insert

    def wrong(edit: Edit, target: Any, *args: Any, **kwargs: Any) -> Any:
        if target is insert.DEQUANTIZE and args[3] == "int32":
            twice = right(edit, aten.mul.Tensor, args[1], 2.0, **{k: v for k, v in kwargs.items() if k != "val"})
            args = (args[0], twice, *args[2:])
        return right(edit, target, *args, **kwargs)

    patch.setattr(Edit, "insert", wrong)


def other_operand(patch: pytest.MonkeyPatch) -> None:
    """What the weight's readers get is the quantised activation's twin: the pair is made of another value than it stands for."""
    right = Edit.insert

    def wrong(edit: Edit, target: Any, *args: Any, **kwargs: Any) -> Any:
        if target is insert.QUANTIZE and args[0].name == "y":
            args = (node(edit.program, "x"), *args[1:])
        return right(edit, target, *args, **kwargs)

    patch.setattr(Edit, "insert", wrong)


def stale_range(patch: pytest.MonkeyPatch) -> None:
    """The scale is made for a range that the value had once, half of what is measured."""
    right = grids.scale_from_range
    patch.setattr(grids, "scale_from_range", lambda lo, hi, *rest: right(lo / 2, hi / 2, *rest))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "scale halved": scaled(0.5, "x.scale"),
    "scale doubled": scaled(2.0, "x.scale"),
    "scale negated": scaled(-1.0, "x.scale"),
    "weight scale halved": scaled(0.5, "w.scale"),
    "weight scale doubled": scaled(2.0, "w.scale"),
    "zero point one more": zero_point(2),
    "zero point dropped": zero_point(-100),
    "weight scales of the other axis": other_axis,
    "bias scale off": bias_scale,
    "stale range": stale_range,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_contract_bites(monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]) -> None:
    before = square()
    was = text(before)
    assert {c.verdict for c in run(before)[1].checks} == {"held"}
    fault(monkeypatch)
    with pytest.raises(ContractViolation, match=r"quant.insert breaks its bounded contract at [12] of [23] sites\n  where <root>  \(conv1d\)"):
        run(before)
    assert text(before) == was


def test_contract_bites_on_the_other_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    before = function(lambda x, y: x @ y, seeded(16, 16), seeded(16, 16, seed=1))
    assert run(before)[1].fired == 2
    other_operand(monkeypatch)
    with pytest.raises(ContractViolation, match=r"quant.insert breaks its bounded contract at 1 of 2 sites\n  where <root>  \(matmul\)"):
        run(before)


def test_a_probe_of_zeros_is_no_excuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros vouch for no quantiser; numbers over its range do, and tell on a wrong one."""
    before = function(linear, torch.zeros(4, 6), w=seeded(3, 6))
    _, report = run(before, [torch.zeros(4, 6)], [seeded(4, 6)])
    assert {c.verdict for c in report.checks} == {"held"}
    right = insert.grid_of
    monkeypatch.setattr(insert, "grid_of", lambda *args: replace(right(*args), scale=right(*args).scale / 2))
    with pytest.raises(ContractViolation):
        run(before, [torch.zeros(4, 6)], [seeded(4, 6)])


def test_zeros_whose_scale_is_computed_are_no_excuse_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that no token of the probe is sent to reads zeros. Its quantiser takes any numbers, and a wrong one shows on others."""
    before = function(linear, torch.zeros(4, 6), w=seeded(3, 6))
    _, report = run(before, activations="int8/token")
    assert {c.verdict for c in report.checks} == {"held"}
    right = insert._token_scale
    monkeypatch.setattr(insert, "_token_scale", lambda value, format, op: op(aten.mul.Tensor, right(value, format, op), 0.5))
    with pytest.raises(ContractViolation, match="breaks its bounded contract at 1 of 2 sites"):
        run(before, activations="int8/token")


# real models


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attentions"), [("llama", 2), ("gpt2", 2), ("resnet", 0), ("unet2d_cond", 8)])
def test_real_models(name: str, attentions: int) -> None:
    """Every linear layer and convolution the model has, and both products of every attention, multiply integers."""
    before = zoo(name)
    for step in ("tidy.fold_constants", "tidy.fold_batch_norm", "tidy.open_attention"):
        before, _ = run_pass(before, step)
    after, report = run(before, range="mse")
    found = list(matmul_sites(before))
    modules = list(ZOO[name]()[0].modules())
    assert sum(s.family == "linear" for s in found) == sum(isinstance(m, nn.Linear | Conv1D) for m in modules)
    assert sum(s.family == "conv" for s in found) == sum(isinstance(m, nn.Conv2d) for m in modules)
    assert sum(s.family == "product" for s in found) == 2 * attentions
    for site in found:
        operands = [a for a in node(after, site.node.name).args[:3] if isinstance(a, fx.Node)]
        quantised = sum(reaches(a, insert.DEQUANTIZE) for a in operands)
        assert quantised >= 2, site.node.name
    assert declined(report) == []
    assert {c.verdict for c in report.checks} == {"held"}
    assert report.output_sqnr > 25


def reaches(value: fx.Node, target: Any) -> bool:
    """Whether a value is of that op, or a view of one."""
    while value.target in VIEWS or is_move(value):
        value = value.args[0]
    return value.target is target


def test_a_finalised_program_survives_the_store(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    for index, (_, value) in enumerate(model.named_parameters()):
        value.data = seeded(*value.shape, seed=index) / 4
    feed = [(seeded(n, 3, 6, 6, seed=n),) for n in (2, 99, 4)]
    compiled = fxc.compile(model, "int8", feed[0], feed, backend="reference")
    assert [p.fired for p in compiled.report.passes] == [0, 0, 0, 0, 5, 2, 3]
    again = fxc.load(compiled.save(tmp_path / "out"))
    x = seeded(5, 3, 6, 6, seed=9)
    assert torch.equal(again(x), compiled(x))
    assert compiled.report.output_sqnr > 30
    constants = store.load_program(tmp_path / "out").constants
    assert {t.dtype for n, t in constants.items() if n.endswith(".codes")} == {torch.int32}
    assert {t.dtype for n, t in constants.items() if n.endswith(".packed")} == {torch.uint8}


def test_a_range_far_beyond_the_probe_is_checked_on_numbers_that_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outlier of the feed leaves the probe below one step: on the probe nothing bites, over the range a fault does."""
    before = function(linear, seeded(4, 8), w=seeded(5, 8))
    outlier = seeded(4, 8, seed=1)
    outlier[0, 0] = 1e4
    _, report = run(before, before.example, [outlier])
    assert {c.verdict for c in report.checks} == {"held"}
    right = insert.grid_of
    monkeypatch.setattr(insert, "grid_of", lambda *args: replace(right(*args), zero_point=right(*args).zero_point + 9))
    with pytest.raises(ContractViolation):
        run(before, before.example, [outlier])


def test_a_background_half_a_step_off_is_no_violation() -> None:
    """-1 lies between two codes of the range -1 to 1, and fills the image."""
    x = seeded(1, 1, 16, 16).clamp(-1, 1)
    x = torch.where(seeded(1, 1, 16, 16, seed=1) > 1.3, x, -1.0)
    x[..., 0, 0] = 1.0
    program = function(lambda x, w: F.conv2d(x, w).relu(), x, w=seeded(4, 1, 3, 3, seed=2))
    _, report = run(program, [x])
    assert report.fired
    assert min(c.figure - c.limit for c in report.checks) < 2


def test_products_that_no_table_tells_are_declined() -> None:
    """An einsum stays in float, and the report says so."""
    program = function(lambda x, y: torch.einsum("bqd,bkd->bqk", x, y), seeded(2, 5, 8), seeded(2, 6, 8), dynamic=False)
    _, report = run(program)
    assert (report.fired, declined(report)) == (
        0,
        [("einsum", "einsum multiplies in a way that isn't opened: matmul, linear and convolutions are")],
    )
