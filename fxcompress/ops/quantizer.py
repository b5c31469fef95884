"""fxc::quantize, fxc::dequantize, fxc::unpack: a quantizer as graph nodes.

The reference is `numerics`. None of the three has a gradient: codes are integers, so what a straight-through estimate needs (x itself) is
gone once it is two nodes apart, and torch raises on backward. Training runs the pair as one `numerics.straight_through.fake_quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxcompress.numerics import affine, packing
from fxcompress.numerics.formats import format_of

_PAIR = "Tensor scale, Tensor? zero_point, str format, SymInt[] block) -> Tensor"


@torch.library.custom_op("fxc::quantize", mutates_args=(), schema=f"(Tensor x, {_PAIR}")
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: str, block: Sequence[int]) -> Tensor:
    """`numerics.affine.quantize` with the format by name: the codes of x, in the format's container."""
    return affine.quantize(x, scale, zero_point, format_of(format), block)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, format: str, block: Sequence[int]) -> Tensor:
    return torch.empty_like(x, dtype=format_of(format).container)


@torch.library.custom_op("fxc::dequantize", mutates_args=(), schema=f"(Tensor codes, {_PAIR}")
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, format: str, block: Sequence[int]) -> Tensor:
    """`numerics.affine.dequantize` with the format by name: values in scale's dtype."""
    return affine.dequantize(codes, scale, zero_point, format_of(format), block)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, format: str, block: Sequence[int]) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@torch.library.custom_op("fxc::unpack", mutates_args=(), schema="(Tensor packed, str format, SymInt size) -> Tensor")
def unpack(packed: Tensor, format: str, size: int) -> Tensor:
    """`numerics.packing.unpack` with the format by name: [..., bytes] -> codes [..., size]."""
    return packing.unpack(packed, format_of(format), size)


@unpack.register_fake
def _(packed: Tensor, format: str, size: int) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], size), dtype=format_of(format).container)


_OPS = torch.ops.fxc
PLAIN: Mapping[Any, Callable[..., Tensor]] = {
    _OPS.quantize.default: quantize._init_fn,
    _OPS.dequantize.default: dequantize._init_fn,
    _OPS.unpack.default: unpack._init_fn,
}  # the same functions without torch's dispatcher, and without its refusal to differentiate them
