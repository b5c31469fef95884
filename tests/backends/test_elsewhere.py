"""Other sizes than the example's: faults that the example can't show are refused with the sizes that show them."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.backends.onnx import forms
from fxcompress.backends.onnx.drift import check_drift
from fxcompress.backends.onnx.elsewhere import check_other_sizes
from fxcompress.errors import BackendRefusal, InputError
from fxcompress.interpret import run
from tests.backends.integer_helpers import integer
from tests.backends.onnx_helpers import program_of
from tests.zoo import ZOO


@pytest.fixture
def program():
    torch.manual_seed(0)
    return program_of(nn.Sequential(nn.Linear(8, 8), nn.Softmax(dim=-1)), torch.randn(2, 8))


def test_the_same_numbers_pass(program):
    check_other_sizes(program, lambda inputs: run(program, inputs))


def test_other_numbers_are_refused(program):
    def model(inputs: list[Tensor]) -> list[Tensor]:
        return [v if len(v) == 2 else v.roll(1, 0) for v in run(program, inputs)]

    with pytest.raises(BackendRefusal, match="relative error") as refused:
        check_other_sizes(program, model)
    assert "at batch = 3" in refused.value.where


def test_another_shape_is_refused(program):
    with pytest.raises(BackendRefusal, match="at batch = 3"):
        check_other_sizes(program, lambda inputs: [v[:2] for v in run(program, inputs)])


def test_a_failure_there_is_refused(program):
    def model(inputs: list[Tensor]) -> list[Tensor]:
        raise InputError("the inputs don't fit the model", why="invalid expand shape")

    with pytest.raises(BackendRefusal, match="invalid expand shape") as refused:
        check_other_sizes(program, model)
    assert "batch = 3" in refused.value.where


def test_a_cache_is_tried_empty():
    seen, ids = [], torch.randint(3, 90, (2, 12))
    program = fxc.capture(ZOO["llama"]()[0], {"input_ids": ids, "use_cache": True})
    check_other_sizes(program, lambda inputs: seen.append(inputs) or run(program, inputs))
    assert [0 in [n for t in inputs for n in t.shape] for inputs in seen] == [False, True]


@pytest.mark.parametrize(("off_by", "is_right"), [(1e-6, True), (1e-2, False)])
def test_an_output_that_no_code_leads_to_is_held_to_rounding(off_by, is_right):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), x.mean(-1)

    torch.manual_seed(0)
    program = integer(program_of(Two(), torch.randn(2, 8)))
    wanted = run(program, program.example)
    given = [wanted[0], wanted[1] * (1 + off_by)]
    if is_right:
        check_drift(program, program.example, wanted, given)
    else:
        with pytest.raises(BackendRefusal, match="with every code off by one it is inf dB"):
            check_drift(program, program.example, wanted, given)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_form_that_is_right_for_one_batch_only(backend, monkeypatch):
    class Tiled(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.repeat_interleave(y.shape[1], dim=0)

    def first_row(x, repeats, dim=None, output_size=None):
        return forms.op.Tile(x, forms.op.Concat(forms._vector(repeats), forms.ints(1), axis=0))

    monkeypatch.setitem(forms.FORMS, torch.ops.aten.repeat_interleave.self_int, first_row)
    monkeypatch.setattr("fxcompress.backends.onnx.translate._SKELETONS", OrderedDict())
    with pytest.raises(BackendRefusal, match=r"batch = \d"):
        fxc.compile(Tiled().eval(), {"name": "n", "passes": ["tidy.fold_constants"]}, (torch.randn(1, 3), torch.randn(1, 4)), backend=backend)
