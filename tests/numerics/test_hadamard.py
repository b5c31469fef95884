"""Hadamard matrices: orthogonal for every size, flat where a Hadamard matrix is known, another per seed."""

from __future__ import annotations

import math

import pytest
import torch

from fxcompress.numerics.hadamard import hadamard, hartley, mean_keeping, randomised_hadamard

FLAT = (1, 2, 4, 8, 12, 20, 28, 36, 48, 64, 576, 896, 1536)


def off_orthogonal(matrix: torch.Tensor) -> float:
    return float((matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("size", [*FLAT, 3, 7, 9, 18, 80, 92, 100])
def test_orthogonal(size: int) -> None:
    assert hadamard(size).shape == (size, size)
    assert off_orthogonal(hadamard(size)) < 1e-13 * math.sqrt(size)
    assert off_orthogonal(randomised_hadamard(size, 1)) < 1e-13 * math.sqrt(size)


@pytest.mark.parametrize("size", FLAT)
def test_entries_are_all_equally_large(size: int) -> None:
    assert (hadamard(size).abs() * math.sqrt(size) - 1).abs().max() < 1e-13


@pytest.mark.parametrize("size", [3, 9, 25])
def test_other_sizes_stay_flat_within_root_two(size: int) -> None:
    assert hadamard(size).abs().max() <= math.sqrt(2 / size)
    assert torch.equal(hadamard(size), hartley(size))


def test_seeds() -> None:
    assert torch.equal(randomised_hadamard(12, 1), randomised_hadamard(12, 1))
    assert not torch.equal(randomised_hadamard(12, 1), randomised_hadamard(12, 2))
    assert torch.equal(randomised_hadamard(12, 1).abs(), hadamard(12).abs())


@pytest.mark.parametrize("size", [1, 2, 3, 12, 64, 100])
def test_a_rotation_that_keeps_the_mean(size: int) -> None:
    """Still orthogonal, still flat, and 1 R = 1 = R 1; one that keeps it already stays."""
    matrix = mean_keeping(randomised_hadamard(size, 1))
    ones = torch.ones(size, dtype=torch.float64)
    assert off_orthogonal(matrix) < 1e-13 * math.sqrt(size)
    assert max((matrix @ ones - ones).abs().max(), (ones @ matrix - ones).abs().max()) < 1e-13 * math.sqrt(size)
    assert matrix.abs().max() < 5 / math.sqrt(size)
    assert torch.equal(mean_keeping(torch.eye(size, dtype=torch.float64)), torch.eye(size, dtype=torch.float64))


def test_no_size() -> None:
    with pytest.raises(ValueError, match="no matrix has 0 rows"):
        hadamard(0)
