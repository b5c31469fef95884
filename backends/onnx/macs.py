"""Multiply-accumulates of a node from the shapes of what it reads and makes: one line an op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

Shape = Sequence[int]
_ATEN = torch.ops.aten


def macs(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> int:
    """Multiply-accumulates of the node; 0 for ops that don't contract."""
    rule = _RULES.get(str(node.target))
    if rule is None:
        return 0
    given = [shapes.get(a, ()) if isinstance(a, fx.Node) else () for a in node.args]
    return rule(given, shapes.get(node, ()), node)


def _contracts(operand: int) -> Callable[[Sequence[Shape], Shape, Any], int]:
    """Every output element sums over the last axis of that operand."""
    return lambda given, out, node: prod(out) * given[operand][-1]


def _convolves(given: Sequence[Shape], out: Shape, node: fx.Node) -> int:
    turned = "transpose" in str(node.target) or (node.target is _ATEN.convolution.default and bool(node.args[6]))
    return prod(given[0] if turned else out) * prod(given[1][1:])


def _attends(given: Sequence[Shape], out: Shape, node: fx.Node) -> int:
    query, key, value = given[:3]
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurs(given: Sequence[Shape], out: Shape, node: fx.Node) -> int:
    """Every weight matrix multiplies every step of every sequence. given[0]: the sequence [.., .., features]."""
    weights: Any = next(a for a in node.args if isinstance(a, list | tuple) and len(a) > 2)
    return prod(given[0][:-1]) * sum(int(w.meta["val"].numel()) for w in weights if w.meta["val"].dim() == 2)


_RULES: Mapping[str, Callable[[Sequence[Shape], Shape, Any], int]] = {
    **{f"aten.{op}.default": _contracts(0) for op in ("linear", "mm", "bmm", "matmul")},
    **{f"aten.{op}.default": _contracts(1) for op in ("addmm", "baddbmm")},
    **{f"aten.conv{n}d.{overload}": _convolves for n in (1, 2, 3) for overload in ("default", "padding")},
    **dict.fromkeys(("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"), _convolves),
    "aten.convolution.default": _convolves,
    **dict.fromkeys(("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input"), _recurs),
    "aten.scaled_dot_product_attention.default": _attends,
}
