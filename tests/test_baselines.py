"""The table of naive rounding: which multiplications run at which width, and what a row of it holds."""

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.capture import capture
from tools.testbeds.baselines import WIDTHS, Subject, rows_of
from tools.testbeds.widths import macs_by_width


class Mixed(nn.Module):
    """Of a row of 8 numbers: 8 x 16 in a linear layer, 16 x 4 in another, and a product of activations, 3 x 16 x 3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, 8] to [b, 3, 7]."""
        y = self.up(x).relu()
        return torch.cat([self.down(y), y @ y.transpose(1, 2)], 2)


ITEMS = [{"x": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(s))} for s in range(4)]
UP, DOWN, PRODUCT = 3 * 8 * 16, 3 * 16 * 4, 3 * 16 * 3
TOTAL = UP + DOWN + PRODUCT


def quantised(**where: list[str]) -> fxc.Program:
    insert = {"weights": "int4/channel", "activations": "uint8/tensor", **({"where": where} if where else {})}
    recipe = {"name": "test", "passes": [{"quant.insert": insert}, "quant.finalize"]}
    program = fxc.compile(Mixed().eval(), recipe, ITEMS[0], calibration=ITEMS, backend="reference").program
    assert program is not None
    return program


def test_shares_of_the_widths_by_hand():
    assert macs_by_width(capture(Mixed().eval(), ITEMS[0])) == {"float": 1.0}
    assert macs_by_width(quantised()) == {"W4A8": pytest.approx((UP + DOWN) / TOTAL), "A8A8": pytest.approx(PRODUCT / TOTAL)}
    found = macs_by_width(quantised(exclude=["up"]))
    assert found == {"float": pytest.approx(UP / TOTAL), "W4A8": pytest.approx(DOWN / TOTAL), "A8A8": pytest.approx(PRODUCT / TOTAL)}


def test_codes_of_logs_are_told_from_integers():
    """Four queries times two keys of width 3, and their probabilities, logs of 4 bits, times values."""
    q, k, v = (torch.randn(1, n, 3, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2))
    recipe = {
        "passes": [{"softmax.adaptive": {"bits": 4, "candidates": [2]}}, {"quant.insert": {"activations": "uint8/tensor"}}, "quant.finalize"]
    }
    program = fxc.compile(Attention().eval(), recipe, (q, k, v), calibration=[(q, k, v), (-q, k, v)], backend="reference").program
    assert macs_by_width(program) == {"A8A8": 0.5, "L4A8": 0.5}


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_fewer_bits_cost_more_and_the_artifact_is_as_good_as_its_simulation():
    model = Mixed().eval()
    x = 0.9 * torch.cat([item["x"] for item in ITEMS])  # within the ranges: what clips would drown what rounds

    @torch.no_grad()
    def judge(models):
        return {"error": str(float((models[""](x=x) - model(x)).norm() / model(x).norm()))}

    rows = list(rows_of(Subject(model, judge, {"": ITEMS}), list(WIDTHS)))
    assert [(r["width"], r["runs"]) for r in rows] == [
        ("float", "float"), ("W8A8", "fake"), ("W8A8", "integer"), ("W6A6", "fake"), ("W4A8", "fake"), ("W4A4", "fake"),
    ]  # fmt: skip
    error = {(r["width"], r["runs"]): float(r["figures"]["error"]) for r in rows}
    assert error["float", "float"] == 0
    assert 0 < error["W8A8", "fake"] < error["W6A6", "fake"] < error["W4A4", "fake"]
    assert error["W8A8", "integer"] == pytest.approx(error["W8A8", "fake"], rel=0.05)
    assert [r["macs"] for r in rows[1:3]] == [
        {"W8A8": pytest.approx((UP + DOWN) / TOTAL), "A8A8": pytest.approx(PRODUCT / TOTAL)},
        {"integer": 1.0},
    ]
