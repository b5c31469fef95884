"""Forms that OpenVINO 2026.4 refuses or computes wrongly, written in others of the same numbers.

    product of codes           ->  product + 2^-100       unless it has a bias. Without an addition its scale is moved past what reads it, and
                                                          where several do, some get it twice
    Q(concat(a, b))            ->  concat(Q(a), Q(b))     it does so itself, but gives each index a zero point, which no product can take
    Q(x * negative channels)   ->  Q(max(x * .., -2^126)) it divides the quantiser's range by them, and the codes of those come out reversed
    reduce to fewer axes       ->  reduce, then squeeze   a quantiser with a scale for each channel looks for them on the axis that is gone
    x + zeros, x * ones        ->  x                      it does so itself, and a concat is before a quantiser then
    average of a large window  ->  of a smaller one       it refuses windows larger than what they average, which one window covers
    a window long on its last  ->  with an axis more      over few channels its kernels of bytes get it wrong, on processors with AMX
    transpose of equal axes    ->  of five axes           in an attention whose heads are as many as its positions it mixes them up
    x - rows of a table        ->  -(rows - x)            where the result picks a row that is quantised then, it can't be loaded; so always

2^-100 leaves every float32 beyond 2^-76 as it is, and nothing else has that few of an ordinary activation's scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from fxcompress.backends.onnx.build import Builder
from fxcompress.backends.onnx.codes import base_of
from fxcompress.backends.onnx.exported import FX_INDEX, as_real, leaf_name
from fxcompress.backends.onnx.integer import PRODUCTS
from fxcompress.backends.onnx.outline import Leaf, Outline, arguments
from fxcompress.backends.onnx.views import integer, rank

BIAS, LEAST = 2.0**-100, -(2.0**126)
CONVOLUTIONS = ("Conv", "ConvTranspose")
HEADS_FIRST = (0, 2, 1, 3)
NEUTRAL = {"Add": 0, "Mul": 1}
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")


class Legaliser:
    """Rewrites a skeleton whose grids are bound and whose leaves are not."""

    def __init__(self, build: Builder, outlined: Outline, constants: Mapping[str, Tensor]) -> None:
        self.build, self.graph, self.outline, self.constants = build, build.graph, outlined, constants
        self.leaves: Mapping[str | None, Leaf] = {leaf_name(i): leaf for i, leaf in enumerate(outlined.leaves)}

    def run(self) -> None:
        """All nodes, in order. What concerns codes is left alone where no activation has any."""
        for node in list(self.graph):
            if node.op_type == "AveragePool":
                _shrink_window(node)
            elif node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == HEADS_FIRST:
                self._transpose_apart(node)
        if not any(n.op_type == "QuantizeLinear" for n in self.graph):
            return
        for node in list(self.graph):
            if node.op_type in PRODUCTS and any(base_of(v) for v in node.inputs[:2]) and not self._has_bias(node):
                self._give_bias(node)
            elif node.op_type.startswith("Reduce") and "keepdims" in node.attributes and not integer(node, "keepdims"):
                node.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
                self._hand_over(node, ir.node("Squeeze", [node.outputs[0], *node.inputs[1:]]))
            elif node.op_type in NEUTRAL:
                self._drop_neutral(node)
            elif node.op_type == "Sub" and self._is_looked_up(node.inputs[1]) and not self._is_looked_up(node.inputs[0]):
                self._turn_difference(node)
            elif node.op_type == "QuantizeLinear":
                self._part_from_signs(node)
                self._quantise_parts(node)
        for node in [n for n in self.graph if n.op_type == "Conv" and base_of(n.inputs[0]) and _is_tiled(n)]:
            self._turn_window(node)

    def _turn_window(self, node: ir.Node) -> None:
        """A convolution with a last axis more, over which its window has one number."""
        axes = len(node.inputs[1].shape) - 2  # type: ignore[union-attr, arg-type]
        last = self.build.ints(axes + 2)
        for place in (0, 1):
            self._widen(node, place, last)
        for name, other in (("kernel_shape", 1), ("dilations", 1), ("strides", 1), ("pads", 0)):
            if name in node.attributes:
                sizes = list(node.attributes[name].as_ints())
                longer = [n for start in range(0, len(sizes), axes) for n in (*sizes[start : start + axes], other)]
                node.attributes[name] = ir.AttrInt64s(name, longer)
        self._hand_over(node, ir.node("Squeeze", [node.outputs[0], last]))

    def _transpose_apart(self, node: ir.Node) -> None:
        value = node.inputs[0]
        if value is None or value.shape is None or value.shape[1] != value.shape[2]:
            return
        second = self.build.ints(1)  # another first axis than the batch is more than its search for shuffled channels can take
        self._widen(node, 0, second)
        node.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, *(axis + 1 for axis in HEADS_FIRST[1:])])
        self._hand_over(node, ir.node("Squeeze", [node.outputs[0], second]))

    def _widen(self, node: ir.Node, place: int, axis: ir.Value) -> None:
        """An operand with an axis more."""
        value = node.inputs[place]
        wide = ir.node("Unsqueeze", [value, axis])
        wide.outputs[0].name, wide.outputs[0].type = f"{node.name}.wide_{place}", value.type  # type: ignore[union-attr]
        self.graph.insert_before(node, wide)
        node.replace_input_with(place, wide.outputs[0])

    def _has_bias(self, node: ir.Node) -> bool:
        """Whether anything but zeros is added in the same op: torch.onnx writes linear of three axes as MatMul and Add."""
        value, reader = node.inputs[2] if len(node.inputs) > 2 else None, next(iter(node.outputs[0].uses()), None)
        index = node.metadata_props.get(FX_INDEX)
        if reader is not None and reader.node.op_type == "Add" and index is not None and reader.node.metadata_props.get(FX_INDEX) == index:
            value = reader.node.inputs[1 - reader.idx]
        leaf = self.leaves.get(value.name) if value is not None else None
        if leaf is not None:
            return bool(self.constants[leaf.name].any())
        is_written = node.op_type in CONVOLUTIONS and index is not None and arguments(self.outline.nodes[int(index)]).get("bias") is None
        return value is not None and not is_written

    def _give_bias(self, node: ir.Node) -> None:
        shape = node.outputs[0].shape
        size = None if shape is None else shape[1 if node.op_type in CONVOLUTIONS else -1]
        bias = self.build.constant("least_bias", torch.full((size if isinstance(size, int) else 1,), BIAS))
        if node.op_type in ("MatMul", "Einsum"):
            self._hand_over(node, ir.node("Add", [node.outputs[0], bias]))
        else:
            node.resize_inputs(3)
            node.replace_input_with(2, bias)

    def _hand_over(self, node: ir.Node, after: ir.Node) -> None:
        """What is made of the node's result takes its place and name."""
        old, new = node.outputs[0], after.outputs[0]
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        after.replace_input_with(0, old)
        old.name, old.shape = f"{node.name}.plain", None
        self.graph.insert_after(node, after)

    def _is_looked_up(self, value: ir.Value | None) -> bool:
        """Whether a value is rows of a constant table."""
        while value is not None and (node := value.producer()) is not None:
            if node.op_type == "Gather":
                return node.inputs[0] is not None and node.inputs[0].name in self.leaves
            value = node.inputs[0] if node.op_type in MOVES else None
        return False

    def _turn_difference(self, node: ir.Node) -> None:
        first, second = node.inputs
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)
        self._hand_over(node, ir.node("Neg", [node.outputs[0]]))

    def _drop_neutral(self, node: ir.Node) -> None:
        for value, other in (node.inputs, node.inputs[::-1]):
            leaf = self.leaves.get(value.name) if value is not None else None
            if leaf is None or leaf.quantised is not None or other is None or other.shape is None or node.outputs[0].is_graph_output():
                continue
            if other.shape == node.outputs[0].shape and (self.constants[leaf.name] == NEUTRAL[node.op_type]).all():
                node.outputs[0].replace_all_uses_with(other)
                return

    def _part_from_signs(self, node: ir.Node) -> None:
        value = node.inputs[0]
        product = value.producer() if value is not None else None
        if product is not None and product.op_type == "Add":  # a constant summand goes into the range as well
            product = next((v.producer() for v in product.inputs if v is not None and v.producer() is not None), None)
        if value is None or product is None or product.op_type != "Mul":
            return
        leaves = (self.leaves.get(v.name) for v in product.inputs if v is not None)
        if not any((as_real(self.constants[leaf.name]) < 0).any() for leaf in leaves if leaf is not None and leaf.quantised is None):
            return
        kept = ir.node("Max", [value, self.build.constant("least_of_all", torch.tensor(LEAST))])
        kept.outputs[0].name, kept.outputs[0].type, kept.outputs[0].shape = f"{node.name}.kept", value.type, value.shape
        self.graph.insert_before(node, kept)
        node.replace_input_with(0, kept.outputs[0])

    def _quantise_parts(self, node: ir.Node) -> None:
        concat = node.inputs[0].producer() if node.inputs[0] is not None else None
        if concat is None or concat.op_type != "Concat" or rank(node.inputs[1]) != 0:
            return
        parts = [ir.Node("", "QuantizeLinear", [v, *node.inputs[1:]], list(node.attributes.values())) for v in concat.inputs]
        for number, part in enumerate(parts):
            part.name = part.outputs[0].name = f"{node.name}.part_{number}"
            part.outputs[0].type = node.outputs[0].type
        whole = ir.Node("", "Concat", [p.outputs[0] for p in parts], list(concat.attributes.values()))
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [*parts, whole], node.outputs, whole.outputs)
        for part in parts:
            self._quantise_parts(part)


def _is_tiled(node: ir.Node) -> bool:
    """Whether a window holds 128, 192, .. numbers of fewer than 32 channels along its last axis: which were seen wrong. Three axes can't be
    made four."""
    shape = node.inputs[1].shape if node.inputs[1] is not None else None
    if shape is None or len(shape) not in (3, 4) or not isinstance(shape[1], int) or not isinstance(shape[-1], int):
        return False
    numbers = shape[1] * shape[-1]
    return shape[1] < 32 and numbers >= 128 and numbers % 64 == 0


def _shrink_window(node: ir.Node) -> None:
    """Sizes of a window beyond those of its input and padding, which one window covers then."""
    value, window, pads = node.inputs[0], node.attributes["kernel_shape"].as_ints(), node.attributes.get("pads")
    if value is None or value.shape is None:
        return
    around = [0] * (2 * len(window)) if pads is None else pads.as_ints()
    padding = [before + after for before, after in zip(around[: len(window)], around[len(window) :], strict=True)]
    sizes = [min(w, n + p) if isinstance(n, int) else w for w, n, p in zip(window, value.shape[2:], padding, strict=True)]
    node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", sizes)
