"""Distances between two sets of images or other items, over the features that a network sees in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxcompress.errors import InputError
from fxcompress.evaluate.given import require_finite, require_tensors
from fxcompress.evaluate.intervals import Estimate, bootstrap


def frechet(a: Tensor, b: Tensor) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa^½ Σb Σa^½)^½) of the normal distributions fitted to features a [N, D] and b [M, D], in float64.

    Covariances divide by N - 1. Biased upwards for few rows: compare only figures of equal N and M, and with `noise_floor`.
    InputError when N or M < 2, D differs or a value isn't finite. Source: Heusel et al. (NeurIPS 2017), eq. 6; the root of the product is
    taken in its symmetric form, which has the same trace.
    """
    _require_features(a, b, least=2)
    x, y = a.double(), b.double()
    cov_x, cov_y = torch.cov(x.T).view(x.shape[1], -1), torch.cov(y.T).view(y.shape[1], -1)
    root = _root(cov_x)
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross)


def kid(a: Tensor, b: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of features a [N, D], b [M, D] under k(x, y) = (x·y / D + 1)³.

    Σ_{i≠j} k(a_i, a_j) / N(N-1) + Σ_{i≠j} k(b_i, b_j) / M(M-1) - 2 Σ k(a_i, b_j) / NM, over all rows at once, no subsets, in float64. May be
    below 0 where the sets are alike. InputError as `frechet`. Source: Bińkowski et al. (ICLR 2018), section 3 and eq. 4.
    """
    _require_features(a, b, least=2)
    x, y = a.double(), b.double()
    return _among(x) + _among(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def paired_distance(reference: Tensor, changed: Tensor) -> Estimate:
    """mean_i |r_i - c_i| / mean_i |r_i - r_π(i)|: how far samples of a changed model are from those of its reference, drawn from the same
    noise, as a share of how far two samples of the reference are from each other; with a bootstrap interval over pairs.

    reference, changed: [N, ...], images, or features of a network of them; π: the next row, so rows of one class mustn't stand together where
    classes matter. 0: the same samples. 1: the noise no longer decides anything. InputError for other shapes, N < 2 and equal references.
    """
    require_tensors(reference=reference, changed=changed)
    if reference.shape != changed.shape or reference.dim() < 1 or len(reference) < 2:
        raise InputError(
            "the samples can't be paired", why=f"they are {list(reference.shape)} and {list(changed.shape)}, not two [N >= 2, ...]"
        )
    require_finite("the samples", reference, changed)
    a, b = reference.double().flatten(1), changed.double().flatten(1)
    apart = float((a - a.roll(1, 0)).norm(dim=1).mean())
    if not apart > 0:
        raise InputError("the samples of the reference don't differ", why=f"their mean distance is {apart}")
    return bootstrap(lambda d: float(d.mean()) / apart, (a - b).norm(dim=1))


def _among(x: Tensor) -> float:
    """Mean kernel of two different rows."""
    own = float(_cubed(x.square().sum(1), x.shape[1]).sum())
    return (_kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return math.fsum(float(_cubed(rows @ y.T, x.shape[1]).sum()) for rows in torch.split(x, 1024))


def _cubed(products: Tensor, dims: int) -> Tensor:
    return (products / dims + 1).pow(3)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _require_features(a: Tensor, b: Tensor, least: int) -> None:
    require_tensors(a=a, b=b)
    is_real = not (a.is_complex() or b.is_complex())
    if a.dim() != 2 or b.dim() != 2 or not 0 < a.shape[1] == b.shape[1] or min(len(a), len(b)) < least or not is_real:
        raise InputError(
            "the features can't be compared",
            why=f"they are {list(a.shape)} and {list(b.shape)}, not real [N, D] and [M, D] of at least {least} rows",
            do="flatten each item's features to one row",
        )
    require_finite("the features", a, b)
