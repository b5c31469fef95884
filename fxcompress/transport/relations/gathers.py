"""Ops that pick positions along one axis out of their inputs laid end to end: slice, cat, split, roll, repeat, pad and their like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.transport.facts import SPLITS, outputs
from fxcompress.transport.labels import UNSET, Index, Kind, Label
from fxcompress.transport.relations.views import mapped, parted
from fxcompress.transport.solver import Solver

aten = torch.ops.aten
NOTHING = -1  # a position that comes from no input: padding


def gathered(
    s: Solver, node: fx.Node, sources: Sequence[Any], results: Sequence[tuple[fx.Node, Index | None]], axis: int, drop: bool = False
) -> None:
    """results: (node, per position along the axis the position in the sources laid end to end), or None where sizes are dynamic: then one
    parameter acts along the axis everywhere. drop: the results lack the axis (select, unbind)."""
    sizes = [s.shape(x)[axis] for x in sources]
    if any(places is None for _, places in results) or not all(isinstance(n, int) for n in sizes):
        return _alike(s, sources, [r for r, _ in results], axis, drop)
    if s.kind == Kind.REMOVE:  # a channel goes from all pieces or from none
        _alike(s, sources, [r for r, _ in results], axis, drop, only_across=True)
    offset = 0
    for source, size in zip(sources, sizes, strict=True):
        for result, places in results:
            assert places is not None
            _pick(s, source, result, np.asarray(places - offset), size, axis, drop)
        offset += size
    if s.kind.is_mixing:
        _part(s, node, sizes, results, axis, drop)


def _part(s: Solver, node: fx.Node, sizes: Sequence[int], results: Sequence[tuple[fx.Node, Any]], axis: int, drop: bool) -> None:
    """Channels that a result takes from different sources may not mix."""
    ends = np.cumsum(sizes)
    for result, places in results:
        for label in s.labels(result) if not drop else ():
            if label.index.shape[axis] > 1:
                key = np.searchsorted(ends, places, side="right")
                s.classes.refine((node, result, label.index.shape), label.index, key.reshape(-1, *(1,) * (label.index.ndim - axis - 1)))


def _pick(s: Solver, source: Any, result: fx.Node, places: Index, size: int, axis: int, drop: bool) -> None:
    """places: per position of the result that of the source; those out of range come from elsewhere."""
    own = (places >= 0) & (places < size)
    if not own.any():
        return
    along = s.kind == Kind.REMOVE
    for label in s.labels(source):
        index = label.index
        if along and index.shape[axis] == 1:
            continue
        if index.shape[axis] > 1:
            index = index.take(np.where(own, places, 0), axis)
        s.put(result, _shaped(_masked(index, own, axis), axis, drop), label.power)
    covered = np.zeros(size, bool)
    covered[places[own]] = True
    if s.kind.is_mixing and not covered.all():
        _kept_apart(s, source, result, covered, axis)
    for label in s.labels(result):
        index = np.expand_dims(label.index, axis) if drop else label.index
        s.put(source, _scattered(s, index, places, own, covered, axis), label.power)


def _kept_apart(s: Solver, source: Any, result: fx.Node, covered: Any, axis: int) -> None:
    """What a result takes may not mix with what it leaves."""
    for label in s.labels(source):
        if label.index.shape[axis] > 1:
            key = covered.astype(np.int64).reshape(-1, *(1,) * (label.index.ndim - axis - 1))
            s.classes.refine((source, result, label.index.shape), label.index, key)


def _scattered(s: Solver, index: Index, places: Index, own: Any, covered: Any, axis: int) -> Index:
    if index.shape[axis] == 1:
        return _masked(index, covered, axis)
    index = index.compress(own, axis)
    shape = list(index.shape)
    shape[axis] = len(covered)
    full = np.full(shape, UNSET)
    at = (*(slice(None),) * axis, places[own])
    full[at] = np.where(index != UNSET, index, full[at])
    s.classes.union(full[at], index)
    return full


def _masked(index: Index, known: Any, axis: int) -> Index:
    """UNSET along the axis where not known."""
    if known.all():
        return index
    return np.where(known.reshape(-1, *(1,) * (index.ndim - axis - 1)), index, UNSET)


def _shaped(index: Index, axis: int, drop: bool) -> Index:
    return index.squeeze(axis) if drop else index


def _alike(s: Solver, sources: Sequence[Any], results: Sequence[fx.Node], axis: int, drop: bool, only_across: bool = False) -> None:
    """One label for all, which doesn't vary along the axis. only_across: those that do are left alone."""
    ports = [*((x, False) for x in sources), *((r, drop) for r in results)]
    for port, lacks in ports:
        for label in s.labels(port):
            if only_across and not lacks and label.index.shape[axis] > 1:
                continue
            index = np.expand_dims(label.index, axis) if lacks else s.coarsen(label.index, [axis])
            for other, other_lacks in ports:
                s.put(other, index.squeeze(axis) if other_lacks else index, label.power)


def _axis(s: Solver, x: Any, dim: Any) -> int:
    return int(dim) % len(s.shape(x))


def _numbers(size: Any) -> Index | None:
    return np.arange(size) if isinstance(size, int) else None


def slice_(s: Solver, node: fx.Node) -> None:
    """x[start:end:step] along an axis."""
    given = s.args(node)
    axis = _axis(s, node, given["dim"])
    gathered(s, node, [given["self"]], [(node, _sliced(s.shape(given["self"])[axis], given))], axis)


def _sliced(size: Any, given: dict[str, Any]) -> Index | None:
    bounds = [given["start"], given["end"], given["step"]]
    if not isinstance(size, int) or any(isinstance(b, fx.Node) for b in bounds):
        return None
    return np.arange(size)[slice(*bounds)]


def narrow(s: Solver, node: fx.Node) -> None:
    """A length of an axis from a start."""
    given = s.args(node)
    axis = _axis(s, node, given["dim"])
    known = isinstance(given["start"], int) and isinstance(given["length"], int)
    gathered(s, node, [given["self"]], [(node, np.arange(given["start"], given["start"] + given["length"]) if known else None)], axis)


def select(s: Solver, node: fx.Node) -> None:
    """One position of an axis."""
    given = s.args(node)
    axis = _axis(s, given["self"], given["dim"])
    size, number = s.shape(given["self"])[axis], given["index"]
    known = isinstance(size, int) and isinstance(number, int)
    gathered(s, node, [given["self"]], [(node, np.array([number % size]) if known else None)], axis, drop=True)


def cat(s: Solver, node: fx.Node) -> None:
    """Values laid end to end; torch passes over empty ones of one axis among others."""
    given, rank = s.args(node), len(s.shape(node))
    parts, axis = [p for p in given["tensors"] if len(s.shape(p)) == rank], _axis(s, node, given["dim"])
    gathered(s, node, parts, [(node, _numbers(s.shape(node)[axis]))], axis)


def stack(s: Solver, node: fx.Node) -> None:
    """Values laid along a new axis: each is one position of it."""
    given = s.args(node)
    axis = _axis(s, node, given["dim"])
    if s.kind == Kind.REMOVE:
        return _stacked(s, node, given["tensors"], axis)
    for number, part in enumerate(given["tensors"]):
        if isinstance(part, fx.Node):
            _put_position(s, node, part, number, len(given["tensors"]), axis)


def _stacked(s: Solver, node: fx.Node, parts: Sequence[Any], axis: int) -> None:
    """A channel goes from all parts or from none; the parts themselves stay."""
    for label in s.labels(node):
        if axis in label.slot:
            s.stop(node, label.index, f"{node.name} stacks a number of values that is fixed")
        for part in parts:
            s.put(part, s.coarsen(label.index, [axis]).squeeze(axis), label.power)
    for part in parts:
        for label in s.labels(part):
            s.put(node, np.expand_dims(label.index, axis), label.power)


def _put_position(s: Solver, node: fx.Node, part: fx.Node, number: int, count: int, axis: int) -> None:
    only = np.arange(count) == number
    for label in s.labels(part):
        s.put(node, _masked(np.expand_dims(label.index, axis), only, axis), label.power)
    for label in s.labels(node):
        if s.kind.is_mixing and label.index.shape[axis] > 1:
            key = np.arange(count).reshape(-1, *(1,) * (label.index.ndim - axis - 1))
            s.classes.refine((node, label.index.shape), label.index, key)
        s.put(part, label.index.take([number if label.index.shape[axis] > 1 else 0], axis).squeeze(axis), label.power)


def split(s: Solver, node: fx.Node) -> None:
    """Pieces of an axis, in order."""
    given = s.args(node)
    axis, pieces = _axis(s, node.args[0], given["dim"]), outputs(node)
    starts, start = {}, 0
    for number in range(max(pieces, default=-1) + 1):
        if number not in pieces:
            start = _after(s, node, given, number, start, axis)
            continue
        starts[number] = start
        start = start + s.shape(pieces[number])[axis] if start is not None else None
    places = [(pieces[n], _piece(starts[n], s.shape(pieces[n])[axis])) for n in pieces]
    gathered(s, node, [node.args[0]], places, axis)


def _piece(start: Any, size: Any) -> Index | None:
    return np.arange(start, start + size) if isinstance(start, int) and isinstance(size, int) else None


def _after(s: Solver, node: fx.Node, given: dict[str, Any], number: int, start: Any, axis: int) -> Any:
    """Where the piece after one that nobody reads starts; None if that is dynamic."""
    value = s.facts.value(node)
    size = value[number].shape[axis] if value is not None else None
    return start + size if isinstance(size, int) and isinstance(start, int) else None


def unbind(s: Solver, node: fx.Node) -> None:
    """Every position of an axis on its own."""
    given = s.args(node)
    axis = _axis(s, given["self"], given["dim"])
    gathered(s, node, [given["self"]], [(r, np.array([n])) for n, r in outputs(node).items()], axis, drop=True)


def roll(s: Solver, node: fx.Node) -> None:
    """Positions moved around the end of axes."""
    given = s.args(node)
    shifts, dims = given["shifts"], given["dims"]
    if not dims or any(isinstance(k, fx.Node) for k in shifts):
        return s.stop_all(node, [given["self"], node], f"{node.name} moves positions in a way that isn't known")
    _reordered(s, node, {d: lambda n, k=k: np.roll(np.arange(n), k) for k, d in zip(shifts, dims, strict=True)})


def flip(s: Solver, node: fx.Node) -> None:
    """Positions in reverse order."""
    _reordered(s, node, dict.fromkeys(s.args(node)["dims"], lambda n: np.arange(n)[::-1]))


def _reordered(s: Solver, node: fx.Node, orders: Mapping[int, Any]) -> None:
    """Axes whose positions stand in another order, none lost."""
    rank = len(s.shape(node))

    def moved(index: Index, inverse: bool) -> Index:
        """In the new order, or back."""
        for dim, order in orders.items():
            if index.shape[dim % rank] > 1:
                places = order(index.shape[dim % rank])
                index = index.take(np.argsort(places) if inverse else places, dim % rank)
        return index

    mapped(s, node, node.args[0], lambda i: moved(i, False), lambda i: moved(i, True))


def repeat_interleave(s: Solver, node: fx.Node) -> None:
    """Every position several times in a row."""
    given = s.args(node)
    repeats, dim = given["repeats"], given["dim"]
    known = isinstance(repeats, int) and dim is not None
    if known and s.kind == Kind.REMOVE and any(_copies_gone(s, node, label, dim % label.index.ndim, repeats) for label in s.labels(node)):
        return None
    _one_axis(s, node, given["self"], {dim: lambda n: np.arange(n).repeat(repeats)} if known else None)


def _copies_gone(s: Solver, node: fx.Node, label: Label, axis: int, times: int) -> bool:
    """Whether copies go, of every position the same."""
    if label.index.shape[axis] == 1:
        return False
    shape = label.index.shape
    copies = label.index.reshape(*shape[:axis], -1, times, *shape[axis + 1 :])
    part = parted(s, node, copies, [axis + 1])
    if part is not None:
        s.put(node, np.broadcast_to(part, copies.shape).reshape(shape), label.power)
    return part is not None


def repeat(s: Solver, node: fx.Node) -> None:
    """The whole value several times along its axes."""
    given = s.args(node)
    repeats = given["repeats"] if "repeats" in given else given["dims"]
    rank, x = len(s.shape(node)), given["self"]
    lead = rank - len(s.shape(x))
    changed = {a - lead: r for a, r in enumerate(repeats) if a >= lead and not (isinstance(r, int) and r == 1)}
    if lead or not changed or not all(isinstance(r, int) for r in changed.values()):
        return _tiled(s, node, x, repeats, lead)
    _one_axis(s, node, x, {a: (lambda n, r=r: np.tile(np.arange(n), r)) for a, r in changed.items()})


def _tiled(s: Solver, node: fx.Node, x: Any, repeats: Any, lead: int) -> None:
    """New axes in front, which a label on x doesn't depend on; along repeated axes one parameter must do."""
    axes = [a for a, r in enumerate(repeats) if a >= lead and not (isinstance(r, int) and r == 1)]
    for label in s.labels(x):
        s.put(node, s.coarsen(label.index, [a - lead for a in axes]), label.power)
    for label in s.labels(node):
        s.put(x, s.coarsen(label.index, axes), label.power)


def index_select(s: Solver, node: fx.Node) -> None:
    """Positions named by an integer vector."""
    given = s.args(node)
    picked, axis = given["index"], _axis(s, given["self"], given["dim"])
    known = isinstance(picked, fx.Node) and picked.op == "get_attr"
    places = s.facts.program.constants[str(picked.target)].numpy() if known else None
    gathered(s, node, [given["self"]], [(node, places)], axis)


def _one_axis(s: Solver, node: fx.Node, x: Any, maps: Any) -> None:
    """A map from size to places per axis. Several axes: only those the labels vary along matter."""
    if maps is None:
        return s.stop_all(node, [x, node], f"{node.name} moves positions in a way that isn't known")
    rank = len(s.shape(x))
    maps = {a % rank: m for a, m in maps.items()}
    along = [a for a in maps if any(label.index.shape[a] > 1 for label in (*s.labels(x), *s.labels(node)))] or list(maps)[:1]
    if len(along) > 1:
        return s.stop_all(node, [x, node], f"{node.name} moves positions along several axes at once")
    axis = along[0]
    size = s.shape(x)[axis]
    gathered(s, node, [x], [(node, maps[axis](size) if isinstance(size, int) else None)], axis)


def pad(s: Solver, node: fx.Node) -> None:
    """Positions added at the ends of axes. Zeros stay zeros under all but a shift; other fillings only where channels just move. Copies of the
    value's own numbers change as these do, unless channels are padded with other channels."""
    given = s.args(node)
    x, widths, value = given["self"], given["pad"], given.get("value") or 0
    if all(isinstance(w, int) and w == 0 for w in widths):
        return mapped(s, node, x, lambda i: i, lambda i: i)
    is_copied = given.get("mode", "constant") != "constant"
    if not is_copied and (s.kind == Kind.SHIFT or (value and s.kind not in (Kind.PERMUTE, Kind.REMOVE))):
        return s.stop_all(node, [x, node], f"{node.name} pads with values that a {s.kind} would have to change")
    rank = len(s.shape(x))
    padded = {rank - 1 - i // 2: (widths[i], widths[i + 1]) for i in range(0, len(widths), 2) if widths[i] or widths[i + 1]}
    if not any(label.index.shape[a] > 1 for a in padded for label in (*s.labels(x), *s.labels(node))):
        return mapped(s, node, x, lambda i: i, lambda i: i)
    if is_copied:
        return s.stop_all(node, [x, node], f"{node.name} pads these channels with copies of some of them")
    if s.kind == Kind.REMOVE:
        return s.stop_all(node, [x, node], f"{node.name} pads to a number of channels that is fixed")
    _one_axis(s, node, x, {a: (lambda n, w=w: _padded(n, *w)) for a, w in padded.items()})


def _padded(size: int, before: int, after: int) -> Index:
    places = np.arange(-before, size + after)
    return np.where((places >= 0) & (places < size), places, NOTHING - 2**40)


def slice_scatter(s: Solver, node: fx.Node) -> None:
    """One value written over a slice of another."""
    given = s.args(node)
    base, part = given["self"], given["src"]
    axis = _axis(s, node, given["dim"])
    size = s.shape(node)[axis]
    over = _sliced(size, given)
    places = None if over is None else np.arange(size)
    if places is not None:
        places[over] = size + np.arange(len(over))  # type: ignore[arg-type]
    gathered(s, node, [base, part], [(node, places)], axis)


def select_scatter(s: Solver, node: fx.Node) -> None:
    """One value written over a position of another's axis."""
    given = s.args(node)
    axis = _axis(s, node, given["dim"])
    size = s.shape(node)[axis]
    if not isinstance(size, int):
        return s.stop_all(node, [given["self"], given["src"], node], f"{node.name} writes along a dynamic axis")
    rest = np.arange(size)
    rest[given["index"]] = NOTHING - 2**40
    gathered(s, node, [given["self"]], [(node, rest)], axis)
    _put_position(s, node, given["src"], given["index"] % size, size, axis)


TABLE: Mapping[Any, Any] = {
    aten.slice.Tensor: slice_,
    aten.narrow.default: narrow,
    aten.select.int: select,
    aten.cat.default: cat,
    aten.concat.default: cat,
    aten.stack.default: stack,
    **dict.fromkeys(SPLITS, split),
    aten.unbind.int: unbind,
    aten.roll.default: roll,
    aten.flip.default: flip,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.repeat.default: repeat,
    aten.tile.default: repeat,
    aten.index_select.default: index_select,
    aten.constant_pad_nd.default: pad,
    aten.pad.default: pad,
    aten.slice_scatter.default: slice_scatter,
    aten.select_scatter.default: select_scatter,
}
