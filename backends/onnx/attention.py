"""aten.scaled_dot_product_attention in ONNX ops, for any rank, mask and number of key/value heads.

torch.onnx has a form of its own for four axes that gives rows without a visible key the mean of all values; torch gives them zeros.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(scale q kᵀ + mask) v, scale 1/sqrt(E) by default; a row that sees no key is 0.

    query [.., L, E], key [.., S, E], value [.., S, Ev]; with enable_gqa axis -3 of query is a multiple of that of key and value. Dropout is
    an error: programs are captured in eval mode.
    """
    if dropout_p:
        raise NotImplementedError("attention with dropout")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    rank, heads, groups = len(query.shape), query.shape[-3] if enable_gqa else None, key.shape[-3] if enable_gqa else None
    order = [*range(rank - 2), rank - 1, rank - 2]
    query_rows = _regrouped(op.Mul(query, _number(factor, query)), heads, groups, rank)
    scores = _regrouped(op.MatMul(query_rows, op.Transpose(key, perm=order)), groups, heads, rank)
    mask = _causal(query, key) if is_causal else attn_mask
    if mask is None:
        return _averages(op.Softmax(scores, axis=-1), value, heads, groups, rank)
    addend, visible = _addend(mask, query)
    result = _averages(op.Softmax(op.Add(scores, addend), axis=-1), value, heads, groups, rank)
    return result if is_causal else op.Where(visible, result, _number(0.0, query))


def _averages(weights: Any, value: Any, heads: int | None, groups: int | None, rank: int) -> Any:
    return _regrouped(op.MatMul(_regrouped(weights, heads, groups, rank), value), groups, heads, rank)


def _regrouped(rows: Any, heads: int | None, wanted: int | None, rank: int) -> Any:
    """[.., H, L, S] as [.., H', L H / H', S], which moves nothing: H' groups of heads whose rows read the same keys, or back."""
    if heads == wanted or wanted is None:
        return rows
    return op.Reshape(rows, op.Constant(value_ints=[0] * (rank - 3) + [wanted, -1, 0]))


def _addend(mask: Any, like: Any) -> tuple[Any, Any]:
    """(float mask without infinities, whether a row sees any key [.., L, 1])."""
    least = _number(float(torch.finfo(_torch_dtype(like)).min), like)
    if mask.dtype == ir.DataType.BOOL:
        return op.Where(mask, _number(0.0, like), least), _any(mask)
    wide = op.Cast(mask, to=ir.DataType.FLOAT) if mask.dtype == ir.DataType.FLOAT16 else mask  # IsInf takes no halves
    return op.Max(mask, least), _any(op.Not(op.IsInf(wide, detect_positive=0)))


def _any(mask: Any) -> Any:
    return op.Cast(op.ReduceMax(op.Cast(mask, to=ir.DataType.INT32), op.Constant(value_ints=[-1]), keepdims=1), to=ir.DataType.BOOL)


def _causal(query: Any, key: Any) -> Any:
    rows, columns = (
        op.Range(_scalar(0), op.Squeeze(op.Shape(v, start=len(v.shape) - 2, end=len(v.shape) - 1)), _scalar(1)) for v in (query, key)
    )
    return _as_bool(op.GreaterOrEqual(op.Unsqueeze(rows, op.Constant(value_ints=[1])), op.Unsqueeze(columns, op.Constant(value_ints=[0]))))


def _as_bool(value: Any) -> Any:
    value.dtype = ir.DataType.BOOL
    return value


def _number(value: float, like: Any) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=like.dtype))


def _scalar(value: int) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=ir.DataType.INT64))


def _torch_dtype(value: Any) -> torch.dtype:
    return ir.tensor_adapters.to_torch_dtype(value.dtype)
