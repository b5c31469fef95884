"""Ops that only spell several others, written out as these at capture: stacks, splits and moves of axes by their other names, gates, cells of
recurrent networks, bilinear forms. What passes and backends know of the parts then holds for the whole, weights included. Each is written as
torch documents it; the numbers are the same but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import fx

from fxcompress.edit import op_node

aten = torch.ops.aten
Op = Callable[..., Any]
Axes = int | Sequence[int]


def open_composites(graph: fx.Graph) -> None:
    """Replace every composite op, in place."""
    for node in list(graph.nodes):
        if node.target not in COMPOSITES:
            continue
        with graph.inserting_before(node):
            written = COMPOSITES[node.target](partial(op_node, graph, node), *node.args, **node.kwargs)
        if isinstance(written, fx.Node):
            node.replace_all_uses_with(written)
        for part in list(node.users):
            part.replace_all_uses_with(written[part.args[1]])
            graph.erase_node(part)
        graph.erase_node(node)


def _rank(x: fx.Node) -> int:
    return int(x.meta["val"].dim())


def _raised(op: Op, x: fx.Node, rank: int) -> fx.Node:
    """With axes of size 1 up to a rank, as atleast_1d, 2d and 3d add them."""
    while _rank(x) < rank:
        x = op(aten.unsqueeze.default, x, 2 if _rank(x) == 2 else 0)
    return x


def _laid(rank: int, axis: int) -> Callable[..., fx.Node]:
    """Values of at least `rank` axes laid end to end along one of them, or along their only one."""

    def write(op: Op, tensors: Sequence[fx.Node]) -> Any:
        """cat."""
        raised = [_raised(op, x, rank) for x in tensors]
        return op(aten.cat.default, raised, min(axis, _rank(raised[0]) - 1))

    return write


def _columns(op: Op, tensors: Sequence[fx.Node]) -> Any:
    """Vectors as columns, matrices as they are."""
    return op(aten.cat.default, [x if _rank(x) > 1 else op(aten.unsqueeze.default, _raised(op, x, 1), 1) for x in tensors], 1)


def _parted(axis: int) -> Callable[..., list[fx.Node]]:
    """Pieces along an axis, or along the only one: so many, or cut at indices."""

    def write(op: Op, x: fx.Node, at: Axes) -> list[fx.Node]:
        """tensor_split."""
        form = aten.tensor_split.sections if isinstance(at, int) else aten.tensor_split.indices
        return _all(op, op(form, x, at, min(axis, _rank(x) - 1)))

    return write


def _all(op: Op, pieces: fx.Node) -> list[fx.Node]:
    return [op(getitem, pieces, number) for number in range(len(pieces.meta["val"]))]


def _moved(op: Op, x: fx.Node, source: Axes, destination: Axes) -> Any:
    """Axes to other places, the rest in order."""
    rank = _rank(x)
    froms, tos = ([a % rank for a in ([axes] if isinstance(axes, int) else axes)] for axes in (source, destination))
    places, rest = dict(zip(tos, froms, strict=True)), (a for a in range(rank) if a not in froms)
    return op(aten.permute.default, x, [places[a] if a in places else next(rest) for a in range(rank)])


def _glu(op: Op, x: fx.Node, dim: int = -1) -> Any:
    """[a, b] -> a sigmoid(b)."""
    a, b = _all(op, op(aten.chunk.default, x, 2, dim))
    return op(aten.mul.Tensor, a, op(aten.sigmoid.default, b))


def _bilinear(op: Op, x: fx.Node, y: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> Any:
    """Σ_ij x_i W_oij y_j + b: a linear layer of y with a row for every o and i, times x."""
    rows = op(aten.linear.default, y, op(aten.flatten.using_ints, weight, 0, 1))
    rows = op(aten.unflatten.int, rows, -1, list(weight.meta["val"].shape[:2]))
    product = op(aten.squeeze.dim, op(aten.matmul.default, rows, op(aten.unsqueeze.default, x, -1)), -1)
    return product if bias is None else op(aten.add.Tensor, product, bias)


def _gates(op: Op, count: int, x: fx.Node, h: fx.Node, weights: Sequence[Any]) -> tuple[list[fx.Node], list[fx.Node]]:
    """W x + b and U h + c, each in `count` parts. weights: W, U, b, c."""
    of_x, of_h, b, c = (*weights, None, None)[:4]
    made = (op(aten.linear.default, x, of_x, b), op(aten.linear.default, h, of_h, c))
    first, second = (_all(op, op(aten.chunk.default, v, count, -1)) if count > 1 else [v] for v in made)
    return first, second


def _gru(op: Op, x: fx.Node, h: fx.Node, *weights: Any) -> Any:
    """r = σ(r_x + r_h), z = σ(z_x + z_h), n = tanh(n_x + r n_h); (h - n) z + n."""
    (rx, zx, nx), (rh, zh, nh) = _gates(op, 3, x, h, weights)
    r, z = (op(aten.sigmoid.default, op(aten.add.Tensor, a, b)) for a, b in ((rx, rh), (zx, zh)))
    n = op(aten.tanh.default, op(aten.add.Tensor, nx, op(aten.mul.Tensor, r, nh)))
    return op(aten.add.Tensor, op(aten.mul.Tensor, op(aten.sub.Tensor, h, n), z), n)


def _lstm(op: Op, x: fx.Node, states: Sequence[fx.Node], *weights: Any) -> tuple[Any, Any]:
    """i, f, o = σ(..), g = tanh(..); c' = f c + i g, h' = o tanh(c')."""
    h, c = states
    i, f, g, o = (op(aten.add.Tensor, a, b) for a, b in zip(*_gates(op, 4, x, h, weights), strict=True))
    i, f, o = (op(aten.sigmoid.default, v) for v in (i, f, o))
    c = op(aten.add.Tensor, op(aten.mul.Tensor, f, c), op(aten.mul.Tensor, i, op(aten.tanh.default, g)))
    return op(aten.mul.Tensor, o, op(aten.tanh.default, c)), c


def _recurrent(curve: Any) -> Callable[..., Any]:
    """f(W x + b + U h + c)."""

    def write(op: Op, x: fx.Node, h: fx.Node, *weights: Any) -> Any:
        """With this f."""
        (of_x,), (of_h,) = _gates(op, 1, x, h, weights)
        return op(curve, op(aten.add.Tensor, of_x, of_h))

    return write


COMPOSITES: Mapping[Any, Callable[..., Any]] = {
    aten.hstack.default: _laid(1, 1),
    **dict.fromkeys((aten.vstack.default, aten.row_stack.default), _laid(2, 0)),
    aten.dstack.default: _laid(3, 2),
    aten.column_stack.default: _columns,
    **{op: _parted(axis) for axis, split in enumerate((aten.vsplit, aten.hsplit, aten.dsplit)) for op in (split.int, split.array)},
    **dict.fromkeys((aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist), _moved),
    aten.swapdims.default: lambda op, x, a, b: op(aten.transpose.int, x, a, b),
    aten.glu.default: _glu,
    aten.bilinear.default: _bilinear,
    aten.gru_cell.default: _gru,
    aten.lstm_cell.default: _lstm,
    aten.rnn_tanh_cell.default: _recurrent(aten.tanh.default),
    aten.rnn_relu_cell.default: _recurrent(aten.relu.default),
}
