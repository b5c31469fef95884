"""ONNX forms of ops that torch.onnx lacks, or writes with sequences, which no kernel fuses with anything.

Called by torch.onnx while it translates: arguments are values of the graph being made or plain numbers, results are its new values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op

import fxcompress.ops  # noqa: F401 - registers the fxc:: ops named below
from fxcompress.backends.onnx.attention import attention
from fxcompress.backends.onnx.quantisers import dequantize, quantize

aten = torch.ops.aten


def split(x: Any, size: int, dim: int = 0) -> list[Any]:
    """Pieces of `size` along dim, the last one shorter."""
    length = _length(x, dim)
    return split_with_sizes(x, [min(size, length - start) for start in range(0, length, size)], dim)


def split_with_sizes(x: Any, sizes: Sequence[Any], dim: int = 0) -> list[Any]:
    """Pieces of these sizes along dim; a size may be a value of the graph."""
    edges = accumulate((_vector(size) for size in sizes), op.Add, initial=ints(0))
    return [op.Slice(x, a, b, ints(dim)) for a, b in pairwise(edges)]


def unbind(x: Any, dim: int = 0) -> list[Any]:
    """x at every index of dim."""
    return [op.Gather(x, _index(i), axis=dim) for i in range(_length(x, dim))]


def rsub(x: Any, other: Any, alpha: float = 1) -> Any:
    """other - alpha x; integers less than a float are float32, as in torch."""
    if isinstance(other, float) and not x.dtype.is_floating_point():
        x = op.Cast(x, to=ir.DataType.FLOAT)
    return op.Sub(_like(other, x), x if alpha == 1 else op.Mul(x, _like(alpha, x)))


def ints(*values: int) -> Any:
    """An int64 vector."""
    return op.Constant(value_ints=list(values))


def _vector(size: Any) -> Any:
    return ints(size) if isinstance(size, int) else op.Reshape(size, ints(1))


def _index(value: int) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=ir.DataType.INT64))


def _like(number: Any, x: Any) -> Any:
    """A number in the type of x."""
    return op.Constant(value=ir.tensor(number, dtype=x.dtype)) if isinstance(number, int | float) else number


def _length(x: Any, dim: int) -> int:
    length = x.shape[dim]
    if not isinstance(length, int):
        raise NotImplementedError(f"axis {dim} is cut into a number of pieces that depends on its size")
    return length


FORMS: Mapping[Any, Any] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.rsub.Scalar: rsub,
    aten.rsub.Tensor: rsub,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split_with_sizes,
    aten.unbind.int: unbind,
    torch.ops.fxc.quantize.default: quantize,
    torch.ops.fxc.dequantize.default: dequantize,
}
