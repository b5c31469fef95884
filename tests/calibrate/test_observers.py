"""Observers: streamed item by item, the answer is that on all items at once, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fxcompress.calibrate.observers import Distribution, Gram, Halves, Moments, Observer, Range
from fxcompress.numerics.histogram import Histogram
from tests.passes.helpers import seeded

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
AXES = [0, 1, -1]


def items(axis: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Values [., 3, .] of three sizes, the observed axis always 3 long."""
    found = []
    for seed, sizes in enumerate([(5, 2), (1, 7), (4, 4)]):
        shape = list(sizes)
        shape.insert(axis % 3, 3)
        found.append(
            (seeded(*shape, seed=seed) * torch.tensor([1.0, 30.0, 0.01]).reshape([-1 if a == axis % 3 else 1 for a in range(3)])).to(dtype)
        )
    return found


def rows(values: Sequence[Tensor], axis: int) -> Tensor:
    """[indices along the axis, everything else of all items], float64."""
    return torch.cat([v.double().transpose(0, axis).flatten(1) for v in values], 1)


def answer(observer: Observer, values: Sequence[Tensor]) -> Any:
    accumulator = observer.start()
    for value in values:
        accumulator.add(value)
    return accumulator.result()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES)
def test_range(axis: int, dtype: torch.dtype) -> None:
    values = items(axis, dtype)
    whole, each = answer(Range(), values), answer(Range((axis,)), values)
    every = rows(values, axis)
    assert (whole.lo, whole.hi, whole.amax) == (every.min(), every.max(), every.abs().max())
    assert torch.equal(each.lo, every.amin(1)) and torch.equal(each.hi, every.amax(1)) and torch.equal(each.amax, every.abs().amax(1))
    assert each.lo.dtype == each.hi.dtype == whole.lo.dtype == torch.float64
    assert (each.lo.shape, whole.lo.shape) == ((3,), ())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES)
def test_moments(axis: int, dtype: torch.dtype) -> None:
    values = items(axis, dtype)
    got, every = answer(Moments((axis,)), values), rows(values, axis)
    assert torch.allclose(got.mean, every.mean(1), rtol=1e-12, atol=1e-14)
    assert torch.allclose(got.var, every.var(1, correction=0), rtol=1e-12, atol=0)
    assert (got.count, got.mean.dtype) == (every.shape[1], torch.float64)


def test_moments_keep_the_digits_that_a_sum_of_squares_loses() -> None:
    """10^9 ± 1: the mean square less the squared mean keeps none of them in float64."""
    values = [torch.full((2, 50), 1e9, dtype=torch.float64) + torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None] for _ in range(20)]
    every = torch.cat(values)
    naive = every.square().mean() - every.mean().square()
    assert abs(naive - 1) > 0.5
    assert torch.allclose(answer(Moments((-1,)), values).var, torch.ones(50, dtype=torch.float64), rtol=1e-9, atol=0)


def test_moments_of_items_that_differ_only_in_their_mean() -> None:
    values = [torch.full((1, 2, 4), 1e6 + n, dtype=torch.float64) for n in range(5)]
    got = answer(Moments((1,)), values)
    assert got.mean.tolist() == [1e6 + 2] * 2
    assert got.var.tolist() == [2.0] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES)
def test_gram(axis: int, dtype: torch.dtype) -> None:
    values = items(axis, dtype)
    got, every = answer(Gram(axis), values), rows(values, axis)
    assert torch.allclose(got.gram, every @ every.T, rtol=1e-12, atol=1e-12)
    assert (got.count, got.gram.dtype) == (every.shape[1], torch.float64)
    assert torch.equal(got.gram, got.gram.T)


def test_gram_of_halves_does_not_overflow() -> None:
    values = [torch.full((4, 2), 300.0, dtype=torch.float16)] * 3
    assert answer(Gram(), values).gram.tolist() == [[12 * 9e4] * 2] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_distribution(dtype: torch.dtype) -> None:
    values = items(-1, dtype)
    whole = Histogram(32)
    whole.add(torch.cat([v.flatten() for v in values]))
    got = answer(Distribution(32), values)
    assert (got.width, got.first, got.lo, got.hi) == (whole.width, whole.first, whole.lo, whole.hi)
    assert got.counts.tolist() == whole.counts.tolist()
    assert got.total == sum(v.numel() for v in values)


@pytest.mark.parametrize("observer", [Range(), Range((-1,)), Moments((-1,)), Gram(-1), Distribution(32)], ids=str)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_item_without_vectors_changes_nothing(observer: Observer, place: int) -> None:
    values = [v.flatten(0, 1) for v in items(-1)]
    wanted = answer(observer, values)
    values.insert(place, torch.zeros(0, 3))
    got = answer(observer, values)
    for name, value in vars(wanted).items():
        assert torch.equal(torch.as_tensor(getattr(got, name)), torch.as_tensor(value)), name


def test_nothing_seen() -> None:
    seen = answer(Range(), [torch.zeros(0, 3)])
    assert (seen.lo, seen.hi) == (torch.inf, -torch.inf)


@pytest.mark.parametrize("axes", [(), (-1,)])
def test_halves_are_ranges_of_every_other_item(axes: tuple[int, ...]) -> None:
    values = [seeded(4, 3, seed=s) for s in range(5)]
    halves = answer(Halves(axes), values)
    for half, of in zip(halves, (values[::2], values[1::2]), strict=True):
        same = answer(Range(axes), of)
        assert torch.equal(half.lo, same.lo) and torch.equal(half.hi, same.hi)
    first, second = answer(Halves(axes), values[:1])
    assert torch.equal(first.hi, second.hi) and torch.equal(first.hi, answer(Range(axes), values[:1]).hi)


@pytest.mark.parametrize("observer", [Range((0,)), Moments((0,)), Gram(0)], ids=str)
def test_a_row_is_an_axis(observer: Observer) -> None:
    """A vector: every entry is an index of its only axis, seen once an item."""
    got = answer(observer, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])])
    wanted = {
        "lo": [1, -2], "hi": [3, 2], "mean": [2, 0], "var": [1, 4], "count": 2, "gram": [[10, -4], [-4, 8]],
    }  # fmt: skip
    assert {n: torch.as_tensor(v).tolist() for n, v in vars(got).items()} == {n: wanted[n] for n in vars(got)}


def test_the_value_is_not_kept_nor_changed() -> None:
    """What was given may be written over afterwards."""
    for observer in (Range(), Range((-1,)), Moments((-1,)), Gram(-1), Distribution(8)):
        value = seeded(4, 3)
        accumulator, kept = observer.start(), value.clone()
        accumulator.add(value)
        assert torch.equal(value, kept)
        wanted = vars(answer(observer, [kept]))
        value.fill_(7)
        for name, other in vars(accumulator.result()).items():
            assert torch.equal(torch.as_tensor(other), torch.as_tensor(wanted[name])), name


def test_questions_are_values() -> None:
    assert Range() == Range() != Range((0,))
    assert len({Range(), Range(()), Range((1,)), Moments((1,)), Moments((1,)), Gram(1), Distribution(), Distribution(2048)}) == 5


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_memory_is_that_of_the_answer(axis: int) -> None:
    """At least the bytes of what the accumulator holds, and no more than four times that."""
    for observer in (Range(), Range((axis,)), Moments((axis,)), Gram(axis), Distribution(2048)):
        value = seeded(20, 30, 40)
        held = sum(v.numel() * v.itemsize for v in vars(answer(observer, [value])).values() if isinstance(v, Tensor))
        assert held <= observer.memory(value.shape) <= 4 * held, observer
