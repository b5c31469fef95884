"""Quality guard: few sites go back to float, the costliest first, and the report says which and what it bought."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress import guard
from fxcompress.recipe import load_recipe
from tests.passes.helpers import seeded

X = seeded(64, 16)
RECIPE: dict[str, Any] = {
    "passes": ["tidy.fold_constants", {"quant.insert": {"weights": "int4/tensor", "activations": "uint4/tensor"}}, "quant.finalize"]
}


class Net(nn.Module):
    """Layers of which one, with an outlier in its weight, suffers most from four bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        with torch.no_grad():
            self.layers[2].weight[0, 0] = 20.0

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture(scope="module")
def model() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def metric(model: Net) -> Any:
    wanted = model(X).detach()
    return lambda compiled: -float((compiled(X) - wanted).norm() / wanted.norm())


def compiled(model: Net, **options: Any) -> fxc.CompiledModel:
    return fxc.compile(model, RECIPE, (X,), calibration=[(X,), (seeded(8, 16, seed=3),)], backend="reference", check="off", **options)


def test_the_costliest_site_goes_first_and_no_more_than_needed(model: Net) -> None:
    score = metric(model)
    plain = score(compiled(model))
    kept = compiled(model, evaluate=score, max_drop=-plain / 2)
    report = kept.report.guard
    assert report is not None
    assert report.given_back[0] == "linear_2"
    assert report.quantised_metric == pytest.approx(plain)
    assert report.float_metric - report.metric <= report.max_drop
    assert score(kept) == pytest.approx(report.metric)
    fewer = guard.without(load_recipe(RECIPE), report.given_back[:-1])
    worse = score(fxc.compile(model, fewer, (X,), calibration=[(X,), (seeded(8, 16, seed=3),)], backend="reference", check="off"))
    assert report.float_metric - worse > report.max_drop
    assert report.recipe_line.startswith('where: {exclude: ["linear_2"')


def test_nothing_is_given_back_where_the_drop_is_met(model: Net) -> None:
    report = compiled(model, evaluate=metric(model), max_drop=10.0).report.guard
    assert report is not None
    assert report.given_back == ()
    assert report.recipe_line == ""


def test_an_impossible_drop_is_refused(model: Net) -> None:
    score = metric(model)
    with pytest.raises(fxc.ContractViolation, match="can't be reached"):
        compiled(model, evaluate=lambda m: 0.0 if "quant.insert" not in {p.name for p in m.report.passes} else -1 + score(m), max_drop=0.1)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (None, "the metric is no number\n  why   evaluate returned None"),
        ("0.5", "the metric is no number\n  why   evaluate returned '0.5'"),
        (torch.ones(3), "the metric is no number\n  why   evaluate returned a float32 tensor of shape [3]"),
        (float("nan"), "the metric says nothing\n  why   evaluate returned nan for the float model"),
    ],
)
def test_a_metric_is_one_number(returned: Any, text: str, model: Net) -> None:
    with pytest.raises(fxc.InputError) as refused:
        compiled(model, evaluate=lambda m: returned, max_drop=0.1)
    assert str(refused.value).startswith(text)


@pytest.mark.parametrize("drop", [float("nan"), None, "1 %"])
def test_a_drop_is_a_number(drop: Any, model: Net) -> None:
    with pytest.raises(fxc.InputError, match="is no drop"):
        compiled(model, evaluate=metric(model), max_drop=drop)


def test_the_report_is_in_the_artifact(model: Net, tmp_path: Any) -> None:
    kept = compiled(model, evaluate=metric(model), max_drop=10.0)
    assert fxc.load(kept.save(tmp_path / "out")).report.guard == kept.report.guard


def test_costs_leave_the_program_as_it_was(model: Net) -> None:
    program = fxc.capture(model, (X,))
    before = [(n.args, n.kwargs) for n in program.graph.nodes]
    assert guard.costs(program, (X,), [model(X).detach()]) == {}
    assert [(n.args, n.kwargs) for n in program.graph.nodes] == before


class Attentions(nn.Module):
    """Two attentions as one op each, of which the first has the sharper probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Any) -> Any:
        for i, sharpness in ((0, 4.0), (3, 1.0)):
            q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in self.layers[i : i + 3])
            x = x + nn.functional.scaled_dot_product_attention(sharpness * q, k, v).transpose(1, 2).flatten(2)
        return x


def test_an_attention_that_was_opened_to_be_quantised_goes_back_whole() -> None:
    """Its products have no name in the captured program, so a recipe leaves out the op."""
    torch.manual_seed(0)
    net, x = Attentions().eval(), 2 * seeded(4, 9, 8)
    wanted = net(x).detach()
    recipe = {"passes": [{"softmax.adaptive": {"bits": 2, "candidates": ["uniform"]}}, "quant.insert", "quant.finalize"]}
    options: dict[str, Any] = {"calibration": [(x,), (seeded(2, 9, 8, seed=3),)], "backend": "reference", "check": "off"}
    score = lambda compiled: -float((compiled(x) - wanted).norm() / wanted.norm())  # noqa: E731
    plain = score(fxc.compile(net, recipe, (x,), **options))
    kept = fxc.compile(net, recipe, (x,), evaluate=score, max_drop=-plain / 2, **options)
    report = kept.report.guard
    assert report is not None
    assert report.given_back[0].startswith("scaled_dot_product_attention")
    first = next(p for p in kept.report.passes if p.name == "softmax.adaptive")
    assert first.fired == 2 - sum(name.startswith("scaled_dot") for name in report.given_back)
    assert report.float_metric - report.metric <= report.max_drop


def test_a_metric_that_fails_is_told(model: Net) -> None:
    """With the line of the user's code, and what it raised as the cause."""

    def failing(compiled_model: Any) -> float:
        return {"score": 1.0}["skore"]

    with pytest.raises(fxc.InputError) as caught:
        compiled(model, evaluate=failing, max_drop=0.1)
    error = caught.value
    assert (error.what, error.why) == ("the metric fails", "KeyError: 'skore'")
    assert error.where.endswith('return {"score": 1.0}["skore"]')
    assert "returns one number" in error.do
    assert isinstance(error.__cause__, KeyError)


def test_an_error_of_ours_inside_the_metric_stays(model: Net) -> None:
    with pytest.raises(fxc.InputError, match="shape"):
        compiled(model, evaluate=lambda m: m(torch.zeros(1, 3)), max_drop=0.1)
