"""pieces: where graphs are cut, on models whose blocks are known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from fxcompress.dataflow import pair_of
from fxcompress.passes.quant.sites import matmul_sites
from fxcompress.pieces import Piece, pieces
from fxcompress.program import Program
from tests.passes.helpers import captured, chain, seeded, zoo


def cut(program: Program, granularity: str = "block", most: int = 12) -> list[Piece]:
    """The pieces around all layers of a program."""
    return pieces(program, [s.node for s in matmul_sites(program) if s.family != "product"], granularity, most)  # type: ignore[arg-type]


class TestAll:
    @pytest.mark.parametrize("granularity", ["layer", "block", "stage", "whole"])
    @pytest.mark.parametrize("name", ["vit", "sam", "unet2d_cond", "t5", "resnet"])
    def test_every_op_lies_in_one_piece_that_reads_only_what_came_before(self, name: str, granularity: str) -> None:
        program = zoo(name)
        found = cut(program, granularity)
        assert [n for p in found for n in p.nodes] == [n for n in program.graph.nodes if n.op == "call_function"]
        made = set(program.placeholders())
        for piece in found:
            assert made.issuperset(piece.inputs)
            made |= set(piece.outputs)
        assert made.issuperset(r for r in program.results() if r.op != "get_attr")

    def test_finer_cuts_give_more_pieces(self) -> None:
        counts = [len(cut(zoo("unet2d_cond"), g)) for g in ("whole", "stage", "block", "layer")]
        assert counts[0] == 1
        assert counts == sorted(counts)
        assert all(a < b for a, b in pairwise(counts))


class TestBlocks:
    def test_a_residual_layer_is_a_block(self) -> None:
        program = chain(5)
        found = pieces(program, [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default])
        ends = [p.nodes[-1].name for p in found]
        assert set(ends) <= {n.name for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor}
        assert [len(p.layers) for p in found] == [3, 2]

    def test_layers_in_a_row_stay_together_up_to_three(self) -> None:
        model = nn.Sequential(*[m for _ in range(7) for m in (nn.Linear(8, 8), nn.ReLU())])
        found = cut(captured(model, seeded(4, 8)))
        assert [len(p.layers) for p in found] == [3, 3, 1]
        assert all(p.nodes[-1].target is torch.ops.aten.relu.default for p in found)

    def test_skip_connections_are_cut_from_outside_in(self) -> None:
        class Skips(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                kept = []
                for layer in self.layers[:4]:
                    x = x + layer(x).relu()
                    kept.append(x)
                for layer in self.layers[4:]:
                    x = x + layer(x + kept.pop()).relu()
                return x

        program = captured(Skips(), seeded(4, 8))
        assert [len(p.layers) for p in cut(program, most=8)] == [1, 7]
        assert all(len(p.layers) <= 3 for p in cut(program, most=2))
        for piece in cut(program, "layer"):
            assert len(piece.layers) == 1
            assert piece.nodes[-1].target is torch.ops.aten.add.Tensor

    def test_attention_and_mlp_of_a_transformer_are_two_blocks(self) -> None:
        names = [p.name for p in cut(zoo("vit")) if len(p.layers) > 1]
        assert names[:2] == ["vit.layers.0.attention", "vit.layers.0.mlp"]


class TestQuantised:
    def test_no_cut_runs_between_a_quantiser_and_its_reader(self) -> None:
        from tests.passes.test_insert import run

        program, _ = run(zoo("vit"))
        for granularity in ("layer", "block"):
            for piece in cut(program, granularity):
                assert not any(pair_of(n) for n in piece.outputs)
