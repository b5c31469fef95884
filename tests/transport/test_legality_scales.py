"""Scales of a layer's input, given to what comes before it: every pattern of the table, exact or refused by the op that doesn't take it.

x -> x / r before a linear layer or convolution whose columns take r. Source: TCAQ-DM (arXiv 2412.16700), SmoothQuant (arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from fxcompress.transport import Kind
from tests.transport.legality import Row, confirm, mark, rand

C, N, HEADS = 8, 6, 2
X, E, IMAGE = rand(2, 3, C, seed=1), rand(2, N, seed=2), rand(2, C, 5, 5, seed=3)
WEIGHTS = {n: rand(C, C, seed=i) for i, n in enumerate("abcd")} | {
    "g": rand(C, seed=10).abs() + 1,
    "h": rand(C, seed=11),
    "spread": rand(C, seed=24).abs() + 0.5,
    "k": rand(C, C, 3, 3, seed=12),
    "j": rand(C, C, 3, 3, seed=13),
    "wide": rand(2 * C, C, seed=14),
    "deep": rand(C, 2 * C, seed=15),
    "deepk": rand(C, 2 * C, 3, 3, seed=16),
    "taps": rand(C, 1, 3, 3, seed=17),
    "time": rand(C, N, seed=18),
    "times": rand(2 * C, N, seed=19),
    "mixed": rand(4, 2, 1, 1, seed=20),
    "flat": rand(C, C, 1, 1, seed=21),
    "step": rand(1, C, seed=22),
    "steps": rand(2, 2 * C, seed=23),
}
ON_IMAGES = (1,)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attended(x: Tensor, e: Tensor, w: dict[str, Tensor], where: str) -> Tensor:
    q, k, v = (split(nnf.linear(x, w[n])) for n in "abc")
    q, v = mark(q) if where == "q" else q, mark(v) if where == "v" else v
    return nnf.linear(nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2), w["d"])


def modulated(x: Tensor, e: Tensor, w: dict[str, Tensor], other: bool = False) -> Any:
    """Scale and shift from one layer of the time, by halves."""
    scale, shift = nnf.linear(e, w["times"], w["step"].repeat(1, 2)[0]).chunk(2, -1)
    y = nnf.linear(mark(nnf.layer_norm(x, (C,)) * (1 + scale[:, None]) + shift[:, None]), w["a"])
    return (y, nnf.silu(shift)) if other else y


def modulated_twice(x: Tensor, e: Tensor, w: dict[str, Tensor]) -> Any:
    """Norms that are spelled out; their scale and shift come from one layer for two blocks, each with a step of its own."""
    h, made = nnf.linear(x, w["a"]), nnf.linear(e, w["times"])[:, None]
    for number in range(2):
        scale, shift = (made + w["steps"][number]).chunk(2, -1)
        n = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * (1 + scale) + shift
        h = h + nnf.linear(n if number else mark(n), w["b"])
    return nnf.layer_norm(h, (C,))


def embedded(x: Tensor, e: Tensor, w: dict[str, Tensor], norm: bool = False) -> Tensor:
    """An image with the time added, both from layers."""
    y = nnf.conv2d(x, w["k"]) + nnf.linear(e, w["time"], w["h"])[:, :, None, None]
    return nnf.conv2d(mark(nnf.group_norm(y, 2) if norm else y.relu()), w["j"])


def normed(x: Tensor, w: dict[str, Tensor], plain: bool = False) -> Tensor:
    """A batch norm in eval mode."""
    gain, bias = (None, None) if plain else (w["g"], w["step"].reshape(-1))
    return nnf.batch_norm(x, w["h"], w["spread"], gain, bias, eps=0.1)


Body = Callable[[Tensor, Tensor, dict[str, Tensor]], Any]
# name: (input, axes, body, how many classes are free or None)
ROWS: dict[str, tuple[Tensor, tuple[int, ...], Body, int | None]] = {
    "layer norm": (X, (-1,), lambda x, e, w: nnf.linear(mark(nnf.layer_norm(x, (C,), w["g"], w["h"])), w["a"]), C),
    "layer norm without gain": (X, (-1,), lambda x, e, w: nnf.linear(mark(nnf.layer_norm(x, (C,))), w["a"]), C),
    "layer norm, q k v": (
        X,
        (-1,),
        lambda x, e, w: [nnf.linear(y, w[n]) for y in [mark(nnf.layer_norm(x, (C,), w["g"], w["h"]))] for n in "abc"],
        C,
    ),
    "a consumer that can't take it": (
        X,
        (-1,),
        lambda x, e, w: [nnf.linear(y := mark(nnf.layer_norm(x, (C,), w["g"], w["h"])), w["a"]), nnf.silu(y)],
        None,
    ),
    "group norm": (IMAGE, (1,), lambda x, e, w: nnf.conv2d(mark(nnf.group_norm(x, 2, w["g"], w["h"])), w["k"], padding=1), C),
    "group norm, silu": (IMAGE, (1,), lambda x, e, w: nnf.conv2d(mark(nnf.silu(nnf.group_norm(x, 2, w["g"], w["h"]))), w["k"]), None),
    "relu": (X, (-1,), lambda x, e, w: nnf.linear(mark(nnf.linear(x, w["a"], w["h"]).relu()), w["b"]), C),
    "leaky relu": (IMAGE, (1,), lambda x, e, w: nnf.conv2d(mark(nnf.leaky_relu(nnf.conv2d(x, w["k"]), 0.1)), w["j"]), C),
    "prelu": (IMAGE, (1,), lambda x, e, w: nnf.conv2d(mark(nnf.prelu(nnf.conv2d(x, w["k"]), w["g"])), w["j"]), C),
    "average pool": (IMAGE, (1,), lambda x, e, w: nnf.conv2d(mark(nnf.avg_pool2d(nnf.conv2d(x, w["k"]), 2)), w["flat"]), C),
    "max pool": (IMAGE, (1,), lambda x, e, w: nnf.conv2d(mark(nnf.max_pool2d(nnf.conv2d(x, w["k"]), 2)), w["flat"]), C),
    "nearest": (IMAGE, (1,), lambda x, e, w: nnf.conv2d(mark(nnf.interpolate(nnf.conv2d(x, w["k"]), scale_factor=2.0)), w["j"]), C),
    "bilinear": (
        IMAGE,
        (1,),
        lambda x, e, w: nnf.conv2d(mark(nnf.interpolate(nnf.conv2d(x, w["k"]), scale_factor=2.0, mode="bilinear")), w["j"]),
        C,
    ),
    "zero pad": (IMAGE, (1,), lambda x, e, w: nnf.conv2d(mark(nnf.pad(nnf.conv2d(x, w["k"]), (1, 1, 1, 1))), w["j"]), C),
    "reshape, permute": (IMAGE, (-1,), lambda x, e, w: nnf.linear(mark(nnf.conv2d(x, w["k"]).flatten(2).transpose(1, 2)), w["a"]), C),
    "swiglu": (X, (-1,), lambda x, e, w: nnf.linear(mark(nnf.silu(nnf.linear(x, w["a"])) * nnf.linear(x, w["b"])), w["c"]), C),
    "geglu": (X, (-1,), lambda x, e, w: nnf.linear(mark((y := nnf.linear(x, w["wide"]))[..., :C] * nnf.gelu(y[..., C:])), w["c"]), C),
    "silu spelled out": (X, (-1,), lambda x, e, w: nnf.linear(mark((y := nnf.linear(x, w["a"])) * y.sigmoid()), w["c"]), None),
    "time added": (IMAGE, (1,), embedded, C),
    "norm in between": (
        IMAGE,
        (1,),
        lambda x, e, w: nnf.conv2d(nnf.group_norm(mark(nnf.conv2d(x, w["k"]) + nnf.linear(e, w["time"])[:, :, None, None]), 2), w["j"]),
        None,
    ),
    "scale and shift": (X, (-1,), modulated, C),
    "scale and shift read elsewhere": (X, (-1,), lambda x, e, w: modulated(x, e, w, other=True), None),
    "scale and shift of two norms spelled out": (X, (-1,), modulated_twice, C),
    "values": (X, (1, 3), lambda x, e, w: attended(x, e, w, "v"), C),
    "queries": (X, (1, 3), lambda x, e, w: attended(x, e, w, "q"), C),
    "layer norm after": (X, (-1,), lambda x, e, w: nnf.linear(nnf.layer_norm(mark(nnf.linear(x, w["a"])), (C,)), w["b"]), None),
    "closed residual": (
        X,
        (-1,),
        lambda x, e, w: nnf.linear(mark((y := nnf.linear(x, w["a"])) + nnf.linear(nnf.linear(y, w["b"]), w["c"])), w["d"]),
        C,
    ),
    "open residual": (X, (-1,), lambda x, e, w: nnf.linear(mark(x + nnf.linear(x, w["a"])), w["b"]), None),
    "cat": (
        IMAGE,
        (1,),
        lambda x, e, w: nnf.conv2d(mark(torch.cat([nnf.conv2d(x, w["k"]), nnf.conv2d(x, w["j"])], 1)), w["deepk"]),
        2 * C,
    ),
    "cat with a branch that can't": (
        IMAGE,
        (1,),
        lambda x, e, w: nnf.conv2d(mark(torch.cat([nnf.conv2d(x, w["k"]), nnf.silu(nnf.conv2d(x, w["j"]))], 1)), w["deepk"]),
        C,
    ),
    "depthwise": (
        IMAGE,
        (1,),
        lambda x, e, w: nnf.conv2d(nnf.conv2d(mark(nnf.conv2d(x, w["flat"])), w["taps"], groups=C), w["j"]),
        C,
    ),
    "batch norm": (IMAGE, (1,), lambda x, e, w: nnf.conv2d(mark(normed(nnf.conv2d(x, w["k"]), w)), w["j"]), C),
    "batch norm after": (IMAGE, (1,), lambda x, e, w: normed(mark(nnf.conv2d(x, w["k"]).relu()), w).sigmoid(), C),
    "batch norm without gain": (IMAGE, (1,), lambda x, e, w: normed(mark(nnf.conv2d(x, w["k"])), w, plain=True).sigmoid(), C),
    "batch norm of vectors": (E, (-1,), lambda x, e, w: normed(mark(nnf.linear(x, w["time"])), w).sigmoid(), C),
    "batch norm beside a layer": (
        IMAGE,
        (1,),
        lambda x, e, w: [normed(y := mark(nnf.conv2d(x, w["k"])), w).relu(), nnf.conv2d(y, w["j"])],
        C,
    ),
    "batch norm in a residual": (IMAGE, (1,), lambda x, e, w: nnf.conv2d((y := mark(nnf.conv2d(x, w["k"]))) + normed(y, w), w["j"]), C),
    "batch norm in training": (IMAGE, (1,), lambda x, e, w: nnf.batch_norm(mark(nnf.conv2d(x, w["k"])), None, None, training=True), None),
    "pixel shuffle": (IMAGE, (1,), lambda x, e, w: nnf.conv2d(nnf.pixel_shuffle(mark(nnf.conv2d(x, w["k"])), 2), w["mixed"]), 2),
    "one weight twice": (X, (-1,), lambda x, e, w: nnf.linear(nnf.linear(mark(nnf.linear(x, w["b"])), w["a"]).relu(), w["a"]), None),
}


REFUSED: dict[str, tuple[str, str]] = {  # the op that stops, and why
    "a consumer that can't take it": ("silu", "silu (silu) doesn't commute with a scale"),
    "group norm, silu": ("silu", "silu (silu) doesn't commute with a scale"),
    "silu spelled out": ("sigmoid", "sigmoid (sigmoid) doesn't commute with a scale"),
    "norm in between": ("group_norm", "the statistics of group_norm would change"),
    "scale and shift read elsewhere": ("silu", "silu (silu) doesn't commute with a scale"),
    "layer norm after": ("layer_norm", "the statistics of layer_norm would change"),
    "open residual": ("x", "x is an input of the program"),
    "batch norm in training": ("batch_norm", "batch_norm uses the statistics of the batch"),
    "one weight twice": ("output", "the value is an output of the program"),
}


def row_for(name: str, wanted: Any) -> Row:
    x, axes, body, _ = ROWS[name]

    def taken(x: Tensor, e: Tensor, **weights: Tensor) -> Any:
        return body(x, e, weights)

    return Row(taken, Kind.SCALE, wanted, axes, (x, E), WEIGHTS)


@pytest.mark.parametrize("name", list(ROWS))
def test_scales(name: str) -> None:
    free = ROWS[name][3]
    confirm(row_for(name, REFUSED[name] if free is None else free))
