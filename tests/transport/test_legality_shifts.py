"""Shifts of a layer's input, with scales of the same sites: every row of the table, exact or refused by the op that doesn't take it.

x -> x + z before a layer whose bias takes W z off; s as in `test_legality_scales`. Source: QVD (arXiv 2407.11585), Outlier Suppression+
(arXiv 2304.09145).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from fxcompress.edit import Edit
from fxcompress.interpret import run
from fxcompress.transport import Kind, Seed, Transport
from fxcompress.transport.insert import insert
from tests.passes.helpers import node
from tests.transport.helpers import LIMIT, error, vector_for
from tests.transport.legality import Row, confirm, mark, rand

C, HEADS = 8, 2
X, IMAGE, VIDEO = rand(2, 3, C, seed=1), rand(2, C, 5, 5, seed=2), rand(2, C, 4, 3, 3, seed=3)
WEIGHTS = {n: rand(C, C, seed=i) for i, n in enumerate("abcd")} | {
    "g": rand(C, seed=10).abs() + 1,
    "h": rand(C, seed=11),
    "k": rand(C, C, 3, 3, seed=12),
    "j": rand(C, C, 3, 3, seed=13),
    "deepk": rand(C, 2 * C, 3, 3, seed=14),
    "flat": rand(C, C, 1, 1, seed=15),
    "frames": rand(C, C, 3, 1, 1, seed=16),
    "halves": rand(C, C // 2, 1, 1, seed=17),
    "table": rand(10, C, seed=18),
    "scales": rand(10, C, seed=19),
    "before": rand(C, C, 1, 1, 1, seed=20),
}
STEP = torch.tensor([3, 7])
Body = Callable[[Tensor, Tensor, dict[str, Tensor]], Any]


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attended(x: Tensor, w: dict[str, Tensor], mask: Tensor | None = None, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Values marked; change: something done to the attention's weights."""
    q, k, v = split(nnf.linear(x, w["a"])), split(nnf.linear(x, w["b"])), split(nnf.linear(x, w["c"], w["h"]))
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    weights = weights if change is None else change(weights)
    return nnf.linear((weights @ mark(v)).transpose(1, 2).flatten(-2), w["d"])


def zero_query(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """What a decoder of objects starts with: positions are added to it for its keys, its residual is normed."""
    q = mark(torch.zeros_like(x))
    return nnf.layer_norm(q + nnf.linear(nnf.linear(q + x, w["a"]).tanh(), w["b"]), (C,), w["g"], w["h"])


def from_table(x: Tensor, t: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Scale and shift looked up by the step."""
    scale, shift = nnf.embedding(t, w["scales"])[:, None], nnf.embedding(t, w["table"])[:, None]
    return nnf.linear(mark(nnf.layer_norm(x, (C,)) * (1 + scale) + shift), w["a"])


def up(x: Tensor, mode: str) -> Tensor:
    return nnf.interpolate(x, scale_factor=2.0, mode=mode)


ROWS: dict[str, tuple[Tensor, tuple[int, ...], Body, int | None]] = {
    "layer norm": (X, (-1,), lambda x, t, w: nnf.linear(mark(nnf.layer_norm(x, (C,), w["g"], w["h"])), w["a"]), C),
    "layer norm without shift": (X, (-1,), lambda x, t, w: nnf.linear(mark(nnf.layer_norm(x, (C,), w["g"])), w["a"]), C),
    "group norm": (IMAGE, (1,), lambda x, t, w: nnf.conv2d(mark(nnf.group_norm(x, 2, w["g"], w["h"])), w["k"]), C),
    "rms norm": (X, (-1,), lambda x, t, w: nnf.linear(mark(nnf.rms_norm(x, (C,), w["g"])), w["a"]), None),
    "norm, silu": (IMAGE, (1,), lambda x, t, w: nnf.conv2d(mark(nnf.silu(nnf.group_norm(x, 2, w["g"], w["h"]))), w["k"]), None),
    "linear": (X, (-1,), lambda x, t, w: nnf.linear(mark(nnf.linear(x, w["a"], w["h"])), w["b"]), C),
    "linear without bias": (X, (-1,), lambda x, t, w: nnf.linear(mark(nnf.linear(x, w["a"])), w["b"]), C),
    "values": (X, (1, 3), lambda x, t, w: attended(x, w), C),
    "values, logarithmic weights": (X, (1, 3), lambda x, t, w: attended(x, w, change=lambda a: torch.exp2(a.log2().round())), None),
    "values, a sink": (X, (1, 3), lambda x, t, w: attended(x, w, change=lambda a: a / (1 + a.sum(-1, keepdim=True))), None),
    "scale and shift from a table": (X, (-1,), from_table, C),
    "a table added": (X, (-1,), lambda x, t, w: nnf.linear(mark(nnf.gelu(x) + nnf.embedding(t, w["table"])[:, None]), w["a"]), C),
    "zero padding": (IMAGE, (1,), lambda x, t, w: nnf.conv2d(mark(nnf.conv2d(x, w["k"])), w["j"], padding=1), None),
    "no padding": (IMAGE, (1,), lambda x, t, w: nnf.conv2d(mark(nnf.conv2d(x, w["k"])), w["j"]), C),
    "zeros around": (IMAGE, (1,), lambda x, t, w: nnf.conv2d(nnf.pad(mark(nnf.conv2d(x, w["k"])), (1, 1, 1, 1)), w["j"]), None),
    "nothing around": (IMAGE, (1,), lambda x, t, w: nnf.conv2d(nnf.pad(mark(nnf.conv2d(x, w["k"])), (0, 0, 0, 0)), w["j"]), C),
    "over time, padded": (VIDEO, (1,), lambda x, t, w: nnf.conv3d(mark(nnf.conv3d(x, w["before"])), w["frames"], padding=(1, 0, 0)), None),
    "over time": (VIDEO, (1,), lambda x, t, w: nnf.conv3d(mark(nnf.conv3d(x, w["before"])), w["frames"]), C),
    "residual, all take it": (
        X,
        (-1,),
        lambda x, t, w: [nnf.linear(y := mark(nnf.linear(x, w["a"]) + nnf.linear(x, w["b"])), w["c"]), nnf.linear(y, w["d"])],
        C,
    ),
    "residual, a norm reads it": (
        X,
        (-1,),
        lambda x, t, w: [nnf.linear(y := mark(nnf.linear(x, w["a"]) + nnf.linear(x, w["b"])), w["c"]), nnf.layer_norm(y, (C,))],
        None,
    ),
    "skip concatenated": (
        IMAGE,
        (1,),
        lambda x, t, w: nnf.conv2d(mark(torch.cat([nnf.conv2d(x, w["k"]), nnf.conv2d(x, w["j"])], 1)), w["deepk"]),
        2 * C,
    ),
    "query of zeros": (X, (-1,), lambda x, t, w: zero_query(x, w), C),
    "group norm after": (IMAGE, (1,), lambda x, t, w: nnf.group_norm(mark(nnf.conv2d(x, w["k"])), 2), None),
    "grouped": (IMAGE, (1,), lambda x, t, w: nnf.conv2d(mark(nnf.conv2d(x, w["k"])), w["halves"], groups=2), C),
    "nearest": (IMAGE, (1,), lambda x, t, w: nnf.conv2d(up(mark(nnf.conv2d(x, w["k"])), "nearest"), w["flat"]), C),
    "bilinear": (IMAGE, (1,), lambda x, t, w: nnf.conv2d(up(mark(nnf.conv2d(x, w["k"])), "bilinear"), w["flat"]), C),
    "mean pool": (IMAGE, (1,), lambda x, t, w: nnf.conv2d(nnf.avg_pool2d(mark(nnf.conv2d(x, w["k"])), 3), w["flat"]), C),
    "mean pool, zeros counted": (
        IMAGE,
        (1,),
        lambda x, t, w: nnf.conv2d(nnf.avg_pool2d(mark(nnf.conv2d(x, w["k"])), 3, padding=1), w["flat"]),
        None,
    ),
}


REFUSED: dict[str, tuple[str, str]] = {  # the op that stops, and why
    "rms norm": ("rms_norm", "rms_norm has no bias"),
    "norm, silu": ("silu", "silu (silu) doesn't commute with a shift"),
    "values, logarithmic weights": ("matmul_1", "matmul_1: rows of exp2 aren't known to sum to one"),
    "values, a sink": ("matmul_1", "matmul_1: rows of div aren't known to sum to one"),
    "zero padding": ("conv2d_1", "conv2d_1 pads with zeros, which a shift would have to change"),
    "zeros around": ("pad", "pad pads with values that a shift would have to change"),
    "over time, padded": ("conv3d_1", "conv3d_1 pads with zeros, which a shift would have to change"),
    "residual, a norm reads it": ("layer_norm", "the statistics of layer_norm would change"),
    "group norm after": ("group_norm", "the statistics of group_norm would change"),
    "mean pool, zeros counted": ("avg_pool2d", "avg_pool2d counts zeros from outside the image"),
}


def row_for(name: str, wanted: Any, kind: Kind = Kind.SHIFT) -> Row:
    x, axes, body, _ = ROWS[name]

    def taken(x: Tensor, t: Tensor, **weights: Tensor) -> Any:
        return body(x, t, weights)

    return Row(taken, kind, wanted, axes, (x, STEP), WEIGHTS)


@pytest.mark.parametrize("name", list(ROWS))
def test_shifts(name: str) -> None:
    free = ROWS[name][3]
    confirm(row_for(name, REFUSED[name] if free is None else free))


SCALED = (
    "rms norm",
    "values, logarithmic weights",
    "values, a sink",
    "zero padding",
    "zeros around",
    "over time, padded",
    "grouped",
    "bilinear",
)


@pytest.mark.parametrize("name", [*SCALED, "mean pool, zeros counted", "no padding", "scale and shift from a table"])
def test_a_scale_is_legal_there_all_the_same(name: str) -> None:
    confirm(row_for(name, C, Kind.SCALE))


@pytest.mark.parametrize("name", ["norm, silu", "residual, a norm reads it", "group norm after"])
def test_a_scale_is_refused_there_too(name: str) -> None:
    place, reason = REFUSED[name]
    confirm(row_for(name, (place, reason.replace("shift", "scale")), Kind.SCALE))


LOWEST, ZERO = torch.finfo(torch.float64).min, torch.zeros((), dtype=torch.float64)
HIDDEN = "scaled_dot_product_attention: the mask {} may hide all keys from a row, which then gives 0"
MASKS: dict[str, tuple[Callable[..., Tensor], str]] = {  # of seen keys, a float input and queries; "" where it lands, or its name
    "lowest number": (lambda seen, given, q, w: torch.where(seen, ZERO, LOWEST), ""),
    "lowest number and a bias": (
        lambda seen, given, q, w: torch.where(seen, nnf.embedding(STEP % 2, w["table"])[:, None, None, :3], LOWEST),
        "",
    ),
    "filled": (lambda seen, given, q, w: torch.zeros_like(given).masked_fill(~seen, -1e4), ""),
    "ones and zeros": (lambda seen, given, q, w: (1 - seen.to(torch.float64)) * -10000.0, ""),
    "positions, computed": (lambda seen, given, q, w: torch.einsum("bhqd,kd->bhqk", q, w["table"][:3, :4]), ""),
    "boolean": (lambda seen, given, q, w: seen, "expand"),
    "infinite": (lambda seen, given, q, w: torch.where(seen, ZERO, -torch.inf), "expand"),
    "two lowest numbers": (lambda seen, given, q, w: (m := torch.where(seen, ZERO, LOWEST)) + m, "expand"),
    "given": (lambda seen, given, q, w: given, "expand"),
}


@pytest.mark.parametrize("name", list(MASKS))
def test_values_under_a_mask(name: str) -> None:
    """Rows of the weights sum to one unless a row sees no key: then all is 0. Numbers that are added don't hide, however low."""
    mask, shown = MASKS[name]

    def body(x: Tensor, seen: Tensor, given: Tensor, **w: Tensor) -> Tensor:
        q, k, v = split(nnf.linear(x, w["a"])), split(nnf.linear(x, w["b"])), split(nnf.linear(x, w["c"], w["h"]))
        y = nnf.scaled_dot_product_attention(q, k, mark(v), mask(seen, given, q, w).expand(2, HEADS, 3, 3))
        return nnf.linear(y.transpose(1, 2).flatten(-2), w["d"])

    seen = torch.tensor([[True, True, False], [True, False, True]])[:, None, None]
    wanted = ("scaled_dot_product_attention", HIDDEN.format(shown)) if shown else C
    confirm(Row(body, Kind.SHIFT, wanted, (1, 3), (X, seen, rand(2, 1, 1, 3, seed=21)), WEIGHTS))


def test_a_root_mean_square_norm_needs_an_addition() -> None:
    """It has no bias: a pass that wants the shift puts an addition there, and the shift lands in it."""
    program = row_for("rms norm", None).program()
    before, edit, norm = run(program, program.example), Edit(program), node(program, "rms_norm")
    with edit.site(norm):
        shifted = insert(edit, norm, Kind.SHIFT)
    plan = Transport(program).solve(Kind.SHIFT, Seed(shifted))
    assert (plan.count, plan.is_whole) == (C, True)
    plan.apply(edit, vector_for(plan))
    assert error(before, run(program, program.example)) < LIMIT
