"""Which channels of a plan are 0 wherever a value carries them, and which some op reads.

A channel is null on a value if all it holds there is 0: rows of 0 without a shift, what activations with f(0) = 0 make of them, a product with
a null factor, the attention of null values. A layer reads a channel unless its weight is 0 there or what comes in is null; a product of two
computed values reads it unless one of them is null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.interpret import constant_value
from fxcompress.program import Program
from fxcompress.transport import Plan
from fxcompress.transport.facts import is_getitem
from fxcompress.transport.labels import canon
from fxcompress.transport.relations.contractions import einsum_product

aten = torch.ops.aten
CONVS = ("conv1d", "conv2d", "conv3d", "convolution")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
# per product its operands by position, each with the axis summed over
PRODUCTS: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "linear": ((0, -1), (1, 1)),
    "addmm": ((1, -1), (2, -2)),
    **dict.fromkeys(("mm", "matmul", "bmm"), ((0, -1), (1, -2))),
    **dict.fromkeys(CONVS, ((0, 1), (1, 1))),
    **dict.fromkeys(TRANSPOSED, ((0, 1), (1, 0))),
    "scaled_dot_product_attention": ((0, -1), (1, -1)),
}
BIAS: Mapping[str, str] = {"addmm": "self", **dict.fromkeys(("linear", *CONVS, *TRANSPOSED), "bias")}
UNREADABLE = ("einsum", "mv", "dot", "outer", "baddbmm", "addbmm")  # products that this table doesn't tell, but for einsums over one letter
ZERO_AT_ZERO = (
    *("relu", "leaky_relu", "silu", "gelu", "tanh", "abs", "neg", "sin", "erf", "hardswish", "mish", "square", "sqrt", "relu6"),
    *("to", "_to_copy", "clone", "contiguous", "alias", "dropout", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze"),
    *("squeeze", "permute", "transpose", "t", "expand", "slice", "select", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d"),
    *("upsample_nearest2d", "mean", "sum", "repeat", "repeat_interleave", "pixel_shuffle"),
)
PIECES = ("split", "split_with_sizes", "chunk", "unbind")


class Nulls:
    """Answers for one plan."""

    def __init__(self, plan: Plan, program: Program) -> None:
        self.plan, self.program = plan, program
        self._known: dict[fx.Node, Tensor] = {}

    def kept(self) -> Tensor:
        """Per class whether some op reads it."""
        kept = torch.zeros(self.plan.count, dtype=torch.bool)
        for node in self.readers():
            (left, _), (right, axis) = self.operands(node)
            kept |= self._carries(right, axis, summed=True) & ~self._is_null(left) & ~self._is_null(right)
        return kept

    def values(self) -> list[fx.Node]:
        """The values of the plan that hold a channel of nothing but 0."""
        return [n for n in self.plan.values if bool(self._is_null(n).any())]

    def readers(self) -> Iterator[fx.Node]:
        """Products that sum over the channels."""
        for node in dict.fromkeys(u for n in self.plan.values for u in n.users):
            if (operands := self.operands(node)) and self._carries(*operands[1], summed=True).any():
                yield node

    def unreadable(self) -> fx.Node | None:
        """A product of which nobody knows what it sums over."""
        return next((u for n in self.plan.values for u in n.users if _name(u) in UNREADABLE and not self.operands(u)), None)

    def weightless(self) -> fx.Node | None:
        """A reader that multiplies two computed values."""
        fixed = self.plan.facts.is_constant
        return next((n for n in self.readers() if not any(fixed(value) for value, _ in self.operands(n))), None)

    def operands(self, node: fx.Node) -> list[tuple[fx.Node, int]]:
        """The two factors of a product, each with the axis that is summed over; [] for other ops."""
        if _name(node) == "einsum" and (product := einsum_product(self.plan.facts, node)) and len(product.roles["summed"]) == 1:
            (letter,) = product.roles["summed"]
            return [(port.node, port.letters.index(letter)) for port in (product.a, product.b)]
        return [(node.args[place], axis) for place, axis in PRODUCTS.get(_name(node), ())]  # type: ignore[misc]

    def _carries(self, value: fx.Node, axis: int | None = None, summed: bool = False) -> Tensor:
        """Per class whether a label of the value holds it; of those labels only that vary along the axis, or that don't."""
        held = torch.zeros(self.plan.count + 1, dtype=torch.bool)
        for label in self.plan.values.get(value, ()):
            index = canon(self.plan.class_of(label.index))
            if axis is None or (index.shape[axis] > 1) == summed:
                held[torch.from_numpy(index.ravel())] = True
        return held[:-1]

    def _is_null(self, value: Any) -> Tensor:
        """Per class whether the value holds it and is 0 there; a number holds every class."""
        if not isinstance(value, fx.Node):
            return torch.full((self.plan.count,), value in (None, 0))
        if value not in self._known:
            self._known[value] = self._found(value) & self._carries(value)
        return self._known[value]

    def _found(self, node: fx.Node) -> Tensor:
        """The same where the value holds the class; elsewhere anything."""
        name = _name(node)
        if self.plan.facts.is_constant(node):
            return self.plan.gather({node: constant_value(node, self.program.constants).abs()}) <= 0
        if self.operands(node):
            return self._product(node, name)
        if name in ("mul", "div"):
            return torch.stack([self._is_null(f) for f in node.args[: 2 if name == "mul" else 1]]).any(0)
        if name in ("add", "sub"):
            return torch.stack([self._is_null(p) for p in node.args[:2]]).all(0)
        if name in ("cat", "stack"):
            return torch.stack([self._is_null(p) | ~self._carries(p) for p in node.args[0]]).all(0)  # type: ignore[union-attr, arg-type]
        source: Any = node.args[0] if name in (*ZERO_AT_ZERO, "getitem") else None
        if name == "getitem" and _name(source) in PIECES:
            return self._is_null(source.args[0])
        return self._is_null(source) if name in ZERO_AT_ZERO else torch.zeros(self.plan.count, dtype=torch.bool)

    def _product(self, node: fx.Node, name: str) -> Tensor:
        """A product is null where a factor is, along other axes than the summed one, if what is added is."""
        if name == "scaled_dot_product_attention":
            return self._is_null(node.args[2])
        null = torch.zeros(self.plan.count, dtype=torch.bool)
        for value, axis in self.operands(node):
            null |= self._is_null(value) & ~self._carries(value, axis, summed=True)
        added = self.plan.facts.arguments(node)[BIAS[name]] if name in BIAS else None
        return null & self._is_null(added)


def _name(node: fx.Node) -> str:
    if is_getitem(node):
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return node.op if schema is None else str(schema.name).split("::")[1]
