"""The loss at every value: what stands for what, and figures that are those of a plain comparison."""

from __future__ import annotations

import math

import torch

from fxcompress.interpret import run as interpret
from fxcompress.loss import losses, stand_ins
from fxcompress.numerics.noise import sqnr
from tests.passes.helpers import captured, run, seeded


def test_chains_of_replacements_are_followed() -> None:
    assert stand_ins(["a", "b", "c"], [{"a": "x"}, {}, {"x": "y", "y": "z", "b": "c"}]) == {"a": "z", "b": "c", "c": "c"}


def test_replacements_in_a_circle_end() -> None:
    assert stand_ins(["a"], [{"a": "b", "b": "a"}])["a"] in ("a", "b")


def test_losses_are_those_of_the_values() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    program = captured(model, seeded(2, 4))
    after, report = run(program, "quant.weight_only", weights="int4/channel", symmetric=True)
    found = losses(program, after, program.example, [{k: v for c in report.changes for k, v in c.replaced.items()}])
    kept: list[dict[str, torch.Tensor]] = [{}, {}]
    for p, values in zip((program, after), kept, strict=True):
        interpret(p, program.example, lambda n, v, values=values: values.__setitem__(n.name, v))
    assert set(found) == {"linear", "relu", "linear_1"}
    for name, figure in found.items():
        expected = sqnr(kept[0][name], kept[1][name])
        assert math.isfinite(expected) and figure == round(expected, 2)


def test_equal_values_have_none_and_recast_ones_are_left_out() -> None:
    program = captured(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU()), seeded(2, 4))
    assert losses(program, program.copy(), program.example, []) == {"linear": None, "relu": None}
    assert losses(program, program.copy(), program.example, [], {"linear"}) == {"relu": None}
