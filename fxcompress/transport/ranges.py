"""Between which numbers a value stays, whatever the inputs are, as far as masks need it. What nothing is known of lies in (-inf, inf).

One thing is taken on trust: what layers, products and norms compute, scores of attention among them, is within ±COMPUTED.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.dataflow import WEIGHT_ARGUMENTS, is_move
from fxcompress.transport.facts import FILLED, Facts, filling

aten = torch.ops.aten
Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)
COMPUTED = 1e4


def range_of(facts: Facts, value: Any) -> Range:
    """(least, greatest) of a node's value or of a number, as the value's format rounds them: what that can't hold is infinite."""
    if not isinstance(value, fx.Node):
        return (float(value), float(value)) if isinstance(value, int | float) else ANY
    if value not in facts.ranges:
        facts.ranges[value] = _rounded(facts, value, _range(facts, value))
    return facts.ranges[value]


def _range(facts: Facts, node: fx.Node) -> Range:
    if node.op == "get_attr":
        tensor = facts.program.constants[str(node.target)]
        return (float(tensor.min()), float(tensor.max())) if tensor.numel() and not tensor.is_complex() else ANY
    if node.op != "call_function":
        return ANY
    if is_move(node) or node.target in FIRST:
        return range_of(facts, node.all_input_nodes[0])
    if node.target in FILLED:
        return range_of(facts, filling(node))
    if node.target in COMPUTING:
        return (-COMPUTED, COMPUTED)
    rule = RULES.get(node.target)
    return rule(facts, facts.arguments(node)) if rule else ANY


def _rounded(facts: Facts, node: fx.Node, found: Range) -> Range:
    value = facts.value(node)
    if not isinstance(value, Tensor) or value.dtype.is_complex or any(map(math.isnan, found)):
        return ANY
    if value.dtype == torch.bool:
        return (0.0, 1.0)
    if not value.dtype.is_floating_point:
        kind = torch.iinfo(value.dtype)
        inside = kind.min <= found[0] and found[1] <= kind.max
        return found if inside else (float(kind.min), float(kind.max))
    low, high = torch.tensor(found, dtype=torch.float64).to(value.dtype).tolist()
    return (low, high)


def _hull(*names: str) -> Callable[[Facts, dict[str, Any]], Range]:
    """Any of these operands."""

    def rule(facts: Facts, given: dict[str, Any]) -> Range:
        """All that they span."""
        return _around([range_of(facts, given[name]) for name in names])

    return rule


def _around(ranges: Sequence[Range]) -> Range:
    return min(r[0] for r in ranges), max(r[1] for r in ranges)


def _sum(sign: float, is_reversed: bool = False) -> Callable[[Facts, dict[str, Any]], Range]:
    """a + sign alpha b; reversed: b + sign alpha a."""

    def rule(facts: Facts, given: dict[str, Any]) -> Range:
        """By the ends of both."""
        alpha = given.get("alpha", 1)
        first, second = (range_of(facts, given[name]) for name in (("other", "self") if is_reversed else ("self", "other")))
        if not isinstance(alpha, int | float):
            return ANY
        scaled = _product(second, (sign * alpha, sign * alpha))
        return first[0] + scaled[0], first[1] + scaled[1]

    return rule


def _times(facts: Facts, given: dict[str, Any]) -> Range:
    return _product(range_of(facts, given["self"]), range_of(facts, given["other"]))


def _product(a: Range, b: Range) -> Range:
    corners = [x * y for x, y in itertools.product(a, b)]
    return ANY if any(map(math.isnan, corners)) else (min(corners), max(corners))


FIRST = (
    *(aten.to.dtype, aten._to_copy.default, aten.to.device, aten.embedding.default, aten.index.Tensor, aten.index_select.default),
    *(aten.repeat.default, aten.repeat_interleave.self_int),
)  # ops whose numbers are those of their first operand
COMPUTING = (
    *WEIGHT_ARGUMENTS,
    *(aten.einsum.default, aten.scaled_dot_product_attention.default),
    *(aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default, aten.batch_norm.default),
)
RULES: Mapping[Any, Callable[[Facts, dict[str, Any]], Range]] = {
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _hull("self", "other")),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _hull("self", "value")),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _sum(1)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _sum(-1)),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _sum(-1, is_reversed=True)),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _times),
    **dict.fromkeys((aten.cat.default, aten.stack.default), lambda facts, given: _around([range_of(facts, t) for t in given["tensors"]])),
}
