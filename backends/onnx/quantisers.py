"""ONNX forms of fxc::quantize and fxc::dequantize on values of the graph: plain Q/DQ pairs, the same for every runtime.

    one scale, or one for each index of an axis    QuantizeLinear(x, scale, zero_point)       DequantizeLinear(codes, scale, zero_point)
    one for each vector (token), symmetric         QuantizeLinear(x / scale, 1, 0)            DequantizeLinear(codes, 1) * scale
    a log format                                   QuantizeLinear(-ln(x / scale), ln 2 / tau)
                                                   ThresholdedRelu(exp(-codes ln 2 / tau)) * scale, the last code below the threshold
    anything else                                  the law of `numerics.affine`, written out

ln softmax(z) is LogSoftmax(z): then no softmax is computed, and no logarithm of each number. Measured, ONNX Runtime on one AVX-512 thread,
softmax and product with values of 16 heads, 256 x 256, times that in float: 1.9; with the logarithm of the probabilities 3.1; with a Gather
from a table of 2^bits values 18 or more (`tools/bench/onnx_kernels.py logs`).
The codes are bit for bit those of `numerics.affine`: QuantizeLinear divides, rounds ties to even and saturates. Formats below 8 bits clip their
codes. QuantizeLinear has 16 bits from opset 21 only, where GroupNorm is slow, so they are written out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import Tensor

from fxcompress.backends.onnx.build import Builder
from fxcompress.backends.onnx.exported import leaf_name
from fxcompress.backends.onnx.outline import Leaf
from fxcompress.numerics.affine import working_dtype
from fxcompress.numerics.formats import Format, format_of

GRIDDED = ("QuantizeLinear", "DequantizeLinear")


def quantize(x: Any, scale: Any, zero_point: Any, format: str, block: Sequence[int]) -> Any:
    """The codes of x. NotImplementedError for groups, which would need the scale repeated."""
    kind = format_of(format)
    axis = _axis(x, block)
    if kind.kind == "log":
        return _exponents(x, scale, kind, axis)
    if kind.kind == "float" or kind.bits > 8 or not _is_float32(x, scale):
        return _written_out(x, scale, zero_point, kind, block)
    if axis is not None:
        zero = _container(zero_point, kind, axis, scale.shape[axis])
        return _clipped(op.QuantizeLinear(x, _flat(scale, axis), zero, axis=max(axis, 0)), kind)
    if zero_point is not None:
        return _written_out(x, scale, zero_point, kind, block)
    one = _number(1.0, ir.DataType.FLOAT)
    return _clipped(op.QuantizeLinear(op.Div(x, _broadcast(scale, x, block)), one, _container(None, kind, -1)), kind)


def dequantize(codes: Any, scale: Any, zero_point: Any, format: str, block: Sequence[int]) -> Any:
    """The value of the codes, in scale's dtype."""
    kind = format_of(format)
    axis = _axis(codes, block)
    if kind.kind == "log":
        return _powers(codes, scale, kind)
    if kind.kind == "int" and kind.bits <= 8 and _is_float32(scale):
        if axis is not None:
            zero = None if zero_point is None else _container(zero_point, kind, axis)
            return op.DequantizeLinear(codes, _flat(scale, axis), zero, axis=max(axis, 0))
        if zero_point is None:
            return op.Mul(op.DequantizeLinear(codes, _number(1.0, ir.DataType.FLOAT)), _broadcast(scale, codes, block))
    work = _onnx(_work(kind, scale))
    value = op.Cast(codes, to=work)
    if zero_point is not None:
        value = op.Sub(value, op.Cast(_broadcast(zero_point, codes, block), to=work))
    return op.Cast(op.Mul(value, op.Cast(_broadcast(scale, codes, block), to=work)), to=scale.dtype)


def bind_grids(build: Builder, leaves: Sequence[Leaf], constants: Mapping[str, Tensor]) -> None:
    """Scales and zero points that are constants become scalars or vectors in the file, in the place of reshaped leaves."""
    for index, leaf in enumerate(leaves):
        value = build.graph.initializers.get(leaf_name(index))
        for node, _ in list(value.uses()) if value is not None and leaf.quantised is None else ():
            if node.op_type != "Reshape" or any(n.op_type not in GRIDDED for n, _ in node.outputs[0].uses()):
                continue
            shape = ir.convenience.get_const_tensor(node.inputs[1])  # type: ignore[arg-type]
            if shape is not None:
                flat = constants[leaf.name].reshape(shape.numpy().tolist())
                node.outputs[0].replace_all_uses_with(build.constant(leaf.name, flat))
                build.graph.remove(node, safe=True)


def _written_out(x: Any, scale: Any, zero_point: Any, kind: Format, block: Sequence[int]) -> Any:
    """clip(round(x / scale) + zero_point), or cast(clip(x / scale)) for a float format."""
    work = _onnx(_work(kind, x, scale))
    value = op.Div(op.Cast(x, to=work), op.Cast(_broadcast(scale, x, block), to=work))
    if kind.kind == "int":
        value = op.Round(value)
    if zero_point is not None:
        value = op.Add(value, op.Cast(_broadcast(zero_point, x, block), to=work))
    return op.Cast(op.Clip(value, _number(float(kind.qmin), work), _number(float(kind.qmax), work)), to=_onnx(kind.container))


def _exponents(x: Any, scale: Any, kind: Format, axis: int | None) -> Any:
    """The codes of a log format."""
    if axis != -1 or _work(kind, x, scale) != torch.float32:
        raise NotImplementedError(f"{kind} with more than one scale, or of float64")
    scale = op.Cast(scale, to=ir.DataType.FLOAT)
    down = op.Sub(op.Log(scale), _logarithm(x))
    return _clipped(op.QuantizeLinear(down, _number(_step(kind), ir.DataType.FLOAT), _container(None, kind, -1)), kind)


def _logarithm(x: Any) -> Any:
    """ln x, from what x is the softmax of where it is one; -inf of what is 0 or less."""
    node = x.producer()
    if node is not None and node.op_type == "Softmax":
        return op.LogSoftmax(node.inputs[0], axis=node.attributes["axis"].as_int())
    if node is not None and node.op_type == "Where" and _is_nought(node.inputs[2]):
        return op.Where(node.inputs[0], _logarithm(node.inputs[1]), _number(-math.inf, ir.DataType.FLOAT))
    return op.Log(op.Relu(op.Cast(x, to=ir.DataType.FLOAT)))


def _is_nought(value: Any) -> bool:
    number = ir.convenience.get_const_tensor(value)
    return number is not None and not number.numpy().any()


def _powers(codes: Any, scale: Any, kind: Format) -> Any:
    """The values of a log format's codes: exp is exact to the last digits, and all below the least level is 0."""
    down = op.Mul(op.Cast(codes, to=ir.DataType.FLOAT), _number(-_step(kind), ir.DataType.FLOAT))
    level = op.ThresholdedRelu(op.Exp(down), alpha=2.0 ** ((0.5 - kind.qmax) / kind.tau))
    return op.Cast(op.Mul(level, op.Cast(scale, to=ir.DataType.FLOAT)), to=scale.dtype)


def _step(kind: Format) -> float:
    """How much the logarithm falls from one code to the next."""
    return math.log(2) / kind.tau


def _axis(x: Any, block: Sequence[int]) -> int | None:
    """-1 for one scale in all, the axis with a scale for each index, None where it is more than that, or one for each token."""
    split = [a for a, (size, b) in enumerate(zip(x.shape, block, strict=True)) if b != -1 and size != 1 and not _covers(b, size)]
    if not split:
        return -1
    is_token = all(b == 1 for b in block[:-1]) and block[-1] == -1
    is_one = len(split) == 1 and block[split[0]] == 1 and isinstance(x.shape[split[0]], int)
    return split[0] if is_one and not is_token else None


def _covers(block: int, size: Any) -> bool:
    return isinstance(size, int) and block >= size


def _clipped(codes: Any, kind: Format) -> Any:
    if kind.qmax - kind.qmin == 255:
        return codes
    container = _onnx(kind.container)
    return op.Clip(codes, _number(kind.qmin, container), _number(kind.qmax, container))


def _flat(value: Any, axis: int) -> Any:
    """A scale or zero point as QuantizeLinear takes it: a scalar, or a vector along the axis."""
    return op.Reshape(value, op.Constant(value=ir.tensor([] if axis < 0 else [-1], dtype=ir.DataType.INT64)))


def _container(zero_point: Any, kind: Format, axis: int, size: int = 1) -> Any:
    """The zero point in the container's dtype; zeros, `size` along the axis, where there is none."""
    container = _onnx(kind.container)
    if zero_point is None:
        return _number([0] * size if axis >= 0 else 0, container)
    flat = _flat(zero_point, axis)
    return flat if zero_point.dtype == container else op.Cast(flat, to=container)


def _broadcast(value: Any, x: Any, block: Sequence[int]) -> Any:
    if any(b not in (-1, 1) and not _covers(b, size) for b, size in zip(block, x.shape, strict=True)):
        raise NotImplementedError(f"a quantiser of an activation in blocks of {list(block)}")
    return value


def _is_float32(*values: Any) -> bool:
    return all(v.dtype == ir.DataType.FLOAT for v in values)


def _work(kind: Format, *values: Any) -> torch.dtype:
    return working_dtype(kind, *(ir.tensor_adapters.to_torch_dtype(v.dtype) for v in values))


def _onnx(dtype: torch.dtype) -> ir.DataType:
    return ir.tensor_adapters.from_torch_dtype(dtype)


def _number(value: float | list[int], dtype: ir.DataType) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=dtype))
