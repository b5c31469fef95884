"""quant.bias_correction: the mean of every channel is what it was, and layers with groups are left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxcompress as fxc

NAME = "quant.bias_correction"
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 5),
    "conv": lambda: nn.Conv1d(12, 5, 3),
    "transposed": lambda: nn.ConvTranspose1d(12, 5, 3),
}
GROUPED: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv1d(12, 6, 3, groups=3),
    "depthwise": lambda: nn.Conv1d(12, 12, 3, groups=12),
    "transposed": lambda: nn.ConvTranspose1d(12, 6, 3, groups=3),
}


def items(name: str) -> list[tuple[torch.Tensor]]:
    """Inputs with means of their own, one a channel."""
    torch.manual_seed(1)
    shape = (64, 12) if name == "linear" else (64, 12, 20)
    shift = torch.randn(12) * 2
    return [(torch.randn(shape) + shift.reshape(12, *[1] * (len(shape) - 2)),) for _ in range(3)]


def compiled(layer: nn.Module, name: str, *passes: str) -> fxc.CompiledModel:
    """With 4-bit weights; passes: between rounding and storing."""
    feed = items(name)
    recipe = {"name": "r", "passes": [{"quant.insert": {"weights": "int4/channel"}}, *passes, "quant.finalize"]}
    return fxc.compile(layer, recipe, feed[0], calibration=feed, backend="reference")


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize("name", PLAIN)
def test_the_means_are_what_they_were(name: str) -> None:
    layer = seeded(PLAIN[name])
    others = [axis for axis in range(items(name)[0][0].dim()) if axis != 1]

    @torch.no_grad()
    def off(made: fxc.CompiledModel) -> float:
        return max(float((made(*x) - layer(*x)).mean(others).abs().max()) for x in items(name)[1:])

    plain, corrected = compiled(layer, name), compiled(layer, name, NAME)
    assert off(corrected) < off(plain) / 3
    assert [p.fired for p in corrected.report.passes if p.name == NAME] == [1]


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_declined(name: str) -> None:
    (report,) = (p for p in compiled(seeded(GROUPED[name]), name, NAME).report.passes if p.name == NAME)
    reasons = [d.reason.partition(" ")[2] for d in report.declined]
    assert (report.fired, reasons) == (0, ["has groups, or a weight that is read otherwise too"])
