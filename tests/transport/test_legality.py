"""What may be folded where, as the specifications of the single methods have it: each row a small graph, allowed rows exact, refused rows with
their own reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from fxcompress.program import Program
from fxcompress.transport import Kind, Plan, Seed, Transport
from tests.passes.helpers import function, seeded
from tests.transport.helpers import LIMIT, proved, vector_for

aten = torch.ops.aten
F64 = torch.float64
TOKENS, HEADS, SIZE = 5, 4, 8
WIDTH = HEADS * SIZE


def rand(*shape: int, seed: int) -> Tensor:
    return seeded(*shape, seed=seed, dtype=F64) / shape[-1] ** 0.5


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, SIZE)).transpose(1, 2)


def half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def adjacent(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def rope(x: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """Angles from the number of tokens, as models have it; pairs by the layout of `turn`."""
    angles = torch.arange(x.shape[2], dtype=F64)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=F64)
    pairs = torch.cat([angles, angles], -1) if turn is half else angles.repeat_interleave(2, -1)
    return x * pairs.cos() + turn(x) * pairs.sin()


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def softmaxed(q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Tensor] = lambda s: s, dim: int = -1) -> Tensor:
    return change(q @ k.transpose(-1, -2) * 0.3).softmax(dim) @ v


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda q, k, v, g, t: functional.scaled_dot_product_attention(q, k, v),
    "opened": lambda q, k, v, g, t: softmaxed(q, k, v),
    "causal": lambda q, k, v, g, t: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    "bias": lambda q, k, v, g, t: softmaxed(q, k, v, lambda s: s + t[:, :TOKENS]),
    "rope half": lambda q, k, v, g, t: softmaxed(rope(q, half), rope(k, half), v),
    "rope adjacent": lambda q, k, v, g, t: softmaxed(rope(q, adjacent), rope(k, adjacent), v),
    "rms": lambda q, k, v, g, t: softmaxed(rms(q) * g, rms(k) * g, v),
    "layer norm": lambda q, k, v, g, t: softmaxed(functional.layer_norm(q, (SIZE,), g, g), functional.layer_norm(k, (SIZE,), g, g), v),
    "l2": lambda q, k, v, g, t: softmaxed(functional.normalize(q, dim=-1), functional.normalize(k, dim=-1), v),
    "rel pos of q": lambda q, k, v, g, t: softmaxed(q, k, v, lambda s: s + torch.einsum("bhqd,kd->bhqk", q, t)),
    "soft cap": lambda q, k, v, g, t: softmaxed(q, k, v, lambda s: torch.tanh(s / 5) * 5),
    "sigmoid": lambda q, k, v, g, t: (q @ k.transpose(-1, -2)).sigmoid() @ v,
    "queries": lambda q, k, v, g, t: softmaxed(q, k, v, dim=-2),
    "k is v": lambda q, k, v, g, t: softmaxed(q, k, k),
}


def program(variant: str) -> Program:
    """One attention layer; queries of four heads, keys and values likewise, `t` a table of relative positions [tokens, size]."""

    def body(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, bk: Tensor, g: Tensor, t: Tensor) -> Tensor:
        q, k, v = heads(functional.linear(x, wq)), heads(functional.linear(x, wk, bk)), heads(functional.linear(x, wv))
        out = VARIANTS[variant](q, k, v, g, t)
        return functional.linear(out.transpose(1, 2).flatten(-2), wo)

    weights = {n: rand(WIDTH, WIDTH, seed=i) for i, n in enumerate(("wq", "wk", "wv", "wo"))}
    rest = {"bk": rand(WIDTH, seed=5), "g": rand(SIZE, seed=6) + 1, "t": rand(TOKENS, SIZE, seed=7)}
    return function(body, rand(2, TOKENS, WIDTH, seed=9), **weights, **rest, dynamic=False)


def keys(at: Program) -> fx.Node:
    """The value after the key projection's heads are parted."""
    leaf = next(n for n in at.graph.nodes if n.op == "get_attr" and n.target == "wk")
    node = next(iter(leaf.users))
    while node.target is not aten.transpose.int:
        node = next(iter(node.users))
    return node


def classes(variant: str, kind: Kind) -> tuple[int, Plan]:
    """How many free classes a seed on heads and channels of the keys has, proved on the way."""
    at = program(variant)
    plan = Transport(at).solve(kind, Seed(keys(at), (1, 3)))
    if plan.count:
        figures = proved(at, plan, vector_for(plan))
        assert max(figures["output"], figures["audit"]) < LIMIT
        assert not figures["broken"]
    return plan.count, plan


FULL, PAIRS, SHARED = HEADS * SIZE, HEADS * SIZE // 2, SIZE
LANDS: dict[str, dict[Kind, int]] = {  # variant: kind: classes of the keys
    "plain": {Kind.SIGN: FULL, Kind.SCALE: FULL, Kind.SHIFT: FULL, Kind.PERMUTE: FULL, Kind.ROTATE: FULL},
    "opened": {Kind.SIGN: FULL, Kind.SCALE: FULL, Kind.SHIFT: FULL, Kind.PERMUTE: FULL, Kind.ROTATE: FULL},
    "causal": {Kind.SIGN: FULL, Kind.SCALE: FULL, Kind.SHIFT: FULL, Kind.PERMUTE: FULL, Kind.ROTATE: FULL},
    "bias": {Kind.SIGN: FULL, Kind.SCALE: FULL, Kind.SHIFT: FULL, Kind.PERMUTE: FULL, Kind.ROTATE: FULL},
    "rope half": {Kind.SIGN: PAIRS, Kind.SCALE: PAIRS, Kind.SHIFT: 0, Kind.ROTATE: 0},
    "rope adjacent": {Kind.SIGN: PAIRS, Kind.SCALE: PAIRS, Kind.SHIFT: 0, Kind.ROTATE: 0},
    "rms": {Kind.SIGN: FULL, Kind.SCALE: 0, Kind.SHIFT: 0, Kind.PERMUTE: SHARED, Kind.ROTATE: 0},
    "layer norm": {Kind.SIGN: 0, Kind.SCALE: 0, Kind.SHIFT: 0, Kind.PERMUTE: SHARED, Kind.ROTATE: 0},
    "l2": {Kind.SIGN: FULL, Kind.SCALE: 0, Kind.SHIFT: 0, Kind.PERMUTE: FULL, Kind.ROTATE: FULL},
    "rel pos of q": {Kind.SIGN: SHARED, Kind.SCALE: SHARED, Kind.SHIFT: FULL, Kind.PERMUTE: SHARED, Kind.ROTATE: SHARED},
    "soft cap": {Kind.SIGN: FULL, Kind.SCALE: FULL, Kind.SHIFT: 0, Kind.PERMUTE: FULL, Kind.ROTATE: FULL},
    "sigmoid": {Kind.SIGN: FULL, Kind.SCALE: FULL, Kind.SHIFT: 0, Kind.PERMUTE: FULL, Kind.ROTATE: FULL},
    "queries": {Kind.SIGN: FULL, Kind.SCALE: FULL, Kind.SHIFT: 0, Kind.PERMUTE: FULL, Kind.ROTATE: FULL},
    "k is v": {Kind.SIGN: FULL, Kind.SCALE: FULL, Kind.SHIFT: FULL, Kind.PERMUTE: FULL, Kind.ROTATE: FULL},
}


@pytest.mark.parametrize(("variant", "kind", "wanted"), [(v, k, n) for v, row in LANDS.items() for k, n in row.items()])
def test_keys(variant: str, kind: Kind, wanted: int) -> None:
    count, plan = classes(variant, kind)
    assert count == wanted, plan.reason()


REASONS: dict[tuple[str, Kind], str] = {
    ("rope half", Kind.SHIFT): "mul_4: a shift times a factor that isn't one number would vary with it",
    ("layer norm", Kind.SIGN): "the statistics of layer_norm_1 would change",
    ("soft cap", Kind.SHIFT): "tanh lies between matmul and a softmax, which then can't take off a shift of transpose_3",
    ("queries", Kind.SHIFT): "matmul: a shift of transpose_3 times transpose varies with it",
}


@pytest.mark.parametrize(("variant", "kind", "reason"), [(v, k, r) for (v, k), r in REASONS.items()])
def test_refusals_say_why(variant: str, kind: Kind, reason: str) -> None:
    _, plan = classes(variant, kind)
    assert plan.reason() == reason


def layer(body: Callable[..., Any], x: Tensor, **constants: Tensor) -> Program:
    return function(body, x, **constants, dynamic=False)


X = rand(2, 3, 6, seed=1)
IMAGE = rand(2, 4, 5, 5, seed=2)
W, V = rand(6, 6, seed=3), rand(6, 6, seed=4)

REFUSED: dict[str, tuple[Program, Kind, str, str]] = {  # program, kind, seeded node, reason
    "an input": (layer(lambda x, w: functional.linear(x, w, None), X, w=W), Kind.SCALE, "x", "x is an input of the program"),
    "a tapped value": (
        layer(lambda x, w, v: (functional.linear(x, w), functional.linear(functional.linear(x, w), v)), X, w=W, v=V),
        Kind.SCALE,
        "linear",
        "the value is an output of the program",
    ),
    "statistics of the norm after": (
        layer(lambda x, w, v, g: functional.linear(functional.layer_norm(functional.linear(x, w), (6,), g), v), X, w=W, v=V, g=W[0]),
        Kind.SCALE,
        "linear",
        "the statistics of layer_norm would change",
    ),
    "statistics of an rms": (
        layer(lambda x, w, v: functional.linear(rms(functional.linear(x, w)), v), X, w=W, v=V),
        Kind.SCALE,
        "linear",
        "mean sums over the channels that a scale would change",
    ),
    "an activation": (
        layer(lambda x, w, v: functional.linear(functional.gelu(functional.linear(x, w)), v), X, w=W, v=V),
        Kind.SIGN,
        "linear",
        "gelu (gelu) doesn't commute with a sign",
    ),
    "zero padding": (
        layer(
            lambda x, w, v: functional.conv2d(functional.conv2d(x, w), v, padding=1),
            IMAGE,
            w=rand(4, 4, 1, 1, seed=5),
            v=rand(4, 4, 3, 3, seed=6),
        ),
        Kind.SHIFT,
        "conv2d",
        "conv2d_1 pads with zeros, which a shift would have to change",
    ),
    "different gains": (
        layer(lambda x, w, v, g: functional.linear(functional.rms_norm(functional.linear(x, w), (6,), g), v), X, w=W, v=V, g=W[0]),
        Kind.ROTATE,
        "linear",
        "rms_norm scales the channels by different gains, g",
    ),
    "an op without a row": (
        layer(lambda x, w, v: functional.linear(torch.special.i0(functional.linear(x, w)), v), X, w=W, v=V),
        Kind.PERMUTE,
        "linear",
        "special_i0: unknown op aten.special_i0.default",
    ),
    "one weight for both sides": (
        layer(lambda x, w: functional.linear(functional.linear(x, w), w), X, w=W),
        Kind.SCALE,
        "linear",
        "the value is an output of the program",
    ),
}


@pytest.mark.parametrize(("at", "kind", "seeded_node", "reason"), [pytest.param(*r, id=i) for i, r in REFUSED.items()])
def test_refused(at: Program, kind: Kind, seeded_node: str, reason: str) -> None:
    node = next(n for n in at.graph.nodes if n.name == seeded_node)
    plan = Transport(at).solve(kind, Seed(node, (1 if node.meta["val"].dim() == 4 else -1,)))
    assert plan.count == 0
    assert plan.reason() == reason
