"""x R for an orthogonal R. One that is a Kronecker product with signs, as most randomised Hadamard matrices are, acts factor by factor:

R = diag(s) (A (x) B),    x R = A^T X B with X = x diag(s) as an [a, b] matrix: n (a + b) products a row in place of n^2
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

SMALL = 128  # below it one small product a row takes longer than the whole matrix


class Rotation:
    """x -> x R on the last axis, in x's dtype. matrix: [n, n]."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.factors = matrix.to(torch.float64), factors(matrix.to(torch.float64)) if len(matrix) >= SMALL else None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        x = x.contiguous()  # else matmul may go row by row
        if self.factors is None:
            return x @ self.matrix.to(x.dtype)
        signs, a, b = (factor.to(x.dtype) for factor in self.factors)
        return (a.T @ ((x * signs).reshape(-1, len(a), len(b)) @ b)).reshape(x.shape)

    def across(self, x: Tensor, axis: int) -> Tensor:
        """The same on another axis, counted from the front, of size n."""
        if axis == x.dim() - 1:
            return self(x)
        flat = x.contiguous().flatten(axis + 1)
        if self.factors is None:
            return (self.matrix.T.to(x.dtype) @ flat).reshape(x.shape)
        signs, a, b = (factor.to(x.dtype) for factor in self.factors)
        grid = b.T @ (flat * signs[:, None]).reshape(*x.shape[:axis], len(a), len(b), -1)
        return (a.T @ grid.flatten(-2)).reshape(x.shape)


def factors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """(signs [n], A [a, a], B [b, b]) with diag(signs) (A (x) B) the matrix to 1e-14 of its largest entry, a and b as equal as can be; None
    where there is none or n is prime."""
    size = len(matrix)
    signs = torch.where(matrix[:, 0] < 0, -1.0, 1.0).to(matrix.dtype)  # those of A and B are what makes their first columns positive
    plain = signs[:, None] * matrix
    corner = plain[0, 0]
    for a in range(isqrt(size), 1, -1):
        if size % a == 0 and corner != 0:
            grid = plain.reshape(a, size // a, a, size // a)
            left, right = grid[:, 0, :, 0], grid[0, :, 0, :] / corner
            if (torch.kron(left, right) - plain).abs().max() <= 1e-14 * plain.abs().max():
                return signs, left, right
    return None
