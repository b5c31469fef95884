"""Rotations act as their matrices do, and factor by factor where these are Kronecker products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxcompress.numerics.hadamard import hadamard, mean_keeping, randomised_hadamard
from fxcompress.numerics.rotation import SMALL, Rotation, factors


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]


@pytest.mark.parametrize("size", [256, 576, 896, 960, 1024])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_randomised_hadamard_matrix_of_even_parts_has_factors(size: int, seed: int) -> None:
    matrix = randomised_hadamard(size, seed)
    found = factors(matrix)
    assert found is not None
    signs, a, b = found
    assert len(a) * len(b) == size
    assert torch.allclose(signs[:, None] * torch.kron(a, b), matrix, rtol=0, atol=1e-15)


@pytest.mark.parametrize("matrix", [orthogonal(64), mean_keeping(randomised_hadamard(64, 1)), hadamard(20), hadamard(7)])
def test_others_have_none(matrix: Tensor) -> None:
    assert factors(matrix) is None


def test_a_product_with_one_wrong_entry_is_none() -> None:
    matrix = randomised_hadamard(256, 0)
    matrix[200, 100] *= 1 + 1e-9
    assert factors(matrix) is None


@pytest.mark.parametrize("matrix", [randomised_hadamard(256, 3), torch.eye(SMALL, dtype=torch.float64), orthogonal(SMALL), orthogonal(12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_it_acts_as_the_matrix(matrix: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, len(matrix), dtype=dtype, generator=torch.Generator().manual_seed(1))
    result = Rotation(matrix)(x)
    assert (result.shape, result.dtype) == (x.shape, dtype)
    assert (result - x.double() @ matrix).abs().max() < 64 * torch.finfo(dtype).eps


def test_of_what_lies_across_memory() -> None:
    x = torch.randn(256, 6, dtype=torch.float64).T
    assert torch.allclose(Rotation(hadamard(256))(x), x @ hadamard(256), rtol=0, atol=1e-13)


@pytest.mark.parametrize("matrix", [randomised_hadamard(256, 3), orthogonal(12)])
@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((2, 3), 0), ((2, 3), 1), ((2, 3), 2), ((1, 1), 1)])
def test_it_acts_across_other_axes(matrix: Tensor, shape: tuple[int, ...], axis: int) -> None:
    whole = [*shape[:axis], len(matrix), *shape[axis:]]
    x = torch.randn(*whole, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = (x.movedim(axis, -1) @ matrix).movedim(-1, axis)
    result = Rotation(matrix).across(x.transpose(0, -1).contiguous().transpose(0, -1), axis)
    assert torch.allclose(result, expected, rtol=0, atol=1e-13)
