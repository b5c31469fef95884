"""Where a change stops, a neutral op takes it; the contract sees through both in one edit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fxcompress.checker import check
from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.interpret import run
from fxcompress.transport import Kind, Seed, Transport
from fxcompress.transport.insert import insert, untie
from tests.passes.helpers import function, node, seeded
from tests.transport.helpers import LIMIT, error, vector_for

F64 = torch.float64
X, W, V = seeded(2, 3, 6, dtype=F64), seeded(6, 6, seed=1, dtype=F64), seeded(6, 6, seed=2, dtype=F64)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", [Kind.SCALE, Kind.SIGN, Kind.SHIFT, Kind.ROTATE])
def test_a_change_that_an_activation_stops_lands_in_an_inserted_op(kind: Kind, named: bool) -> None:
    program = function(lambda x, w, v: functional.linear(functional.silu(functional.linear(x, w)), v), X, w=W, v=V, dynamic=False)
    silu, after = node(program, "silu"), node(program, "linear_1")
    assert Transport(program).solve(kind, Seed(silu)).count == 0
    before, edit = run(program, program.example), Edit(program)
    with edit.site(silu):
        new = insert(edit, silu, kind, readers=[after] if named else ())
    plan = Transport(program).solve(kind, Seed(new))
    assert (plan.count, plan.is_whole) == (6, True)
    plan.apply(edit, vector_for(plan))
    assert error(before, run(program, program.example)) < LIMIT
    assert {m.verdict for m in check(program, edit, Exact(), program.example)} == {"held"}
    edit.rollback()
    assert error(before, run(program, program.example)) == 0.0


def test_moves_and_dynamic_axes_are_refused() -> None:
    program = function(lambda x, w: functional.silu(functional.linear(x, w)), X, w=W)
    edit, silu = Edit(program), node(program, "silu")
    with edit.site(silu):
        with pytest.raises(ValueError, match="no op takes a permute along axis 2 of silu"):
            insert(edit, silu, Kind.PERMUTE)
        with pytest.raises(ValueError, match="no op takes a scale along axis 0"):
            insert(edit, silu, Kind.SCALE, axis=0)


def test_a_tied_head_takes_the_gain_in_its_own_copy() -> None:
    """E is table and head: a scale of what the head reads stops at the norm of the stream, until the head reads a copy."""
    ids, e, g = torch.tensor([[1, 2], [0, 4]]), seeded(5, 6, seed=3, dtype=F64), seeded(6, seed=4, dtype=F64)
    program = function(lambda i, e, g: functional.linear(functional.rms_norm(functional.embedding(i, e), (6,), g), e), ids, e=e, g=g)
    norm, head, table = (node(program, n) for n in ("rms_norm", "linear", "e"))
    assert Transport(program).solve(Kind.SCALE, Seed(norm)).count == 0
    before, edit = run(program, program.example), Edit(program)
    with edit.site(head):
        copy = untie(edit, table, [head])
    plan = Transport(program).solve(Kind.SCALE, Seed(norm))
    assert (plan.count, plan.is_whole) == (6, True)
    plan.apply(edit, vector_for(plan))
    assert torch.equal(program.constants["e"], e)
    assert not torch.equal(program.constants[copy.target], e)
    assert error(before, run(program, program.example)) < LIMIT
    assert {m.verdict for m in check(program, edit, Exact(), program.example)} == {"held"}
    edit.rollback()
    assert error(before, run(program, program.example)) == 0.0
    assert [n.target for n in table.users] == [torch.ops.aten.embedding.default, torch.ops.aten.linear.default]
