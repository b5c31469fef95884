"""Changes in numbers: what the value at a label becomes under given numbers. Computed in the value's dtype, halves in float32, and cast back
once: who wants it exact gives float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from fxcompress.numerics.rotation import Rotation
from fxcompress.transport.labels import UNSET, Index, Kind, Label, as_tensor, occurrences

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Labelled:
    labels: tuple[Label, ...]

    is_linear = True  # in the values along the other axes

    @property
    def axes(self) -> set[int]:
        """The axes of the value, counted from the end, along which the change isn't one and the same."""
        return {axis - label.index.ndim for label in self.labels for axis in label.slot}

    @property
    def mixed(self) -> set[int]:
        """Those along which it sums numbers."""
        return set()


@dataclass(frozen=True, eq=False)
class Elementwise(_Labelled):
    """x v^power or x + power v. numbers: one per parameter, and the identity at its end for UNSET."""

    kind: Kind
    numbers: Tensor

    @property
    def is_linear(self) -> bool:  # type: ignore[override]
        """Whether nothing is added."""
        return self.kind != Kind.SHIFT

    def __call__(self, x: Tensor) -> Tensor:
        """The value changed."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        for label in self.labels:
            wide = applied(self.kind, wide, label, self.numbers)
        return wide.to(x.dtype)

    def is_identity(self) -> bool:
        """Whether nothing changes."""
        rest = self.numbers[-1]
        return all(bool((self.numbers[as_tensor(label.index)] == rest).all()) for label in self.labels)


def applied(kind: Kind, wide: Tensor, label: Label, numbers: Tensor) -> Tensor:
    """One label's change."""
    v = numbers[as_tensor(label.index)]
    return wide + (label.power * v).to(wide.dtype) if kind == Kind.SHIFT else wide * (v**label.power).to(wide.dtype)


@dataclass(frozen=True, eq=False)
class Gathered(_Labelled):
    """Positions of the slot, flattened, in another order or fewer. places: per new position the old one; sizes: the slot's new sizes."""

    places: tuple[Index, ...]
    sizes: tuple[tuple[int, ...], ...]

    def __call__(self, x: Tensor) -> Tensor:
        """The value rearranged."""
        for label, places, sizes in zip(self.labels, self.places, self.sizes, strict=True):
            x = _on_slot(x, label, partial(_taken, places), sizes)
        return x.contiguous()  # as an op made it, which may read it as complex numbers

    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return all(len(p) == label.index.size and (p == np.arange(len(p))).all() for p, label in zip(self.places, self.labels, strict=True))


@dataclass(frozen=True, eq=False)
class Rotated(_Labelled):
    """x R on sets of positions of the slot. mixes: per label pairs of (positions [copies, n], R of size n)."""

    mixes: tuple[tuple[tuple[Index, Rotation], ...], ...]

    @property
    def mixed(self) -> set[int]:
        """All its axes."""
        return self.axes

    def __call__(self, x: Tensor) -> Tensor:
        """The value rotated."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        for label, mixes, whole in zip(self.labels, self.mixes, self._whole, strict=True):
            if whole is not None:
                axis, copies, rotation = whole
                shape = wide.shape
                wide = rotation.across(wide.reshape(*shape[:axis], copies, -1, *shape[axis + 1 :]), axis + 1).reshape(shape)
            else:
                wide = _on_slot(wide, label, partial(_mixed, mixes), tuple(label.index.shape[a] for a in label.slot))
        return wide.to(x.dtype)

    @cached_property
    def _whole(self) -> list[tuple[int, int, Rotation] | None]:
        return list(map(_of_whole_axis, self.labels, self.mixes))

    def is_identity(self) -> bool:
        """Whether nothing is mixed."""
        return not any(self.mixes)


def _taken(places: Index, flat: Tensor) -> Tensor:
    return flat[..., as_tensor(places)]


def _of_whole_axis(label: Label, mixes: Sequence[tuple[Index, Rotation]]) -> tuple[int, int, Rotation] | None:
    """(axis, copies, R) where R acts on all of an axis, in order, and on nothing else."""
    if len(label.slot) != 1 or len(mixes) != 1:
        return None
    (axis,), ((positions, rotation),) = label.slot, mixes
    return (axis, len(positions), rotation) if _run(positions) == slice(0, label.index.shape[axis]) else None


def _mixed(mixes: Sequence[tuple[Index, Rotation]], flat: Tensor) -> Tensor:
    flat = flat.clone(memory_format=torch.contiguous_format)
    for positions, rotation in mixes:
        if run := _run(positions):  # a view
            flat[..., run] = _in_copies(positions, rotation, flat[..., run])
        else:
            at = as_tensor(positions)
            flat[..., at] = rotation(flat[..., at])
    return flat


def _run(positions: Index) -> slice | None:
    """The positions if they are neighbours in order."""
    first, count = int(positions[0, 0]), positions.size
    return slice(first, first + count) if (positions.ravel() == np.arange(first, first + count)).all() else None


def _in_copies(positions: Index, rotation: Rotation, x: Tensor) -> Tensor:
    """Neighbours rotated, copy by copy."""
    return rotation(x.reshape(*x.shape[:-1], *positions.shape)).reshape(x.shape)


def _on_slot(x: Tensor, label: Label, act: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> Tensor:
    """act on the slot's axes, flattened into the last one."""
    slot = label.slot
    back = tuple(range(-len(slot), 0))
    moved = x.movedim(slot, back)
    flat = act(moved.reshape(*moved.shape[: moved.dim() - len(slot)], -1))
    return flat.reshape(*flat.shape[:-1], *sizes).movedim(back, slot)


def permuted(labels: tuple[Label, ...], source: Index) -> Gathered:
    """source: per parameter the one whose content it gets. The q-th occurrence of a parameter gets that of its source."""
    places = tuple(_sources(label.index, source) for label in labels)
    return Gathered(labels, places, tuple(tuple(label.index.shape[a] for a in label.slot) for label in labels))


def _sources(index: Index, source: Index) -> Index:
    flat = index.ravel()
    order = np.argsort(flat, kind="stable")
    wanted = np.where(flat == UNSET, UNSET, source[flat])
    places: Index = order[np.searchsorted(flat[order], wanted) + occurrences(flat)]
    assert (flat[places] == wanted).all(), "a block whose channels don't occur equally often"
    return places


def removed(labels: tuple[Label, ...], keep: Index) -> Gathered:
    """keep: per parameter whether it stays, the last entry for UNSET. ValueError if the rest is no block of axes."""
    kept = [keep[label.index] for label in labels]
    if not all(k.any() for k in kept):
        raise ValueError("nothing would be left")
    places = tuple(np.flatnonzero(k.ravel()) for k in kept)
    return Gathered(labels, places, tuple(_rest(label, k) for label, k in zip(labels, kept, strict=True)))


def _rest(label: Label, kept: Index) -> tuple[int, ...]:
    """Sizes of the slot's axes when the dropped positions are gone: whole rows, and equally many of the last axis in every other row."""
    lines = kept.reshape([kept.shape[a] for a in label.slot])
    counts = lines.sum(-1)
    rows = counts > 0
    if len(set(counts[rows].ravel())) > 1:
        raise ValueError("rows would lose different numbers of channels")
    sizes = []
    for axis in range(rows.ndim):
        alive = rows.any(tuple(a for a in range(rows.ndim) if a != axis)) if rows.ndim > 1 else rows
        sizes.append(int(alive.sum()))
    if int(np.prod(sizes)) != int(rows.sum()):
        raise ValueError("the rows that stay are no block of axes")
    return (*sizes, int(counts[rows].ravel()[0]) if rows.any() else 0)


def rotated(labels: tuple[Label, ...], classes: Index, blocks: Index, rotations: Mapping[int, Rotation]) -> Rotated:
    """classes: per parameter, UNSET if pinned. A class's members rotate each with its like in the other classes of the block."""
    mixes = []
    for label in labels:
        found: list[tuple[Index, Rotation]] = []
        for block, rotation in rotations.items():
            positions = _copies(label.index, classes, np.flatnonzero(blocks == block))
            if positions is not None:
                found.append((positions, rotation))
        mixes.append(tuple(found))
    return Rotated(labels, tuple(mixes))


def _copies(index: Index, classes: Index, members: Index) -> Index | None:
    """[copies, classes of the block]: where they stand on the flattened slot."""
    flat = index.ravel()
    of = np.where(flat == UNSET, UNSET, classes[flat])
    where = [np.flatnonzero(of == c) for c in members]
    if not any(len(w) for w in where):
        return None
    where = [w[np.argsort(flat[w], kind="stable")] for w in where]
    return np.stack(where, axis=1)
