"""The worklist: seeds go in, one relation per op pushes labels from port to port until nothing climbs any more."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from fxcompress.transport.facts import Facts, is_getitem
from fxcompress.transport.labels import UNSET, Classes, Index, Kind, Label, Stop, aligned, canon


@dataclass(frozen=True)
class Seed:
    """Where a change starts: a value and the axes whose positions get a parameter each. power: with which the vector acts there."""

    node: fx.Node
    axes: tuple[int, ...] = (-1,)
    power: float = 1.0


@dataclass(frozen=True, eq=False)
class Extra:
    """Something an op gains when the change is applied; index is over the operand it gains.

    role "bias", "gain": a new operand; "literal": a number becomes a vector; "filled": the op made one number everywhere, and repeats a vector;
    "input": the op's input is shifted, and its bias takes W z off; there the index is over the letters of `port`, the weight.
    """

    node: fx.Node
    role: str
    index: Index
    power: float
    port: Any = None


@dataclass(frozen=True)
class Inner:
    """A value that an op computes on its way and hands to nobody. of: the op; number: which of them."""

    of: fx.Node
    number: int
    sizes: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The op's."""
        return f"part of {self.of.name}"


class Solver:
    """Labels of all values under one kind of change."""

    def __init__(
        self,
        facts: Facts,
        kind: Kind,
        choices: dict[fx.Node, str] | None = None,
        shuffle: int | None = None,
        is_open: bool = False,
        is_frugal: bool = False,
    ) -> None:
        self.facts, self.kind, self.is_open, self.is_frugal = facts, kind, is_open, is_frugal
        self.passed_over = False  # whether a factor that is narrower than a label could have taken it
        self.classes = Classes()
        self.values: dict[fx.Node | Inner, list[Label]] = {}
        self.stops: list[Stop] = []
        self.seeds: list[tuple[Seed, Index]] = []
        self.loose: dict[fx.Node, None] = {}
        self.means: dict[Any, Index] = {}  # per op and value: channels whose mean a rotation must keep
        self.extras: dict[tuple[fx.Node, str], Extra] = {}
        self.choices: dict[fx.Node, str] = dict(choices or {})
        self._queue: deque[fx.Node] = deque()
        self._queued: set[fx.Node] = set()
        self._random = None if shuffle is None else random.Random(shuffle)

    def seed(self, seed: Seed) -> Index:
        """New parameters on the seed's axes. ValueError if one of them is dynamic or has one position only."""
        shape = self.facts.shape(seed.node)
        if shape is None:
            raise ValueError(f"{seed.node.name} is no tensor")
        axes = tuple(sorted(a % len(shape) for a in seed.axes))
        sizes = [shape[a] if a in axes else 1 for a in range(len(shape))]
        if not all(isinstance(n, int) for n in sizes):
            raise ValueError(f"{seed.node.name}{list(shape)} has a dynamic size on the axes {axes}")
        index = self.classes.add(int(np.prod(sizes))).reshape(sizes)
        self.seeds.append((seed, index))
        self.put(seed.node, index, seed.power)
        return index

    def labels(self, value: Any) -> tuple[Label, ...]:
        """The labels of a value; a literal has none."""
        return tuple(self.values.get(value, ())) if isinstance(value, fx.Node | Inner) else ()

    def shape(self, value: Any) -> tuple[Any, ...]:
        """The value's sizes; () for a literal."""
        return value.sizes if isinstance(value, Inner) else (self.facts.shape(value) or ()) if isinstance(value, fx.Node) else ()

    def args(self, node: fx.Node) -> dict[str, Any]:
        """The op's arguments by name."""
        return self.facts.arguments(node)

    def put(self, value: Any, index: Index, power: float = 1.0) -> None:
        """The value carries this label: merged into what it carries already. Where the value is narrower, parameters are united."""
        if not isinstance(value, fx.Node | Inner) or (index == UNSET).all():
            return
        shape = value.sizes if isinstance(value, Inner) else self.facts.shape(value)
        if shape is None:
            return self.stop(value, index, f"the form of {value.name} is not known")
        index = canon(self._fitted(index, shape))
        if index.size == 1:
            return self._stop_alike(value, index)
        if not self.kind.is_mixing and isinstance(value, fx.Node) and not self._is_float(value):
            return self.stop(value, index, f"{value.name} holds {self.facts.value(value).dtype}, which no {self.kind} fits")
        if self._merge(value, index, power if self.kind in (Kind.SCALE, Kind.SHIFT) else 1.0):
            self.queue(value)

    def stop(self, node: fx.Node | Inner, index: Index, reason: str) -> None:
        """Pin the classes in a label."""
        if self.classes.pin(index, len(self.stops)):
            self.stops.append(Stop(node.of if isinstance(node, Inner) else node, reason))

    def _stop_alike(self, value: fx.Node | Inner, index: Index) -> None:
        self.stop(value, index, f"{value.name} can't tell these channels apart")

    def stop_all(self, node: fx.Node, values: Iterable[Any], reason: str) -> None:
        """Pin everything these values carry."""
        for value in values:
            for label in self.labels(value):
                self.stop(node, label.index, reason)

    def extra(self, node: fx.Node, role: str, index: Index, power: float, port: Any = None) -> None:
        """The op gains an operand; said again, the last word counts."""
        self.extras[node, role] = Extra(node, role, index, power, port)

    def loosen(self, nodes: Iterable[fx.Node]) -> None:
        """These values change in a way no label says, and nobody but what swallows it reads them."""
        self.loose.update(dict.fromkeys(nodes))

    def keep_rows(self, tag: Any, index: Index, axes: Iterable[int]) -> None:
        """Channels of different positions along the axes may not mix."""
        sizes = [n if a in set(axes) else 1 for a, n in enumerate(index.shape)]
        if max(sizes, default=1) > 1:
            self.classes.refine((tag, index.shape), index, np.arange(int(np.prod(sizes))).reshape(sizes))

    def is_flat_in_rows(self, tag: Any, value: Any, index: Index) -> bool:
        """Whether a value has one position along the last labelled axis; then channels that differ along its other axes may not mix."""
        shape = (self.facts.distinct(value) or ()) if isinstance(value, fx.Node) else self.shape(value)
        lead = index.ndim - len(shape)
        slot = [a for a, n in enumerate(index.shape) if n > 1]
        own = [a for a in slot if a >= lead and shape[a - lead] != 1]
        if slot[-1] in own:
            return False
        self.keep_rows(tag, index, own)
        return True

    def is_unmoved(self, tag: Any, value: Any, index: Index) -> bool:
        """Whether a value is the same for all channels that may mix, so that a move leaves it, and a rotation that keeps their mean."""
        if self.kind not in (Kind.PERMUTE, Kind.ROTATE) or not self.is_flat_in_rows(tag, value, index):
            return False
        self.keep_mean(tag, index)
        return True

    def keep_mean(self, tag: Any, index: Index) -> None:
        """A rotation of these channels must keep their mean: R 1 = 1."""
        self.means[tag, index.shape] = index

    def coarsen(self, index: Index, axes: Iterable[int]) -> Index:
        """One parameter along each of the axes."""
        return self.classes.coarsen(index, axes)

    def queue(self, value: fx.Node | Inner) -> None:
        """Ask the relations around a value again."""
        for node in (value.of,) if isinstance(value, Inner) else (value, *value.users):
            at = node.args[0] if is_getitem(node) else node
            if at not in self._queued and isinstance(at, fx.Node):
                self._queued.add(at)
                self._queue.append(at)

    def pending(self) -> Iterator[fx.Node]:
        """Nodes to ask, until none is left."""
        while self._queue:
            if self._random is not None:
                self._queue.rotate(self._random.randrange(len(self._queue)))
            node = self._queue.popleft()
            self._queued.discard(node)
            yield node

    def _is_float(self, value: fx.Node) -> bool:
        dtype = self.facts.value(value).dtype
        return bool(dtype.is_floating_point or dtype.is_complex)

    def _fitted(self, index: Index, shape: tuple[Any, ...]) -> Index:
        surplus = index.ndim - len(shape)
        if surplus > 0:
            index = self.coarsen(index, range(surplus)).reshape(index.shape[surplus:])
        index = aligned(index, len(shape))
        narrow = [a for a, (n, size) in enumerate(zip(index.shape, shape, strict=True)) if n > 1 and n != size]
        assert all(not isinstance(shape[a], int) or shape[a] == 1 for a in narrow), f"a label of {index.shape} on a value of {shape}"
        return self.coarsen(index, narrow)

    def _merge(self, value: fx.Node | Inner, index: Index, power: float) -> bool:
        """Whether a position became known."""
        labels = self.values.setdefault(value, [])
        for label in labels:
            if label.power == power and label.index.shape == index.shape and (label.index == index).all():
                return False
        for label in labels:
            if label.power != power and _overlap(label.index, index):
                index = self._without_conflict(value, label, index)
        if (index == UNSET).all():
            return False
        for number, label in enumerate(labels):
            if label.power == power and _overlap(label.index, index):
                return self._fill(value, number, index)
        labels.append(Label(index, power))
        return True

    def _without_conflict(self, value: fx.Node | Inner, label: Label, index: Index) -> Index:
        """The index without the positions where the label acts with another power; what meets there is pinned."""
        old, new = np.broadcast_arrays(label.index, index)
        both = (old != UNSET) & (new != UNSET)
        if not both.any():
            return index
        reason = f"two different powers of one {self.kind} meet at {value.name}"
        self.stop(value, old[both], reason)
        self.stop(value, new[both], reason)
        return np.where(both, UNSET, new)

    def _fill(self, value: fx.Node | Inner, number: int, index: Index) -> bool:
        labels = self.values[value]
        label = labels[number]
        self.classes.union(label.index, index)
        old, new = np.broadcast_arrays(label.index, index)
        fresh = (old == UNSET) & (new != UNSET)
        if not fresh.any():
            return False
        filled = np.where(fresh, new, old)
        whole = canon(filled)
        if whole.size == 1:
            self._stop_alike(value, whole)
        labels[number] = Label(whole if whole.size > 1 else filled, label.power)  # of one position it would be known to nobody
        return True


def _overlap(a: Index, b: Index) -> bool:
    """Whether two labels of one value vary along a common axis."""
    return any(m > 1 and n > 1 for m, n in zip(a.shape, b.shape, strict=True))
