"""Observers: what can be asked about a value, gathered over all items of a feed in memory that doesn't grow with them.

An observer is a question (frozen, compared by value); `start` gives the accumulator that answers it. Sums run in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxcompress.numerics.histogram import Histogram


class Accumulator(ABC):
    """Takes the values of a node, one item after the other."""

    @abstractmethod
    def add(self, value: Tensor) -> None:
        """One more value; every value has the same rank."""

    @abstractmethod
    def result(self) -> Any:
        """What the observer asked for."""


class Observer(ABC):
    """A question about a value."""

    @abstractmethod
    def start(self) -> Accumulator:
        """An accumulator that has seen nothing."""

    @abstractmethod
    def memory(self, shape: Sequence[int]) -> int:
        """About how many bytes the accumulator of a value of that shape holds."""


class JointAccumulator(ABC):
    """Takes the values that several nodes have in one item, one item after the other."""

    @abstractmethod
    def add(self, values: Sequence[Tensor]) -> None:
        """One value of each node, in the order they were asked about."""

    @abstractmethod
    def result(self) -> Any:
        """What the observer asked for."""


class JointObserver(ABC):
    """A question about several values of one item at once, which are held until the last of them is known."""

    @abstractmethod
    def start(self) -> JointAccumulator:
        """An accumulator that has seen nothing."""

    @abstractmethod
    def memory(self, shapes: Sequence[Sequence[int]]) -> int:
        """About how many bytes the accumulator holds, and takes while it adds values of these shapes, beside the values."""


@dataclass(frozen=True)
class Extremes:
    """lo, hi: least and greatest value, float64; 0-d, or one entry per index of the observed axes. inf and -inf where there was no value."""

    lo: Tensor
    hi: Tensor

    @property
    def amax(self) -> Tensor:
        """Greatest magnitude."""
        return torch.maximum(self.hi, -self.lo)


@dataclass(frozen=True)
class Range(Observer):
    """`Extremes` of the whole value, or of every index along the axes."""

    axes: tuple[int, ...] = ()

    def start(self) -> Accumulator:
        return _Range(self.axes)

    def memory(self, shape: Sequence[int]) -> int:
        return 16 * math.prod(_sizes(shape, self.axes))


class _Range(Accumulator):
    def __init__(self, axes: tuple[int, ...]) -> None:
        self.axes = axes
        self.lo, self.hi = (torch.tensor(end, dtype=torch.float64) for end in (math.inf, -math.inf))

    def add(self, value: Tensor) -> None:
        if value.numel():
            lo, hi = (v.double().reshape(_sizes(value.shape, self.axes)) for v in torch.aminmax(_rows(value, self.axes), dim=1))
            self.lo, self.hi = torch.minimum(lo, self.lo), torch.maximum(hi, self.hi)

    def result(self) -> Extremes:
        return Extremes(self.lo, self.hi)


@dataclass(frozen=True)
class Halves(Observer):
    """(`Extremes` of the 1st, 3rd, .. item, of the 2nd, 4th, ..), as those of `Range`; of a single item twice the same."""

    axes: tuple[int, ...] = ()

    def start(self) -> Accumulator:
        return _Halves(self.axes)

    def memory(self, shape: Sequence[int]) -> int:
        return 2 * Range(self.axes).memory(shape)


class _Halves(Accumulator):
    def __init__(self, axes: tuple[int, ...]) -> None:
        self.halves, self.seen = (_Range(axes), _Range(axes)), 0

    def add(self, value: Tensor) -> None:
        self.halves[self.seen % 2].add(value)
        self.seen += 1

    def result(self) -> tuple[Extremes, Extremes]:
        first, second = (half.result() for half in self.halves)
        return first, second if self.seen > 1 else first


@dataclass(frozen=True)
class MeanAndVariance:
    """mean, var: per index of the observed axes, float64 (population variance). count: values behind each."""

    mean: Tensor
    var: Tensor
    count: int


@dataclass(frozen=True)
class Moments(Observer):
    """`MeanAndVariance` of every index along the axes."""

    axes: tuple[int, ...] = (-1,)

    def start(self) -> Accumulator:
        return _Moments(self.axes)

    def memory(self, shape: Sequence[int]) -> int:
        return 16 * math.prod(_sizes(shape, self.axes))


class _Moments(Accumulator):
    """Merged item by item, which keeps the digits that a plain sum of squares loses. Source: Chan, Golub, LeVeque (1979), equation 2.1."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        self.axes, self.count = axes, 0
        self.sizes: list[int] = []
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, value: Tensor) -> None:
        self.sizes = _sizes(value.shape, self.axes)
        if not value.numel():
            return
        rows = _rows(value, self.axes).double()
        count, mean = rows.shape[1], rows.mean(1)
        total = self.count + count
        apart = mean - self.mean
        self.squares = self.squares + (rows - mean[:, None]).square().sum(1) + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def result(self) -> MeanAndVariance:
        return MeanAndVariance(self.mean.reshape(self.sizes), (self.squares / max(self.count, 1)).reshape(self.sizes), self.count)


@dataclass(frozen=True)
class Distribution(Observer):
    """A `Histogram` of all entries of the value in `bins` bins at most."""

    bins: int = 2048

    def start(self) -> Accumulator:
        return _Distribution(self.bins)

    def memory(self, shape: Sequence[int]) -> int:
        return 16 * self.bins


class _Distribution(Accumulator):
    def __init__(self, bins: int) -> None:
        self.histogram = Histogram(bins)

    def add(self, value: Tensor) -> None:
        self.histogram.add(value)

    def result(self) -> Histogram:
        return self.histogram


@dataclass(frozen=True)
class Products:
    """gram: Σ x xᵀ over all vectors x along the observed axis, [d, d] float64. count: how many vectors."""

    gram: Tensor
    count: int


@dataclass(frozen=True)
class Gram(Observer):
    """`Products` of the vectors along an axis."""

    axis: int = -1

    def start(self) -> Accumulator:
        return _Gram(self.axis)

    def memory(self, shape: Sequence[int]) -> int:
        return 8 * shape[self.axis] ** 2


class _Gram(Accumulator):
    def __init__(self, axis: int) -> None:
        self.axis, self.count = axis, 0
        self.gram: Tensor | None = None

    def add(self, value: Tensor) -> None:
        rows = _rows(value, (self.axis,)).double()
        product = rows @ rows.T
        self.gram = product if self.gram is None else self.gram.add_(product)
        self.count += rows.shape[1]

    def result(self) -> Products:
        assert self.gram is not None
        return Products(self.gram, self.count)


def _rows(value: Tensor, axes: tuple[int, ...]) -> Tensor:
    """[indices along the axes, everything else]."""
    moved = value.detach().movedim(axes, tuple(range(len(axes))))
    return moved.reshape(math.prod(moved.shape[: len(axes)]), math.prod(moved.shape[len(axes) :]))


def _sizes(shape: Sequence[int], axes: tuple[int, ...]) -> list[int]:
    return [shape[a] for a in axes]
