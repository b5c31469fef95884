"""How far two values are apart: the figures that capture, contracts and parity share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_error(old: Tensor, new: Tensor) -> float:
    """max |new - old| / rms(old), in float64; positions where both are the same (infinities too) count 0; inf if a NaN or shape differs.

    An all-zero old value gives max |new|. Integers and booleans: 0 if equal, else inf.
    """
    if old.shape != new.shape:
        return float("inf")
    if not (old.is_floating_point() or old.is_complex()):
        return 0.0 if torch.equal(old, new) else float("inf")
    if not old.numel():
        return 0.0
    if torch.equal(old, new):
        return 0.0
    wide = torch.complex128 if old.is_complex() else torch.float64
    a, b = old.to(wide), new.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    worst = torch.where(same, 0.0, (b - a).abs()).max().item()
    finite = a[a.isfinite()].abs()
    scale = finite.square().mean().sqrt().item() if finite.numel() else 0.0
    if math.isnan(worst):
        return float("inf")
    return float(worst / scale) if scale > 0 else float(worst)
