"""16-bit leaves: numbers in float64, cast once, powers of two without a rounding. Dynamic sizes: what merges with one can't be told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as nnf

from fxcompress.checker import check
from fxcompress.contract import Exact
from fxcompress.edit import Edit
from fxcompress.interpret import run
from fxcompress.program import Program
from fxcompress.transport import Kind, Plan, Seed, Transport
from tests.passes.helpers import function, seeded
from tests.transport.architectures import unread
from tests.transport.helpers import error, vector_for
from tests.transport.legality import mark

C, HEADS = 8, 2
WIDE = (torch.float16, torch.bfloat16)
Body = Callable[..., Tensor]


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


BODIES: dict[str, tuple[Body, tuple[int, ...]]] = {
    "two layers": (lambda x, a, b, c, g: nnf.linear(mark(nnf.linear(x, a, g).relu()), b), (-1,)),
    "layer norm": (lambda x, a, b, c, g: nnf.linear(mark(nnf.layer_norm(x, (C,), g, a[0])), b), (-1,)),
    "plain norm": (lambda x, a, b, c, g: nnf.linear(mark(nnf.layer_norm(x, (C,))), b), (-1,)),
    "gated": (lambda x, a, b, c, g: nnf.linear(nnf.silu(nnf.linear(x, a)) * mark(nnf.linear(x, b, g)), c), (-1,)),
    "a number added": (lambda x, a, b, c, g: nnf.linear(mark(nnf.linear(x, a) + 1.5), b), (-1,)),
    "values": (
        lambda x, a, b, c, g: nnf.linear(
            nnf.scaled_dot_product_attention(split(nnf.linear(x, a)), split(x), mark(split(nnf.linear(x, b, g)))).transpose(1, 2).flatten(2), c
        ),
        (1, 3),
    ),
}


def program(body: Body, dtype: torch.dtype, dynamic: Any = False) -> Program:
    weights = {n: seeded(C, C, seed=i, dtype=dtype) / 2 for i, n in enumerate("abc")} | {"g": seeded(C, seed=5, dtype=dtype)}
    return function(body, seeded(2, 3, C, seed=9, dtype=dtype), dynamic=dynamic, **weights)


def planned(at: Program, kind: Kind, axes: tuple[int, ...]) -> Plan:
    return Transport(at).solve(kind, Seed(next(n for n in at.graph.nodes if n.name == "clone"), axes))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("kind", [Kind.SCALE, Kind.SIGN])
@pytest.mark.parametrize("name", list(BODIES))
def test_powers_of_two_and_signs_change_no_bit(name: str, kind: Kind, dtype: torch.dtype) -> None:
    body, axes = BODIES[name]
    at = program(body, dtype)
    plan = planned(at, kind, axes)
    if name == "two layers" and kind == Kind.SIGN:
        assert plan.reason() == "relu (relu) doesn't commute with a sign"
        return
    assert (plan.count, plan.is_whole) == (C, True)
    vector = vector_for(plan) if kind == Kind.SIGN else 2.0 ** torch.arange(-3, C - 3)
    before, edit = run(at, at.example), Edit(at)
    plan.apply(edit, vector)
    assert torch.equal(before[0], run(at, at.example)[0])
    assert {t.dtype for t in at.constants.values()} == {dtype}
    assert not [m for m in check(at, edit, Exact(limit=0.0), at.example) if m.verdict == "broken"]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_a_leaf_is_rounded_once(dtype: torch.dtype) -> None:
    at = program(BODIES["two layers"][0], dtype)
    plan, old = planned(at, Kind.SCALE, (-1,)), dict(at.constants)
    v = vector_for(plan)
    plan.apply(Edit(at), v)
    assert torch.equal(at.constants["a"], (old["a"].double() * v[:, None]).to(dtype))
    assert torch.equal(at.constants["b"], (old["b"].double() / v).to(dtype))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("kind", [Kind.SHIFT, Kind.ROTATE, Kind.PERMUTE])
def test_other_kinds_stay_within_rounding(kind: Kind, dtype: torch.dtype) -> None:
    body, axes = BODIES["values"]
    at = program(body, dtype)
    plan = planned(at, kind, axes)
    before = run(at, at.example)
    plan.apply(Edit(at), vector_for(plan))
    assert plan.count == C
    assert error(before, run(at, at.example)) < 20 * torch.finfo(dtype).eps


def test_packed_weights_are_left_alone() -> None:
    """Integer codes times a scale: the engine says what holds them."""
    codes = torch.randint(-7, 8, (C, C), dtype=torch.int8, generator=torch.Generator().manual_seed(0))

    def body(x: Tensor, a: Tensor, codes: Tensor) -> Tensor:
        return nnf.linear(mark(nnf.linear(x, a)), codes.to(torch.float32) * 0.1)

    at = function(body, seeded(2, C), dynamic=False, a=seeded(C, C, seed=1), codes=codes)
    assert planned(at, Kind.SCALE, (-1,)).reason() == "codes holds torch.int8, which no scale fits"


ANY = {0: Dim.AUTO, 1: Dim.AUTO}
MERGED: dict[str, tuple[Body, tuple[int, ...], int]] = {  # body, axes, free classes with every size of batch and tokens
    "tokens merged": (lambda x, a, b, c, g: nnf.linear(nnf.linear(mark(nnf.linear(x, a)).flatten(0, 1), b), c), (-1,), C),
    "heads apart": (BODIES["values"][0], (1, 3), C),
    "heads merged with the batch": (
        lambda x, a, b, c, g: nnf.linear(
            (split(x).flatten(0, 1) @ mark(split(nnf.linear(x, b))).flatten(0, 1).transpose(1, 2)).softmax(-1).sum((0, 1, 2)) * g, c
        ),
        (1, 3),
        0,
    ),
    "values merged with the batch": (
        lambda x, a, b, c, g: nnf.linear(
            (split(x) @ split(x).transpose(-1, -2)).softmax(-1).flatten(0, 1).bmm(mark(split(nnf.linear(x, b))).flatten(0, 1)), c[:, :4]
        ),
        (1, 3),
        C // HEADS,
    ),
    "heads taken from the channels into the batch": (lambda x, a, b, c, g: folded(x, b, c), (-1,), C // HEADS),
}


def folded(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As in torch's own attention: tokens first, one view for the heads and the batch."""
    batch, tokens, _ = x.shape
    q, v = (t.transpose(0, 1).reshape(tokens, batch * HEADS, C // HEADS).transpose(0, 1) for t in (x, mark(nnf.linear(x, b))))
    return nnf.linear((q @ q.transpose(1, 2)).softmax(-1).bmm(v).transpose(0, 1).reshape(tokens, batch, C), c)


@pytest.mark.parametrize("name", list(MERGED))
def test_dynamic_sizes(name: str) -> None:
    """Heads that are merged with a dynamic batch share their parameters; the change is exact for other sizes too."""
    body, axes, wanted = MERGED[name]
    at = program(body, torch.float64, {"x": ANY})
    plan = planned(at, Kind.SCALE, axes)
    assert plan.count == wanted, plan.reason()
    others = [at.example, (seeded(3, 5, C, seed=11, dtype=torch.float64),)]
    before = [run(at, x) for x in others]
    plan.apply(Edit(at), vector_for(plan))
    for x, old in zip(others, before, strict=True):
        assert error(old, run(at, x)) < 1e-10


@pytest.mark.parametrize("kind", [k for k in Kind if k != Kind.SCALE])
def test_every_kind_among_merged_heads(kind: Kind) -> None:
    """Removed channels are ones that nothing reads."""
    body, axes, wanted = MERGED["heads taken from the channels into the batch"]
    at = program(body, torch.float64, {"x": ANY})
    plan = planned(at, kind, axes)
    assert (plan.count, plan.is_whole) == (wanted, True), plan.reason()
    vector = vector_for(plan)
    if kind == Kind.REMOVE:
        at.constants.update(unread(at, plan, vector))
    others = [at.example, (seeded(3, 5, C, seed=11, dtype=torch.float64),)]
    before = [run(at, x) for x in others]
    plan.apply(Edit(at), vector)
    for x, old in zip(others, before, strict=True):
        assert error(old, run(at, x)) < 1e-10


def test_a_seed_on_a_dynamic_axis_is_an_error() -> None:
    at = program(BODIES["two layers"][0], torch.float64, {"x": ANY})
    with pytest.raises(ValueError, match="has a dynamic size on the axes"):
        planned(at, Kind.SCALE, (1,))
