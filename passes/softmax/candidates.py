"""The quantisers that probabilities may get, and what each of them does to the products with values.

To add one, write what makes it from the greatest probability, and give it a name in QUANTISERS: whatever is a named format with one scale goes
through the graph, the interpreter and the backends as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from fxcompress.calibrate.observers import JointAccumulator, JointObserver
from fxcompress.numerics.affine import dequantize, quantize
from fxcompress.numerics.formats import Format, format_of
from fxcompress.numerics.noise import decibel
from fxcompress.numerics.ranges import scale_from_range

Candidate = str | int
SHARES = tuple(2 ** (-i / 4) for i in range(9))  # of the greatest probability: the one a quantiser is made for; what lies above is clipped
ROWS = 512  # of probabilities that an item is judged by, drawn with a fixed seed


@dataclass(frozen=True)
class Quantiser:
    """A format with its scale and zero point, 0-d."""

    format: Format
    scale: Tensor
    zero_point: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """x as its codes say it."""
        block, shape = (-1,) * x.dim(), (1,) * x.dim()
        zero = None if self.zero_point is None else self.zero_point.reshape(shape)
        grid = self.scale.reshape(shape), zero, self.format, block
        return dequantize(quantize(x, *grid), *grid)


def _uniform(bits: int, greatest: float, dtype: torch.dtype) -> Quantiser:
    """As quant.insert has it for the range 0..greatest."""
    format = format_of(f"uint{bits}")
    ends = torch.zeros((), dtype=dtype), torch.tensor(greatest, dtype=dtype)
    return Quantiser(format, *scale_from_range(*ends, format, symmetric=False))


def _log(bits: int, greatest: float, dtype: torch.dtype, tau: int) -> Quantiser:
    return Quantiser(format_of(f"log{bits}:{tau}"), torch.tensor(greatest, dtype=dtype), None)


QUANTISERS: Mapping[Candidate, Callable[[int, float, torch.dtype], Quantiser]] = {  # of equal ones the first is taken
    "uniform": _uniform,
    **{tau: partial(_log, tau=tau) for tau in (1, 2, 4, 8)},
}


@dataclass(frozen=True)
class Judged:
    """errors: Σ ‖Q(A) V - A V‖², [2, candidates, shares], of even and odd items; signal: Σ ‖A V‖² of the two. is_hard: whether every
    probability is 0 or 1."""

    errors: Tensor
    signal: Tensor
    is_hard: bool

    def best(self) -> tuple[list[int], list[float]]:
        """Per candidate the number of the share that is best on even items, and the SQNR in dB with it on odd ones."""
        shares = self.errors[0].argmin(-1)
        errors = self.errors[1].gather(-1, shares[:, None])[:, 0]
        return shares.tolist(), [decibel(float(self.signal[1]), float(e)) for e in errors]


@dataclass(frozen=True)
class Trial(JointObserver):
    """What each candidate does to products A V. Asked about probabilities A [.., N, M] and values V [.., M, d]; greatest: of A."""

    greatest: float
    bits: int
    candidates: tuple[Candidate, ...]

    def start(self) -> JointAccumulator:
        return _Trial(self)

    def memory(self, shapes: Sequence[Sequence[int]]) -> int:
        rows, (*_, keys, size) = min(ROWS, prod(shapes[0][:-1])), shapes[1]
        return 8 * (4 * rows * keys + rows * size)

    def quantiser(self, candidate: int, share: int, dtype: torch.dtype) -> Quantiser:
        """The quantiser of that number, made for that share of the greatest probability."""
        return QUANTISERS[self.candidates[candidate]](self.bits, self.greatest * SHARES[share], dtype)


class _Trial(JointAccumulator):
    def __init__(self, asked: Trial) -> None:
        self.asked, self.count, self.is_hard = asked, 0, True
        self.errors = torch.zeros(2, len(asked.candidates), len(SHARES), dtype=torch.float64)
        self.signal = torch.zeros(2, dtype=torch.float64)

    def add(self, values: Sequence[Tensor]) -> None:
        """The errors of one item's products, [..., queries, keys] by [..., keys, size], under every candidate and scale."""
        a, v = _rows(values[0], values[1], self.count)
        half, wide = self.count % 2, torch.promote_types(a.dtype, torch.float32)
        v = v.to(wide)
        for i, j in ((i, j) for i in range(self.errors.shape[1]) for j in range(len(SHARES))):
            self.errors[half, i, j] += _power((self.asked.quantiser(i, j, a.dtype)(a).to(wide) - a) @ v)
        self.signal[half] += _power(a.to(wide) @ v)
        self.is_hard = self.is_hard and bool(((a == 0) | (a == 1)).all())
        self.count += 1

    def result(self) -> Judged:
        """Of fewer than four items all choose and all judge."""
        few = self.count < 4
        errors, signal = (t.sum(0, keepdim=True).expand_as(t) if few else t for t in (self.errors, self.signal))
        return Judged(errors, signal, self.is_hard)


def _power(x: Tensor) -> float:
    return float(x.double().square().sum())


def _rows(a: Tensor, v: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """About ROWS rows of A, [L, n, M], and the values they are multiplied by, [L, M, d]: some rows of every head, or of some heads one."""
    lead = torch.broadcast_shapes(a.shape[:-2], v.shape[:-2])  # type: ignore[no-untyped-call]
    a, v = (x.expand(*lead, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, v))
    draw = torch.Generator().manual_seed(seed)
    heads = torch.randperm(a.shape[0], generator=draw)[:ROWS]
    rows = torch.randperm(a.shape[1], generator=draw)[: max(1, ROWS // max(len(heads), 1))]
    return a[heads][:, rows], v[heads]
