"""Quantised activations in ONNX Runtime: which products run on codes, with which numbers, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from fxcompress.backends.onnx.files import read_graph
from fxcompress.backends.onnx.onnxruntime import OnnxRuntimeBackend
from fxcompress.backends.onnx.session import OnnxSession
from fxcompress.backends.onnx.stepwise import _judge_order, _judged_codes
from fxcompress.errors import BackendRefusal
from fxcompress.program import Program
from fxcompress.report import BackendReport
from tests.backends.integer_helpers import integer
from tests.backends.onnx_helpers import changed, program_of
from tests.passes.helpers import Builder, zoo
from tests.passes.helpers import run as run_pass

BACKEND = OnnxRuntimeBackend()
INTEGER = ("MatMulIntegerToFloat", "QLinearConv")


class Attention(nn.Module):
    """Two products of activations, q kᵀ and p v, between linears."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out((torch.softmax(0.3 * q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).flatten(2))


class Residual(nn.Module):
    """Two convolutions, added and concatenated while their results are dequantised codes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(12, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return self.c(torch.cat([a + b, a, b], 1))


class Columns(nn.Module):
    """x W + b with W [K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(64, 24)), nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Routed(nn.Module):
    """Rows sorted by a key that most of them share, as experts' tokens are."""

    def __init__(self, is_argsort: bool = False) -> None:
        super().__init__()
        self.is_argsort = is_argsort
        self.layer = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        keys = (x.sum(-1) > 0).to(torch.int64)
        order = torch.argsort(keys) if self.is_argsort else torch.sort(keys)[1]
        return self.layer(x[order]).index_select(0, torch.argsort(order))


class Greatest(nn.Module):
    """Where the two greatest values are."""

    def __init__(self, is_sorted: bool) -> None:
        super().__init__()
        self.is_sorted = is_sorted

    def forward(self, x: Tensor) -> Tensor:
        return x.topk(2, sorted=self.is_sorted)[1]


def report(program: Program, folder: Path, lowered: Program | None = None, inputs: list[Tensor] | None = None) -> BackendReport:
    """What the backend says of `lowered` (else the program itself) as the program."""
    BACKEND.write(lowered or program, folder)
    return BACKEND.report(program, folder, inputs or program.example)


def kernels(program: Program, folder: Path) -> Counter[str]:
    """Integer ops of the graph that ONNX Runtime runs."""
    BACKEND.write(program, folder)
    OnnxSession(read_graph(folder), folder, optimized=folder / "optimized.onnx")
    found = Counter(n.op_type for n in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node)
    return Counter({op: found[op] for op in INTEGER if found[op]})


def runs_on_codes(program: Program, folder: Path, expected: dict[str, int], flips: float = 1e-3) -> None:
    """Every product in an integer kernel, and their results the interpreter's."""
    assert kernels(program, folder) == expected
    seen = report(program, folder)
    assert (seen.integer_share, seen.quantised_share, seen.in_float) == (1, 1, ())
    assert seen.code_flips is not None and seen.code_flips <= flips
    assert seen.site_parity is not None and seen.site_parity < 5e-6


@pytest.mark.parametrize(("format", "token"), [("uint8", False), ("int8", False), ("int8", True), ("uint4", False), ("int4", False)])
@pytest.mark.parametrize("shape", [(6, 64), (2, 5, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_linear_runs_on_codes(shape, bias, format, token, tmp_path):
    torch.manual_seed(0)
    program = integer(program_of(nn.Linear(64, 24, bias=bias), torch.randn(*shape)), format, token=token)
    runs_on_codes(program, tmp_path, {"MatMulIntegerToFloat": 1}, flips=0)


@pytest.mark.parametrize("token", [False, True], ids=["tensor", "token"])
def test_a_weight_summed_over_its_first_axis_runs_on_codes(token, tmp_path):
    torch.manual_seed(0)
    runs_on_codes(integer(program_of(Columns(), torch.randn(6, 64)), "int8", token=token), tmp_path, {"MatMulIntegerToFloat": 1}, flips=0)


CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 6, 3), (2, 4, 9, 9)),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 9, 9)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9, 9)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 9, 9)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), (2, 8, 9, 9)),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8, padding=1), (2, 8, 9, 9)),
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 20)),
    "3d": (nn.Conv3d(4, 6, 3), (2, 4, 5, 6, 7)),
}


@pytest.mark.parametrize("format", ["uint8", "int8"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_runs_on_codes(name, format, tmp_path):
    layer, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    runs_on_codes(integer(program_of(layer, torch.randn(*shape)), format), tmp_path, {"QLinearConv": 1}, flips=5e-3)


@pytest.mark.parametrize("clamp", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.2)], ids=str)
@pytest.mark.parametrize("format", ["uint8", "int8"])
def test_a_clamp_goes_into_the_convolution(clamp, format, tmp_path):
    """With int8 the zero lies in the middle of the codes and relu needs a bound of its own; with uint8 the grid is the bound."""
    torch.manual_seed(0)
    program = integer(program_of(nn.Sequential(nn.Conv2d(4, 6, 3), clamp), torch.randn(2, 4, 9, 9)), format)
    runs_on_codes(program, tmp_path, {"QLinearConv": 1}, flips=5e-3)
    lowered = [n.op_type for n in BACKEND.lower(program).model.graph if n.op_type not in ("Constant",)]
    bounded = ["Clip"] if format == "int8" else []
    assert lowered == ["QuantizeLinear", "QLinearConv", *bounded, "DequantizeLinear"]


@pytest.mark.parametrize("format", ["uint8", "int8"])
def test_attention_runs_on_codes(format, tmp_path):
    torch.manual_seed(0)
    program = integer(program_of(Attention(), torch.randn(2, 7, 32)), format)
    runs_on_codes(program, tmp_path, {"MatMulIntegerToFloat": 6})


def test_codes_go_through_additions_and_concatenations(tmp_path):
    torch.manual_seed(0)
    runs_on_codes(integer(program_of(Residual(), torch.randn(2, 4, 9, 9))), tmp_path, {"QLinearConv": 3}, flips=5e-3)


@pytest.mark.parametrize("token", [False, True], ids=["tensor", "token"])
def test_codes_are_the_interpreters_at_other_sizes(token, tmp_path):
    torch.manual_seed(0)
    program = integer(
        program_of(Attention() if not token else nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8)), torch.randn(2, 7, 32)),
        "int8",
        token=token,
    )
    seen = report(program, tmp_path, inputs=[torch.randn(3, 12, 32)])
    assert seen.code_flips is not None and seen.code_flips < 1e-3
    assert seen.site_parity is not None and seen.site_parity < 5e-6


@pytest.mark.parametrize("is_argsort", [False, True], ids=["sort", "argsort"])
def test_equal_keys_may_be_sorted_in_any_order(is_argsort, tmp_path):
    """ONNX Runtime's order of equal keys is another one than torch's from some size on; the rows come back to their places."""
    torch.manual_seed(0)
    seen = report(integer(program_of(Routed(is_argsort), torch.randn(40, 32)), "int8", token=True), tmp_path)
    assert seen.code_flips is not None and seen.code_flips < 1e-3
    assert seen.parity is not None and seen.parity < 1e-5


def test_another_order_of_unequal_keys_is_refused():
    torch.manual_seed(0)
    program = program_of(Routed(), torch.randn(40, 32))
    item = next(n for n in program.graph.nodes if n.name == "getitem_1" or (n.name == "getitem" and n.args[1] == 1))
    keys = torch.tensor([1, 0, 1, 0])
    _judge_order(item, torch.tensor([1, 3, 0, 2]), torch.tensor([3, 1, 2, 0]), keys)
    with pytest.raises(BackendRefusal, match="another order"):
        _judge_order(item, torch.tensor([1, 3, 0, 2]), torch.tensor([1, 0, 3, 2]), keys)


def test_the_greatest_values_may_come_in_any_order_where_none_is_asked_for():
    x = torch.tensor([0.1, 0.9, 0.4, 0.7])
    for is_sorted in (True, False):
        program = program_of(Greatest(is_sorted), x)
        item = next(n for n in program.graph.nodes if n.name.startswith("getitem") and n.args[1] == 1)
        wanted, turned, other = (torch.tensor(order) for order in ([1, 3], [3, 1], [3, 2]))
        _judge_order(item, wanted, wanted, x)
        for given in [other] if not is_sorted else [other, turned]:
            with pytest.raises(BackendRefusal, match="another order"):
                _judge_order(item, wanted, given, x)
        if not is_sorted:
            _judge_order(item, wanted, turned, x)


@pytest.mark.parametrize(("dtype", "is_explained"), [(torch.float16, True), (torch.float32, False)])
def test_halves_may_be_off_by_their_last_places(dtype, is_explained):
    """Of 100 a half's neighbours are 1/16 away, so that 100.4 may round either way; 3.4 may not."""
    built = Builder(x=torch.ones(3, dtype=dtype), scale=torch.ones(1, dtype=dtype))
    quantiser = built.op(torch.ops.fxc.quantize.default, built.x, built.scale, None, "uint8", [-1])
    x, scale = built.program(quantiser).placeholders()
    held = {x: torch.tensor([100.4, 3.4, 7.0]).to(dtype), scale: torch.ones(1).to(dtype)}
    wanted = torch.tensor([100, 3, 7], dtype=torch.uint8)
    share, edges = _judged_codes(quantiser, wanted, wanted + torch.tensor([1, 0, 0], dtype=torch.uint8), held)
    assert (round(share, 2), edges is None) == (0.33, is_explained)
    _, edges = _judged_codes(quantiser, wanted, wanted + torch.tensor([1, 1, 0], dtype=torch.uint8), held)
    assert edges is not None and (edges.away > 0).tolist() == [not is_explained, True, False]


def test_kernels_read_unsigned_codes_on_the_left_and_signed_ones_on_the_right(tmp_path):
    torch.manual_seed(0)
    program = integer(program_of(Attention(), torch.randn(2, 7, 32)), "int8")
    BACKEND.write(program, tmp_path)
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx"))
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info} | {i.name: i.data_type for i in model.graph.initializer}
    pairs = {tuple(types[name] for name in n.input[:2]) for n in model.graph.node if n.op_type == "MatMulIntegerToFloat"}
    assert pairs == {(onnx.TensorProto.UINT8, onnx.TensorProto.INT8)}


def _in_float(program: Program, folder: Path) -> list[tuple[str, str]]:
    seen = report(program, folder)
    assert seen.site_parity is None or seen.site_parity < 5e-6
    return [(s.site, s.reason) for s in seen.in_float]


def test_what_has_no_integer_kernel_computes_in_float_with_the_reason(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9, 9)
    plain = integer(program_of(nn.Conv2d(4, 6, 3), x), outputs=lambda n: False)
    assert _in_float(plain, tmp_path) == [("conv2d", "its result is read in float, and the integer kernel gives codes")]
    turned = integer(program_of(nn.ConvTranspose2d(4, 6, 3), x))
    assert _in_float(turned, tmp_path) == [("conv_transpose2d", "ONNX Runtime has no integer kernel for ConvTranspose")]


def test_codes_of_16_bits_are_the_interpreters(tmp_path):
    torch.manual_seed(0)
    seen = report(integer(program_of(nn.Linear(64, 24), torch.randn(6, 64)), "int16"), tmp_path)
    assert seen.code_flips == 0
    assert seen.site_parity is not None and seen.site_parity < 5e-6


def _constant(suffix: str, change: Callable[[Tensor], Tensor]) -> Callable[[Program], Program]:
    def fault(program: Program) -> Program:
        name = next(n for n in program.constants if n.endswith(suffix))
        return changed(program, name, change(program.constants[name]))

    return fault


FAULTS = {
    "zero point of the input": _constant("input_1.zero_point", lambda t: t + 1),
    "scale of the input": _constant("input_1.scale", lambda t: t * 1.01),
    "scales of other channels": _constant("weight.scale", lambda t: t.roll(1, 0)),
    "codes of other channels": _constant("weight.packed", lambda t: t.roll(1, 0)),
    "weight transposed": _constant("weight.packed", lambda t: t.transpose(-1, -2).contiguous()),
}
CONV_FAULTS = FAULTS | {
    "scale of the bias": _constant("bias.scale", lambda t: t * 2),
    "codes of the bias": _constant("bias.codes", lambda t: -t),
    "zero point of the output": _constant("conv2d.zero_point", lambda t: t - 1),
    "scale of the output": _constant("conv2d.scale", lambda t: t * 1.01),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_a_linear_is_refused(fault, tmp_path):
    torch.manual_seed(0)
    program = integer(program_of(nn.Linear(32, 32), torch.randn(6, 32)))
    report(program, tmp_path)
    with pytest.raises(BackendRefusal, match="the backend gives other numbers than the program"):
        report(program, tmp_path, FAULTS[fault](program))


@pytest.mark.parametrize("fault", CONV_FAULTS)
def test_a_planted_fault_in_a_convolution_is_refused(fault, tmp_path):
    torch.manual_seed(0)
    program = integer(program_of(nn.Conv2d(8, 8, 3), torch.randn(2, 8, 9, 9)))
    report(program, tmp_path)
    with pytest.raises(BackendRefusal, match="the backend gives other numbers than the program"):
        report(program, tmp_path, CONV_FAULTS[fault](program))


def test_a_refusal_names_the_step_and_what_is_wrong(tmp_path):
    torch.manual_seed(0)
    program = integer(program_of(nn.Sequential(nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3)), torch.randn(2, 8, 9, 9)))
    faulty = _constant("2.weight.packed", lambda t: t.roll(1, 0))(program)
    with pytest.raises(BackendRefusal) as refused:
        report(program, tmp_path, faulty)
    assert refused.value.where == "2  (quantize_default_3)"
    assert refused.value.why.startswith("codes differ by up to ")


def test_a_bias_on_another_grid_computes_in_float(tmp_path):
    torch.manual_seed(0)
    program = integer(program_of(nn.Conv2d(8, 8, 3), torch.randn(2, 8, 9, 9)))
    odd = changed(program, "bias.scale", program.constants["bias.scale"] * 2)
    assert _in_float(odd, tmp_path) == [("conv2d", "the scale of its bias isn't s_x s_W")]


@pytest.mark.parametrize("name", ["vit", pytest.param("unet2d_cond", marks=pytest.mark.slow), pytest.param("dit", marks=pytest.mark.slow)])
def test_every_product_of_a_real_model_runs_on_codes(name, tmp_path):
    opened, _ = run_pass(zoo(name), "tidy.open_attention", check="off")
    seen = report(integer(opened), tmp_path)
    assert (seen.integer_share, seen.in_float, seen.opset) == (1, (), 18)
    assert seen.code_flips is not None and seen.code_flips < 1e-3
