"""Labels, parameters, classes: how a change of variables lies on a value, and which of its entries must be equal.

A label says which parameter of the change acts at each position of a value: an int64 array that broadcasts to the value's shape, of size 1
along every axis it doesn't depend on, UNSET where nothing is known. Parameters that some op can't tell apart are united into one class;
classes that meet an op that doesn't commute with the change are pinned to the identity, with the first reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

Index = npt.NDArray[np.int64]
UNSET = -1
FREE = np.iinfo(np.int64).max  # "pinned by stop number": none


class Kind(StrEnum):
    """What a change does at position p of channel i, power k: x v[i]^k, x v[i] with v = ±1, x + k v[i]; or it moves, drops, mixes channels."""

    SCALE = "scale"
    SIGN = "sign"
    SHIFT = "shift"
    PERMUTE = "permute"
    ROTATE = "rotate"
    REMOVE = "remove"

    @property
    def is_mixing(self) -> bool:
        """Whether it acts on channels as a set rather than on each alone."""
        return self in (Kind.PERMUTE, Kind.ROTATE, Kind.REMOVE)


KINDS = tuple(Kind)


@dataclass(frozen=True, eq=False)
class Label:
    """index: parameter per position, of the value's rank. power: exponent of a scale, factor of a shift, else 1."""

    index: Index
    power: float = 1.0

    @property
    def slot(self) -> tuple[int, ...]:
        """The axes along which the label varies."""
        return tuple(a for a, n in enumerate(self.index.shape) if n > 1)


@dataclass(frozen=True)
class Stop:
    """Why a class is pinned: the op that doesn't commute with the change."""

    node: fx.Node
    reason: str


def as_tensor(index: npt.NDArray[Any]) -> Tensor:
    """The same numbers as a tensor; a copy where the array is a view that may not be written."""
    return torch.from_numpy(index if index.flags.writeable and all(n >= 0 for n in index.strides) else index.copy())


def canon(index: Index) -> Index:
    """The same label, of size 1 along axes where it repeats one and the same parameter."""
    for axis, size in enumerate(index.shape):
        if size > 1:
            first = index.take([0], axis)
            if (index == first).all():
                index = first
    return index


def aligned(index: Index, rank: int) -> Index:
    """With axes of size 1 put in front up to a rank."""
    return index.reshape((1,) * (rank - index.ndim) + index.shape) if index.ndim < rank else index


def spread(index: Index, shape: Iterable[int]) -> Index:
    """Broadcast to a shape."""
    return np.broadcast_to(index, tuple(shape))


class Classes:
    """Union-find over parameters, kept flat, with the first stop of every class and, for kinds that mix channels, what tells channels apart.

    parent and pinned have one entry more than there are parameters, so that UNSET indexes it.
    """

    def __init__(self) -> None:
        self.parent: Index = np.array([UNSET])
        self.pinned: Index = np.array([FREE])
        self.marks: dict[Any, tuple[Index, Index]] = {}  # per op: parameters and the keys they were met under
        self.starts: list[int] = []

    def __len__(self) -> int:
        return len(self.parent) - 1

    def add(self, count: int) -> Index:
        """New parameters, each a class of its own."""
        new = np.arange(len(self), len(self) + count)
        self.parent = np.concatenate([self.parent[:-1], new, [UNSET]])
        self.pinned = np.concatenate([self.pinned[:-1], np.full(count + 1, FREE)])
        self.starts.append(int(new[0]))
        return new

    def find(self, index: Any) -> Index:
        """The representative of each entry's class; UNSET stays."""
        return self.parent[index]  # type: ignore[no-any-return]

    def union(self, a: Index, b: Index) -> None:
        """Entry by entry one class, UNSET entries left alone. a and b broadcast."""
        a, b = np.broadcast_arrays(self.find(a), self.find(b))
        apart = (a != b) & (a >= 0) & (b >= 0)
        if not apart.any():
            return
        a, b = a[apart], b[apart]
        while a.size:
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))
            self._flatten()
            a, b = self.parent[a], self.parent[b]
            a, b = a[a != b], b[a != b]
        merged = np.full_like(self.pinned, FREE)
        np.minimum.at(merged, self.parent[:-1], self.pinned[:-1])
        self.pinned = merged

    def _flatten(self) -> None:
        while True:
            above = self.parent[self.parent]
            if (above == self.parent).all():
                return
            self.parent = above

    def pin(self, index: Index, stop: int) -> bool:
        """Pin the classes in the index; an earlier stop stays. Returns whether any was free."""
        roots = self.find(index[index >= 0])
        fresh = roots[self.pinned[roots] == FREE]
        self.pinned[fresh] = stop
        return bool(fresh.size)

    def coarsen(self, index: Index, axes: Iterable[int]) -> Index:
        """One parameter along each of the axes: those that stand there are united. Unset entries follow the others."""
        for axis in axes:
            if index.shape[axis] > 1:
                known = index != UNSET
                first = np.take_along_axis(index, np.expand_dims(known.argmax(axis), axis), axis)
                self.union(index, first)
                index = first
        return index

    def refine(self, tag: Any, index: Index, key: Index) -> None:
        """Channels met under different sequences of keys at one op (tag) may not mix. key broadcasts against index; the last call counts."""
        index, key = np.broadcast_arrays(index, key)
        self.marks[tag] = (index.ravel(), key.ravel())

    def blocks(self, indices: Iterable[Index]) -> Index:
        """Per parameter the block of its class. Classes may mix if their members, in order, come from one seed each, were met under equal
        keys, and appear equally often on every value (indices: one per label)."""
        count = len(self)
        colour = _hashed(np.searchsorted(self.starts, np.arange(count), side="right"))
        seen = [(i.ravel(), np.zeros(i.size, np.int64)) for i in indices]
        for tag, (index, key) in enumerate([*self.marks.values(), *seen]):
            colour += _hashed(_summary(index, key, count) + _hashed(np.array([tag])))
        roots = self.parent[:-1]
        whole = np.zeros(count, np.uint64)
        np.add.at(whole, roots, _hashed(colour + _hashed(occurrences(roots))))
        return np.unique(whole[roots], return_inverse=True)[1].ravel()


def occurrences(flat: Index) -> Index:
    """Per entry how often its value stood before it."""
    order = np.argsort(flat, kind="stable")
    count = np.empty_like(flat)
    count[order] = np.arange(len(flat)) - np.searchsorted(flat[order], flat[order])
    return count


def _summary(index: Index, key: Index, count: int) -> npt.NDArray[np.uint64]:
    """Per parameter a number for the sequence of keys it stands under: its n-th place may be taken by another's n-th place alone."""
    sums = np.zeros(count + 1, np.uint64)
    np.add.at(sums, index, _hashed(_hashed(key) + _hashed(occurrences(index))))
    return sums[:-1]


def _hashed(values: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """splitmix64: sums of these tell sequences of keys apart."""
    z = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
