"""reparam.smooth: outliers move into weights where what makes the value can take it, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxcompress.calibrate import observers
from fxcompress.calibrate.statistics import Statistics
from fxcompress.capture import capture
from fxcompress.errors import CalibrationError
from fxcompress.interpret import run as interpret
from fxcompress.manager import Manager
from fxcompress.passes.reparam import smooth
from fxcompress.program import Program
from fxcompress.recipe import Step, Where
from fxcompress.report import PassReport
from fxcompress.target import Target
from tests.passes.helpers import declined, error, function, named, run, seeded, zoo
from tests.passes.spelled import CENTRED, ROOTS

WIDTH = 16


class Block(nn.Module):
    """A norm whose gain makes outliers, two layers that read it, and a layer behind a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 24),
            nn.Linear(WIDTH, 24),
            nn.Linear(24, WIDTH),
        )
        with torch.no_grad():
            self.norm.weight.copy_(torch.exp(seeded(WIDTH) * 1.5))
            self.norm.bias.copy_(seeded(WIDTH, seed=1))

    def forward(self, x: Any) -> Any:
        y = self.norm(x)
        return self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def smoothed(program: Program, *, where: Where | None = None, **options: Any) -> tuple[Program, PassReport]:
    manager = Manager(program.copy(), Target(name="test"), program.example, "each", Statistics([program.example]))
    item = named("reparam.smooth", **options)
    return manager.program, manager.run([(Step(use=item.name, where=where or Where()), item)])[-1]


@pytest.fixture(scope="module")
def block() -> Program:
    torch.manual_seed(0)
    return capture(Block().eval(), (seeded(6, 10, WIDTH, seed=2),))


def quantised_error(program: Program) -> float:
    """Relative error after static int8."""
    manager = Manager(program.copy(), Target(name="test"), program.example, "each", Statistics([program.example]))
    item = named("quant.insert")
    manager.run([(Step(use=item.name), item)])
    a, b = interpret(program, program.example)[0], interpret(manager.program, program.example)[0]
    return float((a - b).norm() / a.norm())


def test_both_inputs_are_balanced_and_the_function_stays(block: Program) -> None:
    after, report = smoothed(block)
    assert report.fired == 2  # the norm's result, read by two layers; the product, through the factor without silu
    assert error(block, after) < 1e-5
    assert quantised_error(after) < 0.75 * quantised_error(block)


@pytest.mark.parametrize("form", [pytest.param(f, id=i) for i, f in {**ROOTS, **CENTRED}.items()])
def test_the_gain_of_a_spelled_out_norm_takes_it(form: Any) -> None:
    gain = torch.exp(seeded(WIDTH) * 1.5)
    before = function(lambda x, g, w: nn.functional.linear(form(x) * g, w), seeded(6, 10, WIDTH, seed=2), g=gain, w=seeded(24, WIDTH, seed=3))
    after, report = smoothed(before)
    assert (report.fired, declined(report)) == (1, [])
    assert [name for name, tensor in before.constants.items() if not torch.equal(tensor, after.constants[name])] == ["g", "w"]
    assert error(before, after) < 1e-5


class Even(nn.Module):
    """Layers whose channels are all of one size, so that what few rows show of their extremes is chance."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)) for _ in range(6))

    def forward(self, x: Any) -> Any:
        return sum(block(x) for block in self.blocks)


def test_chance_in_few_items_is_no_outlier(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    items = [(seeded(1, 16, 64, seed=s),) for s in range(4)]
    program, fresh = capture(Even().eval(), items[0]), [(seeded(1, 16, 64, seed=100 + s),) for s in range(8)]

    def noise(*passes: str) -> float:
        """Of static int8, on inputs that weren't seen."""
        manager = Manager(program.copy(), Target(name="test"), program.example, "each", Statistics(items))
        manager.run([(Step(use=name), named(name)) for name in passes])
        return sum(float((interpret(program, x)[0] - interpret(manager.program, x)[0]).square().sum()) for x in fresh)

    def both(halves: Any) -> observers.Extremes:
        first, second = (half.result() for half in halves.halves)
        return observers.Extremes(torch.minimum(first.lo, second.lo), torch.maximum(first.hi, second.hi))

    plain = noise("quant.insert")
    assert noise("reparam.smooth", "quant.insert") < 1.03 * plain
    monkeypatch.setattr(observers._Halves, "result", lambda halves: (both(halves),) * 2)
    assert noise("reparam.smooth", "quant.insert") > 1.1 * plain, "judged by the items that the factors are from"


def test_the_factors_are_those_of_the_paper(block: Program) -> None:
    after, _ = smoothed(block, alpha=0.5, where=Where(include=["up", "gate"]))
    values = {}
    interpret(block, block.example, lambda node, value: values.update({node.name: value}))
    x = values["layer_norm"].abs().amax((0, 1)).double()
    w = torch.maximum(block.constants["up.weight"].abs().amax(0), block.constants["gate.weight"].abs().amax(0)).double()
    s = (x / w).sqrt()
    s = s / s.log().mean().exp()
    assert torch.allclose(after.constants["norm.weight"].double(), block.constants["norm.weight"].double() / s, rtol=1e-5)
    assert torch.allclose(after.constants["up.weight"].double(), block.constants["up.weight"].double() * s, rtol=1e-5)


def test_a_second_run_finds_nothing_worth_a_change(block: Program) -> None:
    once, _ = smoothed(block)
    twice, report = smoothed(once)
    gained = quantised_error(once) - quantised_error(twice)
    assert report.fired == 0 or gained < 0.1 * quantised_error(once)


def test_what_stops_a_scale_is_named() -> None:
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval(), (seeded(4, 8),))
    _, report = smoothed(program)
    assert declined(report) == [("linear", "input_1 is an input of the program"), ("linear_1", "gelu (gelu) doesn't commute with a scale")]


def test_it_needs_a_feed(block: Program) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration data"):
        run(block, "reparam.smooth")


def test_a_factor_on_one_side_only_is_caught(block: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    right = smooth.Plan.apply

    def half(plan: Any, edit: Any, vector: Any, *args: Any, **kwargs: Any) -> Any:
        site = right(plan, edit, vector, *args, **kwargs)
        name = next(n for n in site.constants if n.endswith("weight") and "norm" not in n)
        edit.program.constants[name] = edit.constants_before[name]
        return site

    monkeypatch.setattr(smooth.Plan, "apply", half)
    with pytest.raises(Exception, match="breaks its exact contract"):
        smoothed(block)


@pytest.mark.parametrize(("name", "least"), [("llama", 9), ("qwen2", 9), ("gpt2", 5), ("vit", 6), ("swin", 12)])
def test_real_blocks(name: str, least: int) -> None:
    program = zoo(name)
    after, report = smoothed(program)
    assert report.fired + sum("noise" in reason for _, reason in declined(report)) >= least
    assert error(program, after) < 1e-5


def test_grouped_heads_move_together() -> None:
    """llama shares a value head between two query heads: the input of o_proj has one factor for both, and v_proj takes it."""
    program = zoo("llama")
    after, _ = smoothed(program, alpha=0.5, where=Where(include=["*o_proj*"]))
    changed = [n for n in after.constants if not torch.equal(after.constants[n], program.constants[n])]
    assert any("v_proj" in n for n in changed)
    assert any("o_proj" in n for n in changed)
    assert not any("q_proj" in n or "k_proj" in n for n in changed)


def test_torchs_own_attention_gets_factors_for_its_values() -> None:
    """Each of its heads, though they go into a batch of any size on the way."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Linear(6, WIDTH), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    before = capture(model, (seeded(2, 5, 6, seed=3),))
    after, report = smoothed(before)
    assert (report.fired, declined(report)) == (8, [("linear", "input_1 is an input of the program")])
    names = [n for n in before.constants if n.endswith(("in_proj_weight", "out_proj.weight"))]
    assert len(names) == 4
    factors = {n: before.constants[n] / after.constants[n] for n in names if "out_proj" in n}
    assert all(torch.allclose(f, f[:1], atol=1e-5) for f in factors.values())
    assert not any(torch.allclose(f, f[:1, :4].repeat(1, 4), atol=1e-2) for f in factors.values())
    assert error(before, after) < 1e-5
    other = (seeded(3, 7, 6, seed=4),)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(interpret(before, other), interpret(after, other), strict=True))
