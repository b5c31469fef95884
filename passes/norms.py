"""Norms in a graph, kept whole or spelled out, with what they scale and shift by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcompress.passes.tidy.schema import arguments
from fxcompress.program import Program

aten = torch.ops.aten
WHOLE = (aten.layer_norm.default, aten.rms_norm.default)
TURNS = (aten.t.default, aten.transpose.int, aten.permute.default)
CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout)


@dataclass(frozen=True)
class Norm:
    """y = normed(x) gain + bias over the last axes; node computes y. gain, bias: the nodes that hold them, or None."""

    node: fx.Node
    x: fx.Node
    gain: fx.Node | None
    bias: fx.Node | None = None


def norms(program: Program) -> Iterator[Norm]:
    """Every layer_norm and rms_norm, and every x rsqrt(mean(x^2) + eps), with the product by a vector that reads it if there is one."""
    for node in program.graph.nodes:
        if node.target in WHOLE:
            given = arguments(node)
            yield Norm(node, given["input"], given["weight"], given.get("bias"))
        elif (x := _normed(node)) is not None:
            gained = [(u, g) for u in _through_casts(node) if (g := _vector_factor(u)) is not None]
            yield from (Norm(u, x, g) for u, g in gained)
            if not gained:
                yield Norm(node, x, None)


def tied_heads(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(head, table) per layer whose weight is an embedding's table too, perhaps transposed."""
    for leaf in program.graph.find_nodes(op="get_attr"):
        readers = [r for u in leaf.users for r in (u.users if u.target in TURNS else (u,))]
        if any(r.target is aten.embedding.default for r in readers):
            yield from ((r, leaf) for r in readers if r.target in (aten.linear.default, aten.matmul.default, aten.mm.default))


def _normed(node: fx.Node) -> fx.Node | None:
    """x, where the node is x rsqrt(mean(x^2) + eps)."""
    if node.target is not aten.mul.Tensor:
        return None
    for x, root in (node.args[:2], node.args[1::-1]):
        if _is_op(root, aten.rsqrt.default) and isinstance(x, fx.Node) and _mean_square(root.args[0], x):  # type: ignore[union-attr]
            return x
    return None


def _mean_square(total: Any, x: fx.Node) -> bool:
    """Whether a value is mean(x^2) + eps."""
    mean: Any = total.args[0] if _is_op(total, aten.add.Tensor, aten.add.Scalar) else None
    square: Any = mean.args[0] if _is_op(mean, aten.mean.dim) else None
    if _is_op(square, aten.pow.Tensor_Scalar):
        return square.args[0] is x and bool(square.args[1] == 2)
    return _is_op(square, aten.mul.Tensor) and square.args[0] is x and square.args[1] is x


def _through_casts(node: fx.Node) -> Iterator[fx.Node]:
    """The readers of a value, with those of its casts in place of the casts."""
    for user in node.users:
        if user.target in CASTS:
            yield from _through_casts(user)
        else:
            yield user


def _vector_factor(node: fx.Node) -> fx.Node | None:
    """The operand of a product that has one axis only."""
    if node.target is not aten.mul.Tensor:
        return None
    return next((a for a in node.args if isinstance(a, fx.Node) and a.meta["val"].dim() == 1), None)


def _is_op(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets
