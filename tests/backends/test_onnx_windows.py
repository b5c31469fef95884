"""Zeros around the windows of a convolution, and max pools between convolutions, in 8 bits: neither costs a step in float."""

from __future__ import annotations

from collections import Counter
from functools import partial

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import fxcompress as fxc
from fxcompress.backends.onnx.files import read_graph
from fxcompress.backends.onnx.session import OnnxSession
from tests.backends.onnx_helpers import LIMIT, error, ops, program_of


class Net(nn.Module):
    """Three convolutions and a linear layer; `between` stands before the second convolution, `pool` before the third."""

    def __init__(self, between: nn.Module | None = None, pool: nn.Module | None = None, channels: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.between, self.pool, self.head = between or nn.Identity(), pool or nn.Identity(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.between(self.a(x).relu())).relu()
        return self.head(self.c(self.pool(x)).mean((2, 3)))


class Padding(nn.Module):
    """torch.nn.functional.pad."""

    def __init__(self, *sizes: int, mode: str = "constant", value: float | None = None) -> None:
        super().__init__()
        self.pad = partial(pad, pad=sizes, mode=mode, value=value)

    def forward(self, x: Tensor) -> Tensor:
        return self.pad(x)


def _compiled(model: nn.Module) -> fxc.CompiledModel:
    torch.manual_seed(1)
    items = [(torch.randn(2, 3, 16, 16),) for _ in range(4)]
    return fxc.compile(model.eval(), "int8", items[0], calibration=items)


def _run_by_the_runtime(compiled: fxc.CompiledModel, path) -> Counter[str]:
    OnnxSession(read_graph(compiled.folder), compiled.folder, optimized=path)
    return Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)


ZEROS = {"one side": Padding(0, 1, 0, 1), "both": Padding(2, 2, 1, 1), "nothing": Padding(0, 0, 0, 0), "module": nn.ZeroPad2d((1, 0, 2, 1))}


@pytest.mark.parametrize("padding", ZEROS.values(), ids=ZEROS)
def test_zeros_around_windows_are_the_convolutions_own(padding, tmp_path):
    model = Net(padding)
    inputs = (torch.randn(2, 3, 16, 16),)
    program = program_of(model, *inputs)
    assert "Pad" not in ops(program)
    assert error(program, inputs) < LIMIT
    made = _compiled(model)
    found = _run_by_the_runtime(made, tmp_path / "o.onnx")
    assert found["QLinearConv"] == 3
    assert "Pad" not in found
    assert made.report.output_sqnr > 25


OTHERS = {
    "ones": (Padding(1, 1, 1, 1, value=1.0), 8),
    "reflected": (Padding(1, 1, 1, 1, mode="reflect"), 8),
    "cut": (Padding(-1, 1, 0, 0), 8),
    "channels": (Padding(0, 0, 0, 0, 0, 2), 10),
}


@pytest.mark.parametrize(("padding", "channels"), OTHERS.values(), ids=OTHERS)
def test_other_paddings_stay(padding, channels):
    model = Net(padding, channels=channels)
    inputs = (torch.randn(2, 3, 16, 16),)
    program = program_of(model, *inputs)
    assert "Pad" in ops(program)
    assert error(program, inputs) < LIMIT
    made = _compiled(model)
    assert made.report.output_sqnr > 25
    assert made.report.backend.integer_share > 0.99


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2)], ids=str)
def test_a_max_pool_between_convolutions_pools_codes(pool, tmp_path):
    made = _compiled(Net(pool=pool))
    found = _run_by_the_runtime(made, tmp_path / "o.onnx")
    assert found["QuantizeLinear"] == 1 + 1  # the input, and the mean before the last layer
    assert found["QLinearConv"] == 3
    assert made.report.output_sqnr > 20


def test_an_average_pool_has_a_grid_of_its_own(tmp_path):
    made = _compiled(Net(pool=nn.AvgPool2d(2)))
    assert made.report.output_sqnr > 25
    assert _run_by_the_runtime(made, tmp_path / "o.onnx")["QLinearConv"] == 3
