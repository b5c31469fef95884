"""Parts that the engine wasn't written for are trained as its own are: a mask of a weight, a low-rank part beside a rounded one."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from torch import Tensor, fx

from fxcompress.calibrate.learned import Learned
from fxcompress.calibrate.reconstruct import Reconstruction, Schedule
from fxcompress.passes.quant.sites import matmul_sites
from fxcompress.pieces import Piece, pieces
from fxcompress.program import Program
from tests.calibrate.test_reconstruct import prepared, roundings
from tests.passes.helpers import function, seeded

ROWS, WIDTH = 256, 16
CORRELATED = seeded(ROWS, 4) @ seeded(4, WIDTH, seed=1) + 0.1 * seeded(ROWS, WIDTH, seed=2)


def layer(weight: Tensor) -> Program:
    return function(lambda x, weight: F.linear(x, weight) + 0, CORRELATED, weight=weight)


class Mask(Learned):
    """W sigmoid(v), pulled to half of the entries and to 0 or 1; settled: the greater half of v."""

    kind, rate = "mask", 0.05

    def __init__(self, node: fx.Node, weight: Tensor) -> None:
        self.node, self.weight = node, weight
        self.parameter = (weight.abs() / weight.abs().median() - 1).requires_grad_()

    @property
    def constant(self) -> fx.Node:
        return self.node

    def value(self) -> Tensor:
        return self.weight * self.parameter.sigmoid()

    def pull(self, power: float) -> Tensor:
        v = self.parameter.detach().requires_grad_()
        kept = v.sigmoid()
        ((2 * kept - 1).abs().pow(power).mean().neg() + 10 * (kept.mean() - 0.5).square()).backward()
        assert v.grad is not None
        return v.grad

    def settled(self) -> Tensor:
        v = self.parameter.detach()
        return torch.where(v > v.median(), self.weight, 0)


class LowRank(Learned):
    """W + A B with A of a few columns, beside a rounded W; it stays at the rounded weight."""

    kind, rate, rank = "low rank", 0.01, 4

    def __init__(self, node: fx.Node, rounded: Tensor, constant: fx.Node) -> None:
        self.node, self.rounded, self._constant = node, rounded, constant
        rows, columns = rounded.shape
        self.parameter = torch.cat([0.1 * seeded(rows, self.rank), torch.zeros(columns, self.rank)]).requires_grad_()

    @property
    def constant(self) -> fx.Node:
        return self._constant

    def value(self) -> Tensor:
        a, b = self.parameter.split(list(self.rounded.shape))
        return self.rounded + a @ b.T

    def settled(self) -> Tensor:
        return self.value().detach()


def alone(program: Program) -> tuple[Reconstruction, Piece]:
    (piece,) = pieces(program, [s.node for s in matmul_sites(program)])
    walk = Reconstruction(program, [[rows] for rows in CORRELATED.split(32)])
    walk.enter(piece)
    return walk, piece


def test_a_mask_is_better_than_the_greatest_weights() -> None:
    program = layer(seeded(8, WIDTH, seed=3))
    walk, piece = alone(program)
    leaf = next(n for n in program.graph.nodes if n.op == "get_attr")
    mask = Mask(leaf, program.constants["weight"])
    greatest = walk.improve(piece, {"weight": mask.settled()}, 0.0)
    walk.train(piece, [mask], Schedule(800, drop=0, mix=0), greatest)
    settled = mask.settled()
    assert int((settled != 0).sum()) == settled.numel() // 2
    assert walk.improve(piece, {"weight": settled}, 0.0) < 0.8 * greatest


def test_a_low_rank_part_makes_up_for_rounding() -> None:
    after, (piece,), _ = prepared(layer(seeded(8, WIDTH, seed=3)), weights="int2/channel", activations="int16/tensor")
    walk = Reconstruction(after, [[rows] for rows in CORRELATED.split(32)])
    walk.enter(piece)
    (nearest,) = roundings(after, piece)
    part, before = LowRank(nearest.node, nearest.settled(), nearest.constant), walk.error(piece)
    walk.train(piece, [part], Schedule(400, drop=0, mix=0), before)
    wanted, found = F.linear(CORRELATED, seeded(8, WIDTH, seed=3)), F.linear(CORRELATED, part.settled())
    assert walk.error(piece) == before
    assert float((found - wanted).square().sum() / wanted.square().sum()) < 0.1 * before
