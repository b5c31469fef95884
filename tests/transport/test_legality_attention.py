"""Signs of keys and queries, and constants added to keys: every situation of the table in which they may or may not be folded.

Sign: q and k change together, q_c k_c stays. Shift: all scores of a row move alike, which softmax doesn't see. Source: PTQ4SAM
(arXiv 2405.03144) for the signs; the shift is a gauge of softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from fxcompress.passes.tidy.fold_constants import FoldConstants
from fxcompress.transport import Kind, Seed
from tests.passes.helpers import function, node, run
from tests.transport.helpers import LIMIT, proved, solve, vector_for
from tests.transport.legality import F64, Row, confirm, mark, rand

TOKENS, HEADS, SIZE = 5, 4, 8
WIDTH, FULL, PAIRS = HEADS * SIZE, HEADS * SIZE, HEADS * SIZE // 2
X = rand(2, TOKENS, WIDTH, seed=9)
WEIGHTS = {n: rand(WIDTH, WIDTH, seed=i) for i, n in enumerate(("wq", "wk", "wv", "wo"))} | {
    "bk": rand(WIDTH, seed=5),
    "g": rand(SIZE, seed=6) + 1,
    "h": rand(SIZE, seed=16) + 1,
    "t": rand(TOKENS, SIZE, seed=7),
    "e": rand(1, HEADS, 1, SIZE, seed=8),
    "few": rand(2 * SIZE, WIDTH, seed=10),
    "fused": rand(3 * WIDTH, WIDTH, seed=11),
    "low": rand(2, WIDTH, seed=12),
    "high": rand(WIDTH, 2, seed=13),
    "taps": rand(WIDTH, 1, 1, seed=14),
    "wide": rand(WIDTH, 1, 3, seed=15),
}


class W:
    """The weights by attribute."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.__dict__.update(weights)

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(name)


def split(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def out(x: Tensor, w: W) -> Tensor:
    return nnf.linear(x.transpose(1, 2).flatten(-2), w.wo)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * 0.3


def projected(x: Tensor, w: W) -> tuple[Tensor, Tensor, Tensor]:
    return split(nnf.linear(x, w.wq)), split(nnf.linear(x, w.wk, w.bk)), split(nnf.linear(x, w.wv))


def attended(change: Callable[..., Tensor]) -> Callable[..., Any]:
    """change(q, k, v, weights, x) -> values per head; the keys are marked as they come from their projection."""

    def body(x: Tensor, w: W) -> Tensor:
        q, k, v = projected(x, w)
        return out(change(q, mark(k), v, w, x), w)

    return body


def plainly(s: Tensor, v: Tensor) -> Tensor:
    return s.softmax(-1) @ v


def half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def adjacent(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def rope(x: Tensor, turn: Callable[[Tensor], Tensor] = half) -> Tensor:
    rates = torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=F64)[: x.shape[-1] // 2]
    angles = torch.arange(x.shape[2], dtype=F64)[:, None] * rates
    pairs = torch.cat([angles, angles], -1) if turn is half else angles.repeat_interleave(2, -1)
    return x * pairs.cos() + turn(x) * pairs.sin()


def turned(x: Tensor) -> Tensor:
    """Adjacent pairs as complex numbers."""
    angles = torch.arange(x.shape[2], dtype=F64)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=F64)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def partly(x: Tensor) -> Tensor:
    """Half of a head's channels rotated."""
    return torch.cat([rope(x[..., :4]), x[..., 4:]], -1)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def fused(x: Tensor, w: W) -> Tensor:
    q, k, v = nnf.linear(x, w.fused).reshape(2, TOKENS, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
    return out(nnf.scaled_dot_product_attention(q, mark(k), v), w)


def grouped(x: Tensor, w: W) -> Tensor:
    k, v = split(nnf.linear(x, w.few), 2), split(nnf.linear(x, w.few.flip(0)), 2)
    k, v = (t[:, :, None].expand(2, 2, 2, TOKENS, SIZE).reshape(2, HEADS, TOKENS, SIZE) for t in (mark(k), v))
    return out(nnf.scaled_dot_product_attention(split(nnf.linear(x, w.wq)), k, v), w)


def tied(x: Tensor, w: W) -> Tensor:
    q, k, v = split(nnf.linear(x, w.wq)), split(nnf.linear(x, w.wq)), split(nnf.linear(x, w.wv))
    return out(plainly(scores(q, mark(k)), v), w)


def lora(x: Tensor, w: W) -> Tensor:
    q, v = split(nnf.linear(x, w.wq)), split(nnf.linear(x, w.wv))
    k = split(nnf.linear(x, w.wk) + nnf.linear(nnf.linear(x, w.low), w.high))
    return out(plainly(scores(q, mark(k)), v), w)


def convolved(taps: str, padding: int) -> Callable[..., Any]:
    def body(x: Tensor, w: W) -> Tensor:
        q, _, v = projected(x, w)
        k = nnf.conv1d(mark(nnf.linear(x, w.wk)).transpose(1, 2), getattr(w, taps), None, padding=padding, groups=WIDTH)
        return out(plainly(scores(q, split(k.transpose(1, 2))), v), w)

    return body


def kept(x: Tensor, w: W) -> Any:
    """The keys are handed out as well: a cache."""
    q, k, v = projected(x, w)
    k = mark(k)
    return out(plainly(scores(q, k), v), w), k


def cached(x: Tensor, past: Tensor, w: W) -> Tensor:
    q, k, v = projected(x, w)
    keys = torch.cat([past, mark(k)], 2)
    return out(plainly(scores(q, keys), torch.cat([past, v], 2)), w)


def joint(x: Tensor, w: W) -> Tensor:
    """Keys of two projections side by side, as for text and image."""
    q, k, v = projected(x, w)
    others = split(nnf.linear(x, w.wv, w.bk))
    return out(plainly(scores(q, torch.cat([mark(k), others], 2)), torch.cat([v, v], 2)), w)


def extra(x: Tensor, w: W) -> Tensor:
    """One key more that is learned."""
    q, k, v = projected(x, w)
    more, value = w.e.expand(2, -1, -1, -1), (w.e * 2).expand(2, -1, -1, -1)
    return out(plainly(scores(q, torch.cat([mark(k), more], 2)), torch.cat([v, value], 2)), w)


def zero_key(x: Tensor, w: W) -> Tensor:
    """One key more that is 0, made in the graph."""
    q, k, v = projected(x, w)
    k = mark(k)
    key, value = torch.zeros_like(k[:, :, :1]), torch.zeros_like(v[:, :, :1])
    return out(plainly(scores(q, torch.cat([k, key], 2)), torch.cat([v, value], 2)), w)


def normed(norm: Callable[[Tensor, W], Tensor]) -> Callable[..., Any]:
    """Keys marked after their norm."""

    def body(x: Tensor, w: W) -> Tensor:
        q, k, v = projected(x, w)
        return out(plainly(scores(norm(q, w), mark(norm(k, w))), v), w)

    return body


def lse(q: Tensor, k: Tensor, v: Tensor, w: W, x: Tensor) -> Tensor:
    s = scores(q, k)
    return s.softmax(-1) @ v + s.exp().sum(-1, keepdim=True).log()


def added(q: Tensor, k: Tensor, v: Tensor, w: W) -> Tensor:
    """Examples and heads in one axis, positions added with the product in one op."""
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    s = torch.baddbmm(w.t[:TOKENS, :TOKENS].expand(len(q), -1, -1), q, k.transpose(1, 2), beta=1.5, alpha=0.25)
    weights = s.view(-1, HEADS, TOKENS, TOKENS).softmax(-1).view(s.shape)
    return torch.bmm(weights, v).view(-1, HEADS, TOKENS, SIZE)


SITUATIONS: dict[str, tuple[Callable[..., Any], int | None, int | None]] = {  # body; how many signs of the keys, shifts of the keys are free
    "plain": (attended(lambda q, k, v, w, x: nnf.scaled_dot_product_attention(q, k, v)), FULL, FULL),
    "opened": (attended(lambda q, k, v, w, x: plainly(scores(q, k), v)), FULL, FULL),
    "fused weight": (fused, FULL, FULL),
    "scale on the keys": (attended(lambda q, k, v, w, x: plainly(q @ (k * 0.3).transpose(-1, -2), v)), FULL, FULL),
    "mask": (attended(lambda q, k, v, w, x: plainly(scores(q, k) + w.t[:, :TOKENS], v)), FULL, FULL),
    "relative positions of q": (
        attended(lambda q, k, v, w, x: plainly(scores(q, k) + torch.einsum("bhqd,kd->bhqk", q, w.t), v)),
        SIZE,
        FULL,
    ),
    "relative positions of k": (attended(lambda q, k, v, w, x: plainly(scores(q, k) + torch.einsum("bhkd,qd->bhqk", k, w.t), v)), SIZE, None),
    "rotary half": (attended(lambda q, k, v, w, x: plainly(scores(rope(q), rope(k)), v)), PAIRS, None),
    "rotary adjacent": (attended(lambda q, k, v, w, x: plainly(scores(rope(q, adjacent), rope(k, adjacent)), v)), PAIRS, None),
    "rotary complex": (attended(lambda q, k, v, w, x: plainly(scores(turned(q), turned(k)), v)), PAIRS, None),
    "rotary in part": (attended(lambda q, k, v, w, x: plainly(scores(partly(q), partly(k)), v)), HEADS * 6, HEADS * 4),
    "rms before": (attended(lambda q, k, v, w, x: plainly(scores(rms(q) * w.g, rms(k) * w.g), v)), FULL, None),
    "rms after": (normed(lambda x, w: rms(x) * w.g), FULL, None),
    "rms with a shift after": (normed(lambda x, w: rms(x) * w.g + w.t[0]), SIZE, SIZE),
    "layer norm before": (
        attended(lambda q, k, v, w, x: plainly(scores(nnf.layer_norm(q, (SIZE,)), nnf.layer_norm(k, (SIZE,), w.g)), v)),
        None,
        None,
    ),
    "layer norm after": (normed(lambda x, w: nnf.layer_norm(x, (SIZE,), w.g, w.t[0])), SIZE, SIZE),
    "l2": (attended(lambda q, k, v, w, x: plainly(scores(nnf.normalize(q, dim=-1), nnf.normalize(k, dim=-1)), v)), FULL, None),
    "grouped": (grouped, 2 * SIZE, 2 * SIZE),
    "shared by two queries": (
        attended(lambda q, k, v, w, x: plainly(scores(q, k), v) + plainly(scores(split(nnf.linear(x, w.wv)), k), v)),
        FULL,
        FULL,
    ),
    "added to scores": (attended(lambda q, k, v, w, x: added(q, k, v, w)), FULL, FULL),
    "k is v": (attended(lambda q, k, v, w, x: plainly(scores(q, k), k)), FULL, FULL),
    "k is added": (attended(lambda q, k, v, w, x: plainly(scores(q, k), v) + k), FULL, FULL),
    "k goes through gelu": (attended(lambda q, k, v, w, x: plainly(scores(q, k), nnf.gelu(k))), None, None),
    "k is an output": (kept, None, None),
    "cache": (cached, None, None),
    "joint": (joint, FULL, FULL),
    "learned key": (extra, FULL, FULL),
    "key of zeros": (zero_key, FULL, FULL),
    "soft cap": (attended(lambda q, k, v, w, x: plainly((scores(q, k) / 5).tanh() * 5, v)), FULL, None),
    "sigmoid": (attended(lambda q, k, v, w, x: scores(q, k).sigmoid() @ v), FULL, None),
    "relu": (attended(lambda q, k, v, w, x: scores(q, k).relu() @ v), FULL, None),
    "linear": (attended(lambda q, k, v, w, x: q @ (k.transpose(-1, -2) @ v)), FULL, None),
    "sums of exponentials": (attended(lse), FULL, None),
    "over queries": (attended(lambda q, k, v, w, x: scores(q, k).softmax(-2) @ v), FULL, None),
    "depthwise pointwise": (convolved("taps", 0), WIDTH, WIDTH),
    "depthwise padded": (convolved("wide", 1), WIDTH, None),
    "one weight for q and k": (tied, FULL, FULL),
    "low rank beside": (lora, FULL, FULL),
}


REFUSED: dict[tuple[str, Kind], tuple[str, str]] = {  # the op that stops, and why
    ("relative positions of k", Kind.SHIFT): ("einsum", "einsum: a shift of clone times t varies with it"),
    ("rotary half", Kind.SHIFT): ("mul_4", "mul_4: a shift times a factor that isn't one number would vary with it"),
    ("rotary adjacent", Kind.SHIFT): ("mul_4", "mul_4: a shift times a factor that isn't one number would vary with it"),
    ("rotary complex", Kind.SHIFT): ("view_as_complex_1", "view_as_complex_1 pairs real numbers into complex ones"),
    ("rms before", Kind.SHIFT): ("pow_2", "pow_2 doesn't commute with a shift"),
    ("rms after", Kind.SHIFT): ("mul_3", "mul_3: a shift times a factor that isn't one number would vary with it"),
    ("layer norm before", Kind.SIGN): ("layer_norm_1", "the statistics of layer_norm_1 would change"),
    ("layer norm before", Kind.SHIFT): ("layer_norm_1", "the statistics of layer_norm_1 would change"),
    ("l2", Kind.SHIFT): ("linalg_vector_norm_1", "linalg_vector_norm_1 measures the channels that a shift would change"),
    ("k goes through gelu", Kind.SIGN): ("gelu", "gelu (gelu) doesn't commute with a sign"),
    ("k goes through gelu", Kind.SHIFT): ("gelu", "gelu (gelu) doesn't commute with a shift"),
    ("k is an output", Kind.SIGN): ("output", "the value is an output of the program"),
    ("k is an output", Kind.SHIFT): ("output", "the value is an output of the program"),
    ("cache", Kind.SIGN): ("past", "past is an input of the program"),
    ("cache", Kind.SHIFT): ("past", "past is an input of the program"),
    ("soft cap", Kind.SHIFT): ("tanh", "tanh lies between matmul and a softmax, which then can't take off a shift of transpose_3"),
    ("sigmoid", Kind.SHIFT): ("matmul", "matmul: a shift of transpose_3 times transpose varies with it"),
    ("relu", Kind.SHIFT): ("matmul", "matmul: a shift of transpose_3 times transpose varies with it"),
    ("linear", Kind.SHIFT): ("matmul", "matmul: rows of transpose_2 aren't known to sum to one"),
    ("sums of exponentials", Kind.SHIFT): ("matmul", "matmul: a shift of transpose_3 times transpose varies with it"),
    ("over queries", Kind.SHIFT): ("matmul", "matmul: a shift of transpose_3 times transpose varies with it"),
    ("depthwise padded", Kind.SHIFT): ("conv1d", "conv1d pads with zeros, which a shift would have to change"),
}


def row_for(body: Callable[..., Any], kind: Kind, wanted: Any) -> Row:
    def single(x: Tensor, **weights: Tensor) -> Any:
        return body(x, W(weights))

    def double(x: Tensor, past: Tensor, **weights: Tensor) -> Any:
        return body(x, past, W(weights))

    inputs = (X, rand(2, HEADS, 3, SIZE, seed=20)) if body is cached else (X,)
    return Row(double if body is cached else single, kind, wanted, _axes(body), inputs, WEIGHTS)


def _axes(body: Callable[..., Any]) -> tuple[int, ...]:
    return (-1,) if body.__qualname__.startswith("convolved") else (1, 3)


CASES = [(name, kind, n) for name, (_, *counts) in SITUATIONS.items() for kind, n in zip((Kind.SIGN, Kind.SHIFT), counts, strict=True)]


@pytest.mark.parametrize(("name", "kind", "free"), CASES)
def test_keys(name: str, kind: Kind, free: int | None) -> None:
    confirm(row_for(SITUATIONS[name][0], kind, REFUSED[name, kind] if free is None else free))


def test_keys_picked_from_one_weight_by_number() -> None:
    """One key and one value for all queries, from one weight with them, any number of examples: the tables of angles stay as they are."""

    def body(x: Tensor, places: Tensor, w: Tensor, v: Tensor, inverse: Tensor) -> Tensor:
        y = nnf.linear(x, w).view(*x.shape[:2], HEADS + 2, SIZE)
        q, k, value = (t.transpose(1, 2) for t in (y[:, :, :-2], y[:, :, [-2]], y[:, :, [-1]]))
        angles = (places[..., None] * inverse).repeat(1, 1, 2)[:, None]
        q, k = (t * angles.cos() + torch.cat([-t[..., SIZE // 2 :], t[..., : SIZE // 2]], -1) * angles.sin() for t in (q, k))
        return nnf.linear(nnf.scaled_dot_product_attention(q, k, value, enable_gqa=True).transpose(1, 2).flatten(-2), v)

    weights = {"w": rand((HEADS + 2) * SIZE, WIDTH, seed=30), "v": rand(WIDTH, HEADS * SIZE, seed=31), "inverse": rand(SIZE // 2, seed=32)}
    places = torch.arange(TOKENS, dtype=X.dtype).expand(len(X), -1)
    program, _ = run(function(body, X, places, **weights), FoldConstants(), check="off")
    attention = node(program, "scaled_dot_product_attention")
    for kind, operand, free in ((Kind.SCALE, 1, SIZE // 2), (Kind.SIGN, 1, SIZE // 2), (Kind.SCALE, 2, SIZE), (Kind.SIGN, 2, SIZE)):
        plan = solve(program, kind, Seed(attention.args[operand], (1, 3)))
        assert (plan.count, plan.is_whole) == (free, True), (kind, operand, plan.reason())
        figures = proved(program, plan, vector_for(plan))
        assert max(figures["output"], figures["audit"]) < LIMIT
        assert not figures["broken"]


def test_a_scale_of_normed_keys_lands_in_the_gain_that_heads_share() -> None:
    """Their projection can't take it: the norm lies between."""

    def gained(x: Tensor, w: W) -> Tensor:
        q, k, v = projected(x, w)
        return out(plainly(scores(rms(q) * w.g, mark(rms(k) * w.h)), v), w)

    confirm(row_for(gained, Kind.SCALE, SIZE))
