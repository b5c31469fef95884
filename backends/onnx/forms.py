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

from fxcompress.backends.onnx.attention import attention


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


def grouped_matmul(x: Any, weight: Any, ends: Any) -> Any:
    """y[e] = x[e] W[e], where x[e] are the rows ends[e - 1] .. ends[e] of x: no row meets a matrix that isn't its own.

    x [S, K], weight [E, K, N], ends [E] int, non-decreasing. One slice and one product an expert; an expert without rows multiplies nothing.
    """
    ends = op.Cast(ends, to=ir.DataType.INT64)
    starts = op.Concat(ints(0), op.Slice(ends, ints(0), ints(-1), ints(0)), axis=0)
    return op.Concat(*(_of_expert(x, weight, starts, ends, e) for e in range(_length(weight, 0))), axis=0)


def _of_expert(x: Any, weight: Any, starts: Any, ends: Any, expert: int) -> Any:
    first, last = (op.Gather(v, ints(expert), axis=0) for v in (starts, ends))
    rows = op.Slice(x, first, last, ints(0))
    rows.shape = ir.Shape([None, x.shape[1]])
    return op.MatMul(rows, op.Gather(weight, _index(expert), axis=0))


def ints(*values: int) -> Any:
    """An int64 vector."""
    return op.Constant(value_ints=list(values))


def _vector(size: Any) -> Any:
    return ints(size) if isinstance(size, int) else op.Reshape(size, ints(1))


def _index(value: int) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=ir.DataType.INT64))


def _length(x: Any, dim: int) -> int:
    length = x.shape[dim]
    if not isinstance(length, int):
        raise NotImplementedError(f"axis {dim} is cut into a number of pieces that depends on its size")
    return length


_FORMS: Mapping[str, Any] = {
    "aten::scaled_dot_product_attention.default": attention,
    "aten::split.Tensor": split,
    "aten::split_with_sizes.default": split_with_sizes,
    "aten::unbind.int": unbind,
    "transformers::grouped_mm_fallback.default": grouped_matmul,
}


def forms() -> dict[Any, Any]:
    """Form by op, for the ops that are registered in this process."""
    return {target: form for name, form in _FORMS.items() if (target := _registered(name)) is not None}


def _registered(name: str) -> Any:
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
