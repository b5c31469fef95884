"""A quantised constant as a float tensor in standard ONNX ops: (code - zero_point) * scale, bit for bit what `fxc::dequantize` gives.

The file keeps the packed codes; ONNX Runtime folds these nodes when it loads the model, so the site runs as fast and takes as much memory as
a float one. DequantizeLinear would be kept and run at every call, 7 to 50 times slower than the multiplication it feeds.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from fxcompress.backends.onnx.build import Builder
from fxcompress.backends.onnx.outline import Leaf, Quantised
from fxcompress.errors import BackendRefusal
from fxcompress.numerics.affine import working_dtype

RIGHT = "RIGHT"


def dense(build: Builder, leaf: Leaf, quantised: Quantised, constants: Mapping[str, Tensor]) -> ir.Value:
    """The value of the leaf's tensor, in the scale's dtype."""
    work = ir.tensor_adapters.from_torch_dtype(working_dtype(quantised.format, leaf.dtype))
    codes = build.early_node("Cast", _stored(build, leaf, quantised, constants), to=work)
    scale = build.early_node("Cast", build.constant(quantised.scale, constants[quantised.scale]), to=work)
    zero = _zero(build, quantised, constants)
    if zero is not None:
        zero = build.early_node("Cast", zero, to=work)
        is_one = quantised.zero_point is None  # the offset of the format
        codes = build.early_node("Sub", codes, zero if is_one else _spread(build, zero, leaf, quantised))
    product = build.early_node("Mul", codes, _spread(build, scale, leaf, quantised))
    return build.early_node("Cast", product, to=ir.tensor_adapters.from_torch_dtype(leaf.dtype))


def _stored(build: Builder, leaf: Leaf, quantised: Quantised, constants: Mapping[str, Tensor]) -> ir.Value:
    """The codes one element each: the container's numbers, or, packed, less qmin."""
    tensor, format = constants[leaf.name], quantised.format
    if quantised.packed and format.kind == "float":
        tensor = tensor.view(format.container)
    value = build.constant(leaf.name, tensor)
    if not quantised.packed or format.bits == 8:
        return value
    if 8 % format.bits:
        why = f"{format.bits} bits don't divide a byte, and no kernel reads such codes"
        raise BackendRefusal(f"{leaf.name} is of {format}", where=leaf.name, why=why, do='backend="reference" runs it; or say int4 or int8')
    parts = [_part(build, value, shift, format.bits) for shift in range(0, 8, format.bits)]
    joined = build.early_node("Concat", *(build.early_node("Unsqueeze", p, build.ints(-1)) for p in parts), axis=-1)
    flat = build.early_node("Reshape", joined, build.ints(*leaf.shape[:-1], tensor.shape[-1] * len(parts)))
    return _cut(build, flat, len(leaf.shape) - 1, tensor.shape[-1] * len(parts), leaf.shape[-1])


def _part(build: Builder, value: ir.Value, shift: int, bits: int) -> ir.Value:
    moved = build.early_node("BitShift", value, build.constant(f"shift_{shift}", torch.tensor(shift, dtype=torch.uint8)), direction=RIGHT)
    return build.early_node("BitwiseAnd", moved, build.constant(f"mask_{bits}", torch.tensor(2**bits - 1, dtype=torch.uint8)))


def _zero(build: Builder, quantised: Quantised, constants: Mapping[str, Tensor]) -> ir.Value | None:
    """What is taken from a stored code: the zero point, less qmin where codes are stored that way."""
    offset = quantised.format.qmin if quantised.packed and quantised.format.kind == "int" else 0
    if quantised.zero_point is None:
        return build.constant(f"offset_{-offset}", torch.tensor(-offset, dtype=torch.float32)) if offset else None
    name = f"{quantised.zero_point}.offset" if offset else quantised.zero_point
    return build.constant(name, (constants[quantised.zero_point].to(torch.int32) - offset).float())


def _spread(build: Builder, value: ir.Value, leaf: Leaf, quantised: Quantised) -> ir.Value:
    """The scale or zero point repeated over the elements of each block; axes with one block broadcast by themselves."""
    if value.shape is not None and len(value.shape) == 0:
        return value
    shape = [1 if b == -1 else -(-n // b) for n, b in zip(leaf.shape, quantised.block, strict=True)]
    for axis, (size, block) in enumerate(zip(leaf.shape, quantised.block, strict=True)):
        if block in (-1, 1) or shape[axis] == 1:
            continue
        wide = build.early_node("Unsqueeze", value, build.ints(axis + 1))
        wide = build.early_node("Expand", wide, build.ints(*shape[: axis + 1], block, *shape[axis + 1 :]))
        shape[axis] *= block
        value = _cut(build, build.early_node("Reshape", wide, build.ints(*shape)), axis, shape[axis], size)
        shape[axis] = size
    return value


def _cut(build: Builder, value: ir.Value, axis: int, size: int, wanted: int) -> ir.Value:
    if size == wanted:
        return value
    return build.early_node("Slice", value, build.ints(0), build.ints(wanted), build.ints(axis))
