"""Skeleton + constants -> ONNX model: every leaf gets its numbers, quantised ones in the form their readers' kernels take.

    Gather(W)  ->  GatherBlockQuantized         MatMul(x, W), MatMul(x, Transpose(W)), Gemm(x, W)  ->  MatMulNBits

Both read the same bytes, so a tied embedding is stored once. Where no kernel reads the weight the site computes in float, and is recorded
with the reason. Direct contributed ops instead of DequantizeLinear + MatMul, which ONNX Runtime fuses to the same kernels: packed bytes go into
the file as they are, short last groups and 2 bits work, nothing is transposed at load, and the opset may stay where GroupNorm is fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from torch import Tensor

from fxcompress.backends.onnx.blocks import Blocks, blocks_of, matrix_of
from fxcompress.backends.onnx.build import CONTRIB, Builder
from fxcompress.backends.onnx.dense import dense
from fxcompress.backends.onnx.exported import FX_INDEX, as_real, leaf_name
from fxcompress.backends.onnx.integer import Legaliser
from fxcompress.backends.onnx.outline import Leaf, Outline
from fxcompress.backends.onnx.quantisers import bind_grids
from fxcompress.backends.onnx.translate import Skeleton
from fxcompress.backends.onnx.views import factor, integer, view

FLOAT_KERNEL, INT8_KERNEL = 1, 4  # accuracy_level of MatMulNBits: activations as they are, or rounded to int8 in the kernel


@dataclass(frozen=True)
class Bound:
    """The model with its constants, and per quantised reader (fx node name) that computes in float the reason."""

    model: ir.Model
    in_float: dict[str, str]


def bind(skeleton: Skeleton, constants: Mapping[str, Tensor], accuracy_level: int) -> Bound:
    """Fill the skeleton, which is edited. Constants are shared with the model, never copied, but for repacked ones."""
    binder = _Binder(skeleton, constants, accuracy_level)
    bind_grids(binder.build, skeleton.outline.leaves, constants)
    legaliser = Legaliser(binder.build, skeleton.outline, constants)
    legaliser.run()
    binder.in_float.update(legaliser.reasons)
    for index, leaf in enumerate(skeleton.outline.leaves):
        value = skeleton.model.graph.initializers.pop(leaf_name(index), None)
        if value is not None and value.uses():
            binder.bind(value, leaf)
    binder.build.finish()
    return Bound(skeleton.model, binder.in_float)


@dataclass(frozen=True)
class _Reader:
    """A node that reads a leaf, maybe through transposes and picks of one index.

    axes: of the leaf, one for each axis of what the node reads. picked: index by axis of the leaf, for those that are gone.
    """

    node: ir.Node
    position: int
    axes: tuple[int, ...]
    picked: tuple[tuple[int, int], ...]


class _Binder:
    def __init__(self, skeleton: Skeleton, constants: Mapping[str, Tensor], accuracy_level: int) -> None:
        self.build = Builder(skeleton.model)
        self.outline: Outline = skeleton.outline
        self.constants, self.accuracy_level = constants, accuracy_level
        self.in_float: dict[str, str] = {}
        self.known: dict[Any, Blocks | str] = {}

    def bind(self, value: ir.Value, leaf: Leaf) -> None:
        """Give one leaf its numbers."""
        if leaf.quantised is None:
            tensor = as_real(self.constants[leaf.name])
            value.replace_all_uses_with(self.build.constant(leaf.name, tensor), replace_graph_outputs=True)
            return
        for reader in list(_readers(value, tuple(range(len(leaf.shape))))):
            name, reason = self._name(reader.node), self._kernel(reader, leaf)
            if reason:
                self.in_float.setdefault(name, reason)
            else:
                self.in_float.pop(name, None)
        self._drop_dead_views(value)
        if value.uses() or value.is_graph_output():
            value.replace_all_uses_with(dense(self.build, leaf, leaf.quantised, self.constants), replace_graph_outputs=True)

    def _drop_dead_views(self, value: ir.Value) -> None:
        for node, _ in list(value.uses()):
            if view(node) is None or node.outputs[0].is_graph_output():
                continue
            self._drop_dead_views(node.outputs[0])
            if not node.outputs[0].uses():
                self.build.graph.remove(node, safe=True)

    def _kernel(self, reader: _Reader, leaf: Leaf) -> str | None:
        """Put the kernel in the reader's place, or say why there is none."""
        if reason := _unfit(reader):
            return reason
        blocks = self._blocks(leaf, _rows_and_columns(reader), reader.picked)
        if isinstance(blocks, str):
            return blocks
        name = "".join([leaf.name, *(f".{index}" for _, index in reader.picked)])
        nodes = (
            self._gather(reader.node, name, leaf, blocks) if reader.node.op_type == "Gather" else self._matmul(reader.node, name, leaf, blocks)
        )
        old = reader.node
        nodes[0].name = self._name(old)
        for node in nodes:
            node.metadata_props[FX_INDEX] = old.metadata_props.get(FX_INDEX, "")
        ir.convenience.replace_nodes_and_values(self.build.graph, old, [old], nodes, old.outputs, nodes[-1].outputs)
        return None

    def _blocks(self, leaf: Leaf, axes: tuple[int, int], picked: tuple[tuple[int, int], ...]) -> Blocks | str:
        key = leaf, axes, picked
        if key not in self.known:
            matrix = matrix_of(leaf, self.constants, axes, dict(picked))
            self.known[key] = matrix if isinstance(matrix, str) else blocks_of(matrix)
        return self.known[key]

    def _name(self, node: ir.Node) -> str:
        index = node.metadata_props.get(FX_INDEX)
        return self.outline.nodes[int(index)].name if index else str(node.name)

    def _matmul(self, old: ir.Node, name: str, leaf: Leaf, blocks: Blocks) -> list[ir.Node]:
        codes = self.build.constant(name, blocks.codes)
        inputs = [old.inputs[0], codes, *self._grid(name, leaf, blocks)]
        bias = old.inputs[2] if len(old.inputs) > 2 else None
        attributes = {
            "K": blocks.columns,
            "N": blocks.rows,
            "bits": blocks.bits,
            "block_size": blocks.group,
            "accuracy_level": self.accuracy_level,
        }
        product = ir.node("MatMulNBits", inputs, attributes, domain=CONTRIB)
        return [product] if bias is None else [product, ir.node("Add", [product.outputs[0], bias])]

    def _gather(self, old: ir.Node, name: str, leaf: Leaf, blocks: Blocks) -> list[ir.Node]:
        codes = self.build.constant(f"{name}.rows", blocks.codes.flatten(1))
        inputs = [codes, old.inputs[1], *self._grid(name, leaf, blocks)]
        attributes = {"bits": blocks.bits, "block_size": blocks.group, "gather_axis": 0, "quantize_axis": 1}
        rows = ir.node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB)
        if blocks.count * blocks.group == blocks.columns:
            return [rows]
        ints = self.build.ints
        return [rows, ir.node("Slice", [rows.outputs[0], ints(0), ints(blocks.columns), ints(-1)])]

    def _grid(self, name: str, leaf: Leaf, blocks: Blocks) -> list[ir.Value | None]:
        assert leaf.quantised is not None
        suffix = name.removeprefix(leaf.name)
        scale = self.build.constant(f"{leaf.quantised.scale}{suffix}", blocks.scale)
        if blocks.scale.shape != (blocks.rows, blocks.count):
            scale = self._expanded(scale, blocks)
        if blocks.zero_point is None:
            return [scale]
        return [scale, self.build.constant(f"{leaf.quantised.zero_point or f'{leaf.quantised.scale}.zero'}{suffix}.packed", blocks.zero_point)]

    def _expanded(self, scale: ir.Value, blocks: Blocks) -> ir.Value:
        name = f"{scale.name}.expanded"
        for node in self.build.early:
            if node.name == name:
                return node.outputs[0]
        value = self.build.early_node("Expand", scale, self.build.ints(blocks.rows, blocks.count))
        self.build.early[-1].name = name
        return value


def _readers(value: ir.Value, axes: tuple[int, ...], picked: tuple[tuple[int, int], ...] = ()) -> Iterator[_Reader]:
    for node, position in value.uses():
        seen = view(node) if position == 0 else None
        if seen is None:
            yield _Reader(node, position, axes, picked)
        elif isinstance(seen, int):
            yield from _readers(node.outputs[0], axes[1:], (*picked, (axes[0], seen)))
        else:
            yield from _readers(node.outputs[0], tuple(axes[i] for i in seen), picked)


def _rows_and_columns(reader: _Reader) -> tuple[int, int]:
    """The leaf's axes: rows, and columns that are summed over or gathered along."""
    is_rows_first = reader.node.op_type == "Gather" or (reader.node.op_type == "Gemm" and integer(reader.node, "transB"))
    first, second = reader.axes
    return (first, second) if is_rows_first else (second, first)


def _unfit(reader: _Reader) -> str | None:
    node = reader.node
    place = {"Gather": 0, "MatMul": 1, "Gemm": 1}.get(node.op_type)
    if place is None:
        return f"{node.op_type} has no n-bit kernel"
    if place != reader.position:
        return f"{node.op_type} has an n-bit kernel for operand {place} only, the weight is operand {reader.position}"
    if len(reader.axes) != 2:
        return f"a weight of {len(reader.axes)} axes has no n-bit kernel"
    if node.op_type == "Gather":
        return "the n-bit kernel gathers rows" if integer(node, "axis") or reader.axes[0] > reader.axes[1] else None
    if node.op_type == "Gemm" and (integer(node, "transA") or any(factor(node, f) != 1 for f in ("alpha", "beta"))):
        return "Gemm with a transposed input or a factor has no n-bit kernel"
    given = node.inputs[0]
    if given is None or given.shape is None or len(given.shape) < 2:
        return "a product with a vector has no n-bit kernel"
    return None
