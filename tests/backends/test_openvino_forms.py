"""Forms that OpenVINO computes wrongly or can't load: what is shipped in their place has the program's numbers, and faults in it are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as nnf
from onnx import numpy_helper
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.backends.onnx.files import MODEL, read_graph
from fxcompress.backends.openvino.backend import OpenVinoBackend, OpenVinoOptions
from fxcompress.backends.openvino.legalise import BIAS, Legaliser
from fxcompress.capture import capture
from fxcompress.errors import ArtifactError, BackendRefusal
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.program import Program
from tests.backends.integer_helpers import integer

EXACT = OpenVinoBackend(OpenVinoOptions(activation_rounding="off"))
Make = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


class Holding(nn.Module):
    """A function of the inputs and of modules and constants it is given."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def read_twice() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        return y, y.flatten(2).transpose(1, 2)

    return Holding(forward, conv=nn.Conv2d(3, 8, 3, padding=1, bias=False)), (torch.randn(2, 3, 8, 8),)


def picked_from() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Holding(lambda m, x: m.layer(x)[:, 0], layer=nn.Linear(16, 24, bias=False)), (torch.randn(2, 5, 16),)


def concatenated() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Holding(lambda m, a, b: m.layer(torch.cat([a, b], 1)), layer=nn.Linear(16, 24)), (torch.randn(2, 1, 16), torch.randn(2, 16, 16))


def concatenated_times_ones() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = Holding(lambda m, a, b: m.layer(torch.cat([a, b], 1) * m.mask), layer=nn.Linear(16, 24), mask=torch.ones(1, 17, 1))
    return model, (torch.randn(2, 1, 16), torch.randn(2, 16, 16))


def averaged() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = Holding(lambda m, x: m.layer(x.mean(1) * m.gain), layer=nn.Linear(16, 24), gain=torch.linspace(0.1, 3, 16))
    return model, (torch.randn(2, 7, 16),)


def scaled() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = Holding(lambda m, x: m.layer(x * m.gain), layer=nn.Conv2d(16, 24, 3), gain=torch.linspace(-2, 2, 16)[:, None, None])
    return model, (torch.randn(2, 16, 7, 7),)


def scaled_and_moved() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = Holding(lambda m, x: m.layer(x * m.gain + 0.5), layer=nn.Conv2d(16, 24, 3), gain=torch.linspace(-2, 2, 16)[:, None, None])
    return model, (torch.randn(2, 16, 7, 7),)


def picked_by_distance() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def forward(m: Any, x: Tensor, index: Tensor) -> Tensor:
        nearest = (x.transpose(1, 2) - m.table(index)).argmin(-1)
        return m.layer(m.table(nearest).transpose(1, 2))

    return Holding(forward, table=nn.Embedding(32, 16), layer=nn.Conv1d(16, 24, 1)), (torch.randn(2, 16, 7), torch.randint(32, (2, 7)))


def long_window() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Holding(lambda m, x: m.layer(x), layer=nn.Conv1d(32, 24, 16, padding=8, groups=2, dilation=2)), (torch.randn(2, 32, 40),)


def long_strided_window() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Holding(lambda m, x: m.layer(x), layer=nn.Conv1d(16, 24, 8, stride=4, padding=2)), (torch.randn(2, 16, 40),)


def long_window_of_two_axes() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = nn.Conv2d(8, 24, (3, 16), stride=(1, 2), padding=(1, 4), dilation=(2, 1))
    return Holding(lambda m, x: m.layer(x), layer=layer), (torch.randn(2, 8, 12, 40),)


def codes_of(make: Make) -> Program:
    torch.manual_seed(0)
    model, inputs = make()
    dynamic = None if make in (read_twice, scaled, scaled_and_moved) else False  # where it goes wrong
    return integer(capture(model.eval(), inputs, dynamic=dynamic), outputs=lambda n: False)


QUANTISED = (read_twice, picked_from, concatenated, concatenated_times_ones, averaged, scaled, scaled_and_moved, picked_by_distance)


def judged(program: Program, folder: Path) -> Any:
    EXACT.write(program, folder)
    return EXACT.report(program, folder, program.example)


@pytest.mark.parametrize("make", [*QUANTISED, long_window, long_strided_window, long_window_of_two_axes], ids=lambda f: f.__name__)
def test_codes_have_the_programs_numbers(make, tmp_path):
    program = codes_of(make)
    seen = judged(program, tmp_path)
    assert (seen.integer_share, seen.code_flips) == (1, 0)
    for wanted, given in zip(run(program, program.example), EXACT.open(tmp_path).run(program.example), strict=True):
        assert relative_error(wanted, given) < 1e-5


@pytest.mark.parametrize("make", QUANTISED, ids=lambda f: f.__name__)
def test_openvino_still_needs_another_form(make, tmp_path, monkeypatch):
    """Fails where a version of OpenVINO computes the form as it is: the form can go then."""
    program = codes_of(make)
    monkeypatch.setattr(Legaliser, "run", lambda self: None)
    with pytest.raises((ArtifactError, BackendRefusal)):
        judged(program, tmp_path)


class Heads(nn.Module):
    """Float attention of four heads over as many positions."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(2, 4, 4, 8).transpose(1, 2) for t in (q, k, v))
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


class Joined(nn.Module):
    """The same for any batch, with its heads put side by side: as that is looked at as a shuffle of channels, the batch has to come first."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in (q, k, v))
        return nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(q.shape[0], -1, 32)


FLOAT: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "heads": (Heads, ((2, 4, 32),) * 3),
    "heads joined": (Joined, ((2, 4, 32),) * 3),
    "large window": (lambda: Holding(lambda m, x: nnf.avg_pool2d(x, 8, ceil_mode=True)), ((2, 3, 4, 5),)),
    "large window of padding": (lambda: Holding(lambda m, x: nnf.avg_pool2d(x, (8, 2), padding=(1, 1), ceil_mode=True)), ((2, 3, 4, 5),)),
}


@pytest.mark.parametrize("name", FLOAT)
def test_float_forms_have_the_programs_numbers(name, tmp_path):
    torch.manual_seed(0)
    make, shapes = FLOAT[name]
    dynamic = {key: [0] for key in "qkv"} if name == "heads joined" else False
    program = capture(make().eval(), tuple(torch.randn(s) for s in shapes), dynamic=dynamic)
    assert judged(program, tmp_path).parity < 1e-5


def test_bias_of_a_product_that_has_one_stays(tmp_path):
    torch.manual_seed(0)
    EXACT.write(integer(capture(nn.Conv2d(3, 8, 3).eval(), (torch.randn(2, 3, 8, 8),)), outputs=lambda n: False), tmp_path)
    assert "least_bias" not in {i.name for i in read_graph(tmp_path).graph.initializer}
    EXACT.write(codes_of(read_twice), tmp_path)
    (bias,) = [i for i in read_graph(tmp_path).graph.initializer if i.name == "least_bias"]
    assert numpy_helper.to_array(bias).tolist() == [BIAS] * 8


# planted faults in what stands in for the forms


def changed(folder: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    edit(model)
    (folder / MODEL).write_bytes(model.SerializeToString())


def large_bias(model: onnx.ModelProto) -> None:
    (bias,) = [i for i in model.graph.initializer if i.name == "least_bias"]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 0.01, bias.name))


def other_part(model: onnx.ModelProto) -> None:
    (whole,) = [n for n in model.graph.node if n.op_type == "Concat" and "part_0" in n.input[0]]
    part = next(n for n in model.graph.node if n.output[0] == whole.input[1])
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(_constant(model, part.input[1])) * 1.02, "other_scale"))
    part.input[1] = "other_scale"


def other_axis(model: onnx.ModelProto) -> None:
    (reduce,) = [n for n in model.graph.node if n.op_type == "ReduceMean"]
    reduce.op_type = "ReduceMax"


def _constant(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(i for i in model.graph.initializer if i.name == name)


@pytest.mark.parametrize(
    ("make", "fault"), [(read_twice, large_bias), (concatenated, other_part), (averaged, other_axis)], ids=lambda f: f.__name__
)
def test_faults_are_refused(make, fault, tmp_path):
    program = codes_of(make)
    EXACT.write(program, tmp_path)
    changed(tmp_path, fault)
    with pytest.raises(BackendRefusal, match="gives other numbers than the program"):
        EXACT.report(program, tmp_path, program.example)


class Rotary(nn.Module):
    """Positions as complex numbers, given with the call and kept by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.polar(torch.ones(5, 4), torch.linspace(0, 3, 20).view(5, 4)))

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn.flatten(0, 1).unsqueeze(1)
        return torch.view_as_real(z * self.kept.unsqueeze(1)).flatten(-2)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_complex_numbers_go_in_as_their_parts(backend):
    model, inputs = Rotary(), (torch.randn(2, 5, 3, 8), torch.polar(torch.ones(5, 1, 4), torch.randn(5, 1, 4)))
    made = fxc.compile(model.eval(), {"name": "t", "passes": ["tidy.fold_constants"]}, inputs, backend=backend)
    assert torch.allclose(made(*inputs), model(*inputs), atol=1e-5)
