"""What a metric is given: tensors, and finite ones where a figure would say nothing otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import InputError


def require_tensors(**values: Any) -> None:
    """InputError for anything else, such as an array or a list."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name} is no tensor", why=f"it is a {type(value).__name__}", do=f"pass torch.as_tensor({name})")


def require_finite(what: str, *values: Tensor) -> None:
    """InputError with the number of values that aren't."""
    wrong, total = sum(int((~torch.isfinite(v)).sum()) for v in values), sum(v.numel() for v in values)
    if wrong:
        raise InputError(f"{what} aren't finite", why=f"{wrong} of {total} values are inf or nan")
