"""Static grids of activations from what was observed: the methods that quant.insert and quant.ranges share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.calibrate.observers import Distribution, Extremes, Observer, Range
from fxcompress.edit import Edit
from fxcompress.errors import CalibrationError
from fxcompress.numerics.formats import Format
from fxcompress.numerics.histogram import Histogram, least_divergence, least_error, percentile
from fxcompress.numerics.ranges import scale_from_range
from fxcompress.program import place_of
from fxcompress.rewrite import Reject


@dataclass(frozen=True)
class Grid:
    """A static quantiser: scale and zero point 0-d, lo and hi the range it was made for."""

    scale: Tensor
    zero_point: Tensor | None
    lo: Tensor
    hi: Tensor


QUANTIZE, DEQUANTIZE = torch.ops.fxc.quantize.default, torch.ops.fxc.dequantize.default


def insert_pair(
    edit: Edit, value: fx.Node, scale: fx.Node, zero: fx.Node | None, format: Format, block: Sequence[int], **at: fx.Node
) -> fx.Node:
    """value on the grid: quantize and dequantize, the second of which is returned."""
    of = value.meta["val"]
    fake = of.new_empty((), dtype=format.container).expand(of.shape) if value.op == "get_attr" else torch.empty_like(of, dtype=format.container)
    grid: Any = (scale, zero, format.name, list(block))
    codes = edit.insert(QUANTIZE, value, *grid, val=fake, **at)
    return edit.insert(DEQUANTIZE, codes, *grid, val=of, **at)


def check_method(value: str) -> str:
    """The method's text. ValueError if it is none of minmax, mse, entropy, percentile:99.99."""
    name, _, share = value.partition(":")
    if name not in ("minmax", "mse", "entropy", "percentile") or bool(share) != (name == "percentile"):
        raise ValueError(f"{value!r}: one of minmax, mse, entropy, percentile:99.99")
    if share and not 50 < float(share) <= 100:
        raise ValueError("a percentile lies above 50, up to 100")
    return value


def observer_of(method: str) -> Observer:
    """What the method asks about a value."""
    return Range() if method == "minmax" else Distribution()


def grid_of(value: fx.Node, seen: Extremes | Histogram, format: Format, method: str, by: str) -> Grid | Reject:
    """The grid of a value; a Reject where it never changes, or hardly ever. Signed formats are symmetric. by: the pass, for the error of a
    feed too small."""
    lo, hi = float(seen.lo), float(seen.hi)
    if lo >= hi:
        return Reject("{} is {} on the calibration feed", value, f"{lo:g} everywhere" if lo == hi else "empty")
    if isinstance(seen, Histogram) and method != "minmax":
        lo, hi = _range(value, seen, format, method, by)
        if max(hi, 0) - min(lo, 0) < seen.width:
            return Reject("{} is 0 on the calibration feed but for what {} leaves out", value, method)
    dtype = value.meta["val"].dtype
    ends = torch.tensor(min(lo, hi), dtype=torch.float64), torch.tensor(max(lo, hi), dtype=torch.float64)
    scale, zero = scale_from_range(ends[0].to(dtype), ends[1].to(dtype), format, format.signed)
    return Grid(scale, zero, *ends)


def _range(value: fx.Node, seen: Histogram, format: Format, method: str, by: str) -> tuple[float, float]:
    name, _, share = method.partition(":")
    if name == "mse":
        return least_error(seen, format, format.signed)
    if name == "entropy":
        return least_divergence(seen, format)
    try:
        return percentile(seen, float(share) / 100)
    except ValueError as error:
        where = place_of(value)
        do = f"pass more items, or ask {by} for a lower percentile, as percentile:99.9"
        raise CalibrationError("the calibration feed is too small", where=where, why=str(error), do=do) from None
