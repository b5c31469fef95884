"""Removal of channels: what couples with what, and where no channel may go. Weights of a channel that goes are 0, as pruning leaves them.

Source: the rules of FCPTS' dead channels (arXiv 2412.03268 and its code), as far as they are about which layers share a channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from fxcompress.transport import Kind
from tests.passes.helpers import declined, error, run, text
from tests.transport.legality import Row, rand

C = 8
X, IMAGE = rand(2, 3, C, seed=1), rand(2, C, 6, 6, seed=2)
ALIVE = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1], dtype=torch.float64)
HALF = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
WEIGHTS = {n: rand(C, C, seed=i) for i, n in enumerate("abd")} | {
    "c": rand(C, C, seed=9) * ALIVE,
    "e": rand(C, C, seed=8) * ALIVE,
    "h": rand(C, seed=10),
    "g": rand(C, seed=11).abs() + 1,
    "m": rand(C, seed=12),
    "v": rand(C, seed=13).abs() + 1,
    "k": rand(C, C, 3, 3, seed=14),
    "j": rand(C, C, 3, 3, seed=15) * ALIVE.view(1, -1, 1, 1),
    "taps": rand(C, 1, 3, 3, seed=16),
    "deep": rand(C, 2 * C, 1, 1, seed=17) * torch.cat([ALIVE, ALIVE * 0 + 1]).view(1, -1, 1, 1),
    "groups": rand(C, C // 2, 1, 1, seed=18),
    "flat": rand(C, C * 4, seed=19) * ALIVE.repeat_interleave(4),
    "halves": rand(C, C, 1, 1, seed=20) * HALF.view(1, -1, 1, 1),
    "quarter": rand(C, C, 1, 1, seed=23) * (torch.arange(C) > 1).double().view(1, -1, 1, 1),
    "row": rand(C, C, seed=21) * ALIVE[:, None],
    "rowk": rand(C, C, 3, 3, seed=22) * ALIVE.view(-1, 1, 1, 1),
}
W = dict[str, Tensor]
Body = Callable[[Tensor, Tensor, W], Any]

# name: (body, shape of a weight of the channels and its name afterwards, or why no channel may go)
ROWS: dict[str, tuple[Body, tuple[str, tuple[int, ...]] | tuple[str, str]]] = {
    "unread, linear": (lambda x, y, w: nnf.linear(nnf.sigmoid(nnf.linear(x, w["a"], w["h"])), w["c"]), ("a", (6, C))),
    "unread, batch norm": (
        lambda x, y, w: nnf.conv2d(nnf.batch_norm(nnf.conv2d(y, w["k"]), w["m"], w["v"], w["g"], w["h"]).relu(), w["j"]),
        ("m", (6,)),
    ),
    "unread, pooled": (lambda x, y, w: nnf.conv2d(nnf.max_pool2d(nnf.conv2d(y, w["k"]), 2), w["j"], padding=1), ("k", (6, C, 3, 3))),
    "unread, flattened": (lambda x, y, w: nnf.linear(nnf.max_pool2d(nnf.conv2d(y, w["k"]), 2).flatten(1), w["flat"]), ("k", (6, C, 3, 3))),
    "unread, depthwise": (
        lambda x, y, w: nnf.conv2d(nnf.conv2d(nnf.conv2d(y, w["k"]), w["taps"], groups=C), w["j"], padding=1),
        ("taps", (6, 1, 3, 3)),
    ),
    "unread, part of a cat": (
        lambda x, y, w: nnf.conv2d(torch.cat([nnf.conv2d(y, w["k"]), nnf.conv2d(y, w["j"])], 1), w["deep"]),
        ("k", (6, C, 3, 3)),
    ),
    "unread in both": (
        lambda x, y, w: [nnf.linear(z := nnf.linear(x, w["a"]).relu(), w["c"]), nnf.linear(z, w["e"])],
        ("a", (6, C)),
    ),
    "unread in one of two": (
        lambda x, y, w: [nnf.linear(z := nnf.linear(x, w["a"]).relu(), w["c"]), nnf.linear(z, w["b"])],
        ("linear_1", "every channel is read by some layer"),
    ),
    "residual sum, unread": (
        lambda x, y, w: nnf.linear((z := nnf.linear(x, w["a"])) + nnf.linear(z.relu(), w["row"].T * ALIVE[:, None]), w["c"]),
        ("a", (6, C)),
    ),
    "null, relu": (lambda x, y, w: nnf.linear(nnf.linear(x, w["row"]).relu(), w["b"]), ("b", (C, 6))),
    "null, padded border": (lambda x, y, w: nnf.conv2d(nnf.gelu(nnf.conv2d(y, w["rowk"])), w["k"], padding=1), ("k", (C, 6, 3, 3))),
    "null but for its bias": (
        lambda x, y, w: nnf.conv2d(nnf.conv2d(y, w["rowk"], w["h"]), w["k"], padding=1),
        ("conv2d", "every channel is read by some layer"),
    ),
    "layer norm": (
        lambda x, y, w: nnf.linear(nnf.layer_norm(nnf.linear(x, w["a"]), (C,)), w["c"]),
        ("linear_1", "layer_norm norms over the channels that a remove would change"),
    ),
    "rms norm": (
        lambda x, y, w: nnf.linear(nnf.rms_norm(nnf.linear(x, w["a"]), (C,)), w["c"]),
        ("linear_1", "rms_norm norms over the channels that a remove would change"),
    ),
    "group norm": (
        lambda x, y, w: nnf.conv2d(nnf.group_norm(nnf.conv2d(y, w["k"]), 2), w["j"]),
        ("conv2d_1", "group_norm norms over the channels that a remove would change"),
    ),
    "softmax": (
        lambda x, y, w: nnf.linear(nnf.linear(x, w["a"]).softmax(-1), w["c"]),
        ("linear_1", "softmax doesn't commute with a remove"),
    ),
    "an output": (
        lambda x, y, w: [z := nnf.linear(x, w["a"]), nnf.linear(z, w["c"])],
        ("linear_1", "the value is an output of the program"),
    ),
    "scores": (
        lambda x, y, w: [nnf.linear(z := nnf.linear(x, w["a"]), w["c"]), z @ z.transpose(-1, -2)],
        ("linear_1", "matmul reads the channels too, without a weight"),
    ),
    "a whole group": (
        lambda x, y, w: nnf.conv2d(nnf.conv2d(nnf.conv2d(y, w["k"]), w["groups"], groups=2), w["halves"]),
        ("groups", (4, 4, 1, 1)),
    ),
    "as many of each group": (
        lambda x, y, w: nnf.conv2d(nnf.conv2d(nnf.conv2d(y, w["k"]), w["groups"], groups=2), w["j"]),
        ("groups", (6, 4, 1, 1)),
    ),
    "part of a group": (
        lambda x, y, w: nnf.conv2d(nnf.conv2d(nnf.conv2d(y, w["k"]), w["groups"], groups=2), w["quarter"]),
        ("conv2d_2", "the channels that conv2d_2 has zeros for go only together with others"),
    ),
}


def row_for(name: str) -> Row:
    body, _ = ROWS[name]

    def taken(x: Tensor, y: Tensor, **weights: Tensor) -> Any:
        return body(x, y, weights)

    return Row(taken, Kind.REMOVE, 0, (-1,), (X, IMAGE), WEIGHTS)


@pytest.mark.parametrize("name", list(ROWS))
def test_removal(name: str) -> None:
    before = row_for(name).program()
    after, report = run(before, "sparsity.remove_channels")
    what, wanted = ROWS[name][1]
    if isinstance(wanted, str):
        assert text(after) == text(before)
        assert (report.fired, dict(declined(report)).get(what)) == (0, wanted)
    else:
        assert report.fired
        assert tuple(after.constants[what].shape) == wanted
        assert error(before, after) < 1e-12
