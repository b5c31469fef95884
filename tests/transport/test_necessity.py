"""Where the op table is stricter than it need be: a change of one operand that it stops, although the result is unchanged or carries it too.

Every row of the table alone, every operand and axis. What is found is listed below and may shrink; anything else is a row to look at.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.program import Program
from fxcompress.transport import Kind, Seed, Transport
from tests.transport.helpers import _orthogonal
from tests.transport.test_rows import ROWS, Row

KINDS = (Kind.SCALE, Kind.SIGN, Kind.SHIFT, Kind.PERMUTE, Kind.ROTATE)
POWERS = {Kind.SCALE: (1.0, -1.0, 2.0, 0.5), Kind.SHIFT: (1.0, -1.0)}


def changed(kind: Kind, x: Tensor, axis: int, v: Tensor, power: float = 1.0) -> Tensor:
    """The value changed along one axis."""
    if kind == Kind.PERMUTE:
        return x.index_select(axis, v)
    if kind == Kind.ROTATE:
        return (x.movedim(axis, -1) @ v).movedim(-1, axis).contiguous()
    v = v.view(-1, *(1,) * (x.dim() - axis - 1))
    return x + power * v if kind == Kind.SHIFT else x * v**power


def vector(kind: Kind, size: int) -> Tensor:
    rng = torch.Generator().manual_seed(size)
    if kind == Kind.PERMUTE:
        return torch.arange(size).roll(1)
    if kind == Kind.ROTATE:
        return _orthogonal(size, rng)
    if kind == Kind.SIGN:
        return torch.tensor([-1.0, 1.0] * size, dtype=torch.float64)[:size]
    return torch.rand(size, generator=rng, dtype=torch.float64) + 0.5


def operands(program: Program) -> Iterator[tuple[fx.Node, Tensor]]:
    for node, x in zip(program.placeholders(), program.example, strict=True):
        if node.name != "anchor" and x.dtype == torch.float64:
            yield node, x


def is_carried(kind: Kind, old: Tensor, new: Tensor, v: Tensor) -> str:
    """How the new result is the old one: "" if in no way this looks for."""
    if old.shape == new.shape and relative_error(old, new) < 1e-12:
        return "swallowed"
    for axis, size in enumerate(old.shape):
        for power in POWERS.get(kind, (1.0,)) if size == len(v) and old.dtype == torch.float64 else ():
            if relative_error(changed(kind, old, axis, v, power), new) < 1e-12:
                return f"carried, power {power:g}"
    return ""


def too_strict(name: str, row: Row, kind: Kind) -> Iterator[str]:
    program = row.program()
    engine, before = Transport(program), run(program, program.example)
    for node, x in operands(program):
        for axis, size in enumerate(x.shape):
            if size < 2 or engine.solve(kind, Seed(node, (axis,)), is_open=True).count:
                continue
            v = vector(kind, size)
            inputs = [changed(kind, x, axis, v) if n is node else y for n, y in zip(program.placeholders(), program.example, strict=True)]
            ways = [is_carried(kind, a, b, v) for a, b in zip(before, run(program, inputs), strict=True)]
            if all(ways):
                yield f"{name}, {kind} of {node.name} axis {axis}: {ways[0]}"


TWICE = "einsum of a letter twice"
ENTRIES = {
    "matmul",
    "bmm",
    "einsum ellipsis",
    "einsum in a row",
    TWICE,
}  # a factor per batch entry, the result's or the other operand's
NORMS = {"layer_norm", "layer_norm even", "layer_norm plain", "native_layer_norm", "native_layer_norm plain", "group_norm"} | {
    "native_group_norm",
    "native_group_norm plain",
}
KNOWN: dict[Kind, set[str]] = {
    Kind.SCALE: ENTRIES,
    Kind.SIGN: ENTRIES
    | {"clamp", "maximum of number"}  # symmetric bounds, fmod
    | {"layer_norm plain", "native_layer_norm plain", "native_group_norm plain"},  # a sign per token
    Kind.SHIFT: NORMS | {"index_add"},  # a shift per token; of the value added to
    Kind.PERMUTE: {TWICE, "sdpa", "sdpa gqa", "adaptive_avg_pool2d", "grid_sampler", "grid_sampler to the border"},  # tokens, pixels, images
    Kind.ROTATE: {"where zero", TWICE, "gather"},  # a mixture of examples
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_stricter_than_known(kind: Kind) -> None:
    assert {name for name, row in ROWS.items() if list(too_strict(name, row, kind))} == KNOWN[kind]


def test_a_row_that_stops_too_much_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """relu without its row: positive scales go through it."""
    from fxcompress.transport import relations

    monkeypatch.delitem(relations.TABLE, torch.ops.aten.relu.default)  # type: ignore[arg-type]
    assert list(too_strict("relu", ROWS["relu"], Kind.SCALE)) == [f"relu, scale of x0_0 axis {a}: carried, power 1" for a in range(3)]
