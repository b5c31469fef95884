"""Norms in a graph, kept whole or spelled out, with what they scale and shift by.

Spelled out, y is a norm of x if it is what is left of x (or of x less its mean) when a length of x is divided out:

    y = (x - m) r,    y(c x) = y(x) for every c > 0,    r one number for all channels

up to the small constant that keeps the length off 0. Both are read off the dataflow: the degree of a value in x, and its shape.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcompress.passes.tidy.schema import arguments
from fxcompress.program import Program

aten = torch.ops.aten
WHOLE = (aten.layer_norm.default, aten.rms_norm.default)
TURNS = (aten.t.default, aten.transpose.int, aten.permute.default)
CASTS = (
    *(aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default),
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default),
)
REPEATS = (aten.expand.default, aten.expand_as.default)
ARRANGED = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, *TURNS)
ADDS = (aten.add.Tensor, aten.add.Scalar)
SUBTRACTIONS = (aten.sub.Tensor, aten.sub.Scalar)
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
DEPTH = 12  # steps from a value to the factor that norms it
PAIRS: Mapping[Any, float] = {
    aten.var_mean.correction: 2.0,
    aten.var_mean.dim: 2.0,
    aten.std_mean.correction: 1.0,
    aten.std_mean.dim: 1.0,
}  # degree of the first
BOUNDS = (aten.clamp.default, aten.clamp_min.default, aten.maximum.default)
POWERS: Mapping[Any, float] = {  # f(c x) = c^n f(x) for c > 0
    **dict.fromkeys((*CASTS, *REPEATS, *ARRANGED, *PAIRS, aten.neg.default, aten.abs.default, aten.dropout.default), 1.0),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.amax.default), 1.0),
    **dict.fromkeys((aten.std.correction, aten.std.dim), 1.0),
    **dict.fromkeys((aten.square.default, aten.var.correction, aten.var.dim), 2.0),
    **{aten.sqrt.default: 0.5, aten.rsqrt.default: -0.5, aten.reciprocal.default: -1.0},
}


@dataclass(frozen=True)
class Norm:
    """y = normed(x) gain + bias over an axis, or the last axes; node computes y. gain, bias: the nodes that hold them, or None."""

    node: fx.Node
    x: fx.Node
    gain: fx.Node | None
    bias: fx.Node | None = None
    axis: int = -1


def norms(program: Program) -> Iterator[Norm]:
    """Every layer_norm and rms_norm, and every norm that is spelled out, with the vectors that its readers multiply and add."""
    for node in program.graph.nodes:
        if node.target in WHOLE:
            given = arguments(node)
            yield Norm(node, given["input"], given["weight"], given.get("bias"))
        elif (found := _normed(node)) is not None:
            x, axis = found
            gained: list[tuple[fx.Node, fx.Node | None]] = [(u, g) for u in _readers(node) if (g := vector(u, PRODUCTS, axis)) is not None]
            for product, gain in gained or [(node, None)]:
                shifted: list[tuple[fx.Node, fx.Node | None]] = [(u, b) for u in _readers(product) if (b := vector(u, ADDS, axis)) is not None]
                last, bias = shifted[0] if len(shifted) == 1 else (product, None)  # with two there is no one result
                yield Norm(last, x, gain, bias, axis)


def branch_scales(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(product, vector) wherever a value is multiplied by a constant vector before it goes into a sum, each once."""
    terms = (before(a, *CASTS, *ARRANGED, aten.dropout.default) for n in program.graph.nodes if n.target in ADDS for a in n.args)
    for term in dict.fromkeys(t for t in terms if isinstance(t, fx.Node) and t.target in PRODUCTS):
        found = (vector(term, PRODUCTS, -axis) for axis in range(1, term.meta["val"].dim() + 1))
        if constant := next((v for v in found if v is not None and v.op == "get_attr"), None):
            yield term, constant


def tied_heads(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(head, table) per layer whose weight is an embedding's table too, perhaps transposed or cast."""
    for leaf in program.graph.find_nodes(op="get_attr"):
        readers = list(_after(leaf, *TURNS, *CASTS))
        if any(r.target is aten.embedding.default for r in readers):
            yield from ((r, leaf) for r in readers if r.target in (aten.linear.default, aten.matmul.default, aten.mm.default))


def _after(value: fx.Node, *ops: Any) -> Iterator[fx.Node]:
    """The readers of a value, with those of these ops in place of them."""
    for user in value.users:
        yield from _after(user, *ops) if user.target in ops else (user,)


def before(value: Any, *ops: Any) -> Any:
    """What a value was before these ops of one operand; casts, if none are named."""
    while isinstance(value, fx.Node) and value.target in (ops or CASTS):
        value = value.args[0]
    return value


def _normed(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, axis) where the node is a norm of x over that axis, without gain and bias."""
    factors: Any = node.args[:2] if node.target in (*PRODUCTS, *QUOTIENTS) else ()
    if not factors or not all(isinstance(f, fx.Node) for f in factors):
        return None
    for wide, length in (factors,) if node.target in QUOTIENTS else (factors, factors[::-1]):
        axis = _told_apart(wide, length)
        for x in _sources(wide, axis) if axis is not None else ():
            if _degree(length, x) and _degree(node, x) == 0:
                return x, axis  # type: ignore[return-value]
    return None


def _told_apart(wide: fx.Node, narrow: Any) -> int | None:
    """The axis, from the end, along which only the one value varies; None if there is none or more than one, or its size is dynamic."""
    narrow = before(narrow, *CASTS, *REPEATS)
    sizes = wide.meta["val"].shape, narrow.meta["val"].shape if isinstance(narrow, fx.Node) else ()
    if len(sizes[0]) != len(sizes[1]):
        return None
    own = [a for a in range(-len(sizes[0]), 0) if _is_one(sizes[1][a]) and not _is_one(sizes[0][a])]
    return own[0] if len(own) == 1 and isinstance(sizes[0][own[0]], int) else None


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _sources(value: fx.Node, axis: int) -> Iterator[fx.Node]:
    """What a value may be a norm of: what it was before something was taken off all channels alike, and itself."""
    value = before(value)
    if value.target in SUBTRACTIONS and isinstance(whole := before(value.args[0]), fx.Node) and _told_apart(whole, value.args[1]) == axis:
        yield whole
    yield value


def _degree(value: Any, x: fx.Node, depth: int = DEPTH) -> float | None:
    """n where value(c x) = c^n value(x) for c > 0, but for constants that are added; None where there is no such n, or it isn't known."""
    if value is x:
        return 1.0
    if _is_fixed(value):
        return 0.0
    if value.op != "call_function" or not depth:
        return None
    if (power := _power(value)) is not None:
        inner = _degree(value.args[0], x, depth - 1)
        return None if inner is None else inner * power
    if value.target in (*PRODUCTS, *QUOTIENTS):
        a, b = (_degree(factor, x, depth - 1) for factor in value.args[:2])
        return None if a is None or b is None else a + b if value.target in PRODUCTS else a - b
    terms = {_degree(a, x, depth - 1) for a in value.args[:2] if not _is_fixed(a)} if value.target in (*ADDS, *SUBTRACTIONS, *BOUNDS) else ()
    return next(iter(terms)) if len(terms) == 1 else None


def _power(node: fx.Node) -> float | None:
    """What an op of one operand multiplies a degree by; None for any other op."""
    if node.target is aten.pow.Tensor_Scalar:
        return float(node.args[1])  # type: ignore[arg-type]
    if node.target is operator.getitem:
        pair, place = node.args
        op: Any = pair.target if isinstance(pair, fx.Node) else None
        return None if op not in PAIRS else 1.0 if place else PAIRS[op]
    return POWERS.get(node.target)


def _is_fixed(value: Any) -> bool:
    """Whether a value is a number or a constant."""
    value = before(value, *CASTS, *REPEATS, *ARRANGED)
    return not isinstance(value, fx.Node) or value.op == "get_attr"


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The readers of a value, with those of its casts and of its multiples in place of these."""
    for user in node.users:
        if user.target in CASTS or (user.target in (*PRODUCTS, *QUOTIENTS) and user.args[0] is node and _is_number(user.args[1])):
            yield from _readers(user)
        else:
            yield user


def _is_number(value: Any) -> bool:
    """Whether a value is one number, written down or kept as a constant."""
    return _is_fixed(value) and (not isinstance(value, fx.Node) or value.meta["val"].numel() == 1)


def vector(node: fx.Node, ops: tuple[Any, ...], axis: int) -> fx.Node | None:
    """The operand of one of these ops that varies along an axis only: the constant that it is a view of, else itself."""
    for operand in node.args[:2] if node.target in ops else ():
        if (
            isinstance(operand, fx.Node)
            and operand.meta["val"].dim() >= -axis
            and operand.meta["val"].shape[axis] == operand.meta["val"].numel()
        ):
            constant = before(operand, *CASTS, *ARRANGED)
            if not constant.meta["val"].is_floating_point():  # a mask
                continue
            if constant.op == "get_attr" and constant.meta["val"].numel() > 1:
                return constant  # type: ignore[no-any-return]
            if operand.meta["val"].dim() == 1:
                return operand
    return None
