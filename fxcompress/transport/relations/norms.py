"""Normalisations kept whole. Their statistics see all channels at once; what comes out of them is taken up by gain and bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxcompress.transport.labels import Index, Kind
from fxcompress.transport.relations.pointwise import fits, is_uniform, spread_over
from fxcompress.transport.solver import Solver

aten = torch.ops.aten


def layer_norm(s: Solver, node: fx.Node) -> None:
    """(x - mean) / std * w + b over the last axes."""
    given = s.args(node)
    x, weight, bias, depth = given["input"], given["weight"], given["bias"], len(given["normalized_shape"])
    if s.kind == Kind.PERMUTE:
        spread_over(s, [p for p in (x, weight, bias, node) if p is not None])
    else:
        _stop_statistics(s, node, x, depth)
        _affine(s, node, weight, bias, depth)


def rms_norm(s: Solver, node: fx.Node) -> None:
    """x / rms * w over the last axes."""
    given = s.args(node)
    x, weight, depth = given["input"], given["weight"], len(given["normalized_shape"])
    if s.kind == Kind.PERMUTE:
        spread_over(s, [p for p in (x, weight, node) if p is not None])
    elif s.kind == Kind.ROTATE:
        _rotated(s, node, x, weight)
    elif s.kind == Kind.SIGN:
        _signed(s, node, x, weight)
    else:
        _stop_statistics(s, node, x, depth)
        _affine(s, node, weight, None, depth)


def _signed(s: Solver, node: fx.Node, x: fx.Node, weight: Any) -> None:
    """The mean of squares sees no sign: it goes through, or into the gain where the label fits it."""
    for label in s.labels(x):
        s.put(node, label.index)
    for label in s.labels(node):
        carried = any(other.index.shape == label.index.shape for other in s.labels(x))
        if weight is not None and fits(s, weight, label.index) and not carried:
            s.put(weight, label.index)
        elif not s.labels(weight):
            s.put(x, label.index)


def _rotated(s: Solver, node: fx.Node, x: fx.Node, weight: Any) -> None:
    for label in (*s.labels(x), *s.labels(node)):
        if set(label.slot) != {label.index.ndim - 1}:
            s.stop(node, label.index, f"{node.name} norms other channels than the rotated ones")
        elif weight is not None and not is_uniform(s, weight, label.index):
            s.stop(node, label.index, f"{node.name} scales the channels by different gains, {weight.name}")
    spread_over(s, [x, node])


def _stop_statistics(s: Solver, node: fx.Node, x: Any, depth: int) -> None:
    for label in s.labels(x):
        s.stop(node, label.index, f"the statistics of {node.name} would change")


def _affine(s: Solver, node: fx.Node, weight: Any, bias: Any, depth: int) -> None:
    """A change of the result lands in gain and bias, which are made if there are none."""
    for label in s.labels(node):
        outside = [a for a in label.slot if a < label.index.ndim - depth]
        index = s.coarsen(label.index, outside)
        index = index.reshape(index.shape[index.ndim - depth :])
        if s.kind == Kind.ROTATE or s.kind == Kind.REMOVE:
            s.stop(node, label.index, f"{node.name} norms over the channels that a {s.kind} would change")
        elif s.kind == Kind.SHIFT:
            _shifted(s, node, bias, index, label.power)
        else:
            _gained(s, node, weight, bias, index, label.power)
    for operand in (weight, bias):
        for label in s.labels(operand):
            s.put(node, label.index, label.power)


def _shifted(s: Solver, node: fx.Node, bias: Any, index: Index, power: float) -> None:
    if bias is not None:
        s.put(bias, index, power)
    elif node.target is aten.rms_norm.default:
        s.stop(node, index, f"{node.name} has no bias")
    else:
        s.extra(node, "bias", index, power)


def _gained(s: Solver, node: fx.Node, weight: Any, bias: Any, index: Index, power: float) -> None:
    if weight is not None:
        s.put(weight, index, power)
    else:
        s.extra(node, "gain", index, power)
    s.put(bias, index, power)


def group_norm(s: Solver, node: fx.Node) -> None:
    """Statistics over groups of channels (axis 1) and all positions; gain and bias per channel."""
    given = s.args(node)
    x, weight, bias, groups = given["input"], given["weight"], given["bias"], given["num_groups"]
    if s.kind == Kind.PERMUTE:
        spread_over(s, [x, node])
        _refine(s, node, x, groups)
    else:
        _stop_statistics(s, node, x, 1)
        if s.kind in (Kind.ROTATE, Kind.REMOVE):
            return s.stop_all(node, [node], f"{node.name} norms over the channels that a {s.kind} would change")
    _per_channel(s, node, [weight, bias] if s.kind != Kind.SHIFT else [bias], {0: "gain"} if s.kind != Kind.SHIFT else {0: "bias"})


def _refine(s: Solver, node: fx.Node, x: Any, groups: int) -> None:
    for label in s.labels(x):
        channels = label.index.shape[1]
        if channels > 1:
            key = torch.arange(channels).div(channels // groups, rounding_mode="floor").numpy()
            s.classes.refine(node, label.index, key.reshape(1, -1, *(1,) * (label.index.ndim - 2)))


def batch_norm(s: Solver, node: fx.Node) -> None:
    """(x - mean) / sqrt(var + eps) * w + b with stored statistics: an affine map per channel."""
    given = s.args(node)
    x, training = given["input"], given.get("training")
    operands = {k: given[k] for k in ("weight", "bias", "running_mean", "running_var")}
    if training or s.kind == Kind.ROTATE:
        return s.stop_all(
            node, [x, node], f"{node.name} " + ("uses the statistics of the batch" if training else "scales channels differently")
        )
    if s.kind.is_mixing:
        spread_over(s, [x, node])
        return _per_channel(s, node, list(operands.values()), {})
    if s.kind == Kind.SCALE:
        s.stop_all(node, [x], f"{node.name} adds eps to the variance, which a scale of its input would have to change")
    else:
        for label in s.labels(x):
            _channel(s, operands["running_mean"], label.index, label.power)
            if s.kind == Kind.SIGN:
                _channel(s, operands["weight"], label.index, label.power)
    _per_channel(s, node, [operands["bias"]] if s.kind == Kind.SHIFT else [operands["weight"], operands["bias"]], {})


def _per_channel(s: Solver, node: fx.Node, operands: list[Any], missing: Mapping[int, str]) -> None:
    """The result's labels onto vectors along axis 1."""
    for label in s.labels(node):
        index = s.coarsen(label.index, [a for a in label.slot if a != 1])
        for number, operand in enumerate(operands):
            if operand is not None:
                _channel(s, operand, index, label.power)
            elif role := missing.get(number):
                s.extra(node, role, index.reshape(-1), label.power)
        s.put(node, index, label.power)


def _channel(s: Solver, operand: Any, index: Index, power: float) -> None:
    index = s.coarsen(index, [a for a, n in enumerate(index.shape) if n > 1 and a != 1])
    s.put(operand, index.reshape(-1), power)


TABLE: Mapping[Any, Any] = {
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.group_norm.default: group_norm,
    aten.batch_norm.default: batch_norm,
}
