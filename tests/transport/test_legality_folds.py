"""Folds of language models: gains, scales, rotations, removal of means, permutations, on streams, attention and gated perceptrons.

The rows' numbers are those of the table; the source of each is QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406), SliceGPT
(arXiv 2401.15024), AWQ (arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from fxcompress.transport import Kind
from tests.transport.legality import F64, Row, confirm, mark, rand
from tests.transport.test_legality_attention import half

D, HEADS, WORDS = 8, 2, 7
IDS, X = torch.tensor([[1, 2, 4], [3, 3, 0]]), rand(2, 3, D, seed=1)
ANGLES = torch.arange(3, dtype=F64)[:, None] * torch.tensor([1.0, 0.3, 1.0, 0.3], dtype=F64)
WEIGHTS = {n: rand(D, D, seed=i) for i, n in enumerate("abcdfh")} | {
    "e": rand(WORDS, D, seed=10),
    "p": rand(3, D, seed=11),
    "g": rand(D, seed=12).abs() + 1,
    "s": rand(D, seed=13),
    "few": rand(D // 2, D, seed=14),
    "less": rand(D // 2, D, seed=15),
    "router": rand(4, D, seed=16),
    "even": torch.full((D,), 1.5, dtype=F64),
    "normq": rand(D // HEADS, seed=17) + 2,
    "normk": rand(D // HEADS, seed=18) + 2,
    "cos": ANGLES.cos(),
    "sin": ANGLES.sin(),
}
W = dict[str, Tensor]
Body = Callable[[Tensor, Tensor, W], Any]


def rms(x: Tensor, gain: Tensor | None = None) -> Tensor:
    return nnf.rms_norm(x, (D,), gain, 1e-6)


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


def stream(ids: Tensor, w: W, norm: Callable[[Tensor], Tensor] = rms, scaled: Any = 1.0) -> Tensor:
    """Words and positions, and a layer's addition to them."""
    x = mark(nnf.embedding(ids, w["e"]) + w["p"])
    return x + scaled * nnf.linear(norm(x), w["a"])


def layer_norm(x: Tensor, gain: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    return nnf.layer_norm(x, (D,), gain, shift)


def rope(x: Tensor, w: W) -> Tensor:
    """One table for queries and keys."""
    return x * w["cos"] + half(x) * w["sin"]


def attended(x: Tensor, w: W, at: str, rotary: bool = False, norm: bool = False, cap: bool = False) -> Tensor:
    q, k, v = (split(nnf.linear(x, w[n])) for n in "abc")
    if rotary:
        q, k = rope(q, w), rope(k, w)
    if norm:
        q, k = (nnf.rms_norm(t, (D // HEADS,), w[n]) for t, n in ((q, "normq"), (k, "normk")))
    q, k, v = (mark(t) if at == n else t for t, n in ((q, "q"), (k, "k"), (v, "v")))
    scores = q @ k.transpose(-1, -2)
    return nnf.linear(merged(((scores / 5).tanh() * 5 if cap else scores).softmax(-1) @ v), w["d"])


def before_rope(x: Tensor, w: W) -> Tensor:
    q, k, v = (split(nnf.linear(x, w[n])) for n in "abc")
    return nnf.linear(merged((rope(q, w) @ rope(mark(k), w).transpose(-1, -2)).softmax(-1) @ v), w["d"])


def grouped(x: Tensor, w: W, at: str) -> Tensor:
    """One head of keys and values for two of queries."""
    q, k, v = split(nnf.linear(x, w["a"])), split(nnf.linear(x, w["few"]), 1), split(nnf.linear(x, w["less"]), 1)
    q, k = rope(q, w), rope(k, w)
    k, v = (mark(t) if at == n else t for t, n in ((k, "k"), (v, "v")))
    k, v = (t[:, :, None].expand(2, 1, HEADS, 3, D // HEADS).reshape(2, HEADS, 3, D // HEADS) for t in (k, v))
    return nnf.linear(merged((q @ k.transpose(-1, -2)).softmax(-1) @ v), w["d"])


def whole(x: Tensor, w: W) -> Tensor:
    q, k, v = (split(nnf.linear(x, w[n])) for n in "abc")
    return nnf.linear(merged(nnf.scaled_dot_product_attention(mark(q), k, v)), w["d"])


def gated(x: Tensor, w: W, at: str, f: Callable[[Tensor], Tensor] = nnf.silu) -> Tensor:
    gate, up = nnf.linear(x, w["a"]), nnf.linear(x, w["b"])
    gate, up = mark(gate) if at == "gate" else gate, mark(up) if at == "up" else up
    hidden = f(gate) * up
    return nnf.linear(mark(hidden) if at == "down" else hidden, w["c"])


def head(x: Tensor, w: W) -> Tensor:
    return nnf.linear(rms(x), w["h"])


S, R, SHIFT, SIGN, P = Kind.SCALE, Kind.ROTATE, Kind.SHIFT, Kind.SIGN, Kind.PERMUTE
HEAD = (1, 3)
PER_HEAD = D // HEADS
# name: (kind, axes, body, how many classes are free or None, the input)
ROWS: dict[str, tuple[Any, tuple[int, ...], Body, int | None, Tensor]] = {
    "1 gain, all linear": (S, (-1,), lambda x, i, w: [nnf.linear(y := mark(rms(x, w["g"])), w["a"]), nnf.linear(y, w["b"])], D, X),
    "1 gain, also returned": (S, (-1,), lambda x, i, w: [nnf.linear(y := mark(rms(x, w["g"])), w["a"]), y], None, X),
    "1 gain, also gated": (S, (-1,), lambda x, i, w: [nnf.linear(y := mark(rms(x, w["g"])), w["a"]), y.sigmoid().sum(-1)], None, X),
    "1 gain as 1 + g": (S, (-1,), lambda x, i, w: nnf.linear(mark(rms(x) * (1 + w["g"])), w["a"]), D, X),
    "2 router and experts": (
        S,
        (-1,),
        lambda x, i, w: nnf.linear(y := mark(rms(x, w["g"])), w["a"]) * nnf.linear(y, w["router"]).softmax(-1)[..., :1] + nnf.linear(y, w["b"]),
        D,
        X,
    ),
    "3 layer norm": (S, (-1,), lambda x, i, w: nnf.linear(mark(layer_norm(x, w["g"], w["s"])), w["a"]), D, X),
    "3 layer norm's shift": (SHIFT, (-1,), lambda x, i, w: nnf.linear(mark(layer_norm(x, w["g"], w["s"])), w["a"]), D, X),
    "4 stream of layer norms": (R, (-1,), lambda x, i, w: nnf.linear(layer_norm(stream(i, w, layer_norm)), w["h"]), D, X),
    "4 an input feeds it": (R, (-1,), lambda x, i, w: nnf.linear(layer_norm(stream(i, w, layer_norm) + x), w["h"]), None, X),
    "6 shift after a norm, then zeros": (
        SHIFT,
        (-1,),
        lambda x, i, w: nnf.linear(mark(layer_norm(x, w["g"], w["s"])).masked_fill(x[..., :1] > 0, 0.0), w["a"]),
        None,
        X,
    ),
    "7 stream": (R, (-1,), lambda x, i, w: head(stream(i, w), w), D, X),
    "7 stream, one number on a branch": (R, (-1,), lambda x, i, w: head(stream(i, w, scaled=0.3), w), D, X),
    "7 stream, gain": (R, (-1,), lambda x, i, w: nnf.linear(rms(stream(i, w), w["g"]), w["h"]), None, X),
    "7 stream, even gain": (R, (-1,), lambda x, i, w: nnf.linear(rms(stream(i, w), w["even"]), w["h"]), D, X),
    "7 a scale per channel on a branch": (R, (-1,), lambda x, i, w: head(stream(i, w, scaled=w["g"]), w), None, X),
    "7 a normed branch": (R, (-1,), lambda x, i, w: head(stream(i, w) + rms(nnf.linear(x, w["b"]), w["g"]), w), None, X),
    "7 raw output": (R, (-1,), lambda x, i, w: [head(y := stream(i, w), w), y], None, X),
    "7 a branch that can't": (R, (-1,), lambda x, i, w: head(y := stream(i, w), w) + nnf.gelu(y), None, X),
    "8 scale of the stream": (S, (-1,), lambda x, i, w: head(stream(i, w), w), None, X),
    "9 up": (S, (-1,), lambda x, i, w: gated(x, w, "up"), D, X),
    "9 gate": (S, (-1,), lambda x, i, w: gated(x, w, "gate"), None, X),
    "9 gate, relu": (S, (-1,), lambda x, i, w: gated(x, w, "gate", nnf.relu), D, X),
    "9 gate, relu squared": (S, (-1,), lambda x, i, w: gated(x, w, "gate", lambda t: t.relu().square()), D, X),
    "10 permutation": (P, (-1,), lambda x, i, w: gated(x, w, "down"), D, X),
    "10 sign of up": (SIGN, (-1,), lambda x, i, w: gated(x, w, "up"), D, X),
    "10 sign of gate": (SIGN, (-1,), lambda x, i, w: gated(x, w, "gate"), None, X),
    "10 rotation": (R, (-1,), lambda x, i, w: gated(x, w, "down"), None, X),
    "11 tied head, no gain": (R, (-1,), lambda x, i, w: nnf.linear(rms(stream(i, w)), w["e"]), D, X),
    "11 tied head, gain": (R, (-1,), lambda x, i, w: nnf.linear(rms(stream(i, w), w["g"]), w["e"]), None, X),
    "11 tied head's gain": (S, (-1,), lambda x, i, w: nnf.linear(mark(rms(nnf.embedding(i, w["e"]), w["g"])), w["e"]), None, X),
    "11 tied head, sign": (SIGN, (-1,), lambda x, i, w: nnf.linear(rms(mark(nnf.embedding(i, w["e"])), w["g"]), w["e"]), D, X),
    "12 values": (R, HEAD, lambda x, i, w: attended(x, w, "v"), D, X),
    "12 values, scale": (S, HEAD, lambda x, i, w: attended(x, w, "v"), D, X),
    "12 values shared by heads": (R, (-1,), lambda x, i, w: grouped(x, w, "v"), PER_HEAD, X),
    "12 values, gate after": (R, HEAD, lambda x, i, w: nnf.linear(merged(gate_after(x, w)), w["d"]), None, X),
    "12 values, gate after, scale": (S, HEAD, lambda x, i, w: nnf.linear(merged(gate_after(x, w)), w["d"]), D, X),
    "13 shift of values": (SHIFT, HEAD, lambda x, i, w: attended(x, w, "v"), D, X),
    "13 dropped rows": (SHIFT, HEAD, lambda x, i, w: masked(x, w), None, X),
    "14 queries and keys": (S, HEAD, lambda x, i, w: attended(x, w, "k"), D, X),
    "14 rotary pairs, after": (S, HEAD, lambda x, i, w: attended(x, w, "k", rotary=True), D // 2, X),
    "14 rotary pairs": (S, HEAD, lambda x, i, w: before_rope(x, w), D // 2, X),
    "14 keys shared by heads": (S, (-1,), lambda x, i, w: grouped(x, w, "k"), PER_HEAD // 2, X),
    "14 normed keys": (S, HEAD, lambda x, i, w: attended(x, w, "k", norm=True), PER_HEAD, X),
    "15 rotation of keys": (R, HEAD, lambda x, i, w: attended(x, w, "k"), D, X),
    "15 rotation before rotary": (R, HEAD, lambda x, i, w: before_rope(x, w), None, X),
    "16 keys, after rotary": (SHIFT, HEAD, lambda x, i, w: attended(x, w, "k", rotary=True), None, X),
    "16 keys, without rotary": (SHIFT, HEAD, lambda x, i, w: attended(x, w, "k"), D, X),
    "16 keys, before rotary": (SHIFT, HEAD, lambda x, i, w: before_rope(x, w), None, X),
    "16 keys, capped scores": (SHIFT, HEAD, lambda x, i, w: attended(x, w, "k", cap=True), None, X),
    "17 one scale of a head's scores": (S, (1,), lambda x, i, w: whole(x, w), HEADS, X),
    "17 the same, opened": (S, (1,), lambda x, i, w: attended(x, w, "q"), None, X),
    "18 two layers": (R, (-1,), lambda x, i, w: nnf.linear(mark(nnf.linear(x, w["few"])), w["few"].T), PER_HEAD, X),
    "18 latent norm": (R, (-1,), lambda x, i, w: nnf.linear(nnf.rms_norm(mark(nnf.linear(x, w["few"])), (4,)), w["less"].T), PER_HEAD, X),
    "18 latent kept": (R, (-1,), lambda x, i, w: [nnf.linear(y := mark(nnf.linear(x, w["few"])), w["less"].T), y], None, X),
}


def gate_after(x: Tensor, w: W) -> Tensor:
    """A gate per channel on what attention gives."""
    q, k, v = (split(nnf.linear(x, w[n])) for n in "abc")
    return nnf.scaled_dot_product_attention(q, k, mark(v)) * split(nnf.linear(x, w["f"])).sigmoid()


def masked(x: Tensor, w: W) -> Tensor:
    """A mask from the input, which may hide every key from a row."""
    q, k, v = (split(nnf.linear(x, w[n])) for n in "abc")
    mask = (x[..., 0] > 0)[:, None, None].expand(-1, -1, 3, -1)
    return nnf.linear(merged(nnf.scaled_dot_product_attention(q, k, mark(v), mask)), w["d"])


REFUSED: dict[str, tuple[str, str]] = {  # the op that stops, and why
    "1 gain, also returned": ("output", "the value is an output of the program"),
    "1 gain, also gated": ("sigmoid", "sigmoid (sigmoid) doesn't commute with a scale"),
    "4 an input feeds it": ("x", "x is an input of the program"),
    "6 shift after a norm, then zeros": ("masked_fill", "masked_fill puts in a number that a shift would change"),
    "7 stream, gain": ("rms_norm_1", "rms_norm_1 scales the channels by different gains, g"),
    "7 a scale per channel on a branch": ("mul", "mul multiplies the channels by different factors, linear"),
    "7 a normed branch": ("rms_norm_1", "rms_norm_1 scales the channels by different gains, g"),
    "7 raw output": ("output", "the value is an output of the program"),
    "7 a branch that can't": ("gelu", "gelu (gelu) doesn't commute with a rotate"),
    "8 scale of the stream": ("rms_norm", "the statistics of rms_norm would change"),
    "9 gate": ("silu", "silu (silu) doesn't commute with a scale"),
    "10 sign of gate": ("silu", "silu (silu) doesn't commute with a sign"),
    "10 rotation": ("mul", "mul multiplies the channels by different factors, linear_1"),
    "11 tied head, gain": ("rms_norm_1", "rms_norm_1 scales the channels by different gains, g"),
    "11 tied head's gain": ("rms_norm", "the statistics of rms_norm would change"),
    "12 values, gate after": ("mul", "mul multiplies the channels by different factors, sigmoid"),
    "13 dropped rows": (
        "scaled_dot_product_attention",
        "scaled_dot_product_attention: the mask expand may hide all keys from a row, which then gives 0",
    ),
    "15 rotation before rotary": ("mul_2", "mul_2 multiplies the channels by different factors, cos"),
    "16 keys, after rotary": ("mul_2", "mul_2: a shift times a factor that isn't one number would vary with it"),
    "16 keys, before rotary": ("mul_2", "mul_2: a shift times a factor that isn't one number would vary with it"),
    "16 keys, capped scores": ("tanh", "tanh lies between matmul and a softmax, which then can't take off a shift of transpose_3"),
    "17 the same, opened": ("matmul", "matmul: a scale per batch entry"),
    "18 latent kept": ("output", "the value is an output of the program"),
}


def row_for(name: str, wanted: Any) -> Row:
    kind, axes, body, _, x = ROWS[name]

    def taken(x: Tensor, i: Tensor, **weights: Tensor) -> Any:
        return body(x, i, weights)

    return Row(taken, kind, wanted, axes, (x, IDS), WEIGHTS)


@pytest.mark.parametrize("name", list(ROWS))
def test_folds(name: str) -> None:
    free = ROWS[name][3]
    confirm(row_for(name, REFUSED[name] if free is None else free))
