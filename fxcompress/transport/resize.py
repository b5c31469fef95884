"""Literal sizes in an op's arguments, rewritten when channels go: of views, slices, pieces, groups, and what attention derives from a size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fxcompress.edit import Edit
from fxcompress.transport.change import Gathered
from fxcompress.transport.facts import SPLITS, Facts, outputs

aten = torch.ops.aten
SIZED = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.broadcast_to.default),
    *(aten.zeros.default, aten.ones.default, aten.full.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
)


class Resizer:
    """changes: what is dropped of every labelled value. ValueError, before anything is edited, for an op whose new sizes aren't known."""

    def __init__(self, facts: Facts, edit: Edit, changes: Mapping[fx.Node, Any]) -> None:
        self.facts, self.edit, self.changes = facts, edit, changes

    def updates(self) -> list[tuple[fx.Node, Any]]:
        """(op, its new arguments by name, or the sizes of its pieces)."""
        around = dict.fromkeys(u for n in self.changes for u in (n, *n.users) if u.op == "call_function")
        found = ((node, self._update(node)) for node in around)
        return [(node, update) for node, update in found if update]

    def apply(self, updates: Sequence[tuple[fx.Node, Any]]) -> None:
        """Write new arguments and fake values."""
        for node, update in updates:
            if isinstance(update, list):
                self._resplit(node, update)
            else:
                args, kwargs = _with(node, update)
                self.edit.update(node, *args, **kwargs)
        for node in self.changes:
            if node.op == "call_function":
                self.edit.reshape(node, self.new_shape(node))

    def new_shape(self, node: fx.Node) -> list[Any]:
        """The value's sizes after the change, dynamic ones as they are."""
        value = self.facts.value(node)
        shape = list(value.shape)
        for axis, size in self._sizes(node).items():
            shape[axis] = size
        return shape

    def _sizes(self, node: fx.Node) -> dict[int, int]:
        change = self.changes.get(node)
        if change is None:
            return {}
        pairs = ((label.slot, sizes) for label, sizes in zip(change.labels, change.sizes, strict=True))
        return {axis: size for slot, sizes in pairs for axis, size in zip(slot, sizes, strict=True)}

    def _update(self, node: fx.Node) -> Any:
        target: Any = node.target
        if target in SIZED:
            return self._sized(node)
        if target is aten.unflatten.int:
            return self._unflattened(node)
        if target in (aten.slice.Tensor, aten.narrow.default, aten.select.int):
            return self._sliced(node)
        if target in SPLITS:
            return self._pieces(node)
        if target is aten.scaled_dot_product_attention.default:
            return self._attended(node)
        if "conv" in str(target):
            return self._convolved(node)
        if target in (aten.roll.default, aten.index_select.default, aten.index.Tensor, aten.slice_scatter.default, aten.select_scatter.default):
            return self._refused(node)
        return self._repeated(node) if target is aten.repeat_interleave.self_int else None

    def _repeated(self, node: fx.Node) -> Any:
        """As often as positions are left for each; how many that makes isn't said again."""
        given = self.facts.arguments(node)
        if given["dim"] is None:
            return {"output_size": None} if given["output_size"] else None
        axis = given["dim"] % len(self.facts.shape(node))  # type: ignore[arg-type]
        made, source = self._sizes(node).get(axis), given["self"]
        before: Any = self.facts.shape(source)
        if made is None:
            return None
        repeats = made // self._sizes(source).get(axis, before[axis])
        return {"repeats": repeats, **({"output_size": None} if given["output_size"] else {})}

    def _sized(self, node: fx.Node) -> Any:
        new = self._sizes(node)
        name = "size" if "size" in self.facts.arguments(node) else "shape"
        old = self.facts.arguments(node)[name]
        return {name: [new.get(a, n) if a in new else n for a, n in enumerate(old)]} if new else None

    def _unflattened(self, node: fx.Node) -> Any:
        new, given = self._sizes(node), self.facts.arguments(node)
        start = given["dim"] % len(self.facts.shape(node.args[0]))  # type: ignore[arg-type]
        return {"sizes": [new.get(start + i, n) for i, n in enumerate(given["sizes"])]} if new else None

    def _sliced(self, node: fx.Node) -> Any:
        given = self.facts.arguments(node)
        x = given["self"]
        axis = given["dim"] % len(self.facts.shape(x))  # type: ignore[arg-type]
        kept = self._kept_along(x, axis)
        if kept is None:
            return None
        if node.target is aten.select.int:
            return {"index": self._before(node, kept, given["index"] % kept.shape[-1])}
        if node.target is aten.narrow.default:
            start = self._before(node, kept, given["start"])
            return {"start": start, "length": self._before(node, kept, given["start"] + given["length"]) - start}
        if given["step"] != 1:
            return self._refuse(node)
        start, end, _ = slice(given["start"], given["end"]).indices(kept.shape[-1])
        return {"start": self._before(node, kept, start), "end": self._before(node, kept, end)}

    def _pieces(self, node: fx.Node) -> Any:
        given = self.facts.arguments(node)
        x: Any = node.args[0]
        axis = given["dim"] % len(self.facts.shape(x))  # type: ignore[arg-type]
        kept = self._kept_along(x, axis)
        if kept is None:
            return None
        ends = np.cumsum([0, *(int(v.shape[axis]) for v in self.facts.value(node))])
        marks = [self._before(node, kept, int(e)) for e in ends]
        return [b - a for a, b in pairwise(marks)]

    def _kept_along(self, x: Any, axis: int) -> Any:
        """[other slot positions, axis]: what stays, of the rows that do; None if nothing is dropped along the axis."""
        change = self.changes.get(x)
        for label, places in zip(change.labels, change.places, strict=True) if isinstance(change, Gathered) else ():
            if axis in label.slot:
                kept = np.zeros(label.index.size, bool)
                kept[places] = True
                sizes = [label.index.shape[a] for a in label.slot]
                rows = np.moveaxis(kept.reshape(sizes), label.slot.index(axis), -1).reshape(-1, label.index.shape[axis])
                return rows[rows.any(-1)]
        return None

    def _before(self, node: fx.Node, kept: Any, end: int) -> int:
        counts = set(kept[:, :end].sum(-1).tolist())
        if len(counts) > 1:
            self._refuse(node)
        return int(counts.pop())

    def _attended(self, node: fx.Node) -> Any:
        given = self.facts.arguments(node)
        query = given["query"]
        last = len(self.facts.shape(query)) - 1  # type: ignore[arg-type]
        if given["scale"] is None and last in self._sizes(query):
            return {"scale": 1 / math.sqrt(self.facts.shape(query)[last])}  # type: ignore[index]
        return None

    def _convolved(self, node: fx.Node) -> Any:
        given = self.facts.arguments(node)
        groups, weight = given["groups"], given["weight"]
        if groups == 1:
            return None
        axis = len(self.facts.shape(given["input"])) - len(self.facts.shape(weight)) + 1  # type: ignore[arg-type]
        read, made = (self._per_group(x, axis, groups) for x in (given["input"], node))
        alive = (read > 0) & (made > 0)
        if any(len(set(counts[alive])) > 1 for counts in (read, made)) or read[~alive].any() or made[~alive].any():
            self._refuse(node)
        return None if alive.all() else {"groups": int(alive.sum())}

    def _per_group(self, x: Any, axis: int, groups: int) -> Any:
        """How many channels stay in each."""
        kept = self._kept_along(x, axis)
        size: Any = self.facts.shape(x)[axis]  # type: ignore[index]
        return np.full(groups, size // groups) if kept is None else kept.reshape(len(kept), groups, -1).sum(-1).max(0)

    def _refused(self, node: fx.Node) -> Any:
        given = self.facts.arguments(node)
        dims = given.get("dims") or [given.get("dim", 0)]
        if node.target is aten.index.Tensor:  # computed positions tell no channels apart
            dims = [a for a, i in enumerate(given["indices"]) if i is not None and self.facts.program.constant(i) is not None]
        rank = len(self.facts.shape(given["self"]))  # type: ignore[arg-type]
        return self._refuse(node) if any(self._kept_along(given["self"], d % rank) is not None for d in dims) else None

    def _refuse(self, node: fx.Node) -> Any:
        raise ValueError(f"{node.name} picks along the channels in a way that has no form without some of them")

    def _resplit(self, node: fx.Node, sizes: list[int]) -> None:
        given = self.facts.arguments(node)
        values = self.facts.value(node)
        made: list[Tensor] = []
        for number, value in enumerate(values):
            taken = outputs(node).get(number)
            made.append(value.new_empty(self.new_shape(taken)) if taken is not None else value)
        new = self.edit.insert(aten.split_with_sizes.default, node.args[0], sizes, given["dim"], like=node, before=node.next, val=made)
        self.edit.replace(node, new)


def _with(node: fx.Node, update: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with some of them changed by name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    args = [update.get(n, a) if n in update else a for n, a in zip(names, node.args, strict=False)]
    rest = {n: v for n, v in update.items() if n not in names[: len(args)]}
    return tuple(args), {**node.kwargs, **rest}
