"""Normalisations kept whole. Their statistics see all channels at once; what comes out of them is taken up by gain and bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.transport.facts import outputs
from fxcompress.transport.labels import Index, Kind, aligned
from fxcompress.transport.relations.pointwise import described, is_uniform, spread_over, triple, vectors
from fxcompress.transport.relations.reductions import keep_rows
from fxcompress.transport.solver import Inner, Solver

aten = torch.ops.aten


def layer_norm(s: Solver, node: fx.Node) -> None:
    """(x - mean) / std * w + b over the last axes."""
    given = s.args(node)
    _layer_norm(s, node, node, given["input"], given["weight"], given["bias"], len(given["normalized_shape"]))


def native_layer_norm(s: Solver, node: fx.Node) -> None:
    """The same with its mean and 1 / std as further results."""
    given = s.args(node)
    if out := _first(s, node):
        _layer_norm(s, node, out, given["input"], given["weight"], given["bias"], len(given["normalized_shape"]))


def _first(s: Solver, node: fx.Node) -> fx.Node | None:
    """The normed value among the results, if nobody reads the statistics."""
    results = outputs(node)
    if len(results) == 1 and 0 in results:
        return results[0]
    s.stop_all(node, [*node.all_input_nodes, *results.values()], f"{node.name} hands out its statistics")
    return None


def _layer_norm(s: Solver, node: fx.Node, out: fx.Node, x: Any, weight: Any, bias: Any, depth: int) -> None:
    if s.kind == Kind.PERMUTE:
        _permuted(s, node, out, x, [weight, bias], depth)
    elif s.kind == Kind.ROTATE:
        for value in (x, out):
            for label in s.labels(value):
                s.keep_mean((node, value), label.index)
        s.stop_all(node, [weight], f"{node.name} has a gain that a rotation would mix")
        _rotated(s, node, out, x, weight, bias)
    elif s.kind == Kind.REMOVE:
        _rows_gone(s, node, out, x, [weight, bias], depth)
    else:
        _stop_statistics(s, node, x)
        _affine(s, node, out, weight, bias, depth)


def _rows_gone(s: Solver, node: fx.Node, out: fx.Node, x: Any, operands: list[Any], depth: int) -> None:
    """What is normed together goes together, as heads with a norm each do."""
    for port in (x, out):
        for label in s.labels(port):
            index = s.coarsen(label.index, range(label.index.ndim - depth, label.index.ndim))
            if index.size == 1:
                s.stop(node, index, f"{node.name} norms over the channels that a {s.kind} would change")
            for other in (x, out):
                s.put(other, index, label.power)
    s.stop_all(node, operands, f"{node.name} norms over the channels that a {s.kind} would change")


def _permuted(s: Solver, node: fx.Node, out: fx.Node, x: Any, operands: list[Any], depth: int) -> None:
    spread_over(s, [p for p in (x, *operands, out) if p is not None])
    rank = len(s.shape(out))
    keep_rows(s, node, x, list(range(rank - depth, rank)))


def rms_norm(s: Solver, node: fx.Node) -> None:
    """x / rms * w over the last axes."""
    given = s.args(node)
    x, weight, depth = given["input"], given["weight"], len(given["normalized_shape"])
    if s.kind == Kind.PERMUTE:
        _permuted(s, node, node, x, [weight], depth)
    elif s.kind == Kind.ROTATE:
        s.stop_all(node, [weight], f"{node.name} has a gain that a rotation would mix")
        _rotated(s, node, node, x, weight, None)
    elif s.kind == Kind.SIGN:
        _signed(s, node, x, weight)
    elif s.kind == Kind.REMOVE:
        _rows_gone(s, node, node, x, [weight], depth)
    else:
        _stop_statistics(s, node, x)
        _affine(s, node, node, weight, None, depth)


def _signed(s: Solver, node: fx.Node, x: fx.Node, weight: Any) -> None:
    """The mean of squares sees no sign: a product of x and gain."""
    if weight is None:
        spread_over(s, [x, node])
    else:
        triple(s, node, (x, weight), (1.0, 1.0))


def _rotated(s: Solver, node: fx.Node, out: fx.Node, x: fx.Node, weight: Any, bias: Any) -> None:
    """The mean of squares is kept, and so is the mean by a rotation that keeps it; a shift turns with the result."""
    for label in (*s.labels(x), *s.labels(out)):
        s.keep_rows(node, label.index, [a for a in label.slot if a < label.index.ndim - 1])
        if label.index.ndim - 1 not in label.slot:
            s.stop(node, label.index, f"{node.name} norms other channels than the rotated ones")
        elif weight is not None and not is_uniform(s, weight, label.index):
            s.stop(node, label.index, f"{node.name} scales the channels by different gains, {described(weight)}")
    spread_over(s, [x, out, *([] if bias is None else [bias])])


def _stop_statistics(s: Solver, node: fx.Node, x: Any) -> None:
    for label in s.labels(x):
        s.stop(node, label.index, f"the statistics of {node.name} would change")


def _affine(s: Solver, node: fx.Node, out: fx.Node, weight: Any, bias: Any, depth: int) -> None:
    """A change of the result lands in gain and bias, which are made if there are none."""
    for label in s.labels(out):
        outside = [a for a in label.slot if a < label.index.ndim - depth]
        index = s.coarsen(label.index, outside)
        s.put(out, index, label.power)
        index = index.reshape(index.shape[index.ndim - depth :])
        if s.kind == Kind.SHIFT:
            _shifted(s, node, bias, index, label.power)
        else:
            _gained(s, node, weight, bias, index, label.power)
    if s.kind == Kind.SHIFT:
        s.stop_all(node, [weight], f"{node.name} has a gain, which a shift of would act on every input differently")
    for operand in (weight, bias) if s.kind != Kind.SHIFT else (bias,):
        for label in s.labels(operand):
            s.put(out, aligned(label.index, len(s.shape(out))), label.power)


def _shifted(s: Solver, node: fx.Node, bias: Any, index: Index, power: float) -> None:
    if bias is not None:
        s.put(bias, index, power)
    elif node.target not in MAKE:
        s.stop(node, index, f"{node.name} has no bias")
    elif index.size > 1:
        s.extra(node, "bias", index, power)


def _gained(s: Solver, node: fx.Node, weight: Any, bias: Any, index: Index, power: float) -> None:
    if weight is not None:
        s.put(weight, index, power)
    elif node.target not in (*MAKE, aten.rms_norm.default):
        s.stop(node, index, f"{node.name} has no gain")
    elif index.size > 1:
        s.extra(node, "gain", index, power)
    s.put(bias, index, power)


def group_norm(s: Solver, node: fx.Node) -> None:
    """Statistics over groups of channels (axis 1) and all positions; gain and bias per channel."""
    given = s.args(node)
    _group_norm(s, node, node, given["input"], given["weight"], given["bias"], given["num_groups"])


def native_group_norm(s: Solver, node: fx.Node) -> None:
    """The same with its mean and 1 / std as further results."""
    given = s.args(node)
    if out := _first(s, node):
        _group_norm(s, node, out, given["input"], given["weight"], given["bias"], given["group"])


def _group_norm(s: Solver, node: fx.Node, out: fx.Node, x: Any, weight: Any, bias: Any, groups: int) -> None:
    if s.kind == Kind.PERMUTE:
        spread_over(s, [x, out])
        _per_channel(s, node, out, weight, bias)
        return _refine(s, node, x, groups)
    _stop_statistics(s, node, x)
    if s.kind in (Kind.ROTATE, Kind.REMOVE):
        return s.stop_all(node, [out, weight, bias], f"{node.name} norms over the channels that a {s.kind} would change")
    return _per_channel(s, node, out, weight, bias)


def _per_channel(s: Solver, node: fx.Node, out: fx.Node, weight: Any, bias: Any) -> None:
    """The result's labels on gain and bias, which are made where they are missing and needed."""
    wanted = [(bias, "bias")] if s.kind == Kind.SHIFT else [(weight, "gain"), (bias, "")]
    if s.kind == Kind.SHIFT:
        s.stop_all(node, [weight], f"{node.name} has a gain, which a shift of would act on every input differently")
    vectors(s, out, [operand for operand, _ in wanted if operand is not None])
    for operand, role in wanted:
        for label in s.labels(out) if operand is None and role and not s.kind.is_mixing else ():
            index = s.coarsen(label.index, [a for a in label.slot if a != 1])
            s.put(out, index, label.power)
            if node.target in MAKE:
                s.extra(node, role, index.reshape(-1), label.power)
            else:
                s.stop(node, index, f"{node.name} has no {role}")


def _refine(s: Solver, node: fx.Node, x: Any, groups: int) -> None:
    """Channels of one group may mix; positions in space are seen together, so those of different channels may not."""
    for label in s.labels(x):
        if 1 in label.slot:
            index = s.coarsen(label.index, [a for a in label.slot if a != 1])
            s.put(x, index, label.power)
            key = np.arange(index.shape[1]) // (index.shape[1] // groups)
            s.classes.refine(node, index, key.reshape(1, -1, *(1,) * (index.ndim - 2)))
        else:
            keep_rows(s, node, x, list(range(2, label.index.ndim)))


def batch_norm(s: Solver, node: fx.Node) -> None:
    """(x - mean) / sqrt(var + eps) * w + b with stored statistics: an affine map per channel."""
    given = s.args(node)
    x, weight, bias, mean, var = (given[k] for k in ("input", "weight", "bias", "running_mean", "running_var"))
    if given.get("training") or s.kind == Kind.ROTATE:
        why = "uses the statistics of the batch" if given.get("training") else "scales channels differently"
        return s.stop_all(node, [x, weight, bias, mean, var, node], f"{node.name} {why}")
    if s.kind.is_mixing:
        spread_over(s, [x, node])
        return vectors(s, node, [p for p in (weight, bias, mean, var) if p is not None])
    s.stop_all(node, [var], f"{node.name} adds eps to it and divides by the root, which no {s.kind} of it is")
    _with_mean(s, x, mean)
    if s.kind != Kind.SHIFT:
        return _factored(s, node, x, weight, bias)
    if bias is None:
        return s.stop_all(node, [node, weight], f"{node.name} has no bias")
    s.stop_all(node, [weight], f"{node.name} has a gain, which a shift of would act on every input differently")
    return vectors(s, node, [bias])


def _with_mean(s: Solver, x: Any, mean: Any) -> None:
    """x - mean: what the input carries, the stored mean carries."""
    for label in s.labels(x):
        index = s.coarsen(label.index, [a for a in label.slot if a != 1])
        s.put(x, index, label.power)
        s.put(mean, index.reshape(-1), label.power)
    for label in s.labels(mean):
        s.put(x, label.index.reshape(1, -1, *(1,) * (len(s.shape(x)) - 2)), label.power)


def _factored(s: Solver, node: fx.Node, x: Any, weight: Any, bias: Any) -> None:
    """y - b = w (x - mean) / std: a product of gain and input. The gain, which is made if there is none, takes what either side carries."""
    gain = Inner(node, 0, (1, s.shape(node)[1], *(1,) * (len(s.shape(node)) - 2)))
    for label in s.labels(weight):
        s.put(gain, label.index.reshape(gain.sizes), label.power)
    if s.labels(x) or s.labels(node) or s.labels(gain):
        s.choices.setdefault(node, "a-b" if s.labels(x) else "b-out")
        triple(s, node, (x, gain), (1.0, 1.0))
    for label in s.labels(gain):
        if weight is not None:
            s.put(weight, label.index.reshape(-1), label.power)
        else:
            s.extra(node, "gain", label.index.reshape(-1), label.power)
    vectors(s, node, [] if bias is None else [bias])


MAKE = (aten.layer_norm.default, aten.group_norm.default)  # what a gain or bias can be made for
TABLE: Mapping[Any, Any] = {
    aten.native_layer_norm.default: native_layer_norm,
    aten.native_group_norm.default: native_group_norm,
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.group_norm.default: group_norm,
    aten.batch_norm.default: batch_norm,
}
