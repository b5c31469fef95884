"""What real architectures do around their products, in small modules that the shipped 8-bit recipes compile for ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc

FLOOR = 20.0  # dB


def compiled(model: nn.Module, *shape: int, recipe: str = "int8") -> fxc.CompiledModel:
    """The model, calibrated on four random items and judged on a fifth."""
    torch.manual_seed(0)
    items = [(torch.randn(*shape),) for _ in range(5)]
    return fxc.compile(model.eval(), recipe, items[0], calibration=items, backend="onnxruntime")


class Cast(nn.Module):
    """A convolution whose input is cast to the type that it has, as in state-space models."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(8, 8, 4, groups=8, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.convolution(x.to(torch.float32))[..., :-3])


class Codebook(nn.Module):
    """Vectors of a table, summed from zero on and convolved, as in audio codecs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.convolution = nn.Embedding(16, 16), nn.Conv1d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.convolution(torch.tensor(0.0) + self.table(x.argmax(-1)).permute(0, 2, 1)))


@pytest.mark.parametrize("model, shape", [(Cast, (2, 8, 20)), (Codebook, (2, 40, 16))], ids=["cast", "codebook"])
def test_every_product_is_in_integers(model, shape):
    torch.manual_seed(0)
    report = compiled(model(), *shape).report
    assert report.backend is not None and report.output_sqnr is not None
    assert (report.backend.integer_share, report.backend.in_float) == (1, ())
    assert report.output_sqnr > FLOOR
