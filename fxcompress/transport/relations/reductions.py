"""Ops that sum, average, normalise or pool along axes, and lookups by computed indices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.transport.facts import outputs
from fxcompress.transport.labels import Index, Kind
from fxcompress.transport.relations.gathers import gathered
from fxcompress.transport.relations.pointwise import spread_over
from fxcompress.transport.solver import Solver

aten = torch.ops.aten


def reduced(s: Solver, node: fx.Node) -> None:
    """mean, sum, vector norm over axes."""
    if node.target in NORMS and s.kind in (Kind.SIGN, Kind.SHIFT, Kind.ROTATE):
        return _length(s, node, _axes(s, node))
    return _averaged(s, node, node)


def _averaged(s: Solver, node: fx.Node, out: fx.Node) -> None:
    """out: the result, or one of the results, that is linear in the operand."""
    x: Any = node.args[0]
    axes = _axes(s, node)
    kept = len(s.shape(out)) == len(s.shape(x))
    for label in s.labels(x):
        if set(label.slot) & set(axes):
            _within(s, node, label.index, axes, label.slot)
        else:
            s.put(out, label.index if kept else np.squeeze(label.index, tuple(axes)), _factor(s, node, axes) * label.power)
    for label in s.labels(out):
        s.put(x, label.index if kept else np.expand_dims(label.index, tuple(axes)), label.power / _factor(s, node, axes))


def _factor(s: Solver, node: fx.Node, axes: list[int]) -> float:
    """What a shift is multiplied by: the number of terms of a sum."""
    if s.kind != Kind.SHIFT or node.target not in SUMS:
        return 1.0
    x: Any = node.args[0]
    count = float(np.prod([n if isinstance(n, int) else np.nan for n in (s.shape(x)[a] for a in axes)]))
    if not count > 0:
        s.stop_all(node, [x, node], f"{node.name} sums a dynamic number of terms")
    return count if count > 0 else 1.0


def keep_rows(s: Solver, node: fx.Node, x: Any, axes: list[int]) -> None:
    """Positions along the axes are seen together: those of different rows may not mix."""
    for label in s.labels(x):
        if set(label.slot) & set(axes):
            s.keep_rows(node, label.index, [a for a in label.slot if a not in axes])


def _within(s: Solver, node: fx.Node, index: Index, axes: list[int], slot: tuple[int, ...]) -> None:
    """A label along a reduced axis: swallowed where the result can't see order; a rotation if it keeps the mean."""
    if s.kind in (Kind.PERMUTE, Kind.ROTATE):
        s.keep_mean(node, index)
        return s.keep_rows(node, index, [a for a in slot if a not in axes])
    s.stop(node, index, f"{node.name} sums over the channels that a {s.kind} would change")


def _length(s: Solver, node: fx.Node, axes: list[int]) -> None:
    """A norm sees no sign, and a Euclidean one no rotation of all that it sums."""
    for label in s.labels(node.args[0]):
        turned = s.kind == Kind.ROTATE and bool(set(label.slot) & set(axes)) and _is_euclidean(node)
        if turned:
            s.keep_rows(node, label.index, set(label.slot) - set(axes))
        elif s.kind != Kind.SIGN:
            s.stop(node, label.index, f"{node.name} measures the channels that a {s.kind} would change")
    s.stop_all(node, [node], f"{node.name} is a length, which no {s.kind} of its operand changes")


def _is_euclidean(node: fx.Node) -> bool:
    return len(node.args) < 2 or bool(node.args[1] == 2)


def variance(s: Solver, node: fx.Node) -> None:
    """var or std over axes: no shift and no order is seen along them, and no rotation that keeps the mean."""
    for out in (node,) if node.target not in PAIRS else [r for i, r in outputs(node).items() if i == 0]:
        _spread_of(s, node, out, 2.0 if "var" in str(node.target) else 1.0)
    for mean in [r for i, r in outputs(node).items() if i == 1] if node.target in PAIRS else ():
        _averaged(s, node, mean)


def _axes(s: Solver, node: fx.Node) -> list[int]:
    rank, dims = len(s.shape(node.args[0])), s.args(node).get("dim")
    return sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))})


def _spread_of(s: Solver, node: fx.Node, out: fx.Node, power: float) -> None:
    x: Any = node.args[0]
    axes = _axes(s, node)
    kept = len(s.shape(out)) == len(s.shape(x))
    for label in s.labels(x):
        if set(label.slot) & set(axes):
            _within(s, node, label.index, axes, label.slot)
        elif s.kind == Kind.ROTATE:
            s.stop(node, label.index, f"{node.name} measures every channel alone")
        elif s.kind in (Kind.SCALE, Kind.PERMUTE, Kind.REMOVE):
            s.put(out, label.index if kept else np.squeeze(label.index, tuple(axes)), label.power * power)
    if s.kind in (Kind.SIGN, Kind.SHIFT, Kind.ROTATE):
        return s.stop_all(node, [out], f"{node.name} is a spread, which no {s.kind} of its operand changes")
    for label in s.labels(out):
        s.put(x, label.index if kept else np.expand_dims(label.index, tuple(axes)), label.power / power)
    return None


def softmax(s: Solver, node: fx.Node) -> None:
    """exp over its sum along one axis: a shift that is equal along it is not seen, order elsewhere is kept."""
    x: Any = node.args[0]
    axis = s.args(node)["dim"] % len(s.shape(node))
    if s.kind == Kind.PERMUTE or (s.kind == Kind.REMOVE and not _varies(s, [x, node], axis)):
        spread_over(s, [x, node])
        return keep_rows(s, node, x, [axis])
    labels = s.labels(x)
    s.stop_all(node, [node], f"{node.name} doesn't commute with a {s.kind}")
    for label in labels:
        if s.kind != Kind.SHIFT or axis in label.slot:
            s.stop(node, label.index, f"{node.name} doesn't commute with a {s.kind} along its axis")


def _varies(s: Solver, values: list[Any], axis: int) -> bool:
    return any(axis in label.slot for v in values for label in s.labels(v))


def pool(s: Solver, node: fx.Node) -> None:
    """Windows over trailing axes, all channels alike; of a pair the second are places."""
    x, window, results = node.args[0], POOLS[node.target], outputs(node) or {0: node}
    if reason := _pooled_wrong(s, node):
        return s.stop_all(node, [x, *results.values()], f"{node.name} {reason}")
    _over(s, [x, *(r for number, r in results.items() if number == 0 or s.kind.is_mixing)], range(-window, 0))


def _over(s: Solver, ports: list[Any], axes: Iterable[int]) -> None:
    """What one carries, all carry; along these axes one parameter acts everywhere."""
    for port in ports:
        for label in s.labels(port):
            index = s.coarsen(label.index, [a % label.index.ndim for a in axes])
            for other in ports:
                s.put(other, index, label.power)


def grid_sampled(s: Solver, node: fx.Node) -> None:
    """An image read at computed places, between its points; a shift would change zeros that are read outside it."""
    x, grid, _, padding, *_ = node.args
    s.stop_all(node, [grid], f"{node.name} uses the value as a position")
    if s.kind == Kind.SHIFT and padding == 0:
        return s.stop_all(node, [x, node], f"{node.name} reads zeros from outside the image")
    _over(s, [x, node], [*range(2, len(s.shape(node))), *[0] * s.kind.is_mixing])


def _pooled_wrong(s: Solver, node: fx.Node) -> str:
    name, given = str(node.target), s.args(node)
    if "max_pool" in name and s.kind in (Kind.SIGN, Kind.ROTATE):
        return "takes the greatest value"
    counted = given.get("count_include_pad", False) and any(given.get("padding") or ())
    return "counts zeros from outside the image" if s.kind == Kind.SHIFT and "avg_pool" in name and counted else ""


def ordered(s: Solver, node: fx.Node) -> None:
    """The greatest (least) along an axis, some or all, in order, with their places. What moves a whole row keeps its order."""
    x: Any = node.args[0]
    axis = s.args(node)["dim"] % len(s.shape(x))
    results = outputs(node)
    if s.kind in (Kind.SIGN, Kind.ROTATE) or _varies(s, [x], axis):
        return s.stop_all(node, [x, *results.values()], f"{node.name} orders the channels, which a {s.kind} would change")
    for number, result in results.items():
        kept = len(s.shape(result)) == len(s.shape(x))
        for label in s.labels(x) if number == 0 or s.kind.is_mixing else ():
            s.put(result, label.index if kept else label.index.squeeze(axis), label.power)
        for label in s.labels(result):
            index = label.index if kept else np.expand_dims(label.index, axis)
            if axis in label.slot and kept:
                s.stop(node, label.index, f"{node.name} orders the channels, which a {s.kind} would change")
            else:
                s.put(x, index, label.power)
    return None


def greatest(s: Solver, node: fx.Node) -> None:
    """The greatest or least value over axes."""
    if s.kind in (Kind.SIGN, Kind.ROTATE):
        return s.stop_all(node, [node.args[0], node], f"{node.name} takes the greatest value, which a {s.kind} would change")
    return _averaged(s, node, node)


def gather(s: Solver, node: fx.Node) -> None:
    """x at computed places along one axis: along it one parameter acts everywhere; the other axes keep theirs."""
    given = s.args(node)
    x, places = given["self"], given["index"]
    axis, sizes = given["dim"] % len(s.shape(x)), (s.shape(x), s.shape(places))
    if any(m != n for a, (m, n) in enumerate(zip(*sizes, strict=True)) if a != axis):
        return s.stop_all(node, [x, places, node], f"{node.name} reads a part of the other axes")
    for port, other in ((x, node), (node, x)):
        for label in s.labels(port):
            index = s.coarsen(label.index, [axis])
            s.put(port, index, label.power)
            s.put(other, index, label.power)
            if index.size == 1:
                continue
            if s.kind == Kind.ROTATE and not s.is_flat_in_rows((node, port), places, index):
                s.stop(node, index, f"{node.name} reads another place for every channel")
            elif s.kind in (Kind.PERMUTE, Kind.REMOVE) and not s.is_unmoved((node, port), places, index):
                s.put(places, index, label.power)
    for label in s.labels(places):
        s.put(node, s.coarsen(label.index, [axis]), label.power)
    return None


def index_add(s: Solver, node: fx.Node) -> None:
    """Rows of one value added to computed rows of another: along that axis one parameter acts everywhere."""
    given = s.args(node)
    ports = [given["self"], given["source"], node]
    axis = given["dim"] % len(s.shape(node))
    if s.kind == Kind.SHIFT:
        return s.stop_all(node, ports, f"{node.name} adds up shifts")
    for port in ports:
        for label in s.labels(port):
            index = s.coarsen(label.index, [axis])
            for other in ports:
                s.put(other, index, label.power)
    return None


def cumulated(s: Solver, node: fx.Node) -> None:
    """Running sums: channels may not lie along their axis."""
    x: Any = node.args[0]
    axis = s.args(node)["dim"] % len(s.shape(node))
    if s.kind == Kind.SHIFT or _varies(s, [x, node], axis):
        return s.stop_all(node, [x, node], f"{node.name} adds up along the channels" if s.kind != Kind.SHIFT else f"{node.name} adds up shifts")
    spread_over(s, [x, node])


def index(s: Solver, node: fx.Node) -> None:
    """x[..., i, j, ...]: constant positions are picked as by index_select; along the axes of computed ones one parameter acts everywhere."""
    x: Any = node.args[0]
    picked = list(s.args(node)["indices"])
    at = [a for a, i in enumerate(picked) if i is not None]
    known = s.facts.program.constant(picked[at[0]]) if len(at) == 1 else None
    if known is not None and known.dtype == torch.long and known.dim() < 2 and isinstance(size := s.shape(x)[at[0]], int):
        return gathered(s, node, [x], [(node, known.reshape(-1).numpy() % size)], at[0], drop=not known.dim())
    if at != list(range(at[0], at[-1] + 1)) or any(_is_mask(s, picked[a]) for a in at):
        return s.stop_all(node, [x, node], f"{node.name} picks by a mask or along separated axes")
    rank, result = len(s.shape(x)), len(s.shape(node))
    width = result - rank + len(at)  # axes of the broadcast positions
    for label in s.labels(x):
        i = s.coarsen(label.index, at)
        s.put(x, i, label.power)
        s.put(node, i.reshape(*i.shape[: at[0]], *(1,) * width, *i.shape[at[-1] + 1 :]), label.power)
    for label in s.labels(node):
        i = s.coarsen(label.index, range(at[0], at[0] + width))
        s.put(x, i.reshape(*i.shape[: at[0]], *(1,) * len(at), *i.shape[at[0] + width :]), label.power)
    s.stop_all(node, [p for p in picked if p is not None], f"{node.name} uses the value as a position")


def _is_mask(s: Solver, value: Any) -> bool:
    known = s.facts.value(value)
    return known is None or known.dtype == torch.bool


def index_put(s: Solver, node: fx.Node) -> None:
    """Values written at computed positions of the leading axes: the rest of the axes keep their labels."""
    given = s.args(node)
    x, picked, values = given["self"], list(given["indices"]), given["values"]
    if None in picked or any(_is_mask(s, i) for i in picked):
        return s.stop_all(node, [x, values, node], f"{node.name} writes by a mask or along later axes")
    depth = len(picked)
    for port in (x, node):
        for label in s.labels(port):
            i = s.coarsen(label.index, range(depth))
            for other in (x, node):
                s.put(other, i, label.power)
            s.put(values, i.reshape(i.shape[depth:]), label.power)
    for label in s.labels(values):
        lead = len(s.shape(values)) - (len(s.shape(x)) - depth)
        i = s.coarsen(label.index, range(lead))
        s.put(node, i.reshape(*(1,) * depth, *i.shape[lead:]), label.power)


def embedding(s: Solver, node: fx.Node) -> None:
    """Rows of a table by number."""
    table, numbers = node.args[:2]
    for label in s.labels(table):
        s.put(node, s.coarsen(label.index, [0])[0], label.power)
    for label in s.labels(node):
        s.put(table, s.coarsen(label.index, [a for a in label.slot if a < label.index.ndim - 1]).reshape(1, -1), label.power)
    s.stop_all(node, [numbers], f"{node.name} uses the value as a row number")


PAIRS = (aten.var_mean.correction, aten.std_mean.correction, aten.var_mean.dim, aten.std_mean.dim)
SPREADS = (*PAIRS, aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim)
SUMS = (aten.sum.dim_IntList, aten.sum.default)
NORMS = (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
ADAPTIVE = ("adaptive_avg_pool", "adaptive_max_pool")
UPSAMPLES: Mapping[str, int] = {  # by name: how many trailing axes
    **{f"{name}{n}d": n for name in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)},
    **{"upsample_linear1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3},
    **{"_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2},
}
POOLS: Mapping[Any, int] = {
    **{getattr(aten, f"{name}{n}d").default: n for name in ("avg_pool", "max_pool", *ADAPTIVE) for n in (1, 2, 3)},
    **{getattr(aten, f"max_pool{n}d_with_indices").default: n for n in (2, 3)},
    **{op: n for name, n in UPSAMPLES.items() for op in (getattr(aten, name).default, getattr(aten, name).vec)},
}
TABLE: Mapping[Any, Any] = {
    **dict.fromkeys((aten.mean.dim, aten.mean.default, *SUMS, *NORMS), reduced),
    **dict.fromkeys(SPREADS, variance),
    **dict.fromkeys((aten.softmax.int, aten._softmax.default, aten.log_softmax.int), softmax),
    **dict.fromkeys(POOLS, pool),
    **dict.fromkeys((aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default), grid_sampled),
    aten.cumsum.default: cumulated,
    **dict.fromkeys((aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim), ordered),
    **dict.fromkeys((aten.amax.default, aten.amin.default), greatest),
    aten.gather.default: gather,
    aten.index_add.default: index_add,
    aten.index.Tensor: index,
    aten.index_put.default: index_put,
    aten.embedding.default: embedding,
}
