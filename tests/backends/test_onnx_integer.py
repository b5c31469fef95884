"""Quantised activations in ONNX Runtime: which products run on codes, with which numbers, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxcompress.backends.onnx.onnxruntime import OnnxRuntimeBackend
from fxcompress.program import Program
from fxcompress.report import BackendReport
from tests.backends.integer_helpers import integer
from tests.backends.onnx_helpers import program_of

BACKEND = OnnxRuntimeBackend()


def report(program: Program, folder, inputs=None) -> BackendReport:
    BACKEND.write(program, folder)
    return BACKEND.report(program, folder, inputs or program.example)


@pytest.mark.parametrize("token", [False, True], ids=["tensor", "token"])
@pytest.mark.parametrize("shape", [(6, 64), (2, 5, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_linear_runs_on_codes(shape, bias, token, tmp_path):
    torch.manual_seed(0)
    program = integer(program_of(nn.Linear(64, 24, bias=bias), torch.randn(*shape)), "int8" if token else "uint8", token=token)
    seen = report(program, tmp_path)
    assert (seen.integer_share, seen.in_float, seen.code_flips) == (1, (), 0)
    assert seen.site_parity < 1e-6
