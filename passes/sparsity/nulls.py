"""Which channels of a plan are 0 wherever a value carries them, and which some op reads.

A value is null where it is 0 for every input: at rows of 0 without a shift, where activations with f(0) = 0 take it from null ones, at products
with a null factor, at the attention of null values. A layer reads a channel unless its weight is 0 there or what comes in is null; a product of
two computed values reads it unless one of them is null. A channel may stand at several positions (the rows of a fused projection).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from fxcompress.interpret import constant_value
from fxcompress.program import Program
from fxcompress.transport import Kind, Label, Plan
from fxcompress.transport.facts import Facts, is_getitem
from fxcompress.transport.labels import UNSET, canon
from fxcompress.transport.relations import relate
from fxcompress.transport.relations.contractions import einsum_products
from fxcompress.transport.relations.reductions import POOLS
from fxcompress.transport.solver import Solver

Mask = npt.NDArray[np.bool_]
aten = torch.ops.aten
CONVS = ("conv1d", "conv2d", "conv3d", "convolution")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
# per product its operands by position, each with the axis summed over
PRODUCTS: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "linear": ((0, -1), (1, 1)),
    **dict.fromkeys(("addmm", "baddbmm"), ((1, -1), (2, -2))),
    **dict.fromkeys(("mm", "matmul", "bmm"), ((0, -1), (1, -2))),
    **dict.fromkeys(CONVS, ((0, 1), (1, 1))),
    **dict.fromkeys(TRANSPOSED, ((0, 1), (1, 0))),
    "scaled_dot_product_attention": ((0, -1), (1, -1)),
}
BIAS: Mapping[str, str] = {"addmm": "self", "baddbmm": "self", **dict.fromkeys(("linear", *CONVS, *TRANSPOSED), "bias")}
UNREADABLE = ("einsum", "mv", "dot", "outer", "addbmm")  # products that this table doesn't tell, but for einsums over one letter
ZERO_AT_ZERO = (
    *("relu", "leaky_relu", "silu", "gelu", "tanh", "abs", "neg", "sin", "erf", "hardswish", "mish", "square", "sqrt", "relu6"),
    *("elu", "selu", "celu", "prelu", "asin", "atan", "sinh", "expm1", "log1p", "floor", "ceil", "round", "sign", "roll", "flip"),
    *("to", "_to_copy", "clone", "contiguous", "alias", "dropout", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze"),
    *("squeeze", "permute", "transpose", "t", "expand", "slice", "select", "mean", "sum", "repeat", "repeat_interleave"),
    *("pixel_shuffle", "grid_sampler", "index", "index_select", "embedding", *(str(op._schema.name).split("::")[1] for op in POOLS)),
)
PIECES = ("split", "split_with_sizes", "chunk", "unbind")


class Nulls:
    """Answers for one plan."""

    def __init__(self, plan: Plan, program: Program) -> None:
        self.plan, self.program = plan, program
        self._known: dict[fx.Node, list[Mask]] = {}

    def kept(self) -> Tensor:
        """Per class whether some op reads it."""
        kept = np.zeros(self.plan.count, bool)
        for node in self.readers():
            (left, _), (right, axis) = self.operands(node)
            masks = [*self.masks(right), *self._passed(left, node, right)]
            for label in self.plan.values.get(right, ()):
                classes = self.plan.class_of(label.index)
                if canon(classes).shape[axis] > 1:
                    live = classes[~_anywhere(masks, label)]
                    kept[live[live != UNSET]] = True
        return torch.from_numpy(kept)

    def values(self) -> list[fx.Node]:
        """The values of the plan that hold a channel of nothing but 0."""
        return [n for n, labels in self.plan.values.items() if any(_anywhere(self.masks(n), label).any() for label in labels)]

    def readers(self) -> Iterator[fx.Node]:
        """Products that sum over the channels."""
        for node in dict.fromkeys(u for n in self.plan.values for u in n.users):
            if (operands := self.operands(node)) and self._is_summed(*operands[1]):
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
        if _name(node) == "einsum" and len(products := einsum_products(self.plan.facts, node)) == 1 and len(products[0].roles["summed"]) == 1:
            (product,), (letter,) = products, products[0].roles["summed"]
            return [(port.node, port.letters.index(letter)) for port in (product.a, product.b)]
        return [(node.args[place], axis) for place, axis in PRODUCTS.get(_name(node), ())]  # type: ignore[misc]

    def _is_summed(self, value: fx.Node, axis: int) -> bool:
        """Whether channels lie along the axis."""
        return any(canon(self.plan.class_of(label.index)).shape[axis] > 1 for label in self.plan.values.get(value, ()))

    def masks(self, value: Any) -> list[Mask]:
        """The value is null where one of them says so; each is of its rank, and of size 1 along axes that don't matter."""
        if not isinstance(value, fx.Node):
            return [np.array(True)] if value in (None, 0) else []
        if value not in self._known:
            self._known[value] = self._found(value) if value in self.plan.values else []
        return self._known[value]

    def _found(self, node: fx.Node) -> list[Mask]:
        name, source = _name(node), node.args[0] if node.args else None
        if self.plan.facts.is_constant(node):
            tensor = constant_value(node, self.program.constants)
            return [_zeros(tensor, label.slot) for label in self.plan.values[node]]
        if self.operands(node):
            return self._product(node, name)
        if name in ("mul", "div"):
            return [m for factor in node.args[: 2 if name == "mul" else 1] for m in self._passed(factor, node, node)]
        if name in ("add", "sub"):
            return _all_of([self._passed(term, node, node) for term in node.args[:2]])
        if name == "batch_norm" and node.args[1] is not None:
            return _all_of([self._passed(vector, node, node) for vector in node.args[1:3]])
        if name in ("cat", "stack"):
            return _all_of([self._passed(part, node, node, elsewhere=True) for part in source])  # type: ignore[union-attr]
        if name == "getitem" and (_name(source) in PIECES or (source.target in POOLS and node.args[1] == 0)):  # type: ignore[arg-type, union-attr]
            return self._passed(source.args[0], source, node)  # type: ignore[union-attr]
        return self._passed(source, node, node) if name in ZERO_AT_ZERO else []

    def _product(self, node: fx.Node, name: str) -> list[Mask]:
        """A product is null where a factor is, along other axes than the summed one, if what is added is."""
        if name == "scaled_dot_product_attention":
            return self._passed(node.args[2], node, node)
        factors = [m for value, _ in self.operands(node) for m in self._passed(value, node, node)]
        added = self.plan.facts.arguments(node)[BIAS[name]] if name in BIAS else None
        return _all_of([factors, self._passed(added, node, node)])

    def _passed(self, value: Any, op: Any, into: fx.Node, elsewhere: bool = False) -> list[Mask]:
        """What the masks of one value at an op say of another. elsewhere: what they say of positions that the other has from elsewhere."""
        masks = self.masks(value)
        if not isinstance(value, fx.Node):
            return masks
        if elsewhere and not masks:
            masks = [np.zeros(label.index.shape, bool) for label in self.plan.values.get(value, ())]
        return [m for mask in masks for m in _carried(self.plan.facts, mask, value, op, into, elsewhere)]


def _carried(facts: Facts, mask: Mask, value: fx.Node, op: fx.Node, into: fx.Node, elsewhere: bool) -> Iterator[Mask]:
    """A mask carried over an op, by the op's own relation: which positions of the one value make which of the other."""
    if mask.size == 1:
        return
    solver = Solver(facts, Kind.PERMUTE)
    solver.values[value] = [Label(solver.classes.add(mask.size).reshape(mask.shape))]
    relate(solver, op)
    whole = np.ones(mask.size + 1, bool)
    np.logical_and.at(whole, solver.classes.parent[:-1], mask.ravel())
    whole[UNSET] = elsewhere
    for label in solver.labels(into):
        yield whole[solver.classes.find(label.index)]


def _all_of(parts: Sequence[Sequence[Mask]]) -> list[Mask]:
    """Where every part is null."""
    return [np.logical_and.reduce(np.broadcast_arrays(*masks)) for masks in itertools.product(*parts)]


def _anywhere(masks: Sequence[Mask], label: Label) -> Mask:
    """Per position of a label whether one of the masks has only zeros there."""
    found = np.zeros(label.index.shape, bool)
    for mask in masks:
        rest = tuple(a for a, n in enumerate(mask.shape) if n > 1 and label.index.shape[a] == 1)
        found |= mask.all(rest, keepdims=True)
    return found


def _zeros(tensor: Tensor, slot: tuple[int, ...]) -> Mask:
    rest = [a for a in range(tensor.dim()) if a not in slot]
    zeros: Mask = ((tensor == 0).all(rest, keepdim=True) if rest else tensor == 0).numpy()
    return zeros


def _name(node: fx.Node) -> str:
    if is_getitem(node):
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return node.op if schema is None else str(schema.name).split("::")[1]
