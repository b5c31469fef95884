"""Skeleton + constants -> ONNX in plain Q/DQ form: every 8-bit constant is its codes and what makes them numbers, in standard ops.

    one scale, or one for each index of an axis     DequantizeLinear(codes, scale, zero_point)
    groups                                          Reshape((Cast(codes) - zero_point) * scale), the codes reshaped to [.., groups, g, ..]

OpenVINO keeps both as codes: beside a quantised activation they become int8 kernels, beside a float one the kernel decompresses the weight.
The integer bias of a convolution is a DequantizeLinear too. 8-bit floats and groups with a short last one are written out (`dense`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as cleanup
import torch
from torch import Tensor, fx

from fxcompress.backends.onnx.build import CONTRIB, Builder
from fxcompress.backends.onnx.dense import dense
from fxcompress.backends.onnx.exported import FX_INDEX, as_real, leaf_name
from fxcompress.backends.onnx.outline import Leaf, Outline, Quantised
from fxcompress.backends.onnx.quantisers import bind_grids
from fxcompress.backends.onnx.sites import readers
from fxcompress.backends.onnx.translate import Skeleton
from fxcompress.backends.openvino.legalise import Legaliser
from fxcompress.errors import BackendRefusal
from fxcompress.numerics.packing import unpack
from fxcompress.program import place_of

BITS = (8, 32)


@dataclass(frozen=True)
class Bound:
    """The model with its constants. in_float: readers (fx node names) of constants that are decoded, with the reason."""

    model: ir.Model
    in_float: dict[str, str]


def bind(skeleton: Skeleton, constants: Mapping[str, Tensor]) -> Bound:
    """Fill the skeleton, which is edited. BackendRefusal where it holds an op that only ONNX Runtime has, or n-bit codes: the shift that takes
    them out of their bytes is wrong in OpenVINO 2026.4, which divides and rounds."""
    build, outlined = Builder(skeleton.model), skeleton.outline
    _refuse(skeleton)
    bind_grids(build, outlined.leaves, constants)
    Legaliser(build, outlined, constants).run()
    cleanup.RemoveUnusedNodesPass()(skeleton.model)
    in_float: dict[str, str] = {}
    for index, leaf in enumerate(outlined.leaves):
        value = skeleton.model.graph.initializers.pop(leaf_name(index), None)
        if value is None or not (value.uses() or value.is_graph_output()):
            continue
        reason = _unfit(leaf, leaf.quantised) if leaf.quantised is not None else None
        if reason:
            in_float |= {n.name: reason for n in _readers(outlined, index)}
        value.replace_all_uses_with(_value(build, leaf, constants), replace_graph_outputs=True)
    build.finish()
    return Bound(skeleton.model, in_float)


def _value(build: Builder, leaf: Leaf, constants: Mapping[str, Tensor]) -> ir.Value:
    """The tensor of the leaf as the graph computes with it."""
    quantised = leaf.quantised
    if quantised is None:
        return build.constant(leaf.name, as_real(constants[leaf.name]))
    if _unfit(leaf, quantised):
        return dense(build, leaf, quantised, constants)
    codes = constants[leaf.name]
    if quantised.packed:
        codes = unpack(codes, quantised.format, leaf.shape[-1])
    scale = constants[quantised.scale]
    zero = None if quantised.zero_point is None else constants[quantised.zero_point].to(codes.dtype)
    split = _split(leaf, quantised)
    if len(split) <= 1 and all(quantised.block[a] == 1 for a in split):
        return _linear(build, leaf, quantised, codes, (scale, zero), split[0] if split else None)
    return _grouped(build, leaf, quantised, codes, (scale, zero))


def _linear(build: Builder, leaf: Leaf, quantised: Quantised, codes: Tensor, grid: tuple[Tensor, Tensor | None], axis: int | None) -> ir.Value:
    """DequantizeLinear with a scalar, or a vector along the axis."""
    shape = () if axis is None else (leaf.shape[axis],)
    named = ((f"{leaf.name}.codes", codes), (f"{quantised.scale}.flat", grid[0]), (f"{quantised.zero_point}.flat", grid[1]))
    inputs = [build.constant(n, t if t is codes else t.reshape(shape)) for n, t in named if t is not None]
    return build.early_node("DequantizeLinear", *inputs, axis=axis or 0)


def _grouped(build: Builder, leaf: Leaf, quantised: Quantised, codes: Tensor, grid: tuple[Tensor, Tensor | None]) -> ir.Value:
    """The codes with every grouped axis as [groups, g], times scales of that rank. With any other axis OpenVINO decodes at every call."""
    many, per = list[int](), list[int]()
    for size, block in zip(leaf.shape, quantised.block, strict=True):
        is_grouped = 1 < block < size
        many += [size // block, block] if is_grouped else [size]
        per += [size // block, 1] if is_grouped else [size if block == 1 else 1]
    value = build.early_node("Cast", build.constant(f"{leaf.name}.groups", codes.reshape(many)), to=ir.DataType.FLOAT)
    if grid[1] is not None:
        zero = build.constant(f"{quantised.zero_point}.groups", grid[1].reshape(per))
        value = build.early_node("Sub", value, build.early_node("Cast", zero, to=ir.DataType.FLOAT))
    value = build.early_node("Mul", value, build.constant(f"{quantised.scale}.groups", grid[0].reshape(per)))
    return build.early_node("Reshape", value, build.ints(*leaf.shape))


def _unfit(leaf: Leaf, quantised: Quantised) -> str | None:
    """Why a constant has to be decoded, or None."""
    if quantised.format.kind == "float":
        return f"{quantised.format} is decoded when OpenVINO loads the model"
    if leaf.dtype != torch.float32:
        return f"OpenVINO's kernels give float32, the weight's scale is {leaf.dtype}"
    if any(leaf.shape[a] % quantised.block[a] for a in _split(leaf, quantised)):
        return f"groups of {list(quantised.block)} don't divide {list(leaf.shape)}"
    return None


def _split(leaf: Leaf, quantised: Quantised) -> list[int]:
    """The axes with more than one scale."""
    return [a for a, (size, b) in enumerate(zip(leaf.shape, quantised.block, strict=True)) if b != -1 and b < size]


def _readers(outlined: Outline, index: int) -> list[fx.Node]:
    return [n for place, i in outlined.places.items() if i == index for n in readers(place, outlined.leaves[index].shape)]


def _refuse(skeleton: Skeleton) -> None:
    for node in skeleton.model.graph:
        if node.domain == CONTRIB:
            index = node.metadata_props.get(FX_INDEX)
            raise _refusal(f"{node.op_type} as ONNX Runtime has it", skeleton.outline.nodes[int(index)] if index else None)
    for place, number in skeleton.outline.places.items():
        grid = skeleton.outline.leaves[number].quantised
        if grid is not None and grid.format.kind == "int" and grid.format.bits not in BITS:
            raise _refusal(f"{grid.format} weights", place)


def _refusal(what: str, node: fx.Node | None) -> BackendRefusal:
    where = place_of(node) if node is not None else ""
    return BackendRefusal(f"openvino has no {what}", where=where, do='quantise to uint8 or int8; or backend="onnxruntime"')
