"""Reconstruction: the two forms side by side against whole runs, training against exhaustive search, nothing left of it afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody writes it
from torch import Tensor, fx

from fxcompress.calibrate import reconstruct
from fxcompress.calibrate.learned import Learned, Rounding, Scale
from fxcompress.calibrate.reconstruct import Reconstruction, Schedule
from fxcompress.dataflow import pair_of
from fxcompress.interpret import run as interpret
from fxcompress.measure import relative_error
from fxcompress.numerics.formats import format_of
from fxcompress.passes.quant.sites import matmul_sites
from fxcompress.pieces import Piece, pieces
from fxcompress.program import Program
from tests.passes.helpers import function, seeded, zoo
from tests.passes.test_insert import run as quantised


def prepared(program: Program, **options: Any) -> tuple[Program, list[Piece], list[list[Tensor]]]:
    """(the quantised program, its pieces, four items)."""
    items = [[v + 0.1 * i if v.is_floating_point() else v for v in program.example] for i in range(4)]
    after, _ = quantised(program, *items, check="off", **options)
    return after, pieces(after, [s.node for s in matmul_sites(after) if s.family != "product"]), items


def roundings(program: Program, piece: Piece) -> list[Learned]:
    """Every rounding of a piece."""
    found: list[Learned] = []
    for node in piece.nodes:
        pair = pair_of(node)
        if pair is not None and (weight := program.constant(pair.value)) is not None and format_of(pair.format).bits <= 8:
            scale, zero = (None if n is None else program.constant(n) for n in (pair.scale, pair.zero_point))
            assert scale is not None
            found.append(Rounding(node, weight, scale, zero, format_of(pair.format), tuple(pair.block), 0.05))
    return found


def settle(program: Program, learned: Sequence[Learned]) -> None:
    """Store what was learned, as a pass does through an edit."""
    program.constants.update({str(x.constant.target): x.settled() for x in learned})


class TestForms:
    @pytest.mark.parametrize("held", [0, 1 << 30])
    @pytest.mark.parametrize("name", ["vit", "sam", "unet2d_cond"])
    def test_pieces_in_a_row_give_what_whole_runs_give(self, name: str, held: int) -> None:
        after, parts, items = prepared(zoo(name))
        walk = Reconstruction(after, items, held)
        floats, rounded = dict[str, list[Tensor]](), dict[str, list[Tensor]]()
        for piece in parts:
            walk.enter(piece)
            walk.leave(piece)
            for n in (n for n in piece.outputs if n in after.results()):
                floats[n.name] = [walk.floats[i][n] for i in range(4)]
                rounded[n.name] = [walk.rounded[i][n] for i in range(4)]
        for found, program in ((floats, zoo(name)), (rounded, after)):
            for i, item in enumerate(items):
                for node, wanted in zip(after.results(), interpret(program, item), strict=True):
                    assert relative_error(wanted, found[node.name][i]) < 1e-4

    def test_only_values_that_are_read_later_are_kept(self) -> None:
        after, parts, items = prepared(zoo("vit"))
        walk = Reconstruction(after, items)
        for piece in parts:
            walk.enter(piece)
            walk.leave(piece)
            assert len(walk.floats[0]) <= len(piece.inputs) + len(piece.outputs) + len(after.placeholders())
        assert set(walk.rounded[0]) == set(parts[-1].outputs)

    def test_each_piece_is_computed_as_often_whatever_comes_after(self, monkeypatch: pytest.MonkeyPatch) -> None:
        after, parts, items = prepared(zoo("vit"))
        seen: dict[fx.Node, int] = {}
        right = reconstruct.evaluate

        def counted(node: fx.Node, *rest: Any) -> Any:
            seen[node] = seen.get(node, 0) + 1
            return right(node, *rest)

        monkeypatch.setattr(reconstruct, "evaluate", counted)
        walk = Reconstruction(after, items)
        for piece in parts:
            walk.enter(piece)
            walk.leave(piece)
        assert max(seen.values()) == 2 * len(items)

    def test_differences_are_those_of_the_quantisers(self) -> None:
        after, parts, items = prepared(zoo("vit"))
        walk = Reconstruction(after, items)
        walk.enter(parts[0])
        error = walk.error(parts[0])
        assert 0 < error < 1e-2
        assert walk.error(parts[0]) == error

    def test_other_constants_are_kept_where_they_lower_the_error(self) -> None:
        after, parts, items = prepared(zoo("vit"))
        walk = Reconstruction(after, items)
        walk.enter(parts[0])
        node = next(n for n in parts[0].nodes if (p := pair_of(n)) and after.constant(p.value) is not None)
        name = str(node.args[0].args[0].target)  # type: ignore[union-attr]
        error, given = walk.error(parts[0]), walk.rounded
        worse = walk.improve(parts[0], {name: after.constants[name] * 0.5}, error)
        assert worse > 10 * error
        assert walk.rounded is given
        assert walk.improve(parts[0], {}, worse) == error
        out = parts[0].outputs[-1]
        found = walk.rounded[0][out]
        walk.rounded = given
        walk.leave(parts[0])
        assert torch.equal(walk.rounded[0][out], found)


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.5, 1.0])
def test_chances_are_what_they_say_to_a_byte(share: float) -> None:
    found = reconstruct._chance(torch.empty(3, 70001), share, torch.Generator().manual_seed(0))
    assert found.shape == (3, 70001)
    assert float(found.double().mean()) == pytest.approx(max(share, 1 / 256), abs=0.004)


class TestTraining:
    def test_finds_the_best_of_all_roundings(self) -> None:
        correlated = seeded(64, 1) + 0.1 * seeded(64, 6, seed=1)
        program = function(lambda x, weight, bias: F.linear(x, weight) + bias, correlated, weight=seeded(1, 6, seed=2), bias=torch.zeros(1))
        after, parts, _ = prepared(program, weights="int4/channel", activations="int16/tensor")
        walk = Reconstruction(after, [[correlated]])
        walk.enter(parts[0])
        (learned,) = roundings(after, parts[0])
        assert isinstance(learned, Rounding)
        nearest = walk.error(parts[0])
        walk.train(parts[0], [learned], Schedule(600, drop=0, mix=0), nearest)
        found = walk.improve(parts[0], {"weight": learned.settled()}, 0.0)
        best = float("inf")
        for up in itertools.product([-1.0, 1.0], repeat=6):
            with torch.no_grad():
                learned.parameter.copy_(torch.tensor([up]))
            best = min(best, walk.improve(parts[0], {"weight": learned.settled()}, 0.0))
        assert best < 0.5 * nearest
        assert found <= 1.05 * best

    def test_lowers_the_error_of_every_block_and_nothing_stays_soft(self) -> None:
        after, parts, items = prepared(zoo("vit"), weights="int4/channel", activations="uint4/tensor")
        walk = Reconstruction(after, items)
        for piece in parts[:3]:
            learned = roundings(after, piece)
            walk.enter(piece)
            before = walk.error(piece)
            walk.train(piece, learned, Schedule(150), before)
            settle(after, learned)
            assert walk.error(piece) < before
            assert walk.error(piece) == walk.error(piece)
            walk.leave(piece)

    def test_the_same_seed_gives_the_same_codes_and_another_gives_others(self) -> None:
        found = []
        for seed in (3, 3, 4):
            after, parts, items = prepared(zoo("vit"), weights="int4/channel", activations="uint4/tensor")
            walk = Reconstruction(after, items)
            walk.enter(parts[0])
            learned = roundings(after, parts[0])
            walk.train(parts[0], learned, Schedule(40, seed=seed), walk.error(parts[0]))
            found.append(torch.cat([x.settled().flatten() for x in learned]))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_training_changes_neither_the_program_nor_the_random_state(self) -> None:
        after, parts, items = prepared(zoo("vit"), weights="int4/channel")
        walk, before, state = Reconstruction(after, items), dict(after.constants), torch.get_rng_state()
        walk.enter(parts[0])
        walk.train(parts[0], roundings(after, parts[0]), Schedule(10), walk.error(parts[0]))
        assert all(after.constants[k] is v for k, v in before.items())
        assert torch.equal(torch.get_rng_state(), state)

    def test_stops_early_once_nothing_is_soft_and_nothing_gained(self) -> None:
        after, parts, items = prepared(zoo("vit"), weights="int4/channel", activations="uint4/tensor")
        walk = Reconstruction(after, items)
        walk.enter(parts[0])
        scale = next(p.scale for n in parts[0].nodes if (p := pair_of(n)) and after.constant(p.value) is None)
        value = after.constant(scale)
        assert value is not None
        done: list[int] = []
        count = walk.train(parts[0], [Scale(scale, value, 1e-3)], Schedule(4000, drop=0, mix=0), walk.error(parts[0]), done.append)
        assert count < 4000
        assert done[-1] == count
