"""Inspection: costs by module, and forecasts that a compilation then bears out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.inspection import Inspection, forecast
from fxcompress.recipe import shipped
from tests.passes.helpers import seeded, zoo


class Net(nn.Module):
    """A linear, and one whose weight is added to as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.fc(x).relu()) + (self.head.weight + x.mean()).sum()


@pytest.fixture(scope="module")
def program() -> fxc.Program:
    return fxc.capture(Net().eval(), (seeded(3, 64),))


def test_modules_cost_what_their_formulas_say(program: fxc.Program) -> None:
    facts = Inspection(program).facts()
    rows = {r["path"]: r for r in facts["regions"]}
    assert rows["fc"] == {
        "path": "fc",
        "class": "Linear",
        "nodes": 3,
        "parameters": 64 * 65,
        "flops": 2 * 3 * 64 * 64,
        "traffic": 4 * (6 * 64 + 64 * 65),
    }
    batch = 2 * 64 * 64 + 64 + 2 * 64 * 8 + 8 + 64  # linear, relu, linear, the last addition, the mean
    assert facts["cost"]["operations"] == f"8*({batch // 8}*batch + {2 * 64 * 8 // 8})", (
        "weight + mean and its sum: 512 each, whatever the batch"
    )
    assert rows[""]["flops"] == 3 * batch + 2 * 512
    assert "operations of all steps" not in facts["cost"]


def test_modules_are_listed_in_the_order_in_which_they_run() -> None:
    """Not that of their parameters, which those without any would come behind."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Sigmoid()).eval()
    rows = fxc.inspect(model, (seeded(2, 4),)).facts()["regions"]
    assert [r["path"] for r in rows] == ["", "0", "1", "2", "2.0", "2.1", "3"]


def test_a_diffusion_model_has_steps() -> None:
    model = nn.Linear(4, 4)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = model

        def forward(self, x, t):
            return self.fc(x) * t[:, None]

    inputs = fxc.Inputs(seeded(2, 4), torch.tensor([1.0, 2.0]), roles={"t": "timestep"})
    cost = fxc.inspect(Step().eval(), inputs).facts()["cost"]
    assert cost["operations"] == "36*batch"
    assert cost["operations of all steps"] == "36*batch*steps"


@pytest.mark.parametrize("recipe", ["int8-weight-only", "int8-dynamic", "w8a8-llm"])
def test_a_forecast_is_what_compiling_does(recipe: str, program: fxc.Program) -> None:
    """Sites, declined sites and bytes; ranges differ."""
    found = forecast(program, recipe)
    report = fxc.compile(program, recipe, calibration=[(seeded(3, 64),)] * 2).report
    assert found.sites == sum(p.fired for p in report.passes) > 0
    assert [(p.name, p.fired, p.declined) for p in found.passes] == [(p.name, p.fired, p.declined) for p in report.passes]
    assert found.weight_bytes == report.weight_bytes


def test_the_share_counts_work_on_quantised_values(program: fxc.Program) -> None:
    """fc alone can be quantised: 64 · 64 of 64 · 72 multiply-accumulates."""
    assert forecast(program, "int8-weight-only").share == pytest.approx(64 / 72, abs=1e-12)
    assert ("quant.weight_only", "head") in [(n, d.module) for n, d in forecast(program, "int8-weight-only").declined]


def test_the_program_is_left_alone(program: fxc.Program) -> None:
    before = [(n.name, n.args) for n in program.graph.nodes], {k: id(v) for k, v in program.constants.items()}
    forecast(program, "int8")
    assert before == ([(n.name, n.args) for n in program.graph.nodes], {k: id(v) for k, v in program.constants.items()})


def test_a_recipe_that_cannot_run_says_why(program: fxc.Program, tmp_path: Path) -> None:
    class Other(nn.Module):
        def forward(self, x):
            return x.double().log()

    infinite = fxc.capture(Other().eval(), (-torch.ones(2, 4),))
    found = Inspection(infinite, [forecast(infinite, name) for name in shipped()])
    assert all(f.refusal == "" or f.sites == 0 for f in found.forecasts)
    (tmp_path / "bad.yaml").write_text("passes: [quant.finalize]")
    refused = forecast(program, str(tmp_path / "bad.yaml"))
    assert refused.refusal.startswith("recipe ") and refused.sites == 0
    rows: Any = Inspection(program, [refused]).facts()["recipes"]
    assert rows[0]["what"].startswith("can't run: ") and rows[0]["weights"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet2d_cond", "llama"])
def test_real_models(name: str, tmp_path: Path) -> None:
    found = Inspection(zoo(name), [forecast(zoo(name), "int8-weight-only")])
    facts = found.facts()
    root = facts["regions"][0]
    assert root["flops"] > 0 and root["parameters"] > 0
    assert root["flops"] >= max(r["flops"] for r in facts["regions"][1:])
    assert all(s in facts["cost"]["operations"] for s in facts["symbols"])
    html = found.save(tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert html == found.html()
    assert "What each recipe would do" in html
