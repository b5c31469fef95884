"""ONNX forms of ops that torch.onnx lacks, or writes with sequences, which no kernel fuses with anything.

Called by torch.onnx while it translates: arguments are values of the graph being made or plain numbers, results are its new values.
"""

from __future__ import annotations

import math
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


def adaptive_avg_pool(x: Any, sizes: Sequence[int]) -> Any:
    """Means over windows; of everything where one number is left per channel, which is a kernel of its own."""
    axes, has_batch = range(len(x.shape) - len(sizes), len(x.shape)), len(x.shape) == len(sizes) + 2
    if all(size == 1 for size in sizes):
        return op.GlobalAveragePool(x) if has_batch else op.ReduceMean(x, ints(*axes), keepdims=1)
    lengths = [_length(x, axis) for axis in axes]
    if any(length % size for length, size in zip(lengths, sizes, strict=True)):
        return _means(x, axes, lengths, sizes)
    window = [length // size for length, size in zip(lengths, sizes, strict=True)]
    pooled = op.AveragePool(x if has_batch else op.Unsqueeze(x, ints(0)), kernel_shape=window, strides=window)
    return pooled if has_batch else op.Squeeze(pooled, ints(0))


def _means(x: Any, axes: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]) -> Any:
    """Means over windows of different lengths, of one axis after the other, as products: what isn't finite shows in every window."""
    rank, dtype = len(x.shape), x.dtype
    for axis, length, size in zip(axes, lengths, sizes, strict=True):
        windows = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
        if all(end - start == 1 for start, end in windows):
            x = op.Gather(x, ints(*(start for start, _ in windows)), axis=axis)
            continue
        means = torch.zeros(length, size, dtype=torch.float64)
        for i, (start, end) in enumerate(windows):
            means[start:end, i] = 1 / (end - start)
        last = [*(a for a in range(rank) if a != axis), axis]
        rows = op.MatMul(op.Transpose(x, perm=last), op.Constant(value=ir.tensor(means.numpy().astype(dtype.numpy()))))
        x = op.Transpose(rows, perm=[last.index(a) for a in range(rank)])
    return x


def batch_norm(x: Any, gain: Any, bias: Any, mean: Any, variance: Any, training: bool, *more: Any) -> Any:
    """By running statistics."""
    if training or any(v is None for v in (gain, bias, mean, variance)):
        raise NotImplementedError("a batch norm that takes the batch's statistics, or has no gain")
    _, eps, _ = more
    return op.BatchNormalization(x, gain, bias, mean, variance, epsilon=eps)


def diff(x: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    """Each position less the one before it."""
    parts = [part for part in (prepend, x, append) if part is not None]
    if n != 1 or x.dtype == ir.DataType.BOOL:
        raise NotImplementedError("differences of a higher order, or of truths")
    whole = parts[0] if len(parts) == 1 else op.Concat(*parts, axis=dim)
    later, earlier = op.Slice(whole, ints(1), ints(2**62), ints(dim)), op.Slice(whole, ints(0), ints(-1), ints(dim))
    return op.Sub(later, earlier)


def outer(a: Any, b: Any) -> Any:
    """a_i b_j."""
    return op.Mul(op.Unsqueeze(a, ints(1)), b)


def masked_fill(x: Any, mask: Any, value: float) -> Any:
    """value where the mask is True, else x. ONNX Runtime has no Where for booleans."""
    if x.dtype == ir.DataType.BOOL:
        return op.Or(x, mask) if value else op.And(x, op.Not(mask))
    return op.Where(mask, _like(value, x), x)


def gelu(x: Any, approximate: str = "none") -> Any:
    """x Φ(x), in the order of products in which ONNX Runtime finds it, and has one kernel for it; torch.onnx halves the other factor."""
    if approximate == "tanh":
        cubic = op.Add(x, op.Mul(_like(0.044715, x), op.Pow(x, _like(3.0, x))))
        return op.Mul(op.Mul(x, _like(0.5, x)), op.Add(op.Tanh(op.Mul(cubic, _like(math.sqrt(2 / math.pi), x))), _like(1.0, x)))
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, _like(math.sqrt(2), x))), _like(1.0, x))), _like(0.5, x))


def repeat_interleave(x: Any, repeats: Any, dim: int | None = None, output_size: Any = None) -> Any:
    """Each position along dim `repeats` times, a number or a value of the graph. torch.onnx's own form repeats another axis for the latter."""
    if dim is None:
        x, rank, axis = op.Reshape(x, ints(-1)), 1, 0
    else:
        rank, axis = len(x.shape), dim % len(x.shape)
    times = op.Concat(*(ints(1) for _ in range(axis + 1)), _vector(repeats), *(ints(1) for _ in range(rank - axis - 1)), axis=0)
    parts = [op.Shape(x, start=0, end=axis)] * (axis > 0) + [ints(-1)] + [op.Shape(x, start=axis + 1)] * (axis < rank - 1)
    wide = op.Expand(op.Unsqueeze(x, ints(axis + 1)), times)
    return op.Reshape(wide, op.Concat(*parts, axis=0))


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
    aten.gelu.default: gelu,
    aten.scaled_dot_product_attention.default: attention,
    aten.masked_fill.Scalar: masked_fill,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.rsub.Scalar: rsub,
    aten.rsub.Tensor: rsub,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split_with_sizes,
    aten.unbind.int: unbind,
    torch.ops.fxc.quantize.default: quantize,
    torch.ops.fxc.dequantize.default: dequantize,
}

# What torch would decompose, which costs a trace of the whole program: what one of these can't say is left to the decomposition.
SHORTCUTS: Mapping[Any, Any] = {
    aten.adaptive_avg_pool1d.default: adaptive_avg_pool,
    aten.adaptive_avg_pool2d.default: adaptive_avg_pool,
    aten.adaptive_avg_pool3d.default: adaptive_avg_pool,
    aten.batch_norm.default: batch_norm,
    aten.diff.default: diff,
    aten.outer.default: outer,
}
