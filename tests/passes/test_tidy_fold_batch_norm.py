"""tidy.fold_batch_norm: which layers take a norm in, why others don't, and what the contract catches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fxcompress.errors import ContractViolation
from fxcompress.functional import flat_graph
from fxcompress.passes.tidy import fold_batch_norm
from fxcompress.program import Program
from fxcompress.verify import verify
from tests.passes.helpers import captured, declined, error, function, lines, node, ops, planted, run, seeded, text, unchanged_by_second_run, zoo
from tests.zoo import redraw

NAME = "tidy.fold_batch_norm"


def layered(layer: nn.Module, norm: nn.Module, x: Tensor) -> Program:
    """layer, norm, ReLU with weights and statistics that are no identity."""
    return captured(redraw(nn.Sequential(layer, norm, nn.ReLU()), seed=1), x)


def conv_bn(**options: Any) -> Program:
    """conv2d 3 -> 4, norm, ReLU."""
    return layered(nn.Conv2d(3, 4, 3, **options), nn.BatchNorm2d(4), seeded(2, 3, 8, 8))


def test_before_and_after() -> None:
    before = conv_bn()
    assert text(before) == lines("""
        conv2d = conv2d(input_1, %0.weight, %0.bias)
        batch_norm = batch_norm(conv2d, %1.weight, %1.bias, %1.running_mean, %1.running_var, False, 0.1, 1e-05, False)
        relu = relu(batch_norm)
        return relu""")
    after, report = run(before, NAME)
    assert text(after) == lines("""
        conv2d_default = conv2d(input_1, %0.weight_1, %0.bias_1)
        relu = relu(conv2d_default)
        return relu""")
    assert (report.fired, declined(report)) == (1, [])
    assert node(after, "conv2d_default").meta["module"] == node(before, "conv2d").meta["module"]
    assert error(before, after) < 1e-5


def test_formula() -> None:
    """The folded constants against the definition, entry by entry, in float64."""
    before = conv_bn()
    after, _ = run(before, NAME)
    c = {n: t.double() for n, t in before.constants.items()}
    for o in range(4):
        s = c["1.weight"][o] / (c["1.running_var"][o] + 1e-5) ** 0.5
        assert torch.equal(after.constants["0.weight_1"][o], (c["0.weight"][o] * s).float())
        b = (c["0.bias"][o] - c["1.running_mean"][o]) * s + c["1.bias"][o]
        assert after.constants["0.bias_1"][o].item() == pytest.approx(b.item(), rel=1e-7)


LAYERS: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {
    "conv1d": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), seeded(2, 3, 9)),
    "conv3d": (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), seeded(2, 3, 4, 4, 4)),
    "no bias": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), seeded(2, 3, 8, 8)),
    "no affine": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), seeded(2, 3, 8, 8)),
    "padding, stride, groups": (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(8), seeded(2, 4, 8, 8)),
    "padding by name": (nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.BatchNorm2d(4), seeded(2, 3, 8, 8)),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4), seeded(3, 5)),
    "conv_transpose1d": (nn.ConvTranspose1d(3, 4, 3, stride=2), nn.BatchNorm1d(4), seeded(2, 3, 9)),
    "conv_transpose2d": (nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), seeded(2, 3, 8, 8)),
    "conv_transpose2d in groups": (nn.ConvTranspose2d(6, 9, 3, groups=3, bias=False), nn.BatchNorm2d(9), seeded(2, 6, 5, 5)),
    "conv_transpose3d": (nn.ConvTranspose3d(3, 3, 2), nn.BatchNorm3d(3), seeded(2, 3, 4, 4, 4)),
}


@pytest.mark.parametrize(("layer", "norm", "x"), [pytest.param(*v, id=i) for i, v in LAYERS.items()])
def test_layers(layer: nn.Module, norm: nn.Module, x: Tensor) -> None:
    before = layered(layer, norm, x)
    after, report = run(before, NAME)
    assert ops(after) == [ops(before)[0], "relu"]
    assert (report.fired, declined(report)) == (1, [])
    assert error(before, after) < 1e-5


def decomposed(model: nn.Module, x: Tensor) -> Program:
    """The program as capture makes it where torch has to decompose: the norm returns a tuple, with the statistics it saved."""
    program = captured(model, x)
    exported = torch.export.export(model, (x,), strict=False).run_decompositions({})
    graph, constants, _ = flat_graph(exported)
    program = Program(graph, constants, program.inputs, program.outputs, program.signature, example=(x,))
    verify(program)
    return program


def test_norm_in_a_tuple() -> None:
    model = redraw(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), seed=1)
    before = decomposed(model, seeded(2, 3, 8, 8))
    assert ops(before) == ["conv2d", "_native_batch_norm_legit_no_training", "getitem", "relu"]
    after, report = run(before, NAME)
    assert ops(after) == ["conv2d", "relu"]
    assert (report.fired, declined(report)) == (1, [])
    assert error(before, after) < 1e-5


def test_two_in_a_row_are_one_site_each() -> None:
    """The second norm reads the layer that the first one made."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU())
    before = captured(redraw(model, seed=1), seeded(2, 3, 8, 8))
    after, report = run(before, NAME)
    assert ops(after) == ["conv2d", "relu"]
    assert (report.fired, declined(report)) == (2, [])
    assert error(before, after) < 1e-5


def test_a_bias_of_zeros_is_left_out() -> None:
    layer, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)
    norm.running_var.fill_(2.0)
    after, _ = run(captured(nn.Sequential(layer, norm), seeded(2, 3, 8, 8)), NAME)
    assert text(after) == lines("""
        conv2d_default = conv2d(input_1, %0.weight_1, None)
        return conv2d_default""")


W, B = seeded(4, 3, 3, 3, seed=2), seeded(4, seed=3)
MEAN, VAR = seeded(4, seed=4), seeded(4, seed=5).abs() + 0.5
IMAGE = seeded(2, 3, 8, 8)


def norm(y: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
    """Batch norm in eval mode."""
    return nnf.batch_norm(y, mean, var, gamma, beta)


def read_twice(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    y = nnf.conv2d(x, w, b)
    return norm(y, mean, var) + y.mean()


def shared_weight(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return norm(nnf.conv2d(x, w, b), mean, var) + nnf.conv2d(x, w)


def gated_weight(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return norm(nnf.conv2d(x, w * x.mean(), b), mean, var)


def no_layer(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return norm(nnf.conv2d(x, w, b).relu(), mean, var)


def in_training(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return nnf.batch_norm(nnf.conv2d(x, w, b), None, None, mean, var, training=True)


def computed_statistics(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return norm(nnf.conv2d(x, w, b), mean, var * x.abs().mean())


def computed_bias(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return norm(nnf.conv2d(x, w, b * x.mean()), mean, var)


def zero_variance(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return nnf.batch_norm(nnf.conv2d(x, w, b), mean, var.new_tensor([1.0, 0.0, 1.0, 1.0]), eps=0.0).clamp(-1, 1)


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "output read elsewhere": (read_twice, "conv2d is also read by mean_1"),
    "weight shared": (shared_weight, "the weight w of conv2d is also read by conv2d_1"),
    "weight computed": (gated_weight, "conv2d reads mul, which is no constant"),
    "no layer": (no_layer, "batch_norm reads relu, which is no convolution or linear layer"),
    "training": (in_training, "batch_norm uses the statistics of the batch"),
    "statistics computed": (computed_statistics, "batch_norm reads mul, which is no constant"),
    "bias computed": (computed_bias, "conv2d reads mul, which is no constant"),
    "zero variance": (zero_variance, "the scale of batch_norm is not finite in channel 1"),
}


@pytest.mark.parametrize(("body", "reason"), [pytest.param(*c, id=i) for i, c in REFUSED.items()])
def test_refuses(body: Callable[..., Tensor], reason: str) -> None:
    before, _ = run(function(body, IMAGE, w=W, b=B, mean=MEAN, var=VAR), "tidy.fold_constants")
    after, report = run(before, NAME)
    assert text(after) == text(before)
    assert declined(report) == [("batch_norm", reason)]


def test_refuses_an_output() -> None:
    before = function(lambda x, w, m, v: [y := nnf.conv2d(x, w), norm(y, m, v)], IMAGE, w=W, m=MEAN, v=VAR)
    _, report = run(before, NAME)
    assert declined(report) == [("batch_norm", "conv2d is also read by output")]


def test_refuses_another_axis() -> None:
    """A linear layer over tokens has its channels last; the norm of three axes takes axis 1."""
    before = function(lambda x, w, m, v: norm(nnf.linear(x, w), m, v), seeded(2, 4, 3), w=seeded(5, 3), m=MEAN, v=VAR, dynamic=False)
    _, report = run(before, NAME)
    assert declined(report) == [("batch_norm", "batch_norm norms axis 1 of linear, and its channels are axis 2")]


def test_refuses_mixed_precision() -> None:
    before = function(lambda x, w, m, v: norm(nnf.conv2d(x, w), m, v), IMAGE.bfloat16(), w=W.bfloat16(), m=MEAN, v=VAR)
    _, report = run(before, NAME)
    assert declined(report) == [("batch_norm", "batch_norm mixes torch.bfloat16 and torch.float32")]


def test_refuses_read_statistics() -> None:
    model = redraw(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), seed=1)
    before = decomposed(model, seeded(2, 3, 8, 8))
    norm_node, result = node(before, "_native_batch_norm_legit_no_training"), node(before, "relu")
    with before.graph.inserting_before(result):
        saved = before.graph.call_function(node(before, "getitem").target, (norm_node, 1))
        size = before.graph.call_function(torch.ops.aten.numel.default, (saved,))
        shifted = before.graph.call_function(torch.ops.aten.add.Tensor, (result.args[0], size))
    result.args = (shifted,)
    _, report = run(before, NAME)
    assert declined(report) == [("_native_batch_norm_legit_no_training", f"{saved.name} takes the saved statistics of {norm_node.name}")]


def test_second_run_changes_nothing() -> None:
    unchanged_by_second_run(conv_bn(), NAME)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = redraw(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), seed=1).to(dtype)
    after, report = run(captured(model, IMAGE.to(dtype)), NAME)
    assert report.fired == 1
    assert {t.dtype for t in after.constants.values()} == {dtype}


FAULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "sign of the weight": ("fold_weight", lambda w: -w),
    "factor on the weight": ("fold_weight", lambda w: w * 1.5),
    "channels swapped": ("fold_weight", lambda w: w.roll(1, 0)),
    "kernel transposed": ("fold_weight", lambda w: w.transpose(2, 3)),
    "kernel off by one": ("fold_weight", lambda w: w.roll(1, 3)),
    "bias dropped": ("fold_bias", torch.zeros_like),
    "sign of the bias": ("fold_bias", lambda b: -b),
    "factor on the bias": ("fold_bias", lambda b: b * 1.5),
    "bias off by one channel": ("fold_bias", lambda b: b.roll(1)),
    "one channel's bias dropped": ("fold_bias", lambda b: b * torch.tensor([1.0, 1.0, 0.0])),
}


@pytest.mark.parametrize(("helper", "fault"), [pytest.param(*f, id=i) for i, f in FAULTS.items()])
def test_contract_bites(monkeypatch: pytest.MonkeyPatch, helper: str, fault: Callable[[Any], Any]) -> None:
    planted(monkeypatch, fold_batch_norm, helper, fault)
    before = layered(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), seeded(2, 3, 8, 8))
    with pytest.raises(ContractViolation, match=r"tidy\.fold_batch_norm breaks its exact contract at 1 of 1 sites"):
        run(before, NAME)


WRONG_SCALES: dict[str, Callable[[fold_batch_norm.Norm], Tensor]] = {
    "variance without root": lambda n: n.gamma.double() / n.var.double(),  # type: ignore[union-attr]
    "gamma forgotten": lambda n: n.var.double().rsqrt(),
    "statistics of the mean": lambda n: n.gamma.double() * (n.mean.double().square() + n.eps).rsqrt(),  # type: ignore[union-attr]
    "one for all channels": lambda n: (n.gamma.double() * n.var.double().rsqrt()).mean().expand(3),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("scale", [pytest.param(s, id=i) for i, s in WRONG_SCALES.items()])
def test_contract_bites_on_a_wrong_scale(monkeypatch: pytest.MonkeyPatch, scale: Callable[[fold_batch_norm.Norm], Tensor]) -> None:
    monkeypatch.setattr(fold_batch_norm.Norm, "scale", scale)
    with pytest.raises(ContractViolation):
        run(layered(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), seeded(2, 3, 8, 8)), NAME)


def test_contract_bites_on_the_wrong_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Input channels of a transposed convolution scaled in place of its output channels."""
    monkeypatch.setitem(fold_batch_norm.LAYERS, torch.ops.aten.conv_transpose2d.input, lambda given: None)  # type: ignore[arg-type]
    with pytest.raises(ContractViolation):
        run(layered(nn.ConvTranspose2d(3, 3, 3), nn.BatchNorm2d(3), seeded(2, 3, 8, 8)), NAME)


def test_real_model() -> None:
    before = zoo("resnet")
    after, report = run(before, NAME)
    assert (report.fired, declined(report)) == (ops(before).count("batch_norm"), [])
    assert "batch_norm" not in ops(after)
    assert report.bytes_after < report.bytes_before
    assert error(before, after) < 1e-4


class Frozen(nn.Module):
    """A layer, then x s + t with constants of these shapes; a missing one is left out. `extra` reads what lies between."""

    def __init__(self, layer: nn.Module, s: list[int] | None, t: list[int] | None, extra: str = "") -> None:
        super().__init__()
        self.layer, self.extra = layer, extra
        self.register_buffer("s", None if s is None else 1 + 0.5 * seeded(*s, seed=3))
        self.register_buffer("t", None if t is None else seeded(*t, seed=4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        z = y if self.s is None else self.s * y
        out = z if self.t is None else z + self.t
        return (out.relu(), *({"layer": (y.sum(),), "product": (z.sum(),)}.get(self.extra, ())))


FROZEN: dict[str, tuple[nn.Module, list[int] | None, list[int] | None, Tensor]] = {
    "convolution": (nn.Conv2d(3, 4, 3), [1, 4, 1, 1], [1, 4, 1, 1], seeded(2, 3, 8, 8)),
    "without bias": (nn.Conv2d(3, 4, 3, bias=False), [4, 1, 1], [1, 4, 1, 1], seeded(2, 3, 8, 8)),
    "a product alone": (nn.Linear(5, 4), [4], None, seeded(2, 3, 5)),
    "a sum alone": (nn.Linear(5, 4, bias=False), None, [1, 4], seeded(2, 3, 5)),
    "transposed": (nn.ConvTranspose2d(6, 9, 3, groups=3), [1, 9, 1, 1], [1, 9, 1, 1], seeded(2, 6, 5, 5)),
}


@pytest.mark.parametrize("case", FROZEN.values(), ids=FROZEN)
def test_a_norm_that_is_spelled_out(case: tuple[Any, ...]) -> None:
    layer, s, t, x = case
    before = captured(Frozen(layer, s, t), x)
    after, report = run(before, NAME)
    assert (report.fired, declined(report)) == (1, [])
    assert not {"mul.Tensor", "add.Tensor"} & {str(n.target).removeprefix("aten.") for n in after.graph.nodes}
    assert error(before, after) < 1e-5


@pytest.mark.parametrize(
    ("layer", "s", "t", "x"),
    [
        (nn.Linear(5, 4), [3, 1], None, seeded(2, 3, 5)),
        (nn.Linear(5, 4), [3, 4], None, seeded(2, 3, 5)),
        (nn.Conv2d(3, 4, 3), [1, 1, 6, 1], [6], seeded(2, 3, 8, 8)),
        (nn.ReLU(), [1, 3, 1, 1], [1, 3, 1, 1], seeded(2, 3, 8, 8)),
    ],
    ids=["rows", "rows and channels", "rows of an image", "no layer"],
)
def test_constants_along_other_axes_are_no_norm(layer: nn.Module, s: list[int] | None, t: list[int] | None, x: Tensor) -> None:
    _, report = run(captured(Frozen(layer, s, t), x), NAME)
    assert (report.fired, declined(report)) == (0, [])


def test_one_constant_of_two_is_along_the_channels() -> None:
    before = captured(Frozen(nn.Conv2d(3, 4, 3), [1, 4, 1, 1], [6]), seeded(2, 3, 8, 8))
    after, report = run(before, NAME)
    assert (report.fired, error(before, after) < 1e-5) == (1, True)
    assert "aten.add.Tensor" in [str(n.target) for n in after.graph.nodes]


@pytest.mark.parametrize(("extra", "why"), [("layer", "conv2d is also read by sum_1"), ("product", "mul is also read by sum_2")])
def test_a_spelled_out_norm_whose_parts_are_read(extra: str, why: str) -> None:
    _, report = run(captured(Frozen(nn.Conv2d(3, 4, 3), [1, 4, 1, 1], [1, 4, 1, 1], extra), seeded(2, 3, 8, 8)), NAME)
    assert (report.fired, [d.reason for d in report.declined]) == (0, [why])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gain", [10.0, 100.0])
def test_a_loud_channel_in_16_bits_is_rounding_noise_elsewhere(dtype: torch.dtype, gain: float) -> None:
    """Behind a ReLU other numbers stand in for zeros, and what they come to in so few digits is no fault."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
    model.append(nn.Conv2d(16, 16, 1)).append(nn.BatchNorm2d(16))
    redraw(model, seed=1)
    with torch.no_grad():
        for norm in (model[1], model[4], model[7]):
            norm.weight[3] *= gain
    _, report = run(captured(model.to(dtype), seeded(2, 3, 12, 12).to(dtype)), NAME)
    assert report.fired == 3
