"""The oracle on graphs whose answers are known: it finds what is legal and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, fx

from fxcompress.program import Program
from fxcompress.transport import Kind, Seed
from tests.passes.helpers import function, seeded
from tests.transport.oracle import Oracle

D = 16
X = seeded(3, 5, D)
W, V, U = (seeded(D, D, seed=i) / 4 for i in (1, 2, 5))
G, B = 1 + seeded(D, seed=3) / 4, seeded(D, seed=4)
Body = Callable[..., Any]
BODIES: dict[str, Body] = {
    "relu": lambda x, w, u, v, g, b: nnf.linear(nnf.relu(nnf.linear(x, w)), v),
    "gelu": lambda x, w, u, v, g, b: nnf.linear(nnf.gelu(nnf.linear(x, w)), v),
    "tanh": lambda x, w, u, v, g, b: nnf.linear(nnf.tanh(nnf.linear(x, w)), v),
    "gated": lambda x, w, u, v, g, b: nnf.linear(nnf.silu(nnf.linear(x, w)) * nnf.linear(x, u), v),
    "layer norm": lambda x, w, u, v, g, b: nnf.linear(nnf.layer_norm(x, (D,), g, b), v),
    "layer norm of a layer": lambda x, w, u, v, g, b: nnf.linear(nnf.layer_norm(nnf.linear(x, w), (D,)), v),
    "rms norm of a layer": lambda x, w, u, v, g, b: nnf.rms_norm(nnf.linear(x, w), (D,)) @ v,
    "product": lambda x, w, u, v, g, b: nnf.linear(nnf.linear(x, w), v),
    "handed out": lambda x, w, u, v, g, b: (y := nnf.linear(x, w), nnf.linear(y, v)),
}
# (graph, the op whose result changes, which of them): kinds that must be found; all others must not
WANTED: dict[tuple[str, str, int], tuple[Kind, ...]] = {
    ("relu", "relu", 0): (Kind.SCALE, Kind.PERMUTE, Kind.REMOVE),
    ("gelu", "gelu", 0): (Kind.PERMUTE, Kind.REMOVE),
    ("tanh", "tanh", 0): (Kind.SIGN, Kind.PERMUTE, Kind.REMOVE),
    ("gated", "mul", 0): (Kind.SCALE, Kind.SIGN, Kind.PERMUTE, Kind.REMOVE),
    ("layer norm", "layer_norm", 0): (Kind.SCALE, Kind.SIGN, Kind.SHIFT),
    ("layer norm of a layer", "linear", 0): (Kind.PERMUTE, Kind.ROTATE),
    ("rms norm of a layer", "linear", 0): (Kind.SIGN, Kind.PERMUTE, Kind.ROTATE),
    ("product", "linear", 0): tuple(Kind),
    ("handed out", "linear", 0): (),
}


def result(program: Program, name: str, number: int) -> fx.Node:
    return [n for n in program.graph.nodes if f"aten.{name}." in str(n.target)][number]


@pytest.mark.parametrize("place", WANTED, ids=str)
def test_what_is_found(place: tuple[str, str, int]) -> None:
    body, op, number = place
    program = function(BODIES[body], X, w=W, u=U, v=V, g=G, b=B, dynamic=False)
    oracle, node = Oracle(program), result(program, op, number)
    assert [kind for kind in Kind if oracle.freedom(kind, Seed(node))] == [kind for kind in Kind if kind in WANTED[place]]


def test_a_scale_that_only_an_eps_stops_is_none() -> None:
    program = function(lambda x, w, v: nnf.linear(nnf.layer_norm(nnf.linear(x, w), (D,), eps=1e-12), v), X, w=W, v=V, dynamic=False)
    assert Oracle(program).freedom(Kind.SCALE, Seed(result(program, "linear", 0))) == 0


@pytest.mark.parametrize("hides", [True, False])
def test_a_mask_may_hide_everything(hides: bool) -> None:
    """Though it doesn't on the example. Boolean: all weights are 0 then, and a shift of the values is lost; a low number: they stay equal."""

    def attended(x: Tensor, seen: Tensor, w: Tensor, v: Tensor, u: Tensor) -> Tensor:
        mask = (seen > 0)[:, None] if hides else torch.where((seen > 0)[:, None], seen.new_zeros((), dtype=x.dtype), -1e4)
        return nnf.linear(nnf.scaled_dot_product_attention(nnf.linear(x, w), nnf.linear(x, v), nnf.linear(x, u), mask), w)

    seen = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    program = function(attended, X, seen, w=W, v=V, u=U, dynamic=False)
    assert bool(Oracle(program).freedom(Kind.SHIFT, Seed(result(program, "linear", 2)))) != hides


def test_a_relu_that_is_never_on_turns_nothing() -> None:
    program = function(lambda x, w, v, b: nnf.linear(nnf.relu(nnf.linear(x, w, b - 100)), v), X, w=W, v=V, b=B, dynamic=False)
    assert Oracle(program).freedom(Kind.ROTATE, Seed(result(program, "relu", 0))) == 0
