"""OpenVINO on CPU: which products run on codes, with which numbers, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.backends.onnx.build import CONTRIB
from fxcompress.backends.onnx.files import MODEL, read_graph
from fxcompress.backends.onnx.translate import translate
from fxcompress.backends.openvino import session
from fxcompress.backends.openvino.backend import OpenVinoBackend, OpenVinoOptions
from fxcompress.backends.openvino.bind import bind
from fxcompress.errors import ArtifactError, BackendRefusal, InputError
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.numerics.formats import format_of
from fxcompress.numerics.noise import sqnr
from fxcompress.program import Program
from fxcompress.report import BackendReport
from tests.backends.integer_helpers import integer
from tests.backends.onnx_helpers import program_of, quantised
from tests.zoo import ZOO

EXACT = OpenVinoBackend(OpenVinoOptions(activation_rounding="off"))


def report(program: Program, folder: Path, backend: OpenVinoBackend = EXACT) -> BackendReport:
    backend.write(program, folder)
    return backend.report(program, folder, program.example)


def codes(model: nn.Module, *inputs: Tensor, format: str = "uint8") -> Program:
    """The captured model with every operand of every product as codes, results in float."""
    return integer(program_of(model, *inputs), format, outputs=lambda n: False)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 4, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / 8**0.5, -1)
        return self.out(torch.matmul(weights, v).transpose(1, 2).reshape(x.shape))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + x)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "matrix": (lambda: nn.Linear(64, 24), (6, 64)),
    "linear": (lambda: nn.Linear(64, 24), (2, 5, 64)),
    "linear without bias": (lambda: nn.Linear(64, 24, bias=False), (2, 5, 64)),
    "conv1d": (lambda: nn.Conv1d(8, 16, 3, padding=1), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 16, 3, padding=1), (2, 8, 8, 8)),
    "conv2d same": (lambda: nn.Conv2d(8, 16, 3, padding="same"), (2, 8, 8, 8)),
    "conv2d without bias": (lambda: nn.Conv2d(8, 16, 3, stride=2, bias=False), (2, 8, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3), (2, 4, 5, 5, 5)),
    "grouped": (lambda: nn.Conv2d(8, 16, 3, groups=4), (2, 8, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16), (2, 16, 8, 8)),
    "residual": (Residual, (2, 8, 8, 8)),
}


@pytest.mark.parametrize("format", ["uint8", "int8"])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_times_codes_run_in_integers(name, format, tmp_path):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    seen = report(codes(make(), torch.randn(shape), format=format), tmp_path)
    assert (seen.integer_share, seen.quantised_share, seen.in_float, seen.opset) == (1, 1, (), 18)
    assert seen.site_parity < 1e-5 and seen.code_flips == 0
    assert not [n for n in read_graph(tmp_path).graph.node if n.domain]


def test_quantised_result_and_integer_bias(tmp_path):
    torch.manual_seed(0)
    seen = report(integer(program_of(Residual(), torch.randn(2, 8, 8, 8))), tmp_path)
    assert (seen.quantised_share, seen.code_flips) == (1, 0)


def test_attention_products_run_in_integers_without_zero_points(tmp_path):
    torch.manual_seed(0)
    seen = report(codes(Attention(), torch.randn(2, 6, 32), format="int8"), tmp_path)
    assert (seen.integer_share, seen.in_float) == (1, ())


def test_attention_products_with_zero_points_run_in_float_and_say_so(tmp_path):
    torch.manual_seed(0)
    seen = report(codes(Attention(), torch.randn(2, 6, 32)), tmp_path)
    assert [f.site for f in seen.in_float] == ["matmul", "matmul_1"]
    assert all("f32" in f.reason for f in seen.in_float)
    reason = OpenVinoBackend.target.activation_kernel("product", "uint8/tensor", "int8")
    assert reason == "openvino has no integer kernel for product with activations uint8/tensor and weights int8, only for int8/tensor by int8"


def test_transposed_convolution_needs_symmetric_activations(tmp_path):
    torch.manual_seed(0)
    layer, x = nn.ConvTranspose2d(8, 16, 3), torch.randn(2, 8, 8, 8)
    (tmp_path / "a").mkdir()
    reason = OpenVinoBackend.target.activation_kernel("transposed", "uint8/tensor", "int8")
    assert str(reason).startswith("openvino has no integer kernel for transposed with activations uint8/tensor")
    assert report(codes(layer, x, format="int8"), tmp_path / "a").integer_share == 1
    (site,) = report(codes(layer, x), tmp_path).in_float
    assert site.reason.startswith("OpenVINO runs it as Deconvolution (")


BLOCKS = {"tensor": (-1, -1), "channel": (1, -1), "group": (1, 16)}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["int8", "uint8"])
@pytest.mark.parametrize("block", ["tensor", "channel", "group"])
def test_weights_alone_are_read_as_codes(block, format, symmetric, tmp_path):
    program = quantised(program_of(nn.Linear(64, 24), torch.randn(2, 5, 64)), "weight", format, BLOCKS[block], symmetric=symmetric)
    seen = report(program, tmp_path)
    assert (seen.quantised_share, seen.in_float) == (1, ())
    assert seen.parity < 1e-5 and seen.code_flips is None


def test_tied_embedding_is_read_as_codes(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(99, 64)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.rows(ids), self.rows.weight)

    program = quantised(program_of(Tied(), torch.randint(0, 99, (2, 5))), "rows.weight", "int8", (1, -1))
    seen = report(program, tmp_path)
    assert (seen.quantised_share, seen.in_float) == (1, ())


def test_float_codes_are_decoded_and_say_so(tmp_path):
    program = quantised(program_of(nn.Linear(64, 24), torch.randn(2, 5, 64)), "weight", "float8_e4m3fn", (1, -1))
    seen = report(program, tmp_path)
    (site,) = seen.in_float
    assert (seen.quantised_share, site.reason) == (0, "float8_e4m3fn is decoded when OpenVINO loads the model")
    assert seen.parity < 1e-5


def test_rounding_activations_is_measured(tmp_path):
    torch.manual_seed(0)
    program = quantised(program_of(nn.Linear(64, 24), torch.randn(2, 5, 64)), "weight", "int8", (1, -1))
    rounded, exact = report(program, tmp_path, OpenVinoBackend()), report(program, tmp_path)
    assert exact.rounding_sqnr is None and 30 < rounded.rounding_sqnr < 60
    assert rounded.parity == exact.parity < 1e-5


@pytest.mark.parametrize("format", ["uint8", None])
def test_other_batch_sizes(format, tmp_path):
    torch.manual_seed(0)
    program = codes(Attention(), torch.randn(2, 6, 32)) if format else program_of(Attention(), torch.randn(2, 6, 32))
    EXACT.write(program, tmp_path)
    opened = EXACT.open(tmp_path, threads=1)
    for shape in ((1, 6, 32), (5, 3, 32), (2, 6, 32)):
        x = torch.randn(shape)
        assert sqnr(run(program, [x])[0], opened.run([x])[0]) > (40 if format else 110)


def test_results_outlive_the_next_call(tmp_path):
    EXACT.write(program_of(nn.Linear(4, 4), torch.randn(2, 4)), tmp_path)
    opened = EXACT.open(tmp_path)
    first = opened.run([torch.ones(2, 4)])[0]
    kept = first.clone()
    opened.run([torch.zeros(2, 4)])
    assert torch.equal(first, kept)


# what doesn't fit


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ([torch.ones(2, 4, dtype=torch.int64)], "x is int64, the model takes float32"),
        ([torch.ones(2, 4, dtype=torch.float64)], "x is float64, the model takes float32"),
        ([torch.ones(2, 4), torch.ones(2, 4)], "2 values for 1 inputs"),
        ([torch.ones(2, 5)], ""),
        ([torch.ones(4)], ""),
    ],
)
def test_inputs_that_do_not_fit(inputs, why, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    EXACT.write(program_of(model, torch.randn(2, 4)), tmp_path)
    opened = EXACT.open(tmp_path)
    name = opened.compiled.inputs[0].get_any_name()
    with pytest.raises(InputError) as refused:
        opened.run(inputs)
    assert refused.value.why and refused.value.why.startswith(why.replace("x is", f"{name} is"))


def test_files_that_can_not_be_run(tmp_path):
    EXACT.write(program_of(nn.Linear(64, 64), torch.randn(2, 64)), tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="missing or truncated"):
        EXACT.open(tmp_path)
    model = read_graph_unchecked(tmp_path)
    model.graph.node[0].op_type = "Unheard"
    (tmp_path / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="OpenVINO can't load the model"):
        session.OpenVinoSession(tmp_path / MODEL)


def read_graph_unchecked(folder: Path) -> onnx.ModelProto:
    return onnx.load(str(folder / MODEL), load_external_data=False)


def test_16_bit_activations_have_no_kernel(tmp_path):
    reason = OpenVinoBackend.target.activation_kernel("linear", "int16/tensor", "int8")
    assert str(reason).startswith("openvino has no integer kernel for linear with activations int16/tensor")
    (site,) = report(codes(nn.Linear(64, 24), torch.randn(2, 5, 64), format="int16"), tmp_path).in_float  # as a pass left it that didn't ask
    assert site.reason.startswith("OpenVINO runs it as FullyConnected (") and "f32" in site.reason


def test_ops_of_onnx_runtime_are_refused():
    program = codes(nn.Linear(64, 24), torch.randn(2, 5, 64))
    skeleton = translate(program)
    next(n for n in skeleton.model.graph if n.op_type == "QuantizeLinear").domain = CONTRIB
    with pytest.raises(BackendRefusal) as refused:
        bind(skeleton, program.constants)
    assert str(refused.value) == (
        "openvino has no QuantizeLinear as ONNX Runtime has it\n"
        "  where <root>  (quantize_default)\n"
        '  do    quantise to uint8 or int8; or backend="onnxruntime"'
    )


@pytest.mark.parametrize("format", ["int4", "uint2"])
def test_n_bit_weights_are_refused(format, tmp_path):
    reason = f"openvino has no {format} kernel for linear weights, only int8, uint8"
    assert OpenVinoBackend.target.refusal("linear", format_of(format), None, 64, True) == reason
    program = quantised(program_of(nn.Linear(64, 24), torch.randn(2, 5, 64)), "weight", format, (1, -1))
    with pytest.raises(BackendRefusal, match=f"openvino has no {format} weights"):
        EXACT.write(program, tmp_path)


def test_short_last_groups_are_not_offered(tmp_path):
    reason = OpenVinoBackend.target.refusal("linear", format_of("int8"), 48, 64, True)
    assert reason == "openvino: groups of 48 don't divide 64"
    program = quantised(program_of(nn.Linear(64, 24), torch.randn(2, 5, 64)), "weight", "int8", (1, 48))
    assert report(program, tmp_path).parity < 1e-5  # as a pass left it that didn't ask


def test_without_openvino(monkeypatch):
    assert (OpenVinoBackend.absent(), session.INSTALL) == ("", "pip install 'fxcompress[openvino]'")
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert OpenVinoBackend.absent() == "pip install 'fxcompress[openvino]'"
    with pytest.raises(BackendRefusal) as refused:
        fxc.compile(nn.Linear(4, 4), "int8-weight-only", example_inputs=(torch.ones(2, 4),), backend="openvino")
    assert (refused.value.what, refused.value.do) == ("OpenVINO isn't installed", "pip install 'fxcompress[openvino]'")


# planted faults: the file says something else than the program


def constant(model: onnx.ModelProto, kind: str, operand: int, of_weight: bool) -> onnx.TensorProto:
    """The constant operand of a quantiser's or a weight's DequantizeLinear."""
    made = {i.name: i for i in model.graph.initializer}
    node = next(n for n in model.graph.node if n.op_type == kind and (n.input[0] in made) == of_weight)
    return made[node.input[operand]]


def zero_point(model: onnx.ModelProto) -> None:
    held = constant(model, "DequantizeLinear", 2, False)
    held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held) + 1, held.name))


def swapped_scales(model: onnx.ModelProto) -> None:
    held = constant(model, "DequantizeLinear", 1, True)
    held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held)[::-1].copy(), held.name))


def other_axis(model: onnx.ModelProto) -> None:
    made = {i.name for i in model.graph.initializer}
    node = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in made)
    (axis,) = [a for a in node.attribute if a.name == "axis"]
    axis.i = 1 - axis.i


def input_scale(model: onnx.ModelProto) -> None:
    held = constant(model, "QuantizeLinear", 1, False)
    held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held) * 1.02, held.name))


FAULTS = [zero_point, swapped_scales, other_axis, input_scale]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("layer", [nn.Linear(16, 16), nn.Conv2d(16, 16, 3)], ids=["linear", "conv"])
def test_a_file_that_says_something_else_is_refused(layer, fault, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16) if isinstance(layer, nn.Linear) else torch.randn(2, 16, 6, 6)
    program = codes(layer, x)
    assert report(program, tmp_path).code_flips == 0
    model = read_graph_unchecked(tmp_path)
    fault(model)
    (tmp_path / MODEL).write_bytes(model.SerializeToString())
    with pytest.raises(BackendRefusal, match="gives other numbers than the program"):
        EXACT.report(program, tmp_path, program.example)


def test_a_shipped_model_that_drifts_is_refused(tmp_path, monkeypatch):
    torch.manual_seed(0)
    program = codes(Residual(), torch.randn(2, 8, 8, 8))
    EXACT.write(program, tmp_path)
    honest = session.OpenVinoSession.run

    def drifting(self: Any, inputs: Any) -> list[Tensor]:
        values = honest(self, inputs)
        return [v * 1.1 for v in values] if len(values) == 1 else values

    monkeypatch.setattr(session.OpenVinoSession, "run", drifting)
    with pytest.raises(BackendRefusal, match="gives other numbers than the program") as refused:
        EXACT.report(program, tmp_path, program.example)
    assert "with every code off by one" in refused.value.why


# whole models


def items(inputs: dict[str, Any], count: int = 3) -> list[dict[str, Any]]:
    """The example with other numbers: noise on what is real, other tokens."""
    rng = torch.Generator().manual_seed(1)

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return value + 0.3 * torch.randn(value.shape, generator=rng)
        return value.roll(1, -1)

    return [{k: other(v) for k, v in inputs.items()} for _ in range(count)]


@pytest.mark.parametrize("name", ["resnet", "vit", "bert", "llama", "dit"])
def test_models_through_int8(name, tmp_path):
    model, inputs = ZOO[name]()
    compiled = fxc.compile(model, "int8", example_inputs=inputs, calibration=items(inputs), backend="openvino", threads=1)
    seen = compiled.report.backend
    assert seen.quantised_share == 1 and not [f for f in seen.in_float if f.macs]
    assert seen.integer_share > 0.94 and seen.site_parity < 1e-5
    assert compiled.report.output_sqnr > 20
    compiled.save(tmp_path / "out")
    graph = onnx.load(str(tmp_path / "out" / MODEL), load_external_data=False).graph
    assert CONTRIB not in {n.domain for n in graph.node}
    for a, b in zip(_flat(compiled(**inputs)), _flat(fxc.load(tmp_path / "out")(**inputs)), strict=True):
        assert torch.equal(a, b)


def _flat(value: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]


def test_weights_alone_through_the_recipe():
    model, inputs = ZOO["llama"]()
    seen = fxc.compile(model, "int8-weight-only", example_inputs=inputs, backend="openvino", threads=1).report.backend
    assert (seen.quantised_share, seen.in_float) == (1, ())
    assert seen.parity < 1e-4 and seen.rounding_sqnr > 25


def test_float(tmp_path):
    model, inputs = ZOO["resnet"]()
    program = program_of(model, *inputs.values())
    seen = report(program, tmp_path)
    assert (seen.integer_share, seen.quantised_share, seen.in_float) == (0, None, ())
    assert seen.parity < 1e-5
    assert relative_error(run(program, program.example)[0], EXACT.open(tmp_path).run(program.example)[0]) < 1e-5


@pytest.mark.parametrize(("compiling", "is_crash"), [("import os; os.abort()", True), ("raise SystemExit(1)", False)])
def test_a_crash_of_openvino_is_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiling: str, is_crash: bool) -> None:
    """It ends another process, not this one; an error there comes again here, if it is one."""
    monkeypatch.setattr(session, "COMPILE", compiling)
    if not is_crash:
        assert report(codes(nn.Linear(8, 8), torch.randn(2, 8)), tmp_path).integer_share == 1
        return
    with pytest.raises(BackendRefusal, match="OpenVINO crashes on the model") as refusal:
        report(codes(nn.Linear(8, 8), torch.randn(2, 8)), tmp_path)
    assert "SIGABRT" in refusal.value.why


def test_what_is_compiled_elsewhere_first_is_this_model(tmp_path: Path) -> None:
    """The command reads the file that it is given: one that is no model ends it with an error."""
    backend, program = EXACT, codes(nn.Linear(8, 8), torch.randn(2, 8))
    backend.write(program, tmp_path)
    code = [sys.executable, "-c", session.COMPILE, str(tmp_path / MODEL), json.dumps(session._properties(1, False))]
    assert subprocess.run(code, check=False).returncode == 0
    (tmp_path / MODEL).write_bytes(b"no model")
    assert subprocess.run(code, capture_output=True, check=False).returncode == 1
