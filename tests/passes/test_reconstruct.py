"""quant.reconstruct: what it trains, what it declines, what stays, how it goes on after a crash, and the artifact it leads to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.calibrate.learned import Rounding
from fxcompress.calibrate.reconstruct import Reconstruction
from fxcompress.calibrate.statistics import Statistics
from fxcompress.dataflow import pair_of
from fxcompress.errors import CalibrationError
from fxcompress.interpret import run as interpret
from fxcompress.manager import Manager, lowest_sqnr
from fxcompress.numerics.noise import sqnr
from fxcompress.program import Program
from fxcompress.recipe import Step, Where, build, load_recipe
from fxcompress.report import PassReport
from fxcompress.target import Target
from tests.passes.helpers import Builder, captured, declined, named, seeded

W4A4 = {"weights": "int4/channel", "activations": "uint4/tensor"}
INSERT: dict[str, Any] = {"quant.insert": W4A4}


class Residual(nn.Module):
    """Three blocks of x + W2 relu(W1 x), and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


ITEMS = [[seeded(32, 1, seed=i) + 0.3 * seeded(32, 16, seed=50 + i)] for i in range(8)]


def run(program: Program, items: Sequence[Sequence[Tensor]] = ITEMS, where: Where | None = None, **options: Any) -> tuple[Program, PassReport]:
    """(the program after quant.insert at W4A4 and the pass, its report)."""
    recipe = load_recipe({"name": "x", "passes": [INSERT, {"quant.reconstruct": options}, "quant.finalize"]})
    steps = build(recipe)[:2]
    if where:
        steps[1] = (steps[1][0].model_copy(update={"where": where}), steps[1][1])
    manager = Manager(program.copy(), Target(name="test"), items[0], "each", Statistics(items))
    return manager.program, manager.run(steps)[-1]


def quality(program: Program, after: Program) -> float:
    """SQNR in dB on an item that no calibration saw."""
    x = [seeded(256, 1, seed=99) + 0.3 * seeded(256, 16, seed=98)]
    return lowest_sqnr(interpret(program, x), interpret(after, x))


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(Residual(), ITEMS[0][0], dynamic={"x": {0: "rows"}})


class TestWhatItTrains:
    def test_every_rounding_scale_and_bias_and_the_model_is_better_on_what_it_never_saw(self, program: Program) -> None:
        plain, _ = run(program, rounding=False, scales=False, biases=False)
        after, report = run(program, iterations=200)
        kinds = [c.reason.split()[0] for c in report.changes]
        assert {k: kinds.count(k) for k in set(kinds)} == {"rounding": 7, "scale": 7, "bias": 7}
        assert report.declined == ()
        assert report.contract == "lossy"
        assert quality(program, after) > quality(program, plain) + 1

    def test_only_what_is_asked_for(self, program: Program) -> None:
        _, report = run(program, iterations=30, scales=False, biases=False)
        assert {c.reason.split()[0] for c in report.changes} == {"rounding"}
        _, report = run(program, rounding=False, scales=False, biases=False)
        assert report.fired == 0

    def test_weights_are_on_their_grid_and_mostly_within_a_step(self, program: Program) -> None:
        after, _ = run(program, iterations=100)
        for weight, scale, name in _weights(after):
            assert _is_on_grid(weight, scale)
            assert float(((weight - program.constants[name]).abs() / scale).quantile(0.9)) <= 1.001

    def test_two_runs_give_the_same_bits(self, program: Program) -> None:
        first, second = (run(program, iterations=40)[0] for _ in range(2))
        assert first.constants.keys() == second.constants.keys()
        assert all(torch.equal(v, second.constants[k]) for k, v in first.constants.items())

    @pytest.mark.parametrize("granularity", ["layer", "block", "stage", "whole"])
    def test_granularities(self, program: Program, granularity: str) -> None:
        plain, _ = run(program, rounding=False, scales=False, biases=False)
        after, report = run(program, iterations=200, granularity=granularity)
        assert report.fired == 21
        assert quality(program, after) > quality(program, plain) + 1


class Modulated(nn.Module):
    """Scale and shift come from the input's own mean, as in a diffusion transformer: the block before them ends in a chunk."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        y, gain = self.second(torch.relu(self.first(x))).chunk(2, dim=-1)
        return self.head(torch.tanh(y) * gain)


def test_a_block_that_ends_in_several_values_is_trained() -> None:
    _, report = run(captured(Modulated(), ITEMS[0][0], dynamic={"x": {0: "rows"}}), iterations=100, granularity="layer")
    assert report.declined == ()
    assert {c.module for c in report.changes} >= {"first", "second", "head"}


class TestDeclined:
    def test_places_the_recipe_leaves_out(self, program: Program) -> None:
        after, report = run(program, iterations=30, where=Where(exclude=("blocks.1.*",)))
        assert not any("blocks_1" in name or "blocks.1" in name for c in report.changes for name in c.constants)
        assert report.fired == 15
        assert torch.equal(after.constants["blocks.1.0.weight"], program.constants["blocks.1.0.weight"])

    def test_a_weight_that_two_blocks_read(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.shared, self.own = nn.Linear(16, 16), nn.Linear(16, 16)

            def forward(self, x: Tensor) -> Any:
                for layer in (self.shared, self.own, self.own, self.shared):
                    x = x + layer(x).relu()
                return x

        _, report = run(captured(Tied(), ITEMS[0][0]), iterations=20, granularity="layer")
        reasons = dict(declined(report))
        assert any("is read by" in r and "in another block" in r for r in reasons.values())
        assert not any("shared" in name for c in report.changes for name in c.constants)

    def test_a_weight_that_is_also_read_in_float(self) -> None:
        built, weight = Builder(x=ITEMS[0][0]), seeded(8, 16, seed=3)
        leaf, scale = built.constant("w", weight), built.constant("w.scale", weight.abs().amax(1, keepdim=True) / 7)
        grid = (scale, None, "int4", [1, -1])
        codes = built.op(torch.ops.fxc.quantize.default, leaf, *grid)
        layer = built.op(torch.ops.aten.linear.default, built.x, built.op(torch.ops.fxc.dequantize.default, codes, *grid))
        program = built.program(built.op(torch.ops.aten.add.Tensor, layer, built.op(torch.ops.aten.sum.dim_IntList, leaf, [1])))
        manager = Manager(program, Target(name="test"), ITEMS[0], "each", Statistics(ITEMS))
        manager.gave.add("quantised")
        (report,) = manager.run([(Step(use="quant.reconstruct"), named("quant.reconstruct", iterations=5))])
        assert report.fired == 0
        assert "read by sum_dim_int_list too, in float" in declined(report)[0][1]
        assert torch.equal(manager.program.constants["w"], weight)

    def test_a_block_that_would_lose_stays_as_it_was(self, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
        def worse(self: Reconstruction, piece: Any, learned: Any, *rest: Any) -> int:
            for x in learned:
                x.parameter = -x.parameter.detach() + 1.0
            return 1

        monkeypatch.setattr(Reconstruction, "train", worse)
        after, report = run(program)
        assert report.fired == 0
        assert all("squared error of its block would go from" in reason for _, reason in declined(report))
        assert torch.equal(after.constants["head.weight"], program.constants["head.weight"])

    def test_no_feed(self, program: Program) -> None:
        recipe = load_recipe({"name": "x", "passes": [{"quant.weight_only": {"weights": "int4"}}, "quant.reconstruct", "quant.finalize"]})
        manager = Manager(program.copy(), Target(name="test"), ITEMS[0], "each")
        with pytest.raises(CalibrationError, match="no calibration data"):
            manager.run(build(recipe))


class TestFaults:
    def test_soft_rounding_left_behind(self, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Rounding, "settled", lambda self: self.value().detach())
        monkeypatch.setattr(Rounding, "pull", lambda self, power: None)
        after, report = run(program, iterations=30)
        assert report.fired
        assert not all(_is_on_grid(weight, scale) for weight, scale, _ in _weights(after))

    def test_nothing_drops_once_it_is_trained(self, program: Program) -> None:
        after, _ = run(program, iterations=30, drop=0.9)
        x = ITEMS[0]
        assert all(torch.equal(a, b) for a, b in zip(interpret(after, x), interpret(after, x), strict=True))


def _weights(program: Program) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Every weight at 4 bits with its scale and name."""
    for node in program.graph.nodes:
        pair = pair_of(node)
        if pair and pair.format == "int4":
            name = str(pair.value.target)
            yield program.constants[name], program.constants[str(pair.scale.target)], name


def _is_on_grid(weight: Tensor, scale: Tensor) -> bool:
    return torch.equal((weight / scale).round() * scale, weight)


class TestResume:
    RECIPE: ClassVar[dict[str, Any]] = {"name": "x", "passes": [INSERT, {"quant.reconstruct": {"iterations": 30}}, "quant.finalize"]}

    def compiled(self, folder: Path | None, recipe: dict[str, Any] | None = None) -> fxc.CompiledModel:
        """The model at W4A4 on the reference backend."""
        feed = [tuple(item) for item in ITEMS]
        return fxc.compile(Residual().eval(), recipe or self.RECIPE, feed[0], feed, backend="reference", checkpoint=folder)

    def interrupted(self, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        """A run that ends in the block after so many."""
        right, count = Reconstruction.train, 0

        def failing(self: Reconstruction, *args: Any) -> int:
            nonlocal count
            count += 1
            if count > after:
                raise KeyboardInterrupt
            return right(self, *args)

        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(Reconstruction, "train", failing)
            self.compiled(folder)

    def test_finished_blocks_are_not_trained_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = self.compiled(None)
        self.interrupted(tmp_path, monkeypatch, 1)
        assert (tmp_path / "progress.json").exists()
        trained: list[str] = []
        right = Reconstruction.train
        monkeypatch.setattr(Reconstruction, "train", lambda self, piece, *rest: (trained.append(piece.name), right(self, piece, *rest))[1])
        model = self.compiled(tmp_path)
        blocks = {c.reason for c in model.report.passes[1].changes}
        assert 0 < len(trained) < len(blocks)
        assert not (tmp_path / "progress.json").exists()
        x = ITEMS[3][0]
        assert torch.equal(model(x), whole(x))

    def test_other_options_start_anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.interrupted(tmp_path, monkeypatch, 1)
        other = {"name": "x", "passes": [INSERT, {"quant.reconstruct": {"iterations": 31}}, "quant.finalize"]}
        x = ITEMS[3][0]
        assert torch.equal(self.compiled(tmp_path, other)(x), self.compiled(None, other)(x))

    def test_an_altered_list_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.interrupted(tmp_path, monkeypatch, 1)
        path = tmp_path / "progress.json"
        path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
        with pytest.raises(fxc.errors.ArtifactError, match="altered"):
            self.compiled(tmp_path)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_artifact_computes_with_what_was_trained(backend: str) -> None:
    feed = [tuple(item) for item in ITEMS]
    x = feed[3][0]
    recipe = {"name": "x", "passes": [{"quant.insert": {}}, {"quant.reconstruct": {"iterations": 60}}, "quant.finalize"]}
    model = Residual().eval()
    made = fxc.compile(model, recipe, feed[0], feed, backend=backend)
    assert sqnr(model(x).detach(), made(x)) > 30
    assert made.report.backend is not None
    assert made.report.backend.integer_share == 1.0
