"""Orthogonal matrices whose entries are all about equally large, for every size: they spread an outlier over all channels.

    H H^T = I,    H = Sylvester(2^k) (x) Paley(m),    or (x) Hartley(m) for a factor m that has no Paley construction

Entries of the Hadamard part are +-1 / sqrt(n); those of the Hartley part are at most sqrt(2 / m). Sources: R. E. A. C. Paley, On orthogonal
matrices (1933); the discrete Hartley transform, cos + sin. Randomised as in QuaRot (arXiv 2404.00456): a random sign per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def randomised_hadamard(size: int, seed: int) -> Tensor:
    """diag(s) H, s = +-1 drawn from the seed: [size, size], float64, orthogonal."""
    signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return signs * hadamard(size)


def mean_keeping(matrix: Tensor) -> Tensor:
    """R P with P the reflection that takes 1 R to 1: orthogonal if R is, and its rows and columns sum to 1, so that x R has the mean of x.

    [n, n], float64. Entries of a randomised Hadamard matrix stay below 5 / sqrt(n): an outlier is still spread over all channels.
    """
    ones = torch.ones(len(matrix), dtype=torch.float64)
    across = ones @ matrix - ones
    length = across @ across
    return matrix if length < 1e-20 else matrix - (2 / length) * torch.outer(matrix @ across, across)


def hadamard(size: int) -> Tensor:
    """H with H H^T = I: [size, size], float64. ValueError for size < 1."""
    if size < 1:
        raise ValueError(f"no matrix has {size} rows")
    halves = [size >> k for k in range((size & -size).bit_length())]
    core = min((n for n in halves if _construction(n)), default=halves[-1])  # the smaller, the quicker x H is (`Rotation`)
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < size // core:
        sylvester = torch.kron(sylvester, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2))
    return torch.kron(sylvester, (_construction(core) or hartley)(core))


def hartley(size: int) -> Tensor:
    """(cos + sin)(2 pi j k / n) / sqrt(n): symmetric, orthogonal, [n, n]."""
    steps = torch.arange(size)
    angles = (steps[:, None] * steps % size).double() * (2 * math.pi / size)
    return (angles.cos() + angles.sin()) / math.sqrt(size)


def _construction(size: int) -> Callable[[int], Tensor] | None:
    """How a Hadamard matrix of this size is made without a factor of two split off."""
    if size == 1:
        return hartley
    if size % 4 == 0 and _is_prime(size - 1):
        return _paley_one
    return _paley_two if size % 4 == 0 and size // 2 % 4 == 2 and _is_prime(size // 2 - 1) else None


def _paley_one(size: int) -> Tensor:
    """I + S with S skew, from the squares of a prime q = n - 1, q = 3 mod 4."""
    return (torch.eye(size, dtype=torch.float64) + _conference(size - 1, -1.0)) / math.sqrt(size)


def _paley_two(size: int) -> Tensor:
    """C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] with C symmetric, from the squares of a prime q = n / 2 - 1, q = 1 mod 4."""
    off, on = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
    half = size // 2
    return (torch.kron(_conference(half - 1, 1.0), off) + torch.kron(torch.eye(half, dtype=torch.float64), on)) / math.sqrt(size)


def _conference(prime: int, corner: float) -> Tensor:
    """[q + 1, q + 1]: 0 on the diagonal, +-1 elsewhere, C C^T = q I; bordered by ones above and `corner` on the left."""
    character = -torch.ones(prime, dtype=torch.float64)
    character[torch.arange(1, prime) ** 2 % prime] = 1.0
    character[0] = 0.0
    steps = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = character[(steps[:, None] - steps) % prime]
    matrix[1:, 0], matrix[0, 0] = corner, 0.0
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))
