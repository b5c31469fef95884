"""Costs: formulas that give the numbers, and what is free."""

from __future__ import annotations

import pytest
import sympy
from torch import nn

from fxcompress.cost import Costs
from tests.passes.helpers import captured, function, node, seeded, zoo

BATCH = sympy.Symbol("batch")


def test_formulas_are_in_the_programs_own_names() -> None:
    program = captured(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), seeded(3, 4))
    costs = Costs(program)
    assert costs.of(node(program, "linear")).flops == 2 * BATCH * 8 * 4
    assert costs.of(node(program, "relu")).flops == 8 * BATCH
    total = costs.total(program.graph.nodes)
    assert total.flops == 72 * BATCH
    assert total.weights == 4 * (4 * 8 + 8)
    assert total.traffic == 4 * (4 * BATCH + 8 * BATCH + 40) + 4 * 16 * BATCH, "linear reads x, weight, bias and writes; relu reads and writes"
    assert costs.bound(total.flops) == 72 * 3


@pytest.mark.parametrize("name", ["unet2d_cond", "llama"])
def test_formulas_give_the_numbers(name: str) -> None:
    program = zoo(name)
    formulas, numbers = Costs(program), Costs(program, formulas=False)
    for each in program.graph.nodes:
        assert tuple(map(formulas.bound, formulas.of(each))) == tuple(map(int, numbers.of(each))), each.name
    assert numbers.total(program.graph.nodes).flops > 0


def test_moves_are_free_and_attention_is_not() -> None:
    def attention(q, k):
        return nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).reshape(2, 5, 8)

    program = function(attention, seeded(2, 2, 5, 4), seeded(2, 2, 5, 4), dynamic=False)
    found = {n.name: Costs(program).of(n).flops for n in program.graph.nodes if n.op == "call_function"}
    assert found.pop("scaled_dot_product_attention") == 2 * (2 * 2 * 5) * 5 * (4 + 4)
    assert set(found.values()) == {0}


def test_nothing_costs_nothing() -> None:
    assert Costs(function(lambda x: x + 1, seeded(2))).total([]) == (0, 0, 0)


def test_a_size_that_the_data_decides_counts_as_one() -> None:
    program = function(lambda x: x[x > 0].unsqueeze(-1) * 2, seeded(3, 4), dynamic=False)
    formulas, numbers = Costs(program), Costs(program, formulas=False)
    assert numbers.of(node(program, "mul")).flops == 1
    assert formulas.bound(formulas.of(node(program, "mul")).flops) == 1
